"""Gathered rows are the weight's rows exactly, for every implementation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import random_matrix, values_of

from arbs_kernels import backends
from arbs_kernels.cases import SMALL_CASES
from arbs_kernels.row_gather import api, packed_row_gather, reference, sums_of_rows
from arbs_kernels.selection import UnsupportedError


class RowGather:
    """What holds for every implementation; a backend adds a subclass that names it."""

    implementation: str

    def gather(self, ids, matrix, in_features, group_size, dtype="float32"):
        run = jax.jit(packed_row_gather, static_argnames=("in_features", "group_size", "dtype", "implementation"))
        return run(
            ids,
            matrix.trits,
            matrix.scale,
            in_features=in_features,
            group_size=group_size,
            dtype=jnp.dtype(dtype),
            implementation=self.implementation,
        )

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("case", SMALL_CASES, ids=str)
    def test_rows(self, case, dtype):
        rng = np.random.default_rng([13, case.products])
        matrix = random_matrix(rng, case.out_features, case.in_features, case.group_size)
        ids = rng.integers(0, case.out_features, case.rows)
        rows = self.gather(jnp.asarray(ids, jnp.int32), matrix, case.in_features, case.group_size, dtype)
        assert rows.dtype == dtype
        # A trit times a scale rounded to the result's dtype is the weight rounded to it: nothing is left to tolerate.
        expected = matrix.weight.astype(np.float32).astype(jnp.dtype(dtype))
        np.testing.assert_array_equal(rows, expected[ids], strict=True)

    @pytest.mark.parametrize("shape", [(), (1,), (4,), (2, 3), (2, 1, 3)])
    @pytest.mark.parametrize("dtype", ["uint8", "int32"])
    def test_ids_of_any_shape_and_integer_dtype(self, shape, dtype):
        rng = np.random.default_rng(14)
        matrix = random_matrix(rng, 200, 7, 4)
        ids = rng.integers(0, 200, shape)
        rows = self.gather(jnp.asarray(ids, dtype), matrix, 7, 4)
        assert rows.shape == (*shape, 7)
        np.testing.assert_array_equal(rows, matrix.weight.astype(np.float32)[ids])

    @pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16"])
    def test_ids_of_a_dtype_that_does_not_hold_the_height(self, dtype):
        """Bytes of text, say, in a table with rows to spare."""
        matrix = random_matrix(np.random.default_rng(17), 2**16 if dtype == "uint16" else 288, 7, 4)
        ids = np.arange(0, np.iinfo(dtype).max + 1, 3)
        rows = self.gather(jnp.asarray(ids, dtype), matrix, 7, 4)
        np.testing.assert_array_equal(rows, matrix.weight.astype(np.float32)[ids])

    def test_ids_past_the_table_are_clamped(self):
        matrix = random_matrix(np.random.default_rng(15), 5, 9, 4)
        rows = self.gather(jnp.asarray([4, 5, 10**6], jnp.int32), matrix, 9, 4)
        np.testing.assert_array_equal(rows, np.repeat(matrix.weight[-1:].astype(np.float32), 3, axis=0))

    def test_the_rest_of_the_table_is_not_decoded(self):
        matrix = random_matrix(np.random.default_rng(16), 1000, 20, 4)
        traced = jax.make_jaxpr(lambda ids: self.gather(ids, matrix, 20, 4))(jnp.zeros((3,), jnp.int32))
        assert max(value.size for value in values_of(traced)) < 1000


class TestXla(RowGather):
    implementation = "xla"


@pytest.mark.skipif(backends.triton_missing() is not None, reason=f"needs {backends.triton_missing()}")
class TestTriton(RowGather):
    implementation = "triton"


def refused(**changes):
    plain = {
        "ids": jnp.zeros((2,), jnp.int32),
        "trits": jnp.zeros((3, 2), jnp.uint8),
        "scale": jnp.ones((3, 2), jnp.float32),
        "in_features": 10,
        "group_size": 8,
    }
    return packed_row_gather(**plain | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": jnp.zeros((2,), jnp.float32)}, "ids must be integers, got float32"),
        ({"in_features": 11}, r"trits must be uint8 \(N, 3\) for in_features=11, got uint8 \(3, 2\)"),
        ({"scale": jnp.ones((3, 1), jnp.float32)}, r"scale must be float32 \(3, 2\), got float32 \(3, 1\)"),
        ({"group_size": 3}, "group_size must be one of .*, got 3"),
    ],
)
def test_refuses(changes, message):
    with pytest.raises(ValueError, match="packed_row_gather: " + message):
        refused(**changes)


def test_an_unknown_implementation_is_an_error_that_lists_the_known():
    with pytest.raises(UnsupportedError, match=r"no implementation 'abacus'; pass one of .*xla"):
        refused(implementation="abacus")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sums_of_rows(dtype):
    ids = np.array([3, 0, 3, 7, 3, 1])  # 7 is no row of the table
    rows = jnp.asarray(np.random.default_rng(0).normal(size=(6, 5)), dtype)
    expected = np.zeros((4, 5))
    np.add.at(expected, ids[ids < 4], np.asarray(rows, np.float64)[ids < 4])
    for sums in (sums_of_rows, reference.sums_by_scatter, reference.sums_by_product):
        found = sums(jnp.asarray(ids, jnp.int32), rows, 4)
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected, atol=3 * 2**-22)  # three summands below 4


@pytest.mark.parametrize("capability", [0.0, 9.0], ids=["by scatter", "by product"])
def test_sums_by_ids_of_a_dtype_that_does_not_hold_the_height(capability, monkeypatch):
    monkeypatch.setattr(api, "compute_capability", lambda: capability)
    rows = jnp.ones((3, 5), jnp.float32)
    expected = np.zeros((288, 5))
    expected[[2, 255]] = [[2], [1]]
    np.testing.assert_array_equal(sums_of_rows(jnp.asarray([2, 255, 2], jnp.uint8), rows, 288), expected)
