"""What a warp of `few_rows` does in PTX: loads, decoding, scaling, the tensor core's product.

Every tensor has one element for each thread; where a fragment or a load has several registers, a tuple has them.
Loads keep their order, but the compiler would put them off until their values are needed: those before a `fence` are
issued before those after it.
"""

# ruff: noqa: RUF005  Triton's compiler knows no unpacking.

import triton
import triton.language as tl

from arbs_kernels.packed_matmul.five_planes import FIVE_PLANES, FIVE_PLANES_BY_DIFFERENCES

FAR = tl.constexpr(2**30)
"""A place before no limit, and a limit after all other places."""
NO_TRITS = tl.constexpr(0x80808080)
"""Four codes of five zeros."""

_FIVE_PLANES = tl.constexpr(FIVE_PLANES)
_BY_DIFFERENCES = tl.constexpr(FIVE_PLANES_BY_DIFFERENCES)
# Products are fused multiply-adds with -0, which every GPU since Ampere has.
_SCALED = tl.constexpr("{ .reg .b32 z; mov.b32 z, 0x80008000; fma.rn.bf16x2 $0, $1, $2, z; }")
# All bits from $1 on: none from 32 on, all from 0 on and before.
_BITS_FROM = tl.constexpr("{ .reg .b32 n; max.s32 n, $1, 0; mov.b32 $0, 0xFFFFFFFF; shl.b32 $0, $0, n; }")
# Bytes of codes where the mask has them, elsewhere of five zeros.
_OWN = tl.constexpr("lop3.b32 $0, $1, $2, 0x80808080, 0xCA;")
# Two halves of a register from one address, or from two, where a place is before a limit; else zeros.
_ONE_SCALE = tl.constexpr(
    "{ .reg .pred p; .reg .b16 h; setp.lt.s32 p, $2, $3; mov.b16 h, 0; @p ld.global.b16 h, [$1]; mov.b32 $0, {h, h}; }"
)
_TWO_SCALES = tl.constexpr(
    "{ .reg .pred p; .reg .b16 h, k; setp.lt.s32 p, $3, $4; mov.b16 h, 0; mov.b16 k, 0;"
    " @p ld.global.b16 h, [$1]; @p ld.global.b16 k, [$2]; mov.b32 $0, {h, k}; }"
)
# Which of two halves two neighbours take: both the lower up to 0, one each at 8, both the upper from 16 on.
_CHOICE = tl.constexpr(
    "{ .reg .b32 n, a, b; max.s32 n, $1, 0; mov.b32 a, 0x32321010; mov.b32 b, 0x32323232;"
    " shf.r.clamp.b32 $0, a, b, n; }"
)
_CHOSEN = tl.constexpr("prmt.b32 $0, $1, 0, $2;")
_SHIFTED = tl.constexpr("shf.r.wrap.b32 $0, $1, $2, $3;")
_PRODUCT = tl.constexpr(
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9},"
    " {$10, $11, $12, $13};"
)
_QUAD_SUM = tl.constexpr(
    "{ .reg .f32 v; shfl.sync.bfly.b32 v, $1, 1, 31, 0xFFFFFFFF; add.f32 $0, $1, v;"
    " shfl.sync.bfly.b32 v, $0, 2, 31, 0xFFFFFFFF; add.f32 $0, $0, v; }"
)
_FENCE = tl.constexpr("bar.warp.sync 0xFFFFFFFF; mov.b32 $0, $1;")


def _load(width: int, hint: str = "") -> tl.constexpr:
    """PTX that loads `width` registers from an address where a place is before a limit, else takes the last operand."""
    registers = [f"${register}" for register in range(width)]
    address, place, limit, other = (f"${width + index}" for index in range(4))
    into = registers[0] if width == 1 else "{" + ", ".join(registers) + "}"
    vector = "" if width == 1 else f".v{width}"
    code = [f"setp.lt.s32 p, {place}, {limit};", *(f"mov.b32 {register}, {other};" for register in registers)]
    code.append(f"@p ld.global{hint}{vector}.b32 {into}, [{address}];")
    return tl.constexpr("{ .reg .pred p; " + " ".join(code) + " }")


_LOAD_1, _LOAD_2, _LOAD_4 = (_load(width) for width in (1, 2, 4))
# A row's codes are read by one warp, once: they need not push x out of the cache.
_STREAM_1, _STREAM_2, _STREAM_4 = (_load(width, ".L1::evict_first") for width in (1, 2, 4))


