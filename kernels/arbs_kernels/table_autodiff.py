"""Rows of a table of millions, differentiable: what is probed is the rows that were looked up, never the table.

The probe is `{"rows": (M, K), "ids": (M,), "count": ()}` for M lookups; its cotangents are the gradient of every row
that was looked up, the ids as float32 (exact up to 2^24; they may have been computed where only a cotangent gets out)
and 1. Occurrences of one row are not summed here: the vote does it (`arbs_kernels.row_update.sum_rows`).

Ids add up where uses do, so one probe serves one use. Under `vmap` or in a `lax.scan` that shares it the count is not
1, by which the sum is known for what it is: no vote.
"""

from functools import partial

import jax
import jax.numpy as jnp

from arbs_kernels.autodiff import Kinds, Leaves, MatmulSpec, Probe, kinds_of
from arbs_kernels.decode import decode
from arbs_kernels.row_update import rows_of

MOST_ROWS = 2**24
"""Rows whose ids, and the number of rows itself, are exact in float32."""


def make_rows_probe(lookups: int, in_features: int, dtype: jnp.dtype = jnp.float32) -> dict[str, jax.Array]:
    """Zeros whose cotangent is the vote of `lookups` rows; `dtype` is that of their gradient."""
    return {
        "rows": jnp.zeros((lookups, in_features), dtype),
        "ids": jnp.zeros((lookups,), jnp.float32),
        "count": jnp.zeros((), jnp.float32),
    }


def ternary_rows(
    ids: jax.Array, leaves: Leaves, spec: MatmulSpec, dtype: jnp.dtype, probe: Probe | None = None
) -> jax.Array:
    """Rows `W[ids]`, shape `(*ids.shape, K)` in `dtype`; differentiable in `probe`.

    Only the rows asked for are taken, scaled and decoded. Ids outside `[0, N)` read zeros and vote for nothing.

    Args:
        ids: integers of any shape.
        leaves: integer state of one table: those with a row axis `(N, width)`, and scalars of the whole table.
        spec: static description; its law sees the leaves of the rows as those of a matrix of `ids.size` rows.
        dtype: of the result.
        probe: of `make_rows_probe` for `ids.size` lookups; None collects no votes.

    Raises:
        ValueError: the table is too high for ids in float32, or the probe is for another number of lookups.
    """
    height = leaves["trits"].shape[0]
    if height > MOST_ROWS:
        raise ValueError(f"ternary_rows: a table has at most {MOST_ROWS} rows, got {height}")
    if probe is not None and probe["rows"].shape[0] != ids.size:
        raise ValueError(f"ternary_rows: a probe for {probe['rows'].shape[0]} lookups was given {ids.size} ids")
    return _rows(spec, jnp.dtype(dtype), ids, dict(leaves), None if probe is None else dict(probe))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _rows(spec: MatmulSpec, dtype: jnp.dtype, ids: jax.Array, leaves: dict, probe: dict | None) -> jax.Array:
    flat = ids.reshape(-1)
    inside = _inside(flat, leaves)
    own = {name: leaf if leaf.ndim < 2 else rows_of(leaf, flat) for name, leaf in leaves.items()}
    rows = decode(*spec.operands(own), spec.in_features, spec.group_size, dtype)
    return jnp.where(inside[:, None], rows, jnp.zeros((), dtype)).reshape(*ids.shape, spec.in_features)


def _rows_forward(spec: MatmulSpec, dtype: jnp.dtype, ids: jax.Array, leaves: dict, probe: dict | None):
    height = jnp.int32(leaves["trits"].shape[0])
    known = jnp.where(_inside(ids, leaves), ids.astype(jnp.int32), height)
    return _rows(spec, dtype, ids, leaves, probe), (known, kinds_of(probe))


def _rows_backward(spec: MatmulSpec, dtype: jnp.dtype, saved: tuple[jax.Array, Kinds | None], dy: jax.Array):
    known, kinds = saved
    if kinds is None:
        return None, None, None
    dtypes = dict(kinds.dtypes)
    # Made from `dy`, as the count of a product is, so that it adds up where uses do.
    one = jnp.where(jnp.any(jnp.isnan(dy)), jnp.float32(1), jnp.float32(1))
    votes = {
        "rows": dy.reshape(-1, spec.in_features).astype(dtypes["rows"]),
        "ids": known.reshape(-1).astype(jnp.float32) * one,
        "count": one,
    }
    return None, None, {name: votes[name] for name in dtypes}


_rows.defvjp(_rows_forward, _rows_backward)


def _inside(ids: jax.Array, leaves: dict) -> jax.Array:
    return (ids >= 0) & (ids < leaves["trits"].shape[0])
