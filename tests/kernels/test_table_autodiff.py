"""Rows of a table and their probe: equal to the whole table's, with nothing of the table's height."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import is_float, values_of

from arbs_kernels.autodiff import MatmulSpec, ternary_gather
from arbs_kernels.codec import pack_rows
from arbs_kernels.table_autodiff import make_rows_probe, ternary_rows

N, K, G = 50, 13, 4


@dataclass(frozen=True)
class PowerLaw:
    """`S = 2^(E + n)`, of a leaf of the rows and one of the whole table."""

    def scale(self, leaves, group_size):
        return jnp.exp2((leaves["exponent"] + leaves["votes"]).astype(jnp.float32))


SPEC = MatmulSpec(K, G, PowerLaw())
IDS = jnp.asarray([[3, 0, 3], [49, 7, 3]], jnp.int32)


@pytest.fixture(scope="module")
def leaves():
    rng = np.random.default_rng(0)
    trits = pack_rows(jnp.asarray(rng.integers(-1, 2, (N, K)), jnp.int8))
    exponent = jnp.asarray(rng.integers(-3, 1, (N, -(-K // G))), jnp.int8)
    return {"trits": trits, "exponent": exponent, "votes": jnp.int8(1)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_are_those_of_the_table(leaves, dtype):
    got, whole = jax.jit(
        lambda ids: [look(ids, leaves, SPEC, jnp.dtype(dtype)) for look in (ternary_rows, ternary_gather)]
    )(IDS)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, whole)


def test_the_probe_gets_rows_ids_and_one(leaves):
    """Also of ids that a computation made, some of them outside the table."""
    gy = jnp.asarray(np.random.default_rng(1).integers(-3, 4, (2, 3, K)), jnp.float32)
    shifted = jnp.asarray([[3, -1, 3], [50, 7, 3]], jnp.int32)

    @jax.jit
    def collected(probe, ids):
        return jax.grad(lambda probe: jnp.sum(ternary_rows(ids + 1, leaves, SPEC, jnp.float32, probe) * gy))(probe)

    got = collected(make_rows_probe(6, K), shifted - 1)
    np.testing.assert_array_equal(got["rows"], gy.reshape(6, K))
    assert got["ids"].tolist() == [3, N, 3, N, 7, 3]
    assert float(got["count"]) == 1
    rows = np.asarray(jax.jit(lambda ids: ternary_rows(ids, leaves, SPEC, jnp.float32))(shifted))
    assert not rows[0, 1].any()
    assert not rows[1, 0].any()
    assert rows[0, 0].any()


def test_a_probe_that_serves_twice_says_so(leaves):
    def twice(probe):
        body = lambda total, ids: (total + jnp.sum(ternary_rows(ids, leaves, SPEC, jnp.float32, probe)), None)  # noqa: E731
        return jax.lax.scan(body, jnp.float32(0), IDS)[0]

    assert float(jax.jit(jax.grad(twice))(make_rows_probe(3, K))["count"]) == 2


def test_no_array_has_the_height_of_the_table(leaves):
    height = 4099
    tall = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((height, *leaf.shape[1:])[: leaf.ndim], leaf.dtype), leaves)

    def run(ids, leaves, probe):
        return jax.grad(lambda probe: jnp.sum(ternary_rows(ids, leaves, SPEC, jnp.float32, probe) ** 2))(probe)

    made = list(values_of(jax.make_jaxpr(run)(IDS, tall, make_rows_probe(6, K))))
    assert any(is_float(value) and value.shape == (6, K) for value in made)
    assert not [value for value in made if height in value.shape]


def test_what_does_not_fit_is_refused(leaves):
    with pytest.raises(ValueError, match="a probe for 5 lookups was given 6 ids"):
        ternary_rows(IDS, leaves, SPEC, jnp.float32, make_rows_probe(5, K))
    tall = {"trits": jax.ShapeDtypeStruct((2**24 + 1, 3), jnp.uint8)}
    with pytest.raises(ValueError, match=f"at most {2**24} rows, got {2**24 + 1}"):
        jax.eval_shape(lambda leaves: ternary_rows(IDS, leaves, SPEC, jnp.float32), tall)
