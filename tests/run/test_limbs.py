"""No bit may be lost between device, host and storage; 2^40 is the canary that int32 cannot hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arbs_jax.errors import CheckpointError
from arbs_jax.run.limbs import (
    PERSISTENT_DTYPES,
    flatten_tree,
    from_limbs,
    from_storable,
    to_device,
    to_host,
    to_limbs,
    unflatten_tree,
)

EXTREMES = np.array([2**40, -(2**40), np.iinfo(np.int64).min, np.iinfo(np.int64).max, -1, 0], np.int64)


def extremes_of(dtype: str) -> np.ndarray:
    info = np.iinfo(dtype)
    return np.array([[info.min, 0, 1], [2, 3, info.max]], dtype)


@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=9))
@settings(max_examples=60, deadline=None)
def test_limbs_round_trip_any_int64(numbers):
    array = np.array(numbers, np.int64)
    limbs = to_limbs(array)
    assert limbs.dtype == np.uint32
    assert limbs.shape == (len(numbers), 2)
    assert [int(low) + (int(high) << 32) for low, high in limbs] == [n % 2**64 for n in numbers]
    np.testing.assert_array_equal(from_limbs(limbs), array, strict=True)


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (1,), (2, 3), (2, 1, 3)])
def test_limbs_keep_every_shape(shape):
    array = np.full(shape, -(2**40), np.int64)
    np.testing.assert_array_equal(from_limbs(to_limbs(array)), array, strict=True)


def test_limbs_of_strided_and_foreign_byte_order():
    array = np.arange(24, dtype=np.int64).reshape(4, 6).T[::2] + 2**40
    np.testing.assert_array_equal(from_limbs(to_limbs(array)), array, strict=True)
    np.testing.assert_array_equal(to_limbs(np.array([2**40], ">i8").astype(np.int64)), [[0, 256]])
    np.testing.assert_array_equal(to_host({"a": np.array([2**40], ">i8")})["a"], np.array([2**40]), strict=True)


def test_limbs_refuse_other_arrays():
    with pytest.raises(CheckpointError, match="not of int32"):
        to_limbs(np.zeros(3, np.int32))
    for wrong in (np.zeros((3, 2), np.int32), np.zeros((3, 3), np.uint32), np.uint32(1).reshape(())):
        with pytest.raises(CheckpointError, match=r"uint32 \(\.\.\., 2\)"):
            from_limbs(wrong)


def test_the_trap_is_real_or_x64_is_on():
    """If this fails JAX has stopped narrowing int64, and the limbs may go."""
    expected = np.int64 if jax.config.jax_enable_x64 else np.int32
    assert jax.device_put(EXTREMES).dtype == expected


@pytest.mark.parametrize("dtype", PERSISTENT_DTYPES)
def test_device_round_trip(dtype):
    tree = {"outer": {"leaf": extremes_of(dtype), "scalar": extremes_of(dtype)[1, 2]}, "empty": {}}
    on_device = to_device(tree)
    assert isinstance(on_device["outer"]["leaf"], jax.Array)
    assert on_device["outer"]["leaf"].dtype == dtype
    back = to_host(on_device)
    assert list(back) == ["outer", "empty"]
    assert back["empty"] == {}
    np.testing.assert_array_equal(back["outer"]["leaf"], tree["outer"]["leaf"], strict=True)
    np.testing.assert_array_equal(back["outer"]["scalar"], np.asarray(tree["outer"]["scalar"]), strict=True)


@pytest.mark.parametrize("shape", [(), (0, 3), (6,), (2, 3)])
def test_int64_canaries_on_device(shape):
    array = np.resize(EXTREMES, shape)
    placed = to_device({"corr": array})["corr"]
    assert placed.dtype == jnp.int64
    assert placed.shape == shape
    np.testing.assert_array_equal(np.asarray(placed), array, strict=True)
    # Arithmetic on the device sees all 64 bits too.
    np.testing.assert_array_equal(np.asarray(placed >> 8), array >> 8, strict=True)


def test_to_device_with_a_sharding():
    mesh = jax.make_mesh((1,), ("data",))
    sharding = jax.NamedSharding(mesh, jax.P())
    tree = {"corr": np.array([[2**40, -(2**40)]], np.int64), "votes": np.array(2**40), "trits": np.zeros(3, np.uint8)}
    placed = to_device(tree, sharding)
    assert {leaf.sharding for leaf in placed.values()} == {sharding}
    for name, leaf in to_host(placed).items():
        np.testing.assert_array_equal(leaf, tree[name], strict=True)
    again = to_device(placed, sharding)
    assert again["corr"].dtype == jnp.int64


def test_to_device_and_to_host_share_no_memory():
    source = np.arange(4096, dtype=np.int32)
    placed = to_device({"a": source})
    host = to_host(placed)
    source[:] = -1
    np.testing.assert_array_equal(host["a"], np.arange(4096, dtype=np.int32))
    np.testing.assert_array_equal(np.asarray(placed["a"]), np.arange(4096, dtype=np.int32))
    assert host["a"].flags.writeable
    assert not np.shares_memory(host["a"], np.asarray(placed["a"]))


def test_to_host_survives_donation():
    placed = to_device({"a": np.arange(4096, dtype=np.int32)})
    host = to_host(placed)
    bumped = jax.jit(lambda tree: {"a": tree["a"] + 1}, donate_argnums=0)(placed)
    bumped["a"].block_until_ready()
    np.testing.assert_array_equal(host["a"], np.arange(4096, dtype=np.int32))


@pytest.mark.parametrize(
    "leaf",
    [np.zeros(2, np.float32), jnp.zeros(2, jnp.bfloat16), np.zeros(2, bool), np.zeros(2, np.uint64), jax.random.key(0)],
    ids=["float32", "bfloat16", "bool", "uint64", "key"],
)
@pytest.mark.parametrize("move", [to_host, to_device])
def test_other_dtypes_are_refused_by_name(move, leaf):
    with pytest.raises(CheckpointError, match=r"leaf layer/w has dtype .* integers only"):
        move({"layer": {"w": leaf}})


@pytest.mark.parametrize("leaf", [3, 2.5, None, [1, 2], "text"])
def test_leaves_that_are_not_arrays_are_refused(leaf):
    with pytest.raises(CheckpointError, match=f"leaf a/b is a {type(leaf).__name__}"):
        to_host({"a": {"b": leaf}})


def test_flatten_is_inverted_by_unflatten():
    tree = {"b": {"x.y": 1, "z": {"deep": 2}}, "a": 3, "none": {}, "c": {"none": {}}}
    flat = flatten_tree(tree)
    assert flat == {"b/x.y": 1, "b/z/deep": 2, "a": 3, "none": {}, "c/none": {}}
    assert list(flat) == ["b/x.y", "b/z/deep", "a", "none", "c/none"]
    assert unflatten_tree(flat) == tree
    assert flatten_tree({}) == {}


@pytest.mark.parametrize("key", ["", "a/b", 3])
def test_bad_keys_are_refused(key):
    with pytest.raises(CheckpointError, match="keys are non-empty strings"):
        flatten_tree({"outer": {key: 1}})


@pytest.mark.parametrize("paths", [("a", "a/b"), ("a/b", "a")])
def test_colliding_paths_are_refused(paths):
    with pytest.raises(CheckpointError, match=f"leaf {paths[1]}"):
        unflatten_tree(dict.fromkeys(paths, 1))


def test_a_narrowed_leaf_is_noticed_on_the_way_back():
    with pytest.raises(CheckpointError, match=r"leaf corr came back as int32 \(2,\) instead of int64 \(2,\)"):
        from_storable("corr", np.zeros(2, np.int32), "int64", (2,))
    with pytest.raises(CheckpointError, match=r"leaf corr came back as int64 \(1,\) instead of int64 \(2,\)"):
        from_storable("corr", np.zeros((1, 2), np.uint32), "int64", (2,))