@triton.jit
def loaded(address, place, limit, other, WIDTH: tl.constexpr, STREAMED: tl.constexpr):
    """A tuple of WIDTH uint32 from an int64 address where `place < limit`, elsewhere `other`."""
    if WIDTH == 4:
        words = tl.inline_asm_elementwise(
            _STREAM_4 if STREAMED else _LOAD_4,
            "=&r,=&r,=&r,=&r,l,r,r,r",
            [address, place, limit, other],
            (tl.uint32, tl.uint32, tl.uint32, tl.uint32),
            is_pure=False,
            pack=1,
        )
    elif WIDTH == 2:
        words = tl.inline_asm_elementwise(
            _STREAM_2 if STREAMED else _LOAD_2,
            "=&r,=&r,l,r,r,r",
            [address, place, limit, other],
            (tl.uint32, tl.uint32),
            is_pure=False,
            pack=1,
        )
    else:
        word = tl.inline_asm_elementwise(
            _STREAM_1 if STREAMED else _LOAD_1,
            "=&r,l,r,r,r",
            [address, place, limit, other],
            tl.uint32,
            is_pure=False,
            pack=1,
        )
        words = (word,)
    return words


@triton.jit
def fence(lane):
    """Loads before it come before loads after it."""
    tl.inline_asm_elementwise(_FENCE, "=r,r", [lane], tl.int32, is_pure=False, pack=1)


@triton.jit
def five_planes(word, DIFFERENCES: tl.constexpr):
    """Two times the trits of four codes in a uint32: ten pairs of bfloat16, two for each plane."""
    return tl.inline_asm_elementwise(
        _BY_DIFFERENCES if DIFFERENCES else _FIVE_PLANES,
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r",
        [word],
        (tl.uint32, tl.uint32, tl.uint32, tl.uint32, tl.uint32, tl.uint32, tl.uint32, tl.uint32, tl.uint32, tl.uint32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def scaled(trits, scales):
    """A pair of weights."""
    return tl.inline_asm_elementwise(_SCALED, "=r,r,r", [trits, scales], tl.uint32, is_pure=True, pack=1)


@triton.jit
def product(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3):
    """`c + a b` of fragments, a warp each; operands are pairs of bfloat16 in uint32, sums float32."""
    return tl.inline_asm_elementwise(
        _PRODUCT,
        "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r",
        [a0, a1, a2, a3, b0, b1, c0, c1, c2, c3],
        (tl.float32, tl.float32, tl.float32, tl.float32),
        is_pure=False,
        pack=1,
    )


@triton.jit
def _bits_from(first):
    """A uint32 whose bits from `first` on are set."""
    return tl.inline_asm_elementwise(_BITS_FROM, "=&r,r", [first], tl.uint32, is_pure=True, pack=1)


@triton.jit
def only_own(words, byte, begin, end, ROWS: tl.constexpr):
    """Words of ROWS rows from `byte` on, with five zeros for every code that is not between `begin` and `end`."""
    own = ()
    for index in tl.static_range(len(words)):
        at = byte + 4 * (index % (len(words) // ROWS))
        inside = _bits_from(8 * (begin - at)) ^ _bits_from(8 * (end - at))
        word = tl.inline_asm_elementwise(_OWN, "=r,r,r", [inside, words[index]], tl.uint32, is_pure=True, pack=1)
        own = own + (word,)
    return own


@triton.jit
def one_scale(address, place, limit):
    """A uint32: a bfloat16 scale twice, from an int64 address where `place < limit`, elsewhere zeros."""
    return tl.inline_asm_elementwise(_ONE_SCALE, "=r,l,r,r", [address, place, limit], tl.uint32, is_pure=False, pack=1)


@triton.jit
def two_scales(address, after, place, limit):
    """A uint32: two bfloat16 scales, that at `after` in the upper half, where `place < limit`, elsewhere zeros."""
    return tl.inline_asm_elementwise(
        _TWO_SCALES, "=r,l,l,r,r", [address, after, place, limit], tl.uint32, is_pure=False, pack=1
    )


@triton.jit
def chosen(pairs, choice):
    """Halves of each row's pair, as the selector says."""
    some = ()
    for row in tl.static_range(len(pairs)):
        one = tl.inline_asm_elementwise(_CHOSEN, "=r,r,r", [pairs[row], choice], tl.uint32, is_pure=True, pack=1)
        some = some + (one,)
    return some


@triton.jit
def choice_of(left):
    """The selector for two neighbours, the first group of which ends `left` columns after the first."""
    return tl.inline_asm_elementwise(_CHOICE, "=&r,r", [8 * (2 - left)], tl.int32, is_pure=True, pack=1)


@triton.jit
def shifted(low, high, bits):
    """The uint32 that begins `bits` after the beginning of `low`."""
    return tl.inline_asm_elementwise(_SHIFTED, "=r,r,r,r", [low, high, bits], tl.uint32, is_pure=True, pack=1)


@triton.jit
def quad_sum(value):
    """The sum of a float32 of four neighbouring threads, in all of them."""
    return tl.inline_asm_elementwise(_QUAD_SUM, "=&f,f", [value], tl.float32, is_pure=False, pack=1)
