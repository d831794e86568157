"""Rows out of and into one leaf, in plain XLA: a gather and a scatter of whole rows; and sums of rows."""

import jax
import jax.numpy as jnp

_FRACTION_BITS = 30
_TINY = 2.0**-96
"""Sums below this vanish: between here and there an exponent fits every shift."""


def take(leaf: jax.Array, ids: jax.Array) -> jax.Array:
    """Rows `ids (U,)` of a leaf `(..., N, width)`; zeros for ids outside the table."""
    return leaf.at[..., ids, :].get(mode="fill", fill_value=0, wrap_negative_indices=False)


def put(leaf: jax.Array, ids: jax.Array, rows: jax.Array) -> jax.Array:
    """The leaf with rows `ids (U,)` replaced by `rows (..., U, width)`; ids outside the table write nothing."""
    # Ids that write nothing are made different, too: writes that might meet a GPU held to an order does one by one.
    height, ids = leaf.shape[-2], ids.astype(jnp.int32)
    apart = jnp.where((ids >= 0) & (ids < height), ids, height + jnp.arange(ids.shape[0], dtype=jnp.int32))
    return leaf.at[..., apart, :].set(rows, mode="drop", unique_indices=True, wrap_negative_indices=False)


def sums(values: jax.Array, place: jax.Array, size: int) -> jax.Array:
    """See `api.sum_rows`, for float32. Adding floats by a scatter would depend on the order on GPUs."""
    largest = jnp.max(jnp.abs(values), axis=1)
    finite = jnp.isfinite(largest)
    count = jnp.zeros((size,), jnp.int32).at[place].add(1, mode="drop", wrap_negative_indices=False)
    most = (
        jnp.zeros((size,), jnp.float32)
        .at[place]
        .max(jnp.where(finite, largest, 0), mode="drop", wrap_negative_indices=False)
    )
    broken = jnp.zeros((size,), jnp.bool_).at[place].max(~finite, mode="drop", wrap_negative_indices=False)
    # most * count < 2^exponent, so no sum leaves 32 bits.
    exponent = jnp.frexp(jnp.maximum(most, _TINY))[1] + jnp.frexp(count.astype(jnp.float32))[1]
    shift = _FRACTION_BITS - exponent.at[place].get(mode="clip", wrap_negative_indices=False)
    fixed = jnp.round(jnp.ldexp(jnp.where(finite[:, None], values, 0), shift[:, None])).astype(jnp.int32)
    total = jnp.zeros((size, values.shape[1]), jnp.int32).at[place].add(fixed, mode="drop", wrap_negative_indices=False)
    summed = jnp.ldexp(total.astype(jnp.float32), exponent[:, None] - _FRACTION_BITS)
    return jnp.where(broken[:, None], jnp.nan, summed)
