"""The Triton kernel that multiplies up to 16 rows of bfloat16 activations by windows of 32 bytes with a scale a plane.

Like `few_rows_kernel` it computes `y^T = W x^T` with the tensor core's 16 x 8 x 16 product on what each warp decodes in
its own registers, one element of a tensor for each thread of the program. But the trits themselves are multiplied, one
plane of 32 bytes of each row after another, and their sums are scaled, in float32: of one row of x four sums of a
thread, in place of its 80 weights.

The second operand has eight columns, for eight rows of x. If there is only one, column `p` is what meets plane `p`:
each plane is multiplied by all, and of its sums those of its own one are kept. So one load of x serves all planes.

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
def scale_at(scales_of, plane, byte, N: tl.constexpr, P: tl.constexpr, R: tl.constexpr, G: tl.constexpr):
    """The address of a thread's scales of a plane of the window at `byte`."""
    # The same, but the compiler does not see that of the first a constant and one quotient for all planes are left.
    group = plane * (P // G) + byte // G if P % G == 0 else (plane * P + byte) // G
    if R * G < 5 * P:
        group = tl.minimum(group, R - 1)
    return scales_of + group.to(tl.int64) * (2 * N)


@triton.jit
def scales_of_window(
    scales_of, byte, lane, N: tl.constexpr, P: tl.constexpr, R: tl.constexpr, G: tl.constexpr, M: tl.constexpr
):
    """Addresses of a thread's scales: of all planes, or for one row of x of planes `2 (lane % 4)` and the next, as far
    as there are such planes."""
    at = ()
    if M == 1:
        for second in tl.static_range(2):
            at = at + (scale_at(scales_of, tl.minimum(lane % 4 * 2 + second, 4), byte, N, P, R, G),)
    else:
        for plane in tl.static_range(5):
            at = at + (scale_at(scales_of, plane, byte, N, P, R, G),)
    return at


@triton.jit
def tile_at(codes_at, scales_at, TILE: tl.constexpr, P: tl.constexpr):
    """A thread's eight codes each of two rows of a tile, four registers, and its pairs of scales of both."""
    at = codes_at + 16 * TILE * P
    given = loaded(at, 0, 1, 0, 2, True) + loaded(at + P, 0, 1, 0, 2, True)
    for index in tl.static_range(len(scales_at)):
        given = given + loaded(scales_at[index] + 32 * TILE, 0, 1, 0, 1, False)
    return given


@triton.jit
def x_at(x_of, column, byte, own, K: tl.constexpr, P: tl.constexpr):
    """Eight activations of a thread; zeros past the row, where codes are any, and where they are not its own."""
    return loaded(x_of + 2 * byte, tl.where(own & (byte < P), column + byte, FAR), K, 0, 4, False)


@triton.jit
def x_of_window(x_of, byte, lane, K: tl.constexpr, P: tl.constexpr, M: tl.constexpr):
    """A thread's activations, four registers for each plane and eight rows of x; of one row four for all planes."""
    column = lane % 4 * 8
    if M == 1:
        plane = lane // 4
        x = x_at(x_of + 2 * (plane * P).to(tl.int64), plane * P + column, byte, plane < 5, K, P)
    else:
        x = ()
        for plane in tl.static_range(5):
            for first in tl.static_range(0, M, 8):
                at = x_of + 2 * (first * K + plane * P)
                x = x + x_at(at, plane * P + column, byte, first + lane // 4 < M, K, P)
    return x


@triton.jit
def plane_product(trits, PLANE: tl.constexpr, x, FIRST: tl.constexpr):
    """A thread's four sums of a tile (of each word of two rows the trits of five planes) in one plane, and of x."""
    none = tl.zeros_like(x[0]).to(tl.float32)
    four = (none, none, none, none)
    for word in tl.static_range(2):
        four = product(
            trits[word][2 * PLANE],
            trits[2 + word][2 * PLANE],
            trits[word][2 * PLANE + 1],
            trits[2 + word][2 * PLANE + 1],
            x[FIRST + 2 * word],
            x[FIRST + 2 * word + 1],
            four[0],
            four[1],
            four[2],
            four[3],
        )
    return four


@triton.jit
def one_of(pair, SECOND: tl.constexpr):
    """One of two bfloat16 in a uint32, as float32."""
    return (pair & 0xFFFF0000 if SECOND else pair << 16).to(tl.float32, bitcast=True)


@triton.jit
def added_one(total, trits, scales, x, lane):
    """Sums of two rows of W with the products by one row of x."""
    c = (
        plane_product(trits, 0, x, 0),
        plane_product(trits, 1, x, 0),
        plane_product(trits, 2, x, 0),
        plane_product(trits, 3, x, 0),
        plane_product(trits, 4, x, 0),
    )
    sums = ()
    for row in tl.static_range(2):
        # In columns 5 to 7 there are sums of zeros, whatever the plane.
        even = tl.where(lane % 4 == 0, c[0][2 * row], tl.where(lane % 4 == 1, c[2][2 * row], c[4][2 * row]))
        odd = tl.where(lane % 4 == 0, c[1][2 * row + 1], c[3][2 * row + 1])
        sums = sums + (total[row] + even * one_of(scales[0], row) + odd * one_of(scales[1], row),)
    return sums


@triton.jit
def added(total, trits, scales, x, BLOCKS: tl.constexpr):
    """Sums of two rows of W and, for each eight rows of x, two of those, with their products."""
    for plane in tl.static_range(5):
        sums = ()
        for block in tl.static_range(BLOCKS):
            four = plane_product(trits, plane, x, 4 * (BLOCKS * plane + block))
            for index in tl.static_range(4):
                sums = sums + (total[4 * block + index] + four[index] * one_of(scales[plane], index // 2),)
        total = sums
    return total


@triton.jit
def whole_windows(
    x_ptr,
    trits_ptr,
    scale_ptr,
    y_ptr,
    N: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
    M: tl.constexpr,
    STEPS: tl.constexpr,
    ROW_TILES: tl.constexpr,
    WARPS: tl.constexpr,
):
    """`y` (M, N) of `16 ROW_TILES` rows of W, which has no fewer; the last two programs may share some.

    x: bfloat16 (M, K); scale: bfloat16 (R, N). P and G are multiples of WINDOW, K of 8 and N of 2.
    """
    BLOCKS: tl.constexpr = (M + 7) // 8
    SCALES: tl.constexpr = 2 if M == 1 else 5
    GIVEN: tl.constexpr = 4 + SCALES
    SUMS: tl.constexpr = 2 if M == 1 else 4 * BLOCKS
    thread = tl.arange(0, 32 * WARPS)
    lane = thread % 32
    block = tl.minimum(tl.program_id(0) * (16 * ROW_TILES), N - 16 * ROW_TILES)
    # With g = lane / 4 and t the rest a thread has rows 2g and 2g + 1 of each tile, whose scales are one load, and
    # columns 2t and 2t + 1 of the sums; of x^T it has column g, and eight of each 32 rows, as of codes.
    own = block + lane // 4 * 2
    codes_of = trits_ptr.to(tl.int64) + own.to(tl.int64) * P + lane % 4 * 8
    scales_of = scale_ptr.to(tl.int64) + 2 * own.to(tl.int64)
    x_of = x_ptr.to(tl.int64) + lane % 4 * 16
    if M > 1:
        x_of += (lane // 4).to(tl.int64) * (2 * K)

    byte = thread // 32 * WINDOW
    inside = tl.minimum(byte, P - WINDOW)
    scales_at = scales_of_window(scales_of, inside, lane, N, P, R, G, M)
    asked = ()
    for tile in tl.static_range(ROW_TILES):
        asked = asked + tile_at(codes_of + inside, scales_at, tile, P)
    next_x = x_of_window(x_of, byte, lane, K, P, M)
    total = ()
    for _ in tl.static_range(SUMS * ROW_TILES):
        total = total + (tl.zeros_like(lane).to(tl.float32),)
    for _ in range(STEPS):
        byte += WARPS * WINDOW
        inside = tl.minimum(byte, P - WINDOW)
        scales_at = scales_of_window(scales_of, inside, lane, N, P, R, G, M)
        x = next_x
        next_x = x_of_window(x_of, byte, lane, K, P, M)
        given = asked
        asked = ()
        sums = ()
        for tile in tl.static_range(ROW_TILES):
            trits = (
                five_planes(given[GIVEN * tile], True),
                five_planes(given[GIVEN * tile + 1], True),
                five_planes(given[GIVEN * tile + 2], True),
                five_planes(given[GIVEN * tile + 3], True),
            )
            asked = asked + tile_at(codes_of + inside, scales_at, tile, P)
            scales = given[GIVEN * tile + 4 : GIVEN * (tile + 1)]
            before = total[SUMS * tile : SUMS * (tile + 1)]
            if M == 1:
                sums = sums + added_one(before, trits, scales, x, lane)
            else:
                sums = sums + added(before, trits, scales, x, BLOCKS)
        total = sums

    # Trits were twice what they should be.
    if M == 1:
        # Of four threads that share rows each brings those of one tile to the end.
        lanes = tl.arange(0, 64)
        for first in tl.static_range(0, ROW_TILES, 4):
            even = tl.zeros_like(lane).to(tl.float32)
            odd = even
            for tile in tl.static_range(first, min(first + 4, ROW_TILES)):
                even = tl.where(lane % 4 == tile - first, quad_sum(total[2 * tile]), even)
                odd = tl.where(lane % 4 == tile - first, quad_sum(total[2 * tile + 1]), odd)
            value = 0.5 * tl.sum(tl.reshape(tl.join(even, odd), (WARPS, 64)), axis=0)
            tile = first + lanes // 2 % 4
            row = block + tile * 16 + lanes // 8 * 2 + lanes % 2
            tl.store(y_ptr + row, value.to(y_ptr.dtype.element_ty), mask=tile < ROW_TILES)
    else:
        lanes = tl.arange(0, 128)
        for part in tl.static_range(ROW_TILES * BLOCKS):
            even = tl.join(total[4 * part], total[4 * part + 2])
            odd = tl.join(total[4 * part + 1], total[4 * part + 3])
            pairs = tl.reshape(tl.permute(tl.join(even, odd), (0, 2, 1)), (WARPS, 128))
            value = 0.5 * tl.sum(pairs, axis=0)
            m = part % BLOCKS * 8 + lanes // 4 % 4 * 2 + lanes // 2 % 2
            row = block + part // BLOCKS * 16 + lanes // 16 * 2 + lanes % 2
            tl.store(y_ptr + m * N + row, value.to(y_ptr.dtype.element_ty), mask=m < M)
