"""Effective weights by a Triton kernel, near the memory's speed.

A byte's digit `i` is taken out of its fraction `f = code * 3^i mod 256` (see `arbs_kernels.codec`). As `3 f / 256` is
the digit, `192 f + 0xC000` holds `digit - 1` modulo 4 in bits 14 and 15: cut off there it *is* the bfloat16 number
`2 * trit` (0xC000, 0, 0x4000). So two weights in the halves of a register cost two multiplications and two masks; what
a half carries into its neighbour lies below the neighbour's fraction.

A float8 weight takes the same two bits: bit 15 is its sign, bit 14 whether it has the scale's code or none. Scales come
as their float8 codes, and weights go as theirs: Triton need not know the type.
"""

from functools import partial

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from arbs_kernels.triton_launch import check_size, launch, one_by_one

# Eight bytes, $7 bits past the beginning of the words $4 $5 $6, to eight weights; $8 = 3^i, $9 = half the scale.
# bfloat16x2 products are fused multiply-adds with -0, which every GPU since Ampere has.
_EIGHT_WEIGHTS = tl.constexpr(
    "{ .reg .b32 low, high, s, t, z; mov.b32 z, 0x80008000; cvt.rn.bf16x2.f32 s, $9, $9;"
    " shf.r.wrap.b32 low, $4, $5, $7; shf.r.wrap.b32 high, $5, $6, $7;"
    + "".join(
        f" prmt.b32 t, {word}, 0, {picked}; mul.lo.u32 t, t, $8; and.b32 t, t, 0x00FF00FF;"
        f" mad.lo.u32 t, t, 192, 0xC000C000; and.b32 t, t, 0xC000C000; fma.rn.bf16x2 ${at}, t, s, z;"
        for at, (word, picked) in enumerate(
            (("low", "0x4140"), ("low", "0x4342"), ("high", "0x4140"), ("high", "0x4342"))
        )
    )
    + " }"
)

# The same bytes to eight float8 weights, $2 $3 $4 the words, $5 the shift; $6 = 3^i, $7 = the scale's code, below 128.
_EIGHT_FLOAT8 = tl.constexpr(
    "{ .reg .b32 low, high, t, u, n; shf.r.wrap.b32 low, $2, $3, $5; shf.r.wrap.b32 high, $3, $4, $5;"
    + "".join(
        "".join(
            f" prmt.b32 {pair}, {word}, 0, {picked}; mul.lo.u32 {pair}, {pair}, $6; and.b32 {pair}, {pair}, 0x00FF00FF;"
            f" mad.lo.u32 {pair}, {pair}, 192, 0xC000C000;"
            for pair, picked in (("t", "0x4140"), ("u", "0x4342"))
        )
        + " prmt.b32 t, t, u, 0x7531; shr.u32 n, t, 6; and.b32 n, n, 0x01010101; and.b32 t, t, 0x80808080;"
        f" mad.lo.u32 ${at}, n, $7, t;"
        for at, word in enumerate(("low", "high"))
    )
    + " }"
)


@triton.jit
def power_of_plane(plane):
    """`3^i`."""
    return tl.where(plane == 0, 1, tl.where(plane == 1, 3, tl.where(plane == 2, 9, tl.where(plane == 3, 27, 81))))


@triton.jit
def trit_of(codes, power):
    """Trits int32 of codes uint8, of the plane of that power of 3."""
    return (((codes.to(tl.int32) * power & 255) * 3) >> 8) - 1


