"""Every trit survives both packed forms, and the bytes are the documented ones."""

import itertools
from pathlib import Path

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arbs_kernels.codec import (
    pack_flat,
    pack_rows,
    packed_width,
    unpack_flat,
    unpack_planes,
    unpack_rows,
    valid_codes,
)

ORACLE = sorted((Path(__file__).parent.parent / "oracle").glob("*.npz"))
ALL_BYTES = np.array(list(itertools.product((-1, 0, 1), repeat=5)), np.int8)
"""(243, 5): every content of a byte, the lowest column varying slowest."""

pack = jax.jit(pack_rows)
unpack = jax.jit(unpack_rows, static_argnums=1)


def trits(shapes):
    return hnp.arrays(np.int8, shapes, elements=st.integers(-1, 1))


@given(trits(hnp.array_shapes(min_dims=2, max_dims=4, max_side=12)))
@settings(max_examples=20, deadline=None)
def test_rows_round_trip(matrix):
    packed = pack(matrix)
    assert packed.dtype == jnp.uint8
    assert packed.shape == (*matrix.shape[:-1], packed_width(matrix.shape[-1]))
    assert valid_codes(np.asarray(packed)).all()
    np.testing.assert_array_equal(np.asarray(unpack(packed, matrix.shape[-1])), matrix, strict=True)
    capacity = 5 * packed.shape[-1]
    padding = np.asarray(unpack(packed, capacity))[..., matrix.shape[-1] :]
    assert padding.shape[-1] == capacity - matrix.shape[-1]
    assert not padding.any()


@given(trits(hnp.array_shapes(min_dims=2, max_dims=2, max_side=13)))
@settings(max_examples=200, deadline=None)
def test_flat_round_trip(matrix):
    packed = pack_flat(matrix)
    assert packed.dtype == np.uint8
    digits = [int(trit) + 1 for trit in matrix.reshape(-1)]
    digits += [0] * (-len(digits) % 5)
    assert packed.tolist() == [sum(d * 3**i for i, d in enumerate(digits[j : j + 5])) for j in range(0, len(digits), 5)]
    np.testing.assert_array_equal(unpack_flat(packed, *matrix.shape), matrix, strict=True)


def test_every_byte_of_the_row_form():
    packed = np.asarray(pack_rows(jnp.asarray(ALL_BYTES)))[:, 0]
    # The lowest column is the most significant digit: the 243 rows are in the order of their values.
    assert packed.tolist() == [-(-value * 256 // 243) for value in range(243)]
    np.testing.assert_array_equal(unpack_rows(jnp.asarray(packed)[:, None], 5), ALL_BYTES)
    assert np.flatnonzero(valid_codes(np.arange(256))).tolist() == sorted(packed.tolist())


def test_every_byte_of_the_flat_form():
    packed = pack_flat(ALL_BYTES)
    assert sorted(packed.tolist()) == list(range(243))
    np.testing.assert_array_equal(unpack_flat(packed, 243, 5), ALL_BYTES)


def test_digits_are_planar():
    matrix = np.random.default_rng(0).integers(-1, 2, (3, 14)).astype(np.int8)
    packed = pack_rows(jnp.asarray(matrix))
    padded = np.pad(matrix, ((0, 0), (0, 1)))
    for index in range(5):
        plane = unpack_planes(packed)[..., index, :]
        assert plane.dtype == jnp.int8
        np.testing.assert_array_equal(plane, padded[:, 3 * index : 3 * (index + 1)])


@pytest.mark.parametrize("path", ORACLE, ids=lambda path: path.stem)
def test_flat_form_is_the_source_systems(path):
    data = np.load(path)
    np.testing.assert_array_equal(pack_flat(data["T"]), data["T_packed"], strict=True)
    unpacked = unpack_flat(data["T_packed"], *data["T"].shape)
    np.testing.assert_array_equal(unpacked, data["T"], strict=True)
    np.testing.assert_array_equal(unpack_rows(pack_rows(jnp.asarray(unpacked)), data["T"].shape[1]), data["T"])


def test_the_oracle_is_there():
    assert len(ORACLE) == 6


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (2, 0, 3), (3,), ()])
def test_rows_refuse_empty_and_flat_input(shape):
    with pytest.raises(ValueError, match="two non-empty axes") as error:
        pack_rows(jnp.zeros(shape, jnp.int8))
    assert str(shape) in str(error.value)


def test_rows_refuse_another_width():
    with pytest.raises(ValueError, match=r"11 columns need 3 bytes, got 2 \(shape \(4, 2\)\)"):
        unpack_rows(jnp.zeros((4, 2), jnp.uint8), 11)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (np.zeros((0, 3), np.int8), r"empty matrix, got shape \(0, 3\)"),
        (np.array([[0, 2]], np.int8), "from 0 to 2"),
        (np.array([[-2, 1]], np.int8), "from -2 to 1"),
        (np.array([[0.5, 1]], np.float32), "from 0.5 to 1"),
    ],
)
def test_flat_refuses_what_is_no_trit(matrix, message):
    with pytest.raises(ValueError, match=message):
        pack_flat(matrix)


@pytest.mark.parametrize(
    ("packed", "shape", "message"),
    [
        ([0, 0], (1, 11), "1 x 11 matrix has 3 bytes, got 2"),
        ([0, 0], (1, 5), "1 x 5 matrix has 1 bytes, got 2"),
        ([], (0, 5), "0 x 5 matrix has 0 bytes, got 0"),
        ([243], (1, 5), "at most 242, got 243"),
    ],
)
def test_flat_refuses_what_does_not_fit(packed, shape, message):
    with pytest.raises(ValueError, match=message):
        unpack_flat(np.array(packed, np.uint8), *shape)
