"""PTX that the kernel of one row is written with: digits of activations, integer parts of codes, products of bytes.

As in `few_rows_ptx` every tensor has one element for each thread; where a fragment has several registers, a tuple has
them.
"""

import triton
import triton.language as tl

# The largest magnitude of a warp's twelve activations a thread, as the bits of a float32; NaN is the largest of all.
_LARGEST = tl.constexpr(
    "{ .reg .b32 m, n; and.b32 m, $1, 0x7FFF7FFF; "
    + " ".join(f"and.b32 n, ${pair}, 0x7FFF7FFF; max.NaN.bf16x2 m, m, n;" for pair in range(2, 7))
    + " and.b32 n, m, 0xFFFF0000; shl.b32 m, m, 16; max.u32 m, m, n; redux.sync.max.u32 $0, m, 0xFFFFFFFF; }"
)
# Of two activations of one row, times a power of two: 2^23 + 16 64^3 + 32 (64^2 + 64 + 1) makes the sum's mantissa the
# rounded product in digits of base 64 that are 32 too large (the highest one 16). A thread keeps two digits of both
# numbers, and gets the digits of one place, of four numbers, from those that have them.
_DIGITS = tl.constexpr(
    "{ .reg .b32 a, b; shl.b32 a, $1, 16; and.b32 b, $1, 0xFFFF0000;"
    " fma.rn.f32 a, a, $2, 0f4B420820; fma.rn.f32 b, b, $2, 0f4B420820;"
    " shr.u32 a, a, $3; shr.u32 b, b, $3; prmt.b32 a, a, b, 0x5410; and.b32 b, a, 0x003F003F;"
    " shr.u32 a, a, 6; and.b32 a, a, 0x003F003F; prmt.b32 a, b, a, 0x6420;"
    " movmatrix.sync.aligned.m8n8.trans.b16 $0, a; }"
)
# Bytes of two registers, each of which has two numbers of 16 bits: the upper ones, in the order of the codes.
_PARTS = tl.constexpr(
    "{ .reg .b32 even, odd, p, q; prmt.b32 even, $5, 0, 0x4240; prmt.b32 odd, $5, 0, 0x4341; "
    + " ".join(
        f"mul.lo.u32 p, even, {3 ** (part + 1)}; mul.lo.u32 q, odd, {3 ** (part + 1)}; prmt.b32 ${part}, p, q, 0x7351;"
        for part in range(5)
    )
    + " }"
)
_PRODUCT = "mma.sync.aligned.m16n8k32.row.col.s32.{left}.s8.s32 {{$0, $1, $2, $3}}, {a}, {b}, {c};"
_BYTES_PRODUCT = tl.constexpr(_PRODUCT.format(left="u8", a="{$4, $5, $6, $7}", b="{$8, $9}", c="{$10, $11, $12, $13}"))
_NEGATIVE_SUM = tl.constexpr(_PRODUCT.format(left="s8", a="{$4, $4, $4, $4}", b="{$5, $6}", c="{$7, $8, $7, $8}"))


@triton.jit
def largest(pairs):
    """The bits of the largest magnitude of a warp's six pairs of bfloat16 a thread, uint32."""
    return tl.inline_asm_elementwise(
        _LARGEST,
        "=&r,r,r,r,r,r,r",
        [pairs[0], pairs[1], pairs[2], pairs[3], pairs[4], pairs[5]],
        tl.uint32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def digits(pair, factor, shift):
    """Four numbers' digits of the place of the thread's column, unsigned bytes, of a warp's pairs of bfloat16."""
    return tl.inline_asm_elementwise(_DIGITS, "=&r,r,f,r", [pair, factor, shift], tl.uint32, is_pure=False, pack=1)


@triton.jit
def integer_parts(word):
    """`floor(code 3^i / 256)` of four codes in a uint32, for i from 1 to 5: five uint32 of four bytes each."""
    return tl.inline_asm_elementwise(
        _PARTS,
        "=&r,=&r,=&r,=&r,=&r,r",
        [word],
        (tl.uint32, tl.uint32, tl.uint32, tl.uint32, tl.uint32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def bytes_product(a0, a1, a2, a3, b, c):
    """`c + a b` of fragments, a warp each: a unsigned, b signed bytes, sums int32."""
    return tl.inline_asm_elementwise(
        _BYTES_PRODUCT,
        "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r",
        [a0, a1, a2, a3, b[0], b[1], c[0], c[1], c[2], c[3]],
        (tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=False,
        pack=1,
    )


@triton.jit
def negative_sum(minus_ones, b, c0, c1):
    """What `bytes_product` gives where all of a are -1, and the rows of c equal."""
    return tl.inline_asm_elementwise(
        _NEGATIVE_SUM,
        "=r,=r,=r,=r,r,r,r,r,r",
        [minus_ones, b[0], b[1], c0, c1],
        (tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=False,
        pack=1,
    )
