"""A matrix of bytes turned round by a Triton kernel: blocks of 4 x 4 in registers, blocks of words in shared memory.

A thread that moved single bytes would need as many instructions as there are bytes. Four words of four rows, the same
four columns in each, become the four words of those columns by eight byte permutations; from there on words move.
"""

import jax
import triton
import triton.language as tl

from arbs_kernels.triton_launch import in_one_launch, launch

# Words $4 to $7, byte j of word i, to words $0 to $3, byte i of word j.
_FOUR_BY_FOUR = tl.constexpr(
    "{ .reg .b32 a, b, c, d; prmt.b32 a, $4, $5, 0x5140; prmt.b32 b, $4, $5, 0x7362; prmt.b32 c, $6, $7, 0x5140;"
    " prmt.b32 d, $6, $7, 0x7362; prmt.b32 $0, a, c, 0x5410; prmt.b32 $1, a, c, 0x7632; prmt.b32 $2, b, d, 0x5410;"
    " prmt.b32 $3, b, d, 0x7632; }"
)
_ROWS, _COLUMNS = 128, 128
"""Of a program."""


@triton.jit
def _words(values_ptr, out, M: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """M and C multiples of 4."""
    matrix = tl.program_id(2).to(tl.int64) * (M * C // 4)
    row = tl.program_id(0) * (ROWS // 4) + tl.arange(0, ROWS // 4)
    column = tl.program_id(1) * (COLUMNS // 4) + tl.arange(0, COLUMNS // 4)
    inside = (row < M // 4)[:, None] & (column < C // 4)[None, :]
    read = values_ptr.to(tl.pointer_type(tl.int32)) + matrix + row.to(tl.int64)[:, None] * C + column[None, :]
    four = tl.inline_asm_elementwise(
        _FOUR_BY_FOUR,
        "=r,=r,=r,=r,r,r,r,r",
        [
            tl.load(read, mask=inside, other=0),
            tl.load(read + C // 4, mask=inside, other=0),
            tl.load(read + C // 2, mask=inside, other=0),
            tl.load(read + 3 * C // 4, mask=inside, other=0),
        ],
        (tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )
    turned = (column < C // 4)[:, None] & (row < M // 4)[None, :]
    written = out.to(tl.pointer_type(tl.int32)) + matrix + column.to(tl.int64)[:, None] * M + row[None, :]
    for at in tl.static_range(4):
        tl.store(written + at * (M // 4), tl.trans(four[at]), mask=turned)


@triton.jit
def _bytes(values_ptr, out, M: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Any M and C."""
    matrix = tl.program_id(2).to(tl.int64) * (M * C)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < M)[:, None] & (column < C)[None, :]
    read = values_ptr.to(tl.pointer_type(tl.uint8)) + matrix + row.to(tl.int64)[:, None] * C + column[None, :]
    turned = (column < C)[:, None] & (row < M)[None, :]
    written = out.to(tl.pointer_type(tl.uint8)) + matrix + column.to(tl.int64)[:, None] * M + row[None, :]
    tl.store(written, tl.trans(tl.load(read, mask=inside, other=0)), mask=turned)


def transposed(values: jax.Array) -> jax.Array:
    """See `api.byte_transpose`."""
    return in_one_launch(_launched, values)


def _launched(stack: jax.Array) -> jax.Array:
    count, M, C = stack.shape
    whole_words = M % 4 == 0 and C % 4 == 0
    return launch(
        _words if whole_words else _bytes,
        stack,
        out=jax.ShapeDtypeStruct((count, C, M), stack.dtype),
        num_warps=4,
        num_stages=1,
        grid=(triton.cdiv(M, _ROWS), triton.cdiv(C, _COLUMNS), count),
        M=M,
        C=C,
        ROWS=_ROWS,
        COLUMNS=_COLUMNS,
    )
