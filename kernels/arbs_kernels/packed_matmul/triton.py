"""Packed products by Triton kernels: few rows of bfloat16 activations straight from the bytes, many through the weight.

The fused kernel computes `y^T = W x^T` with weights as the first operand of the tensor core's 16 x 8 x 16 product,
which each warp issues by itself (`mma.sync`) on weights that it decoded in its own registers: two bytes cost 15
instructions for ten weights (`arbs_kernels.packed_decode.triton` has the arithmetic). No shared memory, no barrier and
no wait until the end, so many warps hide each other's loads. Every tensor has one element for each thread of the
program: that is the one layout in which an instruction of a whole warp finds its operands.

The order of the products' inner axis is free, as long as both operands agree. In fragment `m16n8k16` a thread holds
rows `lane / 4` and 8 more of W, columns `lane / 4` of `x^T`, and four positions of the inner axis: it takes 16 bytes of
a row in one go, four for each fragment, five planes each. So a thread needs one scale for 16 weights, or two and a mask
where a group may end among them. Groups shorter than 16 take a scale, or two, for every four.

Rows of P bytes begin at any address; those `CLASSES` apart begin at the same remainder modulo 4. A program takes rows
of one class, reads from the aligned word before their beginning, and finds activations shifted alike.
"""

# ruff: noqa: RUF005  Triton's compiler knows no unpacking.

from dataclasses import dataclass
from math import gcd

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from arbs_kernels.packed_decode.triton import weight_of
from arbs_kernels.packed_matmul.reference import precision_of
from arbs_kernels.triton_launch import check_size, launch, one_by_one

FUSED_ROWS = 64
"""Most rows of the fused kernel."""
TILE_BYTES = tl.constexpr(64)
"""Of a row that a warp takes at once: 16 for each of four threads."""


@dataclass(frozen=True)
class Tile:
    """How the fused kernel is cut; all powers of two but `splits`."""

    row_tiles: int
    """Times 16 rows of W of one warp, which share what it loads of x."""
    row_warps: int
    """Warps side by side along the rows, which meet in the cache what they load of x."""
    depth_warps: int
    """Warps that share the reduction; their sums are added within the program."""
    splits: int = 1
    """Programs that share the reduction; their sums are added by another kernel."""
    whole_x: bool = True
    """Whether x is read as it is where that is possible, not from a copy in the order of fragments."""


def tile_of(M: int) -> Tile:
    """The tile for so many rows."""
    if M <= 8:
        return Tile(row_tiles=1, row_warps=1, depth_warps=4)
    if M <= 16:
        return Tile(row_tiles=1, row_warps=2, depth_warps=4, whole_x=False)
    return Tile(row_tiles=1, row_warps=8, depth_warps=1, splits=6, whole_x=False)


def _planes_of_pair(pair: str, half: int) -> str:
    """From two codes in the halves of a register: two times each trit, lowest plane first."""
    code = [f"mad.lo.u32 t, {pair}, 192, 0xC000C000; and.b32 ${half}, t, 0xC000C000;"]
    for plane in range(1, 5):
        code.append("and.b32 t, t, 0x3FC03FC0; mad.lo.u32 t, t, 3, 0xC000C000;")
        code.append(f"and.b32 ${2 * plane + half}, t, 0xC000C000;")
    return " ".join(code)


_FIVE_PLANES = tl.constexpr(
    "{ .reg .b32 a, b, t; prmt.b32 a, $10, 0, 0x4140; prmt.b32 b, $10, 0, 0x4342; "
    + _planes_of_pair("a", 0)
    + " "
    + _planes_of_pair("b", 1)
    + " }"
)
# Products are fused multiply-adds with -0, which every GPU since Ampere has.
_SCALED = tl.constexpr("{ .reg .b32 z; mov.b32 z, 0x80008000; fma.rn.bf16x2 $0, $1, $2, z; }")
# The first scale where the mask is set, the second elsewhere.
_PICKED = tl.constexpr("lop3.b32 $0, $1, $2, $3, 0xCA;")
_TWICE = tl.constexpr("cvt.rn.bf16x2.f32 $0, $1, $1;")
_PRODUCT = tl.constexpr(
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9},"
    " {$10, $11, $12, $13};"
)


