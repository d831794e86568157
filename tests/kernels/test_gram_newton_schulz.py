"""Newton-Schulz iterations on Gram matrices against the same iterations on the matrix itself, in double precision."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arbs_kernels import backends
from arbs_kernels.gram_newton_schulz import gram_newton_schulz
from arbs_kernels.selection import UnsupportedError

QUINTICS = ((3.4445, -4.7750, 2.0315),) * 3
TO_ONE = ((2.0, -1.5, 0.5), (1.5, -0.5, 0.0))
ROUNDOFF = 2.0**-24
RIDGE = 1e-6


def columns(R: int, condition: float, seed: int = 0) -> np.ndarray:
    """`(2 R + 1, R)` whose singular values fall geometrically from 1 to 1/condition."""
    rng = np.random.default_rng([R, seed])
    left, right = np.linalg.qr(rng.standard_normal((2 * R + 1, R)))[0], np.linalg.qr(rng.standard_normal((R, R)))[0]
    return (left * np.geomspace(1, 1 / condition, R)) @ right.T


def iterated(y: np.ndarray, coefficients) -> np.ndarray:
    """By the definition."""
    for a, b, c in coefficients:
        gram = y.T @ y
        y = y @ (a * np.eye(y.shape[1]) + b * gram + c * gram @ gram)
    return y


def scaled(x: np.ndarray) -> np.ndarray:
    """Where the iterations with a ridge start, but for the ridge."""
    y = x / np.linalg.norm(x, axis=0)
    return y / max(np.linalg.norm(y.T @ y), 1) ** 0.5


class GramNewtonSchulz:
    """What holds for every implementation; a backend adds a subclass that names it."""

    implementation: str
    sizes: tuple[int, ...] = (1, 2, 8, 15, 16, 18, 33, 40, 64)

    def run(self, gram, coefficients, ridge=0.0):
        run = partial(gram_newton_schulz, coefficients=coefficients, ridge=ridge, implementation=self.implementation)
        return np.asarray(jax.jit(run)(jnp.asarray(gram, jnp.float32)), np.float64)

    @pytest.mark.parametrize("coefficients", [QUINTICS, TO_ONE, QUINTICS[:1]], ids=len)
    @pytest.mark.parametrize("condition", [1, 30])
    def test_are_those_of_the_matrix_itself(self, condition, coefficients):
        for R in self.sizes:
            x = columns(R, condition)
            factor = self.run(x.T @ x, coefficients)
            assert factor.shape == (R, R)
            # Each of some four products an iteration rounds to sqrt(R) roundoffs or so, of factors of up to 3.4 each.
            np.testing.assert_allclose(
                x @ factor, iterated(x, coefficients), atol=4 * 4 * len(coefficients) * 3.4 * R**0.5 * ROUNDOFF
            )

    @pytest.mark.parametrize("condition", [1, 30])
    def test_with_a_ridge_columns_start_at_one_length_and_no_singular_value_above_one(self, condition):
        for R in self.sizes:
            x = columns(R, condition, seed=1) * np.geomspace(1e-3, 1e3, R)
            factor = self.run(x.T @ x, QUINTICS, RIDGE)
            # The ridge is to a squared singular value, of 1/(4 R) or more here, what its half is to the value.
            atol = 3.4445**3 * 4 * R * condition**2 * RIDGE + 1e-4
            np.testing.assert_allclose(x @ factor, iterated(scaled(x), QUINTICS), atol=atol)

    def test_wide_defaults_widen_nothing(self):
        with jax.enable_x64(True):
            run = partial(gram_newton_schulz, coefficients=TO_ONE, ridge=RIDGE, implementation=self.implementation)
            assert jax.jit(run)(jnp.eye(4, dtype=jnp.float32)).dtype == jnp.float32

    def test_the_ridge_is_added_to_the_diagonal(self):
        gram = np.diag([4.0, 0.0])
        np.testing.assert_allclose(self.run(gram, ((0.0, 1.0, 0.0),), 0.25)[0, 0], (1 + 0.25) / 2, rtol=1e-6)

    @pytest.mark.parametrize("R", [5, 64])
    def test_a_matrix_of_lower_rank_gives_a_finite_factor(self, R):
        rng = np.random.default_rng(R)
        x = rng.standard_normal((200, 2)) @ rng.standard_normal((2, R))
        for gram in (x.T @ x, np.ones((R, R)), np.zeros((R, R)), np.full((R, R), 1e-38)):
            factor = self.run(gram, (*QUINTICS, *TO_ONE), RIDGE)
            assert np.isfinite(factor).all()
            assert np.linalg.eigvalsh(factor.T @ gram @ factor).max() < 1.5

    @pytest.mark.parametrize("R", [7, 40])
    def test_mapped_matrices_are_iterated_as_they_would_be_alone(self, R):
        stack = jnp.asarray([columns(R, 10, seed) for seed in range(6)], jnp.float32)
        stack = jnp.einsum("bnr,bns->brs", stack, stack, precision="highest").reshape(2, 3, R, R)
        one = partial(gram_newton_schulz, coefficients=QUINTICS, ridge=RIDGE, implementation=self.implementation)
        together = jax.jit(jax.vmap(jax.vmap(one)))(stack)
        for i in range(2):
            for j in range(3):
                np.testing.assert_allclose(together[i, j], jax.jit(one)(stack[i, j]), rtol=1e-4, atol=1e-4)


class TestXla(GramNewtonSchulz):
    implementation = "xla"
    sizes = (*GramNewtonSchulz.sizes, 65, 128)


@pytest.mark.skipif(backends.triton_missing() is not None, reason=f"needs {backends.triton_missing()}")
class TestTriton(GramNewtonSchulz):
    implementation = "triton"

    def test_more_columns_than_it_takes_are_an_error(self):
        with pytest.raises(UnsupportedError, match="'triton' takes at most 64 columns, got 65; pass 'xla'"):
            gram_newton_schulz(jnp.eye(65, dtype=jnp.float32), QUINTICS, implementation="triton")


@pytest.mark.parametrize(
    ("gram", "coefficients", "ridge", "message"),
    [
        (jnp.zeros((2, 3), jnp.float32), QUINTICS, 0.0, r"gram must be float32 \(R, R\), got float32 \(2, 3\)"),
        (jnp.zeros((2,), jnp.float32), QUINTICS, 0.0, r"gram must be float32 \(R, R\), got float32 \(2,\)"),
        (jnp.zeros((2, 2), jnp.bfloat16), QUINTICS, 0.0, r"gram must be float32 \(R, R\), got bfloat16 \(2, 2\)"),
        (jnp.zeros((2, 2), jnp.float32), (), 0.0, r"coefficients must be triples, at least one, got \(\)"),
        (
            jnp.zeros((2, 2), jnp.float32),
            ((1.0, 2.0),),
            0.0,
            r"coefficients must be triples, at least one, got \(\(1.0",
        ),
        (jnp.zeros((2, 2), jnp.float32), QUINTICS, -1.0, r"ridge must be finite and at least 0, got -1.0"),
        (jnp.zeros((2, 2), jnp.float32), QUINTICS, float("nan"), r"ridge must be finite and at least 0, got nan"),
    ],
)
def test_refuses(gram, coefficients, ridge, message):
    with pytest.raises(ValueError, match="gram_newton_schulz: " + message):
        gram_newton_schulz(gram, coefficients, ridge=ridge)


def test_an_unknown_implementation_is_an_error():
    with pytest.raises(UnsupportedError, match="gram_newton_schulz has no implementation 'abacus'"):
        gram_newton_schulz(jnp.eye(2, dtype=jnp.float32), QUINTICS, implementation="abacus")
