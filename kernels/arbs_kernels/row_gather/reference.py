"""Row gather in plain XLA: only the rows asked for are unpacked."""

import jax
import jax.numpy as jnp

from arbs_kernels.decode import decode


def gather(
    ids: jax.Array, trits: jax.Array, scale: jax.Array, *, in_features: int, group_size: int, dtype: jnp.dtype
) -> jax.Array:
    """See `api.packed_row_gather`."""
    return decode(trits[ids], scale[ids], in_features, group_size, dtype)


def sums_by_scatter(ids: jax.Array, rows: jax.Array, table_rows: int) -> jax.Array:
    """See `api.sums_of_rows`; a GPU would add the rows of one id in any order."""
    return jnp.zeros((table_rows, rows.shape[1]), jnp.float32).at[ids].add(rows.astype(jnp.float32))


def sums_by_product(ids: jax.Array, rows: jax.Array, table_rows: int) -> jax.Array:
    """See `api.sums_of_rows`; the same bits every time."""
    chosen = jax.nn.one_hot(ids, table_rows, dtype=rows.dtype)
    return jax.lax.dot_general(
        chosen,
        rows,
        (((0,), (0,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
