"""Rows out of a packed table and back: exactly those rows, in place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import assert_trees_equal, int64

from arbs_kernels.row_update import put_rows, rows_of, sum_rows, unique_rows

N = 11


def table(rows=N):
    """Leaves of every shape and integer dtype, a canary of more than 32 bits among them."""
    rng = np.random.default_rng(31)
    return {
        "trits": jnp.asarray(rng.integers(0, 256, (rows, 3)), jnp.uint8),
        "exponent": jnp.asarray(rng.integers(-128, 128, (rows, 2)), jnp.int8),
        "corr": int64(rng.integers(-(2**50), 2**50, (rows, 2))),
        "residual": jnp.asarray(rng.integers(0, 256, (2, rows, 3)), jnp.uint8),
    }


def changed(rows):
    return jax.tree.map(lambda leaf: ~leaf, rows)


def by_hand(leaves, ids):
    """NumPy's leaves with rows `ids` changed."""
    copies = {name: np.array(leaf) for name, leaf in leaves.items()}
    for leaf in copies.values():
        leaf[..., ids, :] = ~leaf[..., ids, :]
    return copies


@pytest.mark.parametrize("ids", [[0], [10, 3, 5], list(range(N)), [4, N, 2, N, N], [N, N], []])
def test_rows_are_replaced_and_the_rest_is_not(ids):
    leaves = table()
    inside = [row for row in ids if row < N]

    def step(leaves, ids):
        rows = rows_of(leaves, ids)
        return rows, put_rows(leaves, ids, changed(rows))

    rows, after = jax.jit(step)(leaves, jnp.asarray(ids, jnp.int32))
    kept = [place for place, row in enumerate(ids) if row < N]
    for name, leaf in leaves.items():
        assert rows[name].dtype == leaf.dtype
        np.testing.assert_array_equal(
            rows[name][..., jnp.asarray(kept, jnp.int32), :], np.asarray(leaf)[..., inside, :]
        )
        padding = np.delete(np.asarray(rows[name]), kept, axis=-2)
        assert not padding.any()
    assert_trees_equal(after, by_hand(leaves, inside))


@pytest.mark.parametrize("wrong", [-1, -N, N, N + 1, 2**31 - 1])
def test_ids_outside_the_table_write_nothing_and_read_zeros(wrong):
    leaves, ids = table(), jnp.asarray([wrong], jnp.int32)
    rows = rows_of(leaves, ids)
    assert not any(np.asarray(leaf).any() for leaf in rows.values())
    assert_trees_equal(put_rows(leaves, ids, changed(rows)), leaves)


def test_equal_ids_with_equal_rows_are_one():
    leaves, ids = table(), jnp.asarray([3, 3, 3], jnp.int32)
    assert_trees_equal(put_rows(leaves, ids, changed(rows_of(leaves, ids))), by_hand(leaves, [3]))


@pytest.mark.parametrize("size", [None, 6, 20])
def test_unique_rows_finds_every_id(size):
    tokens = jnp.asarray([[7, 2, 7], [10, 2, 0]], jnp.int32)
    unique, place = unique_rows(tokens, table_rows=N, size=size)
    expected = [0, 2, 7, 10]
    np.testing.assert_array_equal(unique, expected + [N] * ((size or 6) - 4))
    assert unique.dtype == place.dtype == jnp.int32
    np.testing.assert_array_equal(np.asarray(unique)[np.asarray(place)], tokens)


def test_unique_rows_that_are_too_many_lose_the_largest():
    unique, place = unique_rows(jnp.asarray([5, 1, 9, 3], jnp.uint8), table_rows=N, size=2)
    np.testing.assert_array_equal(unique, [1, 3])
    np.testing.assert_array_equal(place, [2, 0, 2, 1])


def test_a_small_table_needs_no_more_than_its_rows():
    unique, _ = unique_rows(jnp.zeros((100,), jnp.int32), table_rows=3)
    np.testing.assert_array_equal(unique, [0, 3, 3])


