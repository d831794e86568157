"""Not kept: a Triton kernel that multiplies one row of bfloat16 activations by the bytes themselves, in integers.

A matrix that meets one row is read at the memory's speed if a weight costs no more than an instruction or two, and
decoding it for a product in floating point costs two and more. Here nothing is decoded. With `I_i` the integer part of
`code 3^i / 256` the trit of plane `p` is `I_(p+1) - 3 I_p - 1`, so

    sum t x = sum I_(p+1) x - sum I_p 3x - sum x

whose terms are products of bytes: four `I_i` are one instruction and two integer products of two codes each, and the
tensor core takes them as they are (`m16n8k32`, unsigned by signed bytes). It has eight columns for x. Of the 160
columns of a row of W whose codes lie in 32 bytes, x is turned into integers of 22 bits, by one power of two, in four
digits of base 64 from -32 to 31: so -3 of a digit is a byte as well, and sums of digits by trits are exact, each below
2^11. Four columns are the digits of one plane, four those of the next, so that three results of four registers hold
five planes' sums. They are scaled in float32.

A thread's columns of results decide its place of digits and its plane; of the second operand its row does. Each warp
takes all rows of its program and makes its own digits, of other columns than other warps; sums meet at the end. Loads
for the next 32 bytes take the place of registers that were just used.
"""

# ruff: noqa: RUF005  Triton's compiler knows no unpacking.

import triton
import triton.language as tl
from fixed_point_ptx import bytes_product, digits, integer_parts, largest, negative_sum

from arbs_kernels.packed_matmul.few_rows_ptx import FAR, loaded, quad_sum

WINDOW = tl.constexpr(32)
"""Bytes of a row that a warp takes at once."""
_MAGIC = tl.constexpr(0x4B400000)
"""The bits of 1.5 2^23: an integer of less than 22 bits added to them is that number plus it."""
_LEAST_EXPONENT = tl.constexpr(21)
"""Biased, of the largest activation, below which all of them lose digits: factors stay float32's."""


@triton.jit
def x_pairs(x_at, byte, upper, lane, alive, K: tl.constexpr, P: tl.constexpr):
    """Six pairs of activations of a thread: of planes 0, 2, 4, or 1, 3, 4 if `upper`, two each, zeros past the row."""
    pairs = ()
    for result in tl.static_range(3):
        plane = 2 * result + (upper if result < 2 else 0)
        for half in tl.static_range(2):
            column = plane * P + byte + lane // 8 * 8 + lane // 4 % 2 * 2 + 4 * half
            place = tl.where(alive, column, FAR)
            pairs = pairs + loaded(x_at + 2 * column.to(tl.int64), place, K, 0, 1, False)
    return pairs


@triton.jit
def fragments_of(unsigned, once, thrice, of_upper):
    """Of digits that are too large, fragments of the second operand: (those of both planes, of the lower plane, of the
    upper one, -3 times those of the lower one, those of the lower plane and -3 times those of the upper one)."""
    both = ()
    lower = ()
    upper = ()
    thrice_lower = ()
    mixed = ()
    for index in tl.static_range(2):
        one = unsigned[index] + once
        three = thrice - 3 * unsigned[index]
        both = both + (one ^ 0x80808080,)
        lower = lower + ((one ^ 0x80808080) & ~of_upper,)
        upper = upper + ((one ^ 0x80808080) & of_upper,)
        thrice_lower = thrice_lower + ((three ^ 0x80808080) & ~of_upper,)
        mixed = mixed + (((one & ~of_upper) | (three & of_upper)) ^ 0x80808080,)
    return both, lower, upper, thrice_lower, mixed


