"""A transposed matrix in plain XLA, which may make it part of what reads it."""

import jax


def transposed(values: jax.Array) -> jax.Array:
    """See `api.byte_transpose`."""
    return values.T