@triton.jit
def eight_weights(w0, w1, w2, shift, power, half_scale):
    """Eight bfloat16 weights in four int32, low columns first."""
    return tl.inline_asm_elementwise(
        _EIGHT_WEIGHTS,
        "=r,=r,=r,=r,r,r,r,r,r,r",
        [w0, w1, w2, shift, power, half_scale],
        (tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def eight_float8(w0, w1, w2, shift, power, scale):
    """Eight codes of float8 weights in two int32, low columns first."""
    return tl.inline_asm_elementwise(
        _EIGHT_FLOAT8,
        "=r,=r,r,r,r,r,r,r",
        [w0, w1, w2, shift, power, scale.to(tl.uint32)],
        (tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def store_elements(trits_ptr, scale_ptr, w_ptr, rows, columns, N, K, P, R, G, DTYPE: tl.constexpr):
    """Weights of `rows` by `columns`, one number at a time."""
    plane = columns // P
    inside = (rows < N)[:, None] & (columns < K)[None, :]
    codes = tl.load(trits_ptr + rows[:, None] * P + (columns - plane * P)[None, :], mask=inside, other=0)
    scale = tl.load(scale_ptr + rows[:, None] * R + (columns // G)[None, :], mask=inside, other=0)
    trits = trit_of(codes, power_of_plane(plane)[None, :])
    if DTYPE == "float8_e4m3fn":
        weight = tl.where(trits == 0, 0, scale.to(tl.int32) | (trits & 128)).to(tl.uint8)
    else:
        weight = (trits.to(tl.float32) * scale).to(tl.float32 if DTYPE == "float32" else tl.bfloat16)
    tl.store(w_ptr + rows.to(tl.int64)[:, None] * K + columns[None, :], weight, mask=inside)


@triton.jit
def decode_elements(
    trits_ptr,
    scale_ptr,
    w_ptr,
    N: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Any shape, any dtype."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    store_elements(trits_ptr, scale_ptr, w_ptr, rows, columns, N, K, P, R, G, DTYPE)


@triton.jit
def decode_chunks(
    trits_ptr,
    scale_ptr,
    w_ptr,
    N: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
    DTYPE: tl.constexpr,
    CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """bfloat16 or float8, K and G multiples of 8: chunks of eight columns, one scale and one store each.

    A chunk's bytes lie anywhere: they are read as aligned words and shifted. The chunks that two planes share (four a
    row, none where P is a multiple of 8) are written by more programs, each for ROWS rows.
    """
    programs: tl.constexpr = (N * K // 8 + CHUNKS - 1) // CHUNKS
    if tl.program_id(0) >= programs:
        rows = (tl.program_id(0) - programs) * ROWS + tl.arange(0, ROWS)
        at = tl.arange(0, 32)
        columns = (at // 8 + 1) * P // 8 * 8 + at % 8
        store_elements(trits_ptr, scale_ptr, w_ptr, rows, columns, N, K, P, R, G, DTYPE)
    else:
        chunk = tl.program_id(0) * CHUNKS + tl.arange(0, CHUNKS)
        row = chunk // (K // 8)
        column = (chunk - row * (K // 8)) * 8
        plane = column // P
        inside = (row < N) & ((P % 8 == 0) | (plane == (column + 7) // P))
        start = row * P + column - plane * P
        if P % 8 == 0:
            words = tl.load(trits_ptr.to(tl.pointer_type(tl.uint64)) + start // 8, mask=inside, other=0)
            w0 = words.to(tl.uint32)
            w1 = (words >> 32).to(tl.uint32)
            w2 = w1
            shift = tl.zeros_like(start)
        else:
            word = start >> 2
            last: tl.constexpr = (N * P - 1) // 4
            words_ptr = trits_ptr.to(tl.pointer_type(tl.uint32))
            w0 = tl.load(words_ptr + word, mask=inside, other=0)
            w1 = tl.load(words_ptr + tl.minimum(word + 1, last), mask=inside, other=0)
            w2 = tl.load(words_ptr + tl.minimum(word + 2, last), mask=inside, other=0)
            shift = (start & 3) * 8
        scale = tl.load(scale_ptr + row * R + column // G, mask=inside, other=0)
        power = power_of_plane(plane)
        if DTYPE == "bfloat16":
            words_each: tl.constexpr = 4
            a, b, c, d = eight_weights(w0, w1, w2, shift, power, 0.5 * scale)
            made = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (CHUNKS * 4,))
        else:
            words_each: tl.constexpr = 2
            a, b = eight_float8(w0, w1, w2, shift, power, scale)
            made = tl.reshape(tl.join(a, b), (CHUNKS * 2,))
        place = tl.arange(0, CHUNKS * words_each)
        whole = tl.program_id(0) * CHUNKS + place // words_each
        first = whole % (K // 8) * 8
        kept = (whole < N * (K // 8)) & ((P % 8 == 0) | (first // P == (first + 7) // P))
        out = w_ptr.to(tl.pointer_type(tl.int32)) + tl.program_id(0).to(tl.int64) * (CHUNKS * words_each)
        tl.store(out + place, made, mask=kept)


def weight(trits: jax.Array, scale: jax.Array, *, in_features: int, group_size: int, dtype: jnp.dtype) -> jax.Array:
    """See `api.packed_decode`."""
    return one_by_one(weight_of, trits, scale, in_features=in_features, group_size=group_size, dtype=dtype)


def weight_of(
    trits: jax.Array,
    scale: jax.Array,
    *,
    in_features: int,
    group_size: int,
    dtype: jnp.dtype,
    chunks: int = 512,
    num_warps: int = 4,
) -> jax.Array:
    """`weight`; a program takes `chunks` times eight weights, a power of two."""
    check_size("packed_decode", "trits", trits)
    check_size("packed_decode", "scale", scale)
    N, P = trits.shape
    K, R = in_features, scale.shape[1]
    if dtype == jnp.float8_e4m3fn:
        scale = scale.astype(dtype)
    shape = {"N": N, "K": K, "P": P, "R": R, "G": group_size, "DTYPE": jnp.dtype(dtype).name}
    run = partial(launch, out=jax.ShapeDtypeStruct((N, K), dtype), num_warps=num_warps, num_stages=1, **shape)
    if dtype != jnp.float32 and K % 8 == 0 and group_size % 8 == 0:
        rows = 32
        shared = triton.cdiv(N, rows) if P % 8 else 0
        grid = (triton.cdiv(N * K // 8, chunks) + shared,)
        return run(decode_chunks, trits, scale, grid=grid, CHUNKS=chunks, ROWS=rows)
    columns = min(8 * chunks, triton.next_power_of_2(K))
    rows = 8 * chunks // columns
    grid = (triton.cdiv(N, rows), triton.cdiv(K, columns))
    return run(decode_elements, trits, scale, grid=grid, ROWS=rows, COLUMNS=columns)
