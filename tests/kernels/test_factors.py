"""Factors of the experts' gradients against the gradients themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arbs_jax.rules import Integral
from arbs_kernels.autodiff import MatmulSpec
from arbs_kernels.grouped_autodiff import expert_gradient, make_factor_probe, ternary_grouped_matmul

EXPERTS, USES, ROWS, N, K = 3, 2, 7, 4, 6
SIZES = np.asarray([[2, 0, 4], [0, 0, 3]], np.int32)  # rows left over, an expert that has none


@pytest.fixture
def leaves():
    shapes = {"trits": (EXPERTS, N, 2), "exponent": (EXPERTS, N, 2), "corr": (EXPERTS, N, 2), "votes": (EXPERTS,)}
    dtypes = {"trits": jnp.uint8, "exponent": jnp.int8, "corr": jnp.int64, "votes": jnp.int64}
    drawn = np.random.default_rng(0).integers(0, 243, shapes["trits"]).astype(np.uint8)
    return {name: jnp.zeros(shape, dtypes[name]) for name, shape in shapes.items()} | {"trits": jnp.asarray(drawn)}


def test_factors_make_the_sums_of_gradients_over_uses(leaves):
    spec = MatmulSpec(K, 4, Integral())
    x = np.random.default_rng(1).standard_normal((USES, ROWS, K)).astype(np.float32)

    def total(probe):
        """As a loop uses experts: one probe, every turn."""

        def use(sum_so_far, entry):
            number, x, sizes = entry
            y = ternary_grouped_matmul(x, sizes, leaves, spec, probe, number)
            return sum_so_far + jnp.sum(jnp.sin(y)), None

        return jax.lax.scan(use, jnp.float32(0), (jnp.arange(USES, dtype=jnp.int32), x, SIZES))[0]

    dense = {"gradient": jnp.zeros((EXPERTS, N, K), jnp.float32), "count": jnp.zeros((EXPERTS,), jnp.float32)}
    factors = make_factor_probe(USES, ROWS, EXPERTS, N, K, jnp.float32)

    @jax.jit
    def both():
        found = jax.grad(total)(factors)
        made = jax.vmap(lambda expert: expert_gradient(found, expert))(jnp.arange(EXPERTS, dtype=jnp.int32))
        return made, found["count"], jax.grad(total)(dense)

    made, count, expected = both()
    np.testing.assert_allclose(made, expected["gradient"], rtol=0, atol=1e-6)
    np.testing.assert_array_equal(made[1], 0)
    np.testing.assert_array_equal(count, [1, 0, 2])
    np.testing.assert_array_equal(count, expected["count"])
    assert (np.asarray(made)[[0, 2]] != 0).any()
