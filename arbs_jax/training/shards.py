"""What micro-batches and shards add up or exchange: votes, and events over the mapped axis of `shard_map` or `pmap`.

An axis' name is None where there is one shard alone.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

_LARGEST_EXACT = 2**11
"""Up to here float16 holds every integer."""


def first_of(micro: int, axis_name: str | None) -> jax.Array | int:
    """The number of this shard's first micro-batch, of `micro`: counted over all shards, so that random bits do not
    depend on how the micro-batches are spread."""
    return 0 if axis_name is None else micro * jax.lax.axis_index(axis_name)


def narrowed(votes: Any, micro: int, largest_vote: Callable[[str], int | None]) -> Any:
    """Votes in int16 where that holds sums of `micro`, by what one vote's entries are at most (`Rule.largest_vote`)."""

    def narrow(path: Any, leaf: jax.Array) -> jax.Array:
        return leaf.astype(jnp.int16) if _within(2**15 - 1, path, micro, largest_vote) else leaf

    return jax.tree_util.tree_map_with_path(narrow, votes)


def widened(votes: Any) -> Any:
    """Votes as a rule takes them, in int32 at least."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.promote_types(leaf.dtype, jnp.int32)), votes)


def summed(votes: Any, micro: int, largest_vote: Callable[[str], int | None], axis_name: str | None) -> Any:
    """Votes, each already the sum of a shard's `micro`, summed over all shards: exact, so in any order.

    Where float16 holds every sum exactly, it is what is exchanged: half the bytes of int32, and NCCL adds no integers
    of two bytes.
    """
    if axis_name is None:
        return votes
    count = micro * jax.lax.axis_size(axis_name)

    def total(path: Any, leaf: jax.Array) -> jax.Array:
        if _within(_LARGEST_EXACT, path, count, largest_vote):
            return jax.lax.psum(leaf.astype(jnp.float16), axis_name).astype(leaf.dtype)
        return jax.lax.psum(widened(leaf), axis_name)

    return jax.tree_util.tree_map_with_path(total, votes)


def _within(most: int, path: Any, count: int, largest_vote: Callable[[str], int | None]) -> bool:
    """Whether no sum of `count` entries of that name exceeds `most`."""
    largest = largest_vote(jax.tree_util.keystr(path[-1:], simple=True))
    return largest is not None and count * largest <= most


def gathered(tree: Any, axis_name: str | None) -> Any:
    """Leaves stacked over micro-batches with those of all shards, in the order of their numbers."""
    if axis_name is None:
        return tree
    return jax.tree.map(lambda leaf: jax.lax.all_gather(leaf, axis_name, tiled=True), tree)
