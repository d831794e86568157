"""Experts' weight gradients by a Triton kernel: a program sums one tile of one expert's gradient over its rows."""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from arbs_kernels.backends import compute_capability
from arbs_kernels.grouped_matmul.triton import Tile, table_entries
from arbs_kernels.triton_launch import check_size, launch, one_by_one

BIG = Tile(rows=128, columns=128, depth=64, num_warps=8, num_stages=3)
"""bfloat16 on data-centre GPUs since Hopper."""
SMALL = Tile(rows=64, columns=128, depth=32, num_warps=4, num_stages=3)
"""bfloat16 on others."""
FLOAT32 = Tile(rows=32, columns=64, depth=16, num_warps=4, num_stages=2)
"""No tensor core multiplies float32 in full."""


@triton.jit
def gradients(
    x_ptr,
    dy_ptr,
    sizes_ptr,
    out_ptr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    ENTRIES: tl.constexpr,
    X: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """`dy^T x` (X, N, K) of `x` (M, K) and `dy` (M, N), whose rows are sorted by expert. ENTRIES is a power of two."""
    ALONG: tl.constexpr = (K + COLUMNS - 1) // COLUMNS
    TILES: tl.constexpr = (N + ROWS - 1) // ROWS * ALONG
    expert = tl.program_id(0) // TILES
    tile = tl.program_id(0) % TILES
    entry = tl.arange(0, ENTRIES)
    sizes = tl.load(sizes_ptr + entry, mask=entry < X, other=0)
    begin = tl.sum(tl.where(entry < expert, sizes, 0), 0)
    end = tl.minimum(begin + tl.sum(tl.where(entry == expert, sizes, 0), 0), M)
    begin = tl.minimum(begin, M)
    rows = tile // ALONG * ROWS + tl.arange(0, ROWS)
    columns = tile % ALONG * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(begin, end, DEPTH):
        there = (first + depth < end)[:, None]
        dy = tl.load(dy_ptr + (first + depth)[:, None] * N + rows[None, :], mask=there & (rows < N)[None, :], other=0.0)
        x = tl.load(
            x_ptr + (first + depth)[:, None] * K + columns[None, :], mask=there & (columns < K)[None, :], other=0.0
        )
        total = tl.dot(tl.trans(dy), x, total, input_precision="ieee")
    held = (rows < N)[:, None] & (columns < K)[None, :]
    out = out_ptr + expert * (N * K) + rows[:, None] * K + columns[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=held)


def tile_of(dtype: jnp.dtype) -> Tile:
    """The tile for activations of a dtype on this device."""
    if dtype == jnp.float32:
        return FLOAT32
    return BIG if 9.0 <= compute_capability() < 12.0 else SMALL


def weight_gradients(x: jax.Array, dy: jax.Array, group_sizes: jax.Array, *, dtype: jnp.dtype) -> jax.Array:
    """See `api.grouped_weight_gradient`."""
    return one_by_one(gradients_of, x, dy, group_sizes, dtype=dtype)


def gradients_of(
    x: jax.Array, dy: jax.Array, group_sizes: jax.Array, *, dtype: jnp.dtype, tile: Tile | None = None
) -> jax.Array:
    """`weight_gradients` with its tile."""
    (M, K), N, X = x.shape, dy.shape[1], group_sizes.shape[0]
    out = jax.ShapeDtypeStruct((X, N, K), dtype)
    for name, array in {"x": x, "dy": dy, "the result": out}.items():
        check_size("grouped_weight_gradient", name, array)
    if M == 0:
        return jnp.zeros(out.shape, out.dtype)
    tile = tile or tile_of(x.dtype)
    return launch(
        gradients,
        x,
        dy,
        group_sizes,
        out=out,
        grid=(X * triton.cdiv(N, tile.rows) * triton.cdiv(K, tile.columns),),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        M=M,
        N=N,
        K=K,
        ENTRIES=table_entries(X),
        X=X,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        DEPTH=tile.depth,
    )
