"""A step on some rows of a table of millions: take their leaves out, update them, put them back in place.

Leaves are arrays whose last axis but one counts the rows of the table: trits `(N, P)`, exponent and corr `(N, R)`,
planes of residuals `(Q, N, P)`. Nothing of the table's size is made beside it when the table is donated.

    ids, place = unique_rows(tokens, table_rows=N)
    rows = rows_of(leaves, ids)
    leaves = put_rows(leaves, ids, updated(rows))
"""

from typing import Any

import jax
import jax.numpy as jnp

from arbs_kernels.row_update import reference


def unique_rows(ids: jax.Array, *, table_rows: int, size: int | None = None) -> tuple[jax.Array, jax.Array]:
    """The different ids of a batch, and where each of the batch is among them.

    Args:
        ids: integers of any shape in `[0, table_rows)`.
        table_rows: `N`; the padding, which `rows_of` and `put_rows` pass over.
        size: how many to return, None for as many as could differ; if more differ, the largest are lost, and `place`
            is `size` for them.

    Returns:
        `(unique int32 (size,) in ascending order, padded with N; place int32 of the shape of ids)`.

    Raises:
        ValueError: ids are no integers, or the table has no rows.
    """
    _check_ids(ids)
    if table_rows < 1:
        raise ValueError(f"unique_rows: table_rows must be at least 1, got {table_rows}")
    count = min(ids.size, table_rows) if size is None else size
    flat = ids.reshape(-1).astype(jnp.int32)
    unique = jnp.unique(flat, size=count, fill_value=table_rows)
    place = jnp.searchsorted(unique, flat).astype(jnp.int32)
    return unique, place.reshape(ids.shape)


def rows_of(leaves: Any, ids: jax.Array) -> Any:
    """The rows `ids` of every leaf.

    Args:
        leaves: tree of arrays `(..., N, width)`, all of one N.
        ids: integers `(U,)`; outside `[0, N)` they stand for rows of zeros.

    Returns:
        The tree with leaves `(..., U, width)`, dtypes as they were.

    Raises:
        ValueError: ids are no integers on one axis, or leaves do not agree on N.
    """
    _check_ids(ids, axes=1)
    _table_rows(leaves)
    return jax.tree.map(lambda leaf: reference.take(leaf, ids), leaves)


def put_rows(leaves: Any, ids: jax.Array, rows: Any) -> Any:
    """The tree with rows `ids` of every leaf replaced; in place where the tree is donated.

    Args:
        leaves: tree of arrays `(..., N, width)`, all of one N.
        ids: integers `(U,)`, different from one another (of equal ids some one is written); those outside `[0, N)`, as
            the padding of `unique_rows`, write nothing.
        rows: the same tree with leaves `(..., U, width)` of the same dtypes.

    Raises:
        ValueError: ids are no integers on one axis, leaves do not agree on N, or rows do not fit the leaves.
    """
    _check_ids(ids, axes=1)
    _table_rows(leaves)

    def put(path: Any, leaf: jax.Array, new: jax.Array) -> jax.Array:
        expected = (*leaf.shape[:-2], ids.shape[0], leaf.shape[-1])
        if new.shape != expected or new.dtype != leaf.dtype:
            raise ValueError(
                f"put_rows: rows{jax.tree_util.keystr(path)} must be {leaf.dtype} {expected}, "
                f"got {new.dtype} {new.shape}"
            )
        return reference.put(leaf, ids, new)

    return jax.tree_util.tree_map_with_path(put, leaves, rows)


def sum_rows(values: jax.Array, place: jax.Array, size: int) -> jax.Array:
    """Sums of the rows that share a place, the same bits in whatever order they are added.

    Floats are added as 31-bit fixed-point numbers, whose point is that of the largest possible sum of their place:
    every entry of n rows is rounded by at most 2^-29 of n times the largest of them, and not at all where its bits fit.

    Args:
        values: `(M, K)`, floats.
        place: integers `(M,)`, as of `unique_rows`; rows whose place is outside `[0, size)` are left out.
        size: places.

    Returns:
        float32 `(size, K)`; NaN in all of a place one of whose values is not finite.

    Raises:
        ValueError: places are no integers, one for each row.
    """
    _check_ids(place, axes=1)
    if values.ndim != 2 or values.shape[0] != place.shape[0]:
        raise ValueError(f"sum_rows: values must be (M, K) with M = {place.shape[0]} places, got {values.shape}")
    return reference.sums(values.astype(jnp.float32), place, size)


def _check_ids(ids: jax.Array, axes: int | None = None) -> None:
    if not jnp.issubdtype(ids.dtype, jnp.integer) or (axes is not None and ids.ndim != axes):
        raise ValueError(
            f"row_update: ids must be integers{'' if axes is None else ' (U,)'}, got {ids.dtype} {ids.shape}"
        )


def _table_rows(leaves: Any) -> None:
    shapes = {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(leaves)}
    if any(len(shape) < 2 for shape in shapes.values()) or len({shape[-2] for shape in shapes.values()}) > 1:
        raise ValueError(f"row_update: leaves must have shapes (..., N, width) of one N, got {shapes}")