def test_nothing_of_the_tables_size_is_made():
    """Under donation every leaf is updated where it is, and temporaries depend on the batch only."""

    def step(leaves, tokens):
        ids, _ = unique_rows(tokens, table_rows=leaves["trits"].shape[0])
        return put_rows(leaves, ids, changed(rows_of(leaves, ids)))

    temporaries = []
    for rows in (10_000, 1_000_000):
        leaves = {
            "trits": jax.ShapeDtypeStruct((rows, 3), jnp.uint8),
            "exponent": jax.ShapeDtypeStruct((rows, 2), jnp.int8),
            "corr": jax.ShapeDtypeStruct((rows, 2), jnp.int64),
            "residual": jax.ShapeDtypeStruct((2, rows, 3), jnp.uint8),
        }
        tokens = jax.ShapeDtypeStruct((64,), jnp.int32)
        memory = jax.jit(step, donate_argnums=0).lower(leaves, tokens).compile().memory_analysis()
        assert memory.alias_size_in_bytes == rows * (3 + 2 + 16 + 6)
        temporaries.append(memory.temp_size_in_bytes)
    assert temporaries[0] == temporaries[1] < 10_000


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rows_of(table(), jnp.zeros((2,), jnp.float32)), r"ids must be integers \(U,\), got float32 \(2,\)"),
        (lambda: rows_of(table(), jnp.zeros((2, 2), jnp.int32)), r"got int32 \(2, 2\)"),
        (lambda: rows_of({"votes": jnp.zeros((), jnp.int32)}, jnp.zeros((2,), jnp.int32)), r"\(..., N, width\)"),
        (lambda: rows_of(table() | {"trits": table(5)["trits"]}, jnp.zeros((2,), jnp.int32)), "of one N"),
        (
            lambda: put_rows(table(), jnp.zeros((2,), jnp.int32), rows_of(table(), jnp.zeros((3,), jnp.int32))),
            r"rows\['corr'\] must be int64 \(2, 2\), got int64 \(3, 2\)",
        ),
        (lambda: unique_rows(jnp.zeros((2,), jnp.float32), table_rows=3), "ids must be integers, got float32"),
        (lambda: unique_rows(jnp.zeros((2,), jnp.int32), table_rows=0), "table_rows must be at least 1, got 0"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("low", [-40, 0])
def test_sums_of_rows_are_close_and_the_same_in_any_order(low):
    rng = np.random.default_rng(0)
    values = (rng.standard_normal((50, 7)) * np.exp2(rng.uniform(low, 20, (50, 1)))).astype(np.float32)
    place, order = rng.integers(-1, 10, 50).astype(np.int32), rng.permutation(50)
    got = sum_rows(values, place, 9)
    np.testing.assert_array_equal(got, sum_rows(values[order], place[order], 9))
    for at in range(9):
        own = values[place == at].astype(np.float64)
        bound = len(own) ** 2 * np.abs(own).max() * 2.0**-29
        # The sum is rounded to float32 at the end.
        assert (np.abs(got[at] - own.sum(axis=0)) <= bound + np.abs(own.sum(axis=0)) * 2.0**-24).all()


def test_sums_of_whole_numbers_are_exact_and_empty_places_are_zero():
    values = np.random.default_rng(1).integers(-(2**20), 2**20, (30, 5)).astype(np.float32)
    place = np.arange(30, dtype=np.int32) % 3
    expected = np.stack([*(values[place == at].sum(axis=0) for at in range(3)), np.zeros(5)])
    np.testing.assert_array_equal(sum_rows(values, place, 4), expected)


def test_sums_that_are_not_finite_say_so():
    values = np.full((4, 2), 3e38, np.float32)
    assert np.isinf(sum_rows(values, np.zeros(4, np.int32), 1)).all()
    values[1, 0] = np.inf
    got = np.asarray(sum_rows(values, np.asarray([0, 1, 2, 3], np.int32), 4))
    assert np.isnan(got).any(axis=1).tolist() == [False, True, False, False]
    with pytest.raises(ValueError, match=r"values must be \(M, K\) with M = 3 places, got \(4, 2\)"):
        sum_rows(values, np.zeros(3, np.int32), 1)
