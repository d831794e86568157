"""The Triton kernel that multiplies one row of bfloat16 activations by the bytes themselves.

Like `few_rows_kernel` it computes `y^T = W x^T` with the tensor core's 16 x 8 x 16 product on what each warp decodes in
its own registers, one element of a tensor for each thread of the program. But x^T has one column where the tensor core
takes eight. So column `p` of the second operand is what meets plane `p`: each plane is multiplied by all, and of its
sums those of its own one are kept. Planes stay apart, and where the 32 bytes that a warp takes at once have one
scale for each plane, four sums of a thread are scaled in float32, in place of its 80 weights; one load of x serves all
planes.

Each warp takes all rows of its program, of other bytes than other warps; sums meet at the end. Loads for the next 32
bytes take the place of registers that were just used.
"""

# ruff: noqa: RUF005  Triton's compiler knows no unpacking.

import triton
import triton.language as tl

from arbs_kernels.packed_matmul.few_rows_ptx import FAR, five_planes, loaded, product, quad_sum

WINDOW = tl.constexpr(32)
"""Bytes of a row that a warp takes at once."""


@triton.jit
def scales_at(scales_of, byte, lane, N: tl.constexpr, P: tl.constexpr, R: tl.constexpr, G: tl.constexpr):
    """Addresses of a thread's scales of planes `2 (lane % 4)` and the next, as far as there are such planes."""
    at = ()
    for second in tl.static_range(2):
        plane = tl.minimum(lane % 4 * 2 + second, 4)
        group = tl.minimum((plane * P + byte) // G, R - 1)
        at = at + (scales_of + group.to(tl.int64) * (2 * N),)
    return at


@triton.jit
def tile_at(codes_at, scale_at, TILE: tl.constexpr, P: tl.constexpr):
    """A thread's eight codes each of two rows of a tile, four registers, and its scales of both, two pairs."""
    at = codes_at + 16 * TILE * P
    codes = loaded(at, 0, 1, 0, 2, True) + loaded(at + P, 0, 1, 0, 2, True)
    return (
        codes + loaded(scale_at[0] + 32 * TILE, 0, 1, 0, 1, False) + loaded(scale_at[1] + 32 * TILE, 0, 1, 0, 1, False)
    )


@triton.jit
def x_at(x_of, column, byte, lane, K: tl.constexpr, P: tl.constexpr):
    """Eight activations of a thread, of the plane of its column; zeros past the row, where codes are any."""
    return loaded(x_of + 2 * byte, tl.where((lane < 20) & (byte < P), column + byte, FAR), K, 0, 4, False)


@triton.jit
def one_of(pair, SECOND: tl.constexpr):
    """One of two bfloat16 in a uint32, as float32."""
    return (pair & 0xFFFF0000 if SECOND else pair << 16).to(tl.float32, bitcast=True)


@triton.jit
def products(trits, x, none):
    """Of each plane the sums of a thread, a tuple of four, of fragments of a tile (of each word of two rows those of
    five planes) and of x^T."""
    c = ()
    for plane in tl.static_range(5):
        four = (none, none, none, none)
        for word in tl.static_range(2):
            four = product(
                trits[word][2 * plane],
                trits[2 + word][2 * plane],
                trits[word][2 * plane + 1],
                trits[2 + word][2 * plane + 1],
                x[2 * word],
                x[2 * word + 1],
                four[0],
                four[1],
                four[2],
                four[3],
            )
        c = c + (four,)
    return c


@triton.jit
def own_sums(c, lane, ROW: tl.constexpr):
    """Of a row those sums that are in the column of their plane: planes `2 (lane % 4)` and the next. In columns 5 to 7
    there are sums of zeros, whatever the plane."""
    even = tl.where(lane % 4 == 0, c[0][2 * ROW], tl.where(lane % 4 == 1, c[2][2 * ROW], c[4][2 * ROW]))
    return even, tl.where(lane % 4 == 0, c[1][2 * ROW + 1], c[3][2 * ROW + 1])


@triton.jit
def one_row(
    x_ptr,
    trits_ptr,
    scale_ptr,
    y_ptr,
    N: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
    STEPS: tl.constexpr,
    ROW_TILES: tl.constexpr,
    WARPS: tl.constexpr,
):
    """`y` (1, N) of `16 ROW_TILES` rows, of which W has no fewer; the last two programs may share some.

    x: bfloat16 (1, K); scale: bfloat16 (R, N). P and G are multiples of WINDOW, K of 8 and N of 2.
    """
    STRIDE: tl.constexpr = WARPS * WINDOW
    thread = tl.arange(0, 32 * WARPS)
    lane = thread % 32
    block = tl.minimum(tl.program_id(0) * (16 * ROW_TILES), N - 16 * ROW_TILES)
    # With g = lane / 4 and t the rest a thread has rows 2g and 2g + 1 of each tile, whose scales are one load, and
    # columns 2t and 2t + 1 of the sums; of x^T it has column g.
    own = block + lane // 4 * 2
    codes_of = trits_ptr.to(tl.int64) + own.to(tl.int64) * P + lane % 4 * 8
    scales_of = scale_ptr.to(tl.int64) + 2 * own.to(tl.int64)
    column = lane // 4 * P + lane % 4 * 8
    x_of = x_ptr.to(tl.int64) + 2 * column.to(tl.int64)
    none = tl.zeros_like(lane).to(tl.float32)

    byte = thread // 32 * WINDOW
    inside = tl.minimum(byte, P - WINDOW)
    scale_at = scales_at(scales_of, inside, lane, N, P, R, G)
    asked = ()
    total = ()
    for tile in tl.static_range(ROW_TILES):
        asked = asked + tile_at(codes_of + inside, scale_at, tile, P)
        total = total + (none, none)
    next_x = x_at(x_of, column, byte, lane, K, P)
    for _ in range(STEPS):
        byte += STRIDE
        inside = tl.minimum(byte, P - WINDOW)
        scale_at = scales_at(scales_of, inside, lane, N, P, R, G)
        x = next_x
        next_x = x_at(x_of, column, byte, lane, K, P)
        given = asked
        asked = ()
        sums = ()
        for tile in tl.static_range(ROW_TILES):
            trits = ()
            for word in tl.static_range(4):
                trits = trits + (five_planes(given[6 * tile + word], True),)
            asked = asked + tile_at(codes_of + inside, scale_at, tile, P)
            c = products(trits, x, none)
            for row in tl.static_range(2):
                even, odd = own_sums(c, lane, row)
                value = total[2 * tile + row] + even * one_of(given[6 * tile + 4], row)
                sums = sums + (value + odd * one_of(given[6 * tile + 5], row),)
        total = sums

    # Of four threads that share rows each brings those of one tile to the end. Trits were twice what they should be.
    lanes = tl.arange(0, 64)
    for first in tl.static_range(0, ROW_TILES, 4):
        even = none
        odd = none
        for tile in tl.static_range(first, min(first + 4, ROW_TILES)):
            even = tl.where(lane % 4 == tile - first, quad_sum(total[2 * tile]), even)
            odd = tl.where(lane % 4 == tile - first, quad_sum(total[2 * tile + 1]), odd)
        value = 0.5 * tl.sum(tl.reshape(tl.join(even, odd), (WARPS, 64)), axis=0)
        tile = first + lanes // 2 % 4
        row = block + tile * 16 + lanes // 8 * 2 + lanes % 2
        tl.store(y_ptr + row, value.to(y_ptr.dtype.element_ty), mask=tile < ROW_TILES)
