"""Rows out of and into one leaf, in plain XLA: a gather and a scatter of whole rows."""

import jax


def take(leaf: jax.Array, ids: jax.Array) -> jax.Array:
    """Rows `ids (U,)` of a leaf `(..., N, width)`; zeros for ids outside the table."""
    return leaf.at[..., ids, :].get(mode="fill", fill_value=0, wrap_negative_indices=False)


def put(leaf: jax.Array, ids: jax.Array, rows: jax.Array) -> jax.Array:
    """The leaf with rows `ids (U,)` replaced by `rows (..., U, width)`; ids outside the table write nothing."""
    return leaf.at[..., ids, :].set(rows, mode="drop", wrap_negative_indices=False)
