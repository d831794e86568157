"""Row gather in plain XLA: only the rows asked for are unpacked."""

import jax
import jax.numpy as jnp

from arbs_kernels.decode import decode


def gather(
    ids: jax.Array, trits: jax.Array, scale: jax.Array, *, in_features: int, group_size: int, dtype: jnp.dtype
) -> jax.Array:
    """See `api.packed_row_gather`."""
    return decode(trits[ids], scale[ids], in_features, group_size, dtype)
