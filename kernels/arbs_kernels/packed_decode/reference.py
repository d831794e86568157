"""Effective weights in plain XLA."""

import jax
import jax.numpy as jnp

from arbs_kernels import decode


def weight(trits: jax.Array, scale: jax.Array, *, in_features: int, group_size: int, dtype: jnp.dtype) -> jax.Array:
    """See `api.packed_decode`."""
    return decode.decode(trits, scale, in_features, group_size, dtype)
