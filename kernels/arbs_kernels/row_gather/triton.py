"""Row gather by a Triton kernel: a program decodes some columns of a few rows, wherever their ids point."""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from arbs_kernels.packed_decode.triton import power_of_plane, trit_of
from arbs_kernels.triton_launch import launch, one_by_one

MOST_COLUMNS = 1024
"""Of one program."""
NUMBERS = 4096
"""Of one program, in the rows that it takes."""


@triton.jit
def rows_of(
    ids_ptr,
    trits_ptr,
    scale_ptr,
    w_ptr,
    COUNT: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """`w (COUNT, K)` float32 or bfloat16 from ids int32 (COUNT,), in range."""
    at = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    plane = columns // P
    # A table may have more than 2^31 bytes.
    ids = tl.load(ids_ptr + at, mask=at < COUNT, other=0).to(tl.int64)
    inside = (at < COUNT)[:, None] & (columns < K)[None, :]
    codes = tl.load(trits_ptr + ids[:, None] * P + (columns - plane * P)[None, :], mask=inside, other=0)
    scale = tl.load(scale_ptr + ids[:, None] * R + (columns // G)[None, :], mask=inside, other=0.0)
    weight = trit_of(codes, power_of_plane(plane)[None, :]).to(tl.float32) * scale
    tl.store(w_ptr + at.to(tl.int64)[:, None] * K + columns[None, :], weight, mask=inside)


def gather(
    ids: jax.Array, trits: jax.Array, scale: jax.Array, *, in_features: int, group_size: int, dtype: jnp.dtype
) -> jax.Array:
    """See `api.packed_row_gather`; dtypes other than float32 and bfloat16 are rounded from float32."""
    kept = dtype if dtype in (jnp.float32, jnp.bfloat16) else jnp.float32
    static = {"in_features": in_features, "group_size": group_size, "dtype": kept}
    return one_by_one(gather_of, ids, trits, scale, **static).astype(dtype)


def gather_of(
    ids: jax.Array, trits: jax.Array, scale: jax.Array, *, in_features: int, group_size: int, dtype: jnp.dtype
) -> jax.Array:
    """`gather` in float32 or bfloat16."""
    (N, P), K = trits.shape, in_features
    if not ids.size:
        return jnp.zeros((*ids.shape, K), dtype)
    # As `trits[ids]` does: negative ones count from the end, those past the table are clamped.
    if not jnp.issubdtype(ids.dtype, jnp.unsignedinteger):
        ids = jnp.where(ids < 0, ids + N, ids)
    flat = jnp.clip(ids.reshape(-1), 0, N - 1).astype(jnp.int32)
    columns = min(MOST_COLUMNS, triton.next_power_of_2(K))
    rows = min(NUMBERS // columns, triton.next_power_of_2(flat.size))
    w = launch(
        rows_of,
        flat,
        trits,
        scale,
        out=jax.ShapeDtypeStruct((flat.size, K), dtype),
        grid=(triton.cdiv(flat.size, rows), triton.cdiv(K, columns)),
        num_warps=4,
        num_stages=1,
        COUNT=flat.size,
        K=K,
        P=P,
        R=scale.shape[1],
        G=group_size,
        ROWS=rows,
        COLUMNS=columns,
    )
    return w.reshape(*ids.shape, K)
