"""Rows of a packed table, and sums of rows for it."""

import jax
import jax.numpy as jnp

from arbs_kernels.backends import compute_capability, triton_missing
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
        trits: `uint8 (N, P)`.
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
    return run(_wide(ids), trits, scale, in_features=in_features, group_size=group_size, dtype=dtype)


def sums_of_rows(ids: jax.Array, rows: jax.Array, table_rows: int) -> jax.Array:
    """For every row of a table the sum of the given rows that have its id: the gradient of a gather.

    On an NVIDIA GPU a product, which repeats bit for bit where a scatter would not; elsewhere a scatter.

    Args:
        ids: integers `(M,)`; those outside `[0, N)` add nothing.
        rows: `(M, K)`, float32 or bfloat16.
        table_rows: `N`; for vocabularies, the product takes `M N K` multiplications.

    Returns:
        float32 `(N, K)`.
    """
    by = reference.sums_by_product if compute_capability() else reference.sums_by_scatter
    return by(_wide(ids), rows, table_rows)


def _wide(ids: jax.Array) -> jax.Array:
    """Ids that can be compared with any table's height, which wraps in the dtype of bytes."""
    return ids.astype(jnp.int32) if ids.dtype.itemsize < 4 else ids