@triton.jit
def scales_at(scales_of, byte, upper, P: tl.constexpr, G: tl.constexpr, R: tl.constexpr, N: tl.constexpr):
    """Addresses of a thread's scales of three results."""
    at = ()
    for result in tl.static_range(3):
        plane = 2 * result + (upper if result < 2 else 0)
        group = tl.minimum((plane * P + byte) // G, R - 1)
        at = at + (scales_of + group.to(tl.int64) * (2 * N),)
    return at


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
    """`y` (1, N) of `16 ROW_TILES` rows, of which there are no less; the last programs may share some.

    x: bfloat16 (1, K); scale: bfloat16 (R, N). P and G are multiples of WINDOW, K and N of two.
    """
    thread = tl.arange(0, 32 * WARPS)
    lane = thread % 32
    warp = thread // 32
    block = tl.minimum(tl.program_id(0) * (16 * ROW_TILES), N - 16 * ROW_TILES)
    # A thread has rows 2g and 2g + 1 of each 16, for which it loads two scales at once, and columns by lane % 4.
    own = block + lane // 4 * 2
    upper = lane // 2 % 2
    codes_of = trits_ptr.to(tl.int64) + own.to(tl.int64) * P + lane % 4 * 8
    scales_of = scale_ptr.to(tl.int64) + 2 * own.to(tl.int64)
    x_at = x_ptr.to(tl.int64)
    shift = (lane % 2 * 12).to(tl.uint32)
    # Of the second operand: digits of the lower plane in columns 0 to 3, of the upper one in the others.
    of_upper = tl.where(lane >= 16, -1, 0).to(tl.uint32)
    bias = tl.where(lane // 4 % 4 == 3, 16 * 0x01010101, 32 * 0x01010101).to(tl.uint32)
    once = 0x80808080 - bias
    thrice = 0x80808080 + 3 * bias
    magic = tl.zeros_like(lane) + _MAGIC
    minus_ones = tl.zeros_like(lane) - 1

    byte = warp * WINDOW
    inside = tl.minimum(byte, P - WINDOW)
    scale_at = scales_at(scales_of, inside, upper, P, G, R, N)
    codes = ()
    scales = ()
    for tile in tl.static_range(ROW_TILES):
        for row in tl.static_range(2):
            codes = codes + loaded(codes_of + inside + (16 * tile + row) * P, 0, 1, 0, 2, True)
        for result in tl.static_range(3):
            scales = scales + loaded(scale_at[result] + 32 * tile, 0, 1, 0, 1, False)
    x = x_pairs(x_at, byte, upper, lane, byte < P, K, P)
    total = ()
    for _ in tl.static_range(2 * ROW_TILES):
        total = total + (tl.zeros_like(lane).to(tl.float32),)

    for _ in range(STEPS):
        top = largest(x)
        exponent = tl.maximum(top >> 23, _LEAST_EXPONENT)
        factor = ((274 - exponent) << 23).to(tl.float32, bitcast=True)
        unit = tl.where(top < 0x7F800000, (exponent - 20) << 23, 0x7FC00000).to(tl.float32, bitcast=True)
        first = (digits(x[0], factor, shift), digits(x[1], factor, shift))
        second = (digits(x[2], factor, shift), digits(x[3], factor, shift))
        third = (digits(x[4], factor, shift), digits(x[5], factor, shift))
        first = fragments_of(first, once, thrice, of_upper)
        second = fragments_of(second, once, thrice, of_upper)
        third = fragments_of(third, once, thrice, of_upper)
        zero = tl.zeros_like(lane)
        less_0_and_1 = negative_sum(minus_ones, first[0], magic, zero)
        less_2_and_3 = negative_sum(minus_ones, second[0], magic, zero)
        less_4 = negative_sum(minus_ones, third[1], magic, zero)

        byte += WARPS * WINDOW
        inside = tl.minimum(byte, P - WINDOW)
        scale_at = scales_at(scales_of, inside, upper, P, G, R, N)
        x = x_pairs(x_at, byte, upper, lane, byte < P, K, P)
        next_codes = ()
        next_scales = ()
        sums = ()
        for tile in tl.static_range(ROW_TILES):
            a0 = integer_parts(codes[4 * tile])
            a1 = integer_parts(codes[4 * tile + 2])
            a2 = integer_parts(codes[4 * tile + 1])
            a3 = integer_parts(codes[4 * tile + 3])
            for row in tl.static_range(2):
                next_codes = next_codes + loaded(codes_of + inside + (16 * tile + row) * P, 0, 1, 0, 2, True)
            c0 = bytes_product(a0[0], a1[0], a2[0], a3[0], first[4], less_0_and_1)
            c1 = bytes_product(a0[1], a1[1], a2[1], a3[1], second[3], less_2_and_3)
            c2 = bytes_product(a0[3], a1[3], a2[3], a3[3], third[3], less_4)
            c0 = bytes_product(a0[1], a1[1], a2[1], a3[1], first[2], c0)
            c1 = bytes_product(a0[2], a1[2], a2[2], a3[2], second[4], c1)
            c2 = bytes_product(a0[4], a1[4], a2[4], a3[4], third[1], c2)
            c1 = bytes_product(a0[3], a1[3], a2[3], a3[3], second[2], c1)
            c = (c0, c1, c2)
            for row in tl.static_range(2):
                part = tl.zeros_like(lane).to(tl.float32)
                for result in tl.static_range(3):
                    both = scales[3 * tile + result]
                    scale = (both << 16 if row == 0 else both & 0xFFFF0000).to(tl.float32, bitcast=True)
                    value = c[result][2 * row] + 64 * c[result][2 * row + 1]
                    part += (value.to(tl.float32, bitcast=True) - 12582912.0) * scale
                sums = sums + (total[2 * tile + row] + part * unit,)
            for result in tl.static_range(3):
                next_scales = next_scales + loaded(scale_at[result] + 32 * tile, 0, 1, 0, 1, False)
        total = sums
        codes = next_codes
        scales = next_scales

    lanes = tl.arange(0, 64)
    for first_tile in tl.static_range(0, ROW_TILES, 4):
        even = tl.zeros_like(lane).to(tl.float32)
        odd = tl.zeros_like(lane).to(tl.float32)
        for tile in tl.static_range(4):
            if first_tile + tile < ROW_TILES:
                place_value = tl.where(lane % 2 == 1, 4096.0, 1.0)
                mine = lane % 4 == tile
                even = tl.where(mine, quad_sum(total[2 * (first_tile + tile)] * place_value), even)
                odd = tl.where(mine, quad_sum(total[2 * (first_tile + tile) + 1] * place_value), odd)
        value = tl.sum(tl.reshape(tl.join(even, odd), (WARPS, 64)), axis=0)
        tile = first_tile + lanes // 2 % 4
        row = block + tile * 16 + lanes // 8 * 2 + lanes % 2
        tl.store(y_ptr + row, value.to(y_ptr.dtype.element_ty), mask=tile < ROW_TILES)
