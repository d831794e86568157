"""Float8 operands: what rounding does and does not, and products, exact wherever operands are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import ROUNDOFF, PowerLaw, score_by_hand

from arbs_kernels import float8
from arbs_kernels.autodiff import MatmulSpec, make_probe, ternary_matmul
from arbs_kernels.backends import compute_capability
from arbs_kernels.codec import pack_rows

BITS = {float8.OPERAND: 4, float8.COTANGENT: 3}
"""Significant bits."""
LEAST_NORMAL = {float8.OPERAND: 2.0**-6, float8.COTANGENT: 2.0**-14}

dtypes = pytest.mark.parametrize("dtype", BITS, ids=str)


def wide(operand: float8.Float8) -> np.ndarray:
    return np.asarray(operand.values).astype(np.float64) * float(operand.unit)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng([21, seed]).standard_normal(shape).astype(np.float32)


@dtypes
@pytest.mark.parametrize("magnitude", [1e-25, 1.0, 3e20])
@pytest.mark.parametrize("of", ["float32", "bfloat16"])
def test_rounding_is_to_the_nearest_whatever_the_magnitude(dtype, magnitude, of):
    rows = (normal(0, 600, 40) * np.float32(magnitude)).astype(jnp.dtype(of))
    operand = float8.rounded(jnp.asarray(rows), dtype)
    assert operand.values.dtype == dtype
    assert np.frexp(float(operand.unit))[0] == 0.5  # a power of two
    error = np.abs(wide(operand) - rows.astype(np.float64))
    half_a_step = np.abs(rows.astype(np.float64)) * 2.0 ** -BITS[dtype]
    assert np.all(error <= np.maximum(half_a_step, float(operand.unit) * LEAST_NORMAL[dtype] * 2.0 ** -BITS[dtype]))


@dtypes
def test_a_power_of_two_changes_the_unit_alone(dtype):
    rows = normal(1, 300, 7)
    one, other = (float8.rounded(jnp.asarray(rows * factor), dtype) for factor in (np.float32(1), np.float32(2.0**-30)))
    np.testing.assert_array_equal(one.values, other.values)
    assert float(one.unit) == float(other.unit) * 2.0**30


@dtypes
def test_what_the_sample_misses_is_borne_and_beyond_that_clipped(dtype):
    rows = np.ones((4 * 256, 3), np.float32)  # every fourth row is looked at
    headroom = {float8.OPERAND: 64.0, float8.COTANGENT: 8192.0}[dtype]
    rows[1], rows[2] = headroom, -1e9
    found = wide(float8.rounded(jnp.asarray(rows), dtype))
    assert np.all(found[0] == 1)
    assert np.all(found[1] == headroom)
    assert np.all(np.isfinite(found[2]))
    assert np.all(found[2] < -headroom)


@dtypes
def test_zeros_and_what_is_not_finite(dtype):
    assert not wide(float8.rounded(jnp.zeros((300, 2)), dtype)).any()
    for wrong in (np.inf, -np.inf, np.nan):
        rows = normal(2, 300, 2)
        rows[0, 0] = wrong  # in the sample
        found = wide(float8.rounded(jnp.asarray(rows), dtype))
        assert np.isnan(found[0, 0])
        assert np.isfinite(found).sum() == found.size - 1


def test_the_weight_is_trits_times_rounded_scales():
    rng = np.random.default_rng(22)
    trits = rng.integers(-1, 2, (6, 40)).astype(np.int8)
    scale = np.exp2(rng.uniform(-30, -20, (6, 5))).astype(np.float32)
    operand = float8.weight(pack_rows(jnp.asarray(trits)), jnp.asarray(scale), in_features=40, group_size=8)
    assert operand.values.dtype == float8.OPERAND
    found = wide(operand)
    np.testing.assert_array_equal(np.sign(found), trits)
    exact = trits * scale.astype(np.float64)[:, np.arange(40) // 8]
    np.testing.assert_allclose(found, exact, rtol=2.0**-4)


@pytest.mark.parametrize("contracted", [(1, 1), (1, 0), (0, 0)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_product_is_that_of_the_rounded_operands(contracted, dtype):
    left, right = normal(3, 300, 300), normal(4, 300, 300) * np.float32(1e-6)
    a, b = float8.rounded(jnp.asarray(left), float8.COTANGENT), float8.rounded(jnp.asarray(right), float8.OPERAND)
    found = float8.product(a, b, contracted, jnp.dtype(dtype))
    assert found.dtype == jnp.dtype(dtype)
    exact = np.tensordot(wide(a), wide(b), (contracted[:1], contracted[1:]))
    terms = np.tensordot(np.abs(wide(a)), np.abs(wide(b)), (contracted[:1], contracted[1:]))
    result = np.asarray(found).astype(np.float64)
    # Hopper adds 32 products at a time to sums of some 14 bits; elsewhere they are float32.
    adding = 300 * 2.0**-23 if compute_capability() == 0.0 else -(-300 // 32) * 2.0**-13
    assert np.all(np.abs(result - exact) <= np.abs(exact) * ROUNDOFF[dtype] + terms * adding)


N, K, G = 24, 40, 8
SPEC = MatmulSpec(K, G, PowerLaw(), float8=True)


def layer(x, gy, leaves, spec, kind):
    """(y, dx, votes) of a product whose loss is `sum(y * gy)`."""

    def loss(x, probe):
        y = ternary_matmul(x, leaves, spec, probe)
        return jnp.sum(y * gy), y

    (_, y), (dx, votes) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(x, make_probe(kind, N, K, G))
    return y, dx, votes


@pytest.mark.parametrize("rows", [float8.LEAST_ROWS - 1, float8.LEAST_ROWS])
@pytest.mark.parametrize("kind", ["score", "gradient"])
def test_a_layer_of_numbers_that_float8_has_is_exact(rows, kind):
    rng = np.random.default_rng([23, rows])
    trits = rng.integers(-1, 2, (N, K)).astype(np.int8)
    exponent = rng.integers(-2, 2, (N, K // G)).astype(np.int8)
    weight = trits * 2.0 ** exponent[:, np.arange(K) // G]
    leaves = {"trits": pack_rows(jnp.asarray(trits)), "exponent": jnp.asarray(exponent)}
    x, gy = (rng.integers(-3, 4, (rows, width)).astype(np.float32) for width in (K, N))
    y, dx, votes = jax.jit(layer, static_argnums=(3, 4))(jnp.asarray(x), jnp.asarray(gy), leaves, SPEC, kind)
    np.testing.assert_array_equal(y, x @ weight.T)
    np.testing.assert_array_equal(dx, gy @ weight)
    assert votes["count"] == 1
    expected = score_by_hand(gy.T @ x, trits, G) if kind == "score" else gy.T @ x
    np.testing.assert_array_equal(votes[kind], expected)


def test_few_rows_and_plain_specs_are_not_rounded():
    leaves = {"trits": pack_rows(jnp.ones((N, K), jnp.int8)), "exponent": jnp.zeros((N, K // G), jnp.int8)}
    gy = jnp.ones((float8.LEAST_ROWS, N))
    x = jnp.asarray(normal(5, float8.LEAST_ROWS, K))
    plain = MatmulSpec(K, G, PowerLaw())
    few = layer(x[1:], gy[1:], leaves, SPEC, "gradient")
    jax.tree.map(np.testing.assert_array_equal, few, layer(x[1:], gy[1:], leaves, plain, "gradient"))
    y, _, votes = layer(x, gy, leaves, SPEC, "gradient")
    exact_y, _, exact_votes = layer(x, gy, leaves, plain, "gradient")
    assert 0 < np.abs(y - exact_y).max() < 0.1 * np.abs(exact_y).max()
    assert np.abs(votes["gradient"] - exact_votes["gradient"]).max() > 0
