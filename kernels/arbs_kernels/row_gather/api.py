"""Rows of a packed table."""

import jax
import jax.numpy as jnp

from arbs_kernels.backends import triton_missing
from arbs_kernels.row_gather import reference
from arbs_kernels.selection import Implementation, select
from arbs_kernels.shapes import check_matrix
from arbs_kernels.triton_launch import lazily
from arbs_kernels.tuning import tuned

GATHER = {
    "xla": Implementation(reference.gather),
    "triton": Implementation(lazily("arbs_kernels.row_gather.triton", "gather"), triton_missing),
}


def packed_row_gather(
    ids: jax.Array,
    trits: jax.Array,
    scale: jax.Array,
    *,
    in_features: int,
    group_size: int,
    dtype: jnp.dtype = jnp.float32,
    implementation: str | None = None,
) -> jax.Array:
    """Effective rows `W[ids]`; the rest of the table is not read.

    Args:
        ids: integer row numbers of any shape; those past the last row are clamped, as JAX gathers do.
        trits: `uint8 (N, ceil(K/5))`.
        scale: `float32 (N, ceil(K/group_size))`.
        in_features: `K`, the length of a row.
        group_size: columns that share one scale.
        dtype: of the result.
        implementation: "xla", "triton", or None for the best that works here.

    Returns:
        `(*ids.shape, K)` in `dtype`.

    Raises:
        ValueError: shapes or dtypes do not fit. UnsupportedError: no such implementation.
    """
    select("packed_row_gather", GATHER, implementation)  # a wrong name is said first
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"packed_row_gather: ids must be integers, got {ids.dtype}")
    check_matrix("packed_row_gather", trits, scale, in_features, group_size)
    shape = (ids.size, trits.shape[0], in_features, group_size)
    run = tuned("packed_row_gather", GATHER, implementation, shape, dtype)
    return run(ids, trits, scale, in_features=in_features, group_size=group_size, dtype=dtype)
