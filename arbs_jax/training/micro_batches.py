"""Loops over the micro-batches of a stage."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def map_micro(function: Callable[[Any], tuple[Any, Any]], entries: Any, *, summed: bool = False) -> tuple[Any, Any]:
    """`function` over the leading axis of `entries`, one at a time; its second result stacked, or summed exactly."""
    micro = jax.tree.leaves(entries)[0].shape[0]
    first = jax.tree.map(lambda leaf: leaf[0], entries)
    if micro == 1:
        out, extra = function(first)
        lift = lambda tree: jax.tree.map(lambda leaf: leaf[None], tree)  # noqa: E731
        return lift(out), extra if summed else lift(extra)
    if not summed:
        return jax.lax.map(function, entries)

    def body(total: Any, entry: Any) -> tuple[Any, Any]:
        out, extra = function(entry)
        return jax.tree.map(jnp.add, total, extra), out

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(function, first)[1])
    total, out = jax.lax.scan(body, zeros, entries)
    return out, total


def carry_micro(function: Callable[[Any, Any], tuple[Any, Any]], state: Any, entries: Any) -> tuple[Any, Any]:
    """`function(state, entry)` over the leading axis of `entries`: (the state after all, second results stacked)."""
    if jax.tree.leaves(entries)[0].shape[0] > 1:
        return jax.lax.scan(function, state, entries)
    state, out = function(state, jax.tree.map(lambda leaf: leaf[0], entries))
    return state, jax.tree.map(lambda leaf: leaf[None], out)
