"""Newton-Schulz against the singular value decomposition."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arbs_jax.rules.orthogonal import newton_schulz, orthonormal_columns
from arbs_kernels.gram_newton_schulz import MOST_TRITON

NEAR_ONE = 3e-5
"""The basis' singular values end in [0.99999, 1]; and twice the distance from one for squares."""

# GPUs round the operands of float32 products to tf32 unless asked not to.
iterate = jax.default_matmul_precision("highest")(jax.jit(newton_schulz))
orthonormalised = jax.jit(orthonormal_columns)


def of_condition(rng: np.random.Generator, shape: tuple[int, int], condition: float):
    """`U diag(s) V^T` with s spread geometrically from 1 down to 1/condition: (matrix, U, V)."""
    rank = min(shape)
    left, right = (np.linalg.qr(rng.standard_normal((size, rank)))[0] for size in shape)
    values = np.geomspace(1, 1 / condition, rank)
    return (left * values) @ right.T, left, right


@pytest.mark.parametrize("condition", [1, 10, 40])
@pytest.mark.parametrize("shape", [(48, 48), (24, 80), (80, 24), (1, 16), (16, 1)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_singular_values_come_near_one(shape, condition, dtype):
    x, left, right = of_condition(np.random.default_rng(0), shape, condition)
    # The scale of the input does not matter.
    for scale in (1e-6, 1.0, 1e4):
        y = np.asarray(iterate(jnp.asarray(scale * x, dtype)), np.float64)
        scaled = y / max(shape) ** 0.5
        values = np.linalg.svd(scaled, compute_uv=False)
        assert 0.5 < values.min() <= values.max() < 1.4
        # N K entries whose squares add up to max(N, K) times the squared singular values.
        assert np.sqrt(np.mean(y**2)) == pytest.approx(np.sqrt(np.mean(values**2)), rel=1e-4)
        if condition > 1 and min(shape) > 1:
            # Equal singular values all land on one point of the band; others spread over it.
            assert np.sqrt(np.mean(y**2)) == pytest.approx(1.0, abs=0.15)
        # A function of the singular values alone: the singular vectors stay.
        inner = left.T @ scaled @ right
        off = inner - np.diag(np.diag(inner))
        assert np.abs(off).max() < (1e-3 if dtype == "float32" else 0.1)


def test_small_singular_values_grow_forty_fold_and_no_more():
    """Three iterations: the product of their slopes at zero. What is a thousandth of the largest stays small."""
    singular = np.geomspace(1, 1e-4, 24)
    x, left, right = of_condition(np.random.default_rng(4), (24, 80), 1e4)
    y = np.asarray(iterate(jnp.asarray(x, jnp.float32)), np.float64) / 80**0.5
    bound = np.sum(singular**4) ** 0.25
    small = singular < 1e-3
    np.testing.assert_allclose(np.diag(left.T @ y @ right)[small], 3.4445**3 / bound * singular[small], rtol=0.01)


@pytest.mark.parametrize("shape", [(20, 50), (40, 50), (48, 48)])
def test_a_matrix_and_its_transpose_become_the_polynomials_of_their_singular_values(shape):
    """In double precision, step by step as in Muon: `y <- (a + b G + c G G) y`."""
    x = np.random.default_rng(1).standard_normal(shape)
    y = x / np.linalg.norm(x @ x.T) ** 0.5
    for _ in range(3):
        gram = y @ y.T
        y = 3.4445 * y + (-4.7750 * gram + 2.0315 * gram @ gram) @ y
    for given, expected in ((x, y), (x.T, y.T)):
        got = np.asarray(iterate(jnp.asarray(given, jnp.float32)), np.float64) / max(shape) ** 0.5
        assert np.linalg.norm(got - expected) < 1e-5 * np.linalg.norm(expected)


def test_the_transpose_is_treated_alike():
    x = jnp.asarray(np.random.default_rng(1).standard_normal((20, 50)), jnp.float32)
    np.testing.assert_allclose(iterate(x.T).T, iterate(x), atol=1e-5)


def test_nothing_stays_nothing():
    zero = jnp.zeros((8, 12), jnp.float32)
    assert not np.asarray(iterate(zero)).any()
    assert not np.asarray(orthonormalised(zero.T)).any()


def outside(x: np.ndarray, q: np.ndarray, rank: int) -> float:
    """Sine of the largest angle between the space of the columns of x and that of the leading ones of q."""
    inner, outer = (np.linalg.svd(each)[0][:, :rank] for each in (x, q))
    return float(np.linalg.norm(inner - outer @ (outer.T @ inner), 2))


@pytest.mark.parametrize("condition", [1, 10, 100])
@pytest.mark.parametrize("shape", [(96, 6), (40, 1), (33, 16)])
def test_columns_become_orthonormal_and_span_the_same(shape, condition):
    x, _, _ = of_condition(np.random.default_rng(2), shape, condition)
    # Columns of very different length are equals: here the longest has a million times the shortest.
    lengths = np.geomspace(1e-3, 1e3, shape[1])
    for scaled in (x, x * lengths):
        q = np.asarray(orthonormalised(jnp.asarray(scaled, jnp.float32)), np.float64)
        np.testing.assert_allclose(q.T @ q, np.eye(shape[1]), atol=NEAR_ONE)
        assert outside(x, q, shape[1]) < 1e-5


@pytest.mark.parametrize("scale", [1e-12, 1e-19, 1e-20, 1e-25, 1e-37])
def test_columns_whose_squares_are_below_the_smallest_number_do_no_harm(scale):
    x, _, _ = of_condition(np.random.default_rng(5), (40, 6), 3)
    q = np.asarray(orthonormalised(jnp.asarray(scale * x, jnp.float32)), np.float64)
    assert np.isfinite(q).all()
    assert np.linalg.svd(q, compute_uv=False).max() < 1 + 1e-5


@pytest.mark.parametrize("shape", [(96, 6), (33, 16)])
def test_nearly_dependent_columns_are_damped_and_never_amplified(shape):
    x, _, _ = of_condition(np.random.default_rng(2), shape, 1e5)
    q = np.asarray(orthonormalised(jnp.asarray(x, jnp.float32)), np.float64)
    values = np.linalg.svd(q, compute_uv=False)
    assert 0 < values.min() < 0.9 < values.max() < 1 + 1e-5
    assert np.median(values) > 1 - NEAR_ONE


def test_fewer_directions_than_columns_do_no_harm():
    """A momentum of lower rank than its factors has room for: finite, and orthonormal in the directions there are."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((64, 2)) @ rng.standard_normal((2, 5))
    q = np.asarray(orthonormalised(jnp.asarray(x, jnp.float32)), np.float64)
    assert np.isfinite(q).all()
    values = np.linalg.svd(q, compute_uv=False)
    np.testing.assert_allclose(values[:2], 1, atol=NEAR_ONE)
    assert outside(x, q, 2) < 1e-3
    assert values.max() < 1.1


def test_more_columns_than_a_kernel_takes_are_left_to_the_compiler_whatever_is_named():
    x = jnp.asarray(np.random.default_rng(7).standard_normal((300, MOST_TRITON + 1)), jnp.float32)
    q = np.asarray(jax.jit(partial(orthonormal_columns, implementation="triton"))(x), np.float64)
    np.testing.assert_allclose(q.T @ q, np.eye(MOST_TRITON + 1), atol=NEAR_ONE)
