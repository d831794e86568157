"""Integer pytrees between device, host and storage without losing a bit.

JAX turns a NumPy int64 array into int32 without a word wherever one enters (`device_put`, arguments of `jit`, Orbax),
so no int64 ever crosses such a boundary here: it goes as two uint32 limbs, low limb first on a trailing axis of 2.

A tree is a nested dict with string keys whose leaves are JAX or NumPy arrays of the dtypes in `PERSISTENT_DTYPES`.
A leaf's path joins its keys with "/".
"""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from arbs_jax.errors import CheckpointError

# Without it jnp.int64 itself means int32 where x64 is off. Setting it again is harmless; float defaults stay.
jax.config.update("jax_explicit_x64_dtypes", "allow")

PERSISTENT_DTYPES = ("uint8", "int8", "int16", "uint16", "int32", "uint32", "int64")

Tree = dict[str, Any]


def _walk(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if not isinstance(key, str) or not key or "/" in key:
            raise CheckpointError(f"key {key!r} under {prefix or 'the root'!r}: keys are non-empty strings without '/'")
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            if value:
                yield from _walk(value, f"{path}/")
            else:
                yield path, {}
        else:
            yield path, value


def flatten_tree(tree: Mapping[str, Any]) -> dict[str, Any]:
    """{path: leaf} in the tree's order. An empty dict below the root is kept, as a leaf that is an empty dict.

    Raises:
      CheckpointError: a key is not a non-empty string without "/".
    """
    return dict(_walk(tree, ""))


def unflatten_tree(flat: Mapping[str, Any]) -> Tree:
    """The inverse of `flatten_tree`.

    Raises:
      CheckpointError: one path is both a leaf and a folder of others.
    """
    tree: Tree = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise CheckpointError(f"leaf {path}: {parent!r} is a leaf as well as the folder of this one")
        if name in node:
            raise CheckpointError(f"leaf {path}: another leaf has this path or lies below it")
        node[name] = leaf
    return tree


def check_leaf(path: str, leaf: Any) -> None:
    """Accept a JAX or NumPy array (or NumPy scalar) of a persistent dtype.

    Raises:
      CheckpointError: anything else, floats first of all; the message names the leaf.
    """
    if not isinstance(leaf, jax.Array | np.ndarray | np.generic):
        raise CheckpointError(
            f"leaf {path} is a {type(leaf).__name__}, not an array; wrap it in np.asarray with an integer dtype"
        )
    if str(leaf.dtype.name) not in PERSISTENT_DTYPES:
        raise CheckpointError(
            f"leaf {path} has dtype {leaf.dtype.name}; persistent state holds integers only: "
            f"{', '.join(PERSISTENT_DTYPES)}"
        )


def to_host(tree: Mapping[str, Any]) -> Tree:
    """A copy of the tree as NumPy arrays (same shapes and dtypes) that shares no memory with the original.

    The copy is real even where `np.asarray` of a device array is a view (on the CPU): the caller may donate the
    arrays right afterwards. All transfers are started before the first one is waited for.

    Raises:
      CheckpointError: a leaf that `check_leaf` refuses, or one whose shards other processes hold.
    """
    flat = flatten_tree(tree)
    for path, leaf in flat.items():
        if isinstance(leaf, dict):
            continue
        check_leaf(path, leaf)
        if isinstance(leaf, jax.Array):
            if not leaf.is_fully_addressable:
                raise CheckpointError(f"leaf {path} is spread over several processes; gather it first")
            leaf.copy_to_host_async()
    return unflatten_tree({path: _host_copy(leaf) for path, leaf in flat.items()})


def _host_copy(leaf: Any) -> Any:
    if isinstance(leaf, dict):
        return {}
    # The dtype is spelled by name so that arrays of foreign byte order become native; np.array keeps 0-d arrays 0-d.
    return np.array(leaf, dtype=leaf.dtype.name, order="C", copy=True)


def to_limbs(array: np.ndarray) -> np.ndarray:
    """int64 (...) as uint32 (..., 2), low limb first.

    Raises:
      CheckpointError: another dtype.
    """
    if array.dtype != np.int64:
        raise CheckpointError(f"limbs are made of int64 arrays, not of {array.dtype.name}")
    # A trailing axis of one first: a 0-d array cannot be viewed as a narrower dtype.
    return np.array(array, dtype="<i8", order="C")[..., None].view("<u4").astype(np.uint32)


def from_limbs(limbs: np.ndarray) -> np.ndarray:
    """uint32 (..., 2), low limb first, as int64 (...).

    Raises:
      CheckpointError: another dtype or last axis.
    """
    if limbs.dtype != np.uint32 or limbs.ndim == 0 or limbs.shape[-1] != 2:
        raise CheckpointError(f"limbs are uint32 (..., 2), not {limbs.dtype.name} {limbs.shape}")
    wide = np.array(limbs, dtype="<u4", order="C").view("<i8")
    return wide.reshape(limbs.shape[:-1]).astype(np.int64)


def to_storable(leaf: np.ndarray) -> np.ndarray:
    """What Orbax may see of a leaf: int64 as limbs, every other persistent dtype as it is."""
    return to_limbs(leaf) if leaf.dtype == np.int64 else leaf


def from_storable(path: str, stored: np.ndarray, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of `to_storable` for a leaf of `dtype` and `shape`, both checked after the fact.

    Raises:
      CheckpointError: what came back has another dtype or shape; the message names the leaf and both.
    """
    leaf = from_limbs(stored) if dtype == "int64" and stored.dtype == np.uint32 else np.asarray(stored)
    if leaf.dtype.name != dtype or leaf.shape != shape:
        raise CheckpointError(f"leaf {path} came back as {leaf.dtype.name} {leaf.shape} instead of {dtype} {shape}")
    return leaf


@functools.cache
def _join_limbs(sharding: jax.sharding.Sharding | None):
    def join(limbs: jax.Array) -> jax.Array:
        return jax.lax.bitcast_convert_type(limbs, jnp.int64)

    return jax.jit(join) if sharding is None else jax.jit(join, out_shardings=sharding)


def to_device(tree: Mapping[str, Any], sharding: jax.sharding.Sharding | None = None) -> Tree:
    """The tree as JAX arrays (same shapes and dtypes, int64 included), every leaf under `sharding` if one is given.

    Raises:
      CheckpointError: a leaf that `check_leaf` refuses, or one that did not keep its dtype on the way.
    """
    return unflatten_tree({path: _put(path, leaf, sharding) for path, leaf in flatten_tree(tree).items()})


def _put(path: str, leaf: Any, sharding: jax.sharding.Sharding | None) -> Any:
    if isinstance(leaf, dict):
        return {}
    check_leaf(path, leaf)
    if isinstance(leaf, jax.Array):
        return leaf if sharding is None else jax.device_put(leaf, sharding)
    # A copy, because on the CPU a device array may go on using the NumPy array's memory.
    host = _host_copy(leaf)
    if host.dtype == np.int64:
        placed = _join_limbs(sharding)(jax.device_put(to_limbs(host), sharding))
    else:
        placed = jax.device_put(host, sharding)
    if placed.dtype != host.dtype or placed.shape != host.shape:
        raise CheckpointError(
            f"leaf {path} became {placed.dtype.name} {placed.shape} on the device instead of {host.dtype.name} "
            f"{host.shape}; set jax_explicit_x64_dtypes to 'allow'"
        )
    return placed
