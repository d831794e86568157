"""One half of a symmetric product by a Triton kernel; each tile is stored where it lies and, turned, across.

A tile on the diagonal takes what it has above it from below: every number is stored once, so that the result is
symmetric to the bit and the same from run to run. Stores have no mask but the matrix's end, and are whole vectors.
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from arbs_kernels.triton_launch import launch


@triton.jit
def _half(a_ptr, b_ptr, out, M: tl.constexpr, N: tl.constexpr, SIDE: tl.constexpr, DEPTH: tl.constexpr):
    """One tile of SIDE x SIDE of the lower half; `DEPTH` columns of a and b at a time."""
    # Numbered row by row, the longest first.
    row_tile = (M + SIDE - 1) // SIDE - 1
    tile = tl.program_id(0)
    while tile > row_tile:
        tile -= row_tile + 1
        row_tile -= 1
    matrix = tl.program_id(1).to(tl.int64)
    rows = row_tile * SIDE + tl.arange(0, SIDE)
    columns = tile * SIDE + tl.arange(0, SIDE)
    depth = tl.arange(0, DEPTH)
    # Rows beyond the end are those of the beginning once more, and are not stored.
    a_at = a_ptr + matrix * (M * N) + (rows if M % SIDE == 0 else rows % M)[:, None] * N + depth[None, :]
    b_at = b_ptr + matrix * (M * N) + (columns if M % SIDE == 0 else columns % M)[None, :] * N + depth[:, None]
    sums = tl.zeros((SIDE, SIDE), tl.float32)
    for start in range(0, N, DEPTH):
        if N % DEPTH:
            inside = start + depth < N
            a = tl.load(a_at, mask=inside[None, :], other=0.0)
            b = tl.load(b_at, mask=inside[:, None], other=0.0)
            sums = tl.dot(a, b, sums)
        else:
            sums = tl.dot(tl.load(a_at), tl.load(b_at), sums)
        a_at += DEPTH
        b_at += DEPTH
    made = sums.to(tl.bfloat16)
    turned = tl.trans(made)
    place = out + matrix * (M * M)
    if row_tile == tile:
        made = tl.where(rows[:, None] >= columns[None, :], made, turned)
    else:
        at = place + columns[:, None] * M + rows[None, :]
        if M % SIDE:
            tl.store(at, turned, mask=(columns < M)[:, None] & (rows < M)[None, :])
        else:
            tl.store(at, turned)
    at = place + rows[:, None] * M + columns[None, :]
    if M % SIDE:
        tl.store(at, made, mask=(rows < M)[:, None] & (columns < M)[None, :])
    else:
        tl.store(at, made)


def halves(a: jax.Array, b: jax.Array, *, side: int, depth: int, num_warps: int, num_stages: int) -> jax.Array:
    """`a b^T` of stacks `(count, m, n)` in bfloat16, each known to be symmetric; a program takes `side` by `side`
    numbers of a result."""
    count, M, N = a.shape
    tiles = triton.cdiv(M, side)
    return launch(
        _half,
        a,
        b,
        out=jax.ShapeDtypeStruct((count, M, M), jnp.bfloat16),
        num_warps=num_warps,
        num_stages=num_stages,
        grid=(tiles * (tiles + 1) // 2, count),
        M=M,
        N=N,
        SIDE=side,
        DEPTH=depth,
    )
