"""Products by expert under `jax.grad`: those of every expert's matrix by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import PowerLaw

from arbs_kernels.autodiff import MatmulSpec, make_probe, ternary_matmul
from arbs_kernels.codec import pack_rows
from arbs_kernels.grouped_autodiff import ternary_grouped_matmul

X, N, K, G, M = 3, 5, 12, 4, 9
SIZES = jnp.asarray([4, 0, 3], jnp.int32)
SPANS = ((0, 4), (4, 4), (4, 7))


SPEC = MatmulSpec(K, G, PowerLaw())


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    leaves = {
        "trits": pack_rows(jnp.asarray(rng.integers(-1, 2, (X, N, K)), jnp.int8)),
        "exponent": jnp.asarray(rng.integers(-2, 2, (X, N, -(-K // G))), jnp.int8),
    }
    x, gy = (jnp.asarray(rng.integers(-3, 4, (M, width)), jnp.float32) for width in (K, N))
    return x, gy, leaves


def probes(kind):
    return jax.tree.map(lambda leaf: jnp.zeros((X, *leaf.shape), leaf.dtype), make_probe(kind, N, K, G))


@pytest.mark.parametrize("kind", ["score", "gradient"])
def test_equals_the_matrices_one_by_one(problem, kind):
    x, gy, leaves = problem

    @jax.jit
    def both(x, probe):
        loss = lambda x, probe: jnp.sum(ternary_grouped_matmul(x, SIZES, leaves, SPEC, probe) * gy)  # noqa: E731
        return jax.grad(loss, (0, 1))(x, probe), ternary_grouped_matmul(x, SIZES, leaves, SPEC)

    @jax.jit
    def alone(x, gy, own, probe):
        product = lambda x, probe: ternary_matmul(x, own, SPEC, probe)  # noqa: E731
        return product(x, None), jax.grad(lambda x, probe: jnp.sum(product(x, probe) * gy), (0, 1))(x, probe)

    (dx, votes), y = both(x, probes(kind))
    for expert, (start, end) in enumerate(SPANS):
        if start == end:
            assert not any(np.asarray(leaf[expert]).any() for leaf in votes.values())
            continue
        own = jax.tree.map(lambda leaf, at=expert: np.asarray(leaf)[at], leaves)
        own_y, (own_dx, own_votes) = alone(x[start:end], gy[start:end], own, make_probe(kind, N, K, G))
        np.testing.assert_array_equal(y[start:end], own_y)
        np.testing.assert_array_equal(dx[start:end], own_dx)
        for name, vote in own_votes.items():
            np.testing.assert_array_equal(votes[name][expert], vote)
    # The rows of no expert.
    assert not np.asarray(y[7:]).any()
    assert not np.asarray(dx[7:]).any()


def test_uses_in_a_loop_add_up(problem):
    """And an expert counts for those uses alone in which it had rows."""
    x, gy, leaves = problem
    sizes = jnp.asarray([[4, 0, 3], [0, 0, 9], [4, 0, 9]], jnp.int32)

    def loss(probe):
        body = lambda total, own: (total + jnp.sum(ternary_grouped_matmul(x, own, leaves, SPEC, probe) * gy), None)  # noqa: E731
        return jax.lax.scan(body, jnp.float32(0), sizes)[0]

    assert jax.jit(jax.grad(loss))(probes("score"))["count"].tolist() == [2, 0, 3]