@triton.jit
def five_planes(word):
    """Two times the trits of four codes in a uint32: ten pairs of bfloat16, two for each plane."""
    return tl.inline_asm_elementwise(
        _FIVE_PLANES,
        "=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,r",
        [word],
        (tl.uint32, tl.uint32, tl.uint32, tl.uint32, tl.uint32, tl.uint32, tl.uint32, tl.uint32, tl.uint32, tl.uint32),
        is_pure=True,
        pack=1,
    )


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
def words_at(trits_ptr, offset, live, P: tl.constexpr, LAST: tl.constexpr):
    """Sixteen codes from `offset` on, four uint32; 0 past the array."""
    words = ()
    if P % 8 == 0:
        for half in tl.static_range(2):
            at = offset + 8 * half
            two = tl.load(trits_ptr.to(tl.pointer_type(tl.uint64)) + at // 8, mask=live & (at < LAST), other=0)
            words = words + (two.to(tl.uint32), (two >> 32).to(tl.uint32))
    else:
        for quarter in tl.static_range(4):
            at = offset + 4 * quarter
            one = tl.load(trits_ptr.to(tl.pointer_type(tl.uint32)) + at // 4, mask=live & (at < LAST), other=0)
            words = words + (one,)
    return words


@triton.jit
def codes_at(trits_ptr, starts, byte, live, P: tl.constexpr, LAST: tl.constexpr):
    """`words_at` of every row."""
    words = ()
    for row in tl.static_range(len(starts)):
        words = words + words_at(trits_ptr, starts[row] + byte, live, P, LAST)
    return words


@triton.jit
def scales_at(scale_ptr, rows, column, R: tl.constexpr, G: tl.constexpr, EXACT: tl.constexpr):
    """Scales of each of `rows` from `column` on, and of the group after, in both halves of a uint32."""
    group = tl.maximum(column, 0) // G
    pairs = ()
    for row in tl.static_range(len(rows)):
        for after in tl.static_range(1 if EXACT else 2):
            one = tl.load(scale_ptr + rows[row] * R + tl.minimum(group + after, R - 1))
            twice = tl.inline_asm_elementwise(_TWICE, "=r,r", [one], tl.uint32, is_pure=True, pack=1)
            pairs = pairs + (twice,)
    return pairs


@triton.jit
def scaled(pair, place: tl.constexpr, row: tl.constexpr, scales, left, EXACT: tl.constexpr):
    """A pair of weights: twice its trits times its scale; its first is at `place`, the first group ends at `left`."""
    if EXACT:
        scale = scales[row]
    else:
        first = tl.where(place < left, 0xFFFF, 0) | tl.where(place + 1 < left, -65536, 0)
        scale = tl.inline_asm_elementwise(
            _PICKED, "=r,r,r,r", [first, scales[2 * row], scales[2 * row + 1]], tl.uint32, is_pure=True, pack=1
        )
    return tl.inline_asm_elementwise(_SCALED, "=r,r,r", [pair, scale], tl.uint32, is_pure=True, pack=1)


@triton.jit
def few_rows(
    x_ptr,
    trits_ptr,
    scale_ptr,
    y_ptr,
    N: tl.constexpr,
    P: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
    M: tl.constexpr,
    CLASSES: tl.constexpr,
    BLOCKS: tl.constexpr,
    TILES: tl.constexpr,
    TILES_EACH: tl.constexpr,
    WHOLE_X: tl.constexpr,
    ROW_TILES: tl.constexpr,
    ROW_WARPS: tl.constexpr,
    DEPTH_WARPS: tl.constexpr,
):
    """Part of `y` (splits, M, N) of one block of rows and some tiles of bytes.

    x: bfloat16 (M, 5 P) if WHOLE_X, else what `fragments` makes; scale: float32 (N, R). A warp takes `TILES_EACH`
    tiles, one after another; what it decodes past the end of a row meets zeros of x.
    """
    BLOCKS_OF_8: tl.constexpr = (M + 7) // 8
    UNIT: tl.constexpr = 16 if G >= 16 else 4
    EXACT: tl.constexpr = (P % UNIT == 0) & (G % UNIT == 0)
    LAST: tl.constexpr = (N * P + 3) // 4 * 4
    thread = tl.arange(0, 32 * ROW_WARPS * DEPTH_WARPS)
    lane = thread % 32
    depth = thread // 32 % DEPTH_WARPS
    member = tl.program_id(0) // BLOCKS
    block = tl.program_id(0) % BLOCKS * (16 * ROW_TILES * ROW_WARPS)
    phase = member * P % 4
    local = block + thread // (32 * DEPTH_WARPS) * (16 * ROW_TILES) + lane // 4
    starts = ()
    rows = ()
    for each in tl.static_range(2 * ROW_TILES):
        inner = tl.minimum(local + 8 * each, (N - 1 - member) // CLASSES)
        starts = starts + (member * P // 4 * 4 + inner * (CLASSES * P),)
        rows = rows + (member + CLASSES * inner,)
    total = ()
    for _ in tl.static_range(4 * ROW_TILES * BLOCKS_OF_8):
        total = total + (tl.zeros_like(lane).to(tl.float32),)

    first_tile = (tl.program_id(1) * DEPTH_WARPS + depth) * TILES_EACH
    x64 = x_ptr.to(tl.pointer_type(tl.uint64))
    byte = first_tile * TILE_BYTES + lane % 4 * 16
    words = codes_at(trits_ptr, starts, byte, byte < P + 3, P, LAST)
    for step in range(TILES_EACH):
        tile = first_tile + step
        byte = tile * TILE_BYTES + lane % 4 * 16
        ahead = (byte + TILE_BYTES < P + 3) & (step + 1 < TILES_EACH)
        next_words = codes_at(trits_ptr, starts, byte + TILE_BYTES, ahead, P, LAST)
        scales = ()
        if UNIT == 16:
            for plane in tl.static_range(5):
                scales = scales + (scales_at(scale_ptr, rows, plane * P + byte - phase, R, G, EXACT),)
        for word in tl.static_range(4):
            pairs = ()
            for each in tl.static_range(2 * ROW_TILES):
                pairs = pairs + (five_planes(words[4 * each + word]),)
            for plane in tl.static_range(5):
                column = plane * P + byte - phase
                if UNIT == 16:
                    own = scales[plane]
                else:
                    column += 4 * word
                    own = scales_at(scale_ptr, rows, column, R, G, EXACT)
                left = (tl.maximum(column, 0) // G + 1) * G - column
                weights = ()
                for each in tl.static_range(2 * ROW_TILES):
                    low = scaled(pairs[each][2 * plane], 4 * word % UNIT, each, own, left, EXACT)
                    high = scaled(pairs[each][2 * plane + 1], 4 * word % UNIT + 2, each, own, left, EXACT)
                    weights = weights + (low, high)
                sums = ()
                for eight in tl.static_range(BLOCKS_OF_8):
                    if WHOLE_X:
                        m = eight * 8 + lane // 4
                        at = (m * (5 * P) + plane * P + byte) // 4 + word
                        x = tl.load(x64 + at, mask=(m < M) & (byte < P), other=0)
                    else:
                        run = ((member * 5 + plane) * TILES + tile) * BLOCKS_OF_8 + eight
                        x = tl.load(x64 + (run * 4 + word) * 32 + lane)
                    b0 = x.to(tl.uint32)
                    b1 = (x >> 32).to(tl.uint32)
                    for t in tl.static_range(ROW_TILES):
                        sums = sums + product(
                            weights[4 * t],
                            weights[4 * t + 2],
                            weights[4 * t + 1],
                            weights[4 * t + 3],
                            b0,
                            b1,
                            total[4 * (eight * ROW_TILES + t)],
                            total[4 * (eight * ROW_TILES + t) + 1],
                            total[4 * (eight * ROW_TILES + t) + 2],
                            total[4 * (eight * ROW_TILES + t) + 3],
                        )
                total = sums
        words = next_words

    out = y_ptr + tl.program_id(1) * (M * N)
    if DEPTH_WARPS > 1:
        lane = tl.arange(0, 32)[None, :]
        local = block + tl.arange(0, ROW_WARPS)[:, None] * (16 * ROW_TILES) + lane // 4
    for part in tl.static_range(4 * ROW_TILES * BLOCKS_OF_8):
        value = total[part]
        if DEPTH_WARPS > 1:
            value = tl.sum(tl.reshape(value, (ROW_WARPS, DEPTH_WARPS, 32)), axis=1)
        m = part // (4 * ROW_TILES) * 8 + lane % 4 * 2 + part % 2
        n = member + CLASSES * (local + part // 4 % ROW_TILES * 16 + part % 4 // 2 * 8)
        tl.store(out + m * N + n, (value * 0.5).to(y_ptr.dtype.element_ty), mask=(m < M) & (n < N))


def fragments(x: jax.Array, P: int, classes: int, tiles: int) -> jax.Array:
    """Activations `(M, K)` in the order that threads read them, `(classes, 5, tiles, ceil(M/8), 4, 8, 4, 4)`.

    The last axes are the word, the row of x, the thread's bytes, and their position in the word.
    """
    M, K = x.shape
    blocks = triton.cdiv(M, 8)
    planes = jnp.pad(x, ((0, 8 * blocks - M), (0, 5 * P - K))).reshape(8 * blocks, 5, P)
    room = tiles * TILE_BYTES.value - P
    phases = [member * P % 4 for member in range(classes)]
    shifted = jnp.stack([jnp.pad(planes, ((0, 0), (0, 0), (phase, room - phase))) for phase in phases])
    return shifted.reshape(classes, blocks, 8, 5, tiles, 4, 4, 4).transpose(0, 3, 4, 1, 6, 2, 5, 7)


@dataclass(frozen=True)
class Cut:
    """A tile on one shape."""

    tile: Tile
    classes: int
    blocks: int
    """Programs along the rows of one class."""
    each: int
    """Tiles of one warp."""
    tiles: int
    """Of a row, with those that only fill up."""
    splits: int


def cut_of(N: int, P: int, tile: Tile) -> Cut:
    """How `tile` cuts a matrix."""
    classes = min(4 // gcd(P, 4), N)
    blocks = triton.cdiv(triton.cdiv(N, classes), 16 * tile.row_tiles * tile.row_warps)
    needed = triton.cdiv(P + (3 if classes > 1 else 0), TILE_BYTES.value)
    each = triton.cdiv(needed, tile.splits * tile.depth_warps)
    splits = triton.cdiv(needed, each * tile.depth_warps)
    return Cut(tile, classes, blocks, each, each * tile.depth_warps * splits, splits)


def partial_products(
    x: jax.Array, trits: jax.Array, scale: jax.Array, *, M: int, group_size: int, cut: Cut, whole_x: bool
) -> jax.Array:
    """`(splits, M, N)`, float32, or bfloat16 where there is one split; `x` as `few_rows` takes it."""
    N, P = trits.shape
    return launch(
        few_rows,
        x,
        trits,
        scale,
        out=jax.ShapeDtypeStruct((cut.splits, M, N), x.dtype if cut.splits == 1 else jnp.float32),
        grid=(cut.classes * cut.blocks, cut.splits),
        num_warps=cut.tile.row_warps * cut.tile.depth_warps,
        num_stages=1,
        N=N,
        P=P,
        R=scale.shape[1],
        G=group_size,
        M=M,
        CLASSES=cut.classes,
        BLOCKS=cut.blocks,
        TILES=cut.tiles,
        TILES_EACH=cut.each,
        WHOLE_X=whole_x,
        ROW_TILES=cut.tile.row_tiles,
        ROW_WARPS=cut.tile.row_warps,
        DEPTH_WARPS=cut.tile.depth_warps,
    )


def sum_of_splits(parts: jax.Array) -> jax.Array:
    """`(M, N)` bfloat16 of `(splits, M, N)`."""
    return jnp.sum(parts, axis=0, dtype=jnp.float32).astype(jnp.bfloat16)


def fused(x: jax.Array, trits: jax.Array, scale: jax.Array, *, group_size: int, tile: Tile | None = None) -> jax.Array:
    """`y = x W^T` for few rows of bfloat16."""
    (M, K), (N, P) = x.shape, trits.shape
    tile = tile or tile_of(M)
    cut = cut_of(N, P, tile)
    whole_x = tile.whole_x and K == 5 * P and P % 16 == 0
    x = x if whole_x else fragments(x, P, cut.classes, cut.tiles)
    parts = partial_products(x, trits, scale, M=M, group_size=group_size, cut=cut, whole_x=whole_x)
    return parts[0] if cut.splits == 1 else sum_of_splits(parts)


def is_fused(M: int, dtype: jnp.dtype) -> bool:
    """Whether the fused kernel takes so many rows."""
    return M <= FUSED_ROWS and dtype == jnp.bfloat16


def dense(x: jax.Array, trits: jax.Array, scale: jax.Array, *, group_size: int) -> jax.Array:
    """`y = x W^T` through the weight."""
    w_NxK = weight_of(trits, scale, in_features=x.shape[1], group_size=group_size, dtype=x.dtype)
    return jax.lax.dot_general(x, w_NxK, (((1,), (1,)), ((), ())), precision=precision_of(x.dtype))


def forward(x: jax.Array, trits: jax.Array, scale: jax.Array, *, group_size: int) -> jax.Array:
    """See `api.packed_matmul`."""
    check_size("packed_matmul", "trits", trits)
    check_size("packed_matmul", "scale", scale)
    chosen = fused if is_fused(x.shape[0], x.dtype) else dense
    return one_by_one(chosen, x, trits, scale, group_size=group_size)


def dense_input_gradient(
    dy: jax.Array, trits: jax.Array, scale: jax.Array, *, in_features: int, group_size: int
) -> jax.Array:
    """`dx = dy W` through the weight."""
    w_NxK = weight_of(trits, scale, in_features=in_features, group_size=group_size, dtype=dy.dtype)
    return jax.lax.dot_general(dy, w_NxK, (((1,), (0,)), ((), ())), precision=precision_of(dy.dtype))


def input_gradient(
    dy: jax.Array, trits: jax.Array, scale: jax.Array, *, in_features: int, group_size: int
) -> jax.Array:
    """See `api.packed_matmul_input_gradient`."""
    return one_by_one(dense_input_gradient, dy, trits, scale, in_features=in_features, group_size=group_size)
