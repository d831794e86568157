"""What shards of a step exchange: votes and events, over the mapped axis of `shard_map` or `pmap`.

Every function takes the axis' name, or None where there is one shard alone.
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


def summed(votes: Any, micro: int, largest_vote: Callable[[str], int | None], axis_name: str | None) -> Any:
    """Votes, each already the sum of a shard's `micro`, summed over all shards: exact, so in any order.

    Where float16 holds every sum exactly, by what one vote's entries are at most (`Rule.largest_vote`), it is what is
    exchanged: half the bytes of int32, and NCCL adds no integers of two bytes.
    """
    if axis_name is None:
        return votes
    count = micro * jax.lax.axis_size(axis_name)

    def total(path: Any, leaf: jax.Array) -> jax.Array:
        largest = largest_vote(jax.tree_util.keystr(path[-1:], simple=True))
        short = largest is not None and count * largest <= _LARGEST_EXACT
        return jax.lax.psum(leaf.astype(jnp.float16) if short else leaf, axis_name).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(total, votes)


def gathered(tree: Any, axis_name: str | None) -> Any:
    """Leaves stacked over micro-batches with those of all shards, in the order of their numbers."""
    if axis_name is None:
        return tree
    return jax.tree.map(lambda leaf: jax.lax.all_gather(leaf, axis_name, tiled=True), tree)
