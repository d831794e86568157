"""Packed products by Triton kernels: few rows of bfloat16 activations straight from the bytes, many through the weight.

The fused kernel computes `y^T = W x^T`, weights as the first operand of the tensor core, decoded in registers: two
bytes cost 15 instructions for ten weights (`arbs_kernels.packed_decode.triton` has the arithmetic). A tile of BYTES
serves five runs of columns, `i*P + [j, j + BYTES)`, which begin anywhere in a group of G. So scales are applied

- to products, for a few rows (`GROUPS` > 0): every group that a run can touch has columns of its own in the operand of
  activations, which are zero elsewhere, and the products of a group meet its scale in float32 registers;
- to weights, for more (`GROUPS` = 0): a run no longer than G touches two groups, and a mask picks one of two scales.

Rows of P bytes begin at any address; those `CLASSES` apart begin at the same remainder modulo 4. A program takes rows
of one class, reads from the aligned word before their beginning, and finds activations shifted alike.
"""

from dataclasses import dataclass
from math import gcd

import jax
import jax.numpy as jnp
import numpy as np
import triton
import triton.language as tl

from arbs_kernels.packed_decode.triton import weight_of
from arbs_kernels.packed_matmul.reference import precision_of
from arbs_kernels.triton_launch import check_size, launch, one_by_one

SCALED_PRODUCTS_ROWS = 4
"""Most rows whose products are scaled, not their weights."""
FUSED_ROWS = 64
"""Most rows of the fused kernel."""
GROUPS_AT_ONCE = 8
"""Columns for the groups of one run; the length of a run is chosen so that they suffice."""
SHORTEST_RUN = 16
"""The tensor core's depth: a group shorter than that has no run of its own."""
SHARED_BYTES = 2**16
"""Of the activations in flight: every GPU since Ampere has 99 KiB for one program, and several should fit."""


@dataclass(frozen=True)
class Tile:
    """How the fused kernel is cut."""

    rows: int
    """Rows of W of one program, a power of two."""
    codes: int
    """Bytes of a row at once, at most, a power of two."""
    programs: int = 528
    """Programs wanted in all: the reduction is split until there are about that many."""
    num_warps: int = 4
    num_stages: int = 3


SCALED_PRODUCTS = Tile(rows=64, codes=128)
SCALED_WEIGHTS = Tile(rows=128, codes=128)


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

# Times the first scale where the mask is set, the second elsewhere; the addend -0 makes it a product.
_SCALED = tl.constexpr(
    "{ .reg .b32 s, z; mov.b32 z, 0x80008000; lop3.b32 s, $2, $3, $4, 0xCA; fma.rn.bf16x2 $0, $1, s, z; }"
)


@triton.jit
def five_planes(codes):
    """Two times the trits of `codes` uint8, five bfloat16 planes."""
    return tl.inline_asm_elementwise(
        _FIVE_PLANES,
        "=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,r",
        [codes],
        (tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
        is_pure=True,
        pack=4,
    )


@triton.jit
def scaled(digits, first, low, high):
    """`digits` times `low` where `first` is -1, `high` where it is 0; scales are the bits of bfloat16, all int16."""
    return tl.inline_asm_elementwise(
        _SCALED, "=r,r,r,r,r", [digits, first, low, high], tl.bfloat16, is_pure=True, pack=2
    )


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
    CLASSES: tl.constexpr,
    BLOCKS: tl.constexpr,
    TILES: tl.constexpr,
    TILES_EACH: tl.constexpr,
    M: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    BYTES: tl.constexpr,
):
    """Part of `y`, float32 (splits, M, BLOCKS*ROWS*CLASSES), of one block of rows and some tiles of bytes.

    x: bfloat16 (CLASSES, 5, TILES, M * max(GROUPS, 1), BYTES); scale: float32 (N, R) where products are scaled, else
    int32 (R, CLASSES, BLOCKS*ROWS), half of two adjacent groups' scales in bfloat16.
    """
    WIDTH: tl.constexpr = M * max(GROUPS, 1)
    LOCAL: tl.constexpr = BLOCKS * ROWS
    member = tl.program_id(0) // BLOCKS
    local = tl.program_id(0) % BLOCKS * ROWS + tl.arange(0, ROWS)
    inner = tl.minimum(local, (N - 1 - member) // CLASSES)
    row = member + CLASSES * inner
    start = member * P // 4 * 4 + inner * (CLASSES * P)
    phase = member * P % 4
    at = tl.arange(0, BYTES)
    across = tl.arange(0, WIDTH)
    last: tl.constexpr = (N * P + 3) // 4 * 4
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    first_tile = tl.program_id(1) * TILES_EACH
    for tile in range(first_tile, tl.minimum(first_tile + TILES_EACH, TILES)):
        offset = start[:, None] + (tile * BYTES + at)[None, :]
        planes = five_planes(tl.load(trits_ptr + offset, mask=offset < last, other=0))
        for plane in tl.static_range(5):
            run = ((member * 5 + plane) * TILES + tile) * (WIDTH * BYTES)
            x = tl.load(x_ptr + run + across[None, :] * BYTES + at[:, None])
            column = plane * P + tile * BYTES - phase
            group = tl.maximum(column, 0) // G
            if GROUPS > 0:
                products = tl.dot(planes[plane], x)
                theirs = tl.minimum(group + across % GROUPS, R - 1)
                scale = tl.load(scale_ptr + row[:, None] * R + theirs[None, :])
                total += products * scale.to(tl.bfloat16).to(tl.float32)
            else:
                pair = tl.load(scale_ptr + (tl.minimum(group, R - 1) * CLASSES + member) * LOCAL + local)
                low = (pair & 0xFFFF).to(tl.int16)
                high = (pair >> 16).to(tl.int16)
                first = tl.where(at < (group + 1) * G - column, -1, 0).to(tl.int16)
                weight = scaled(planes[plane], first[None, :], low[:, None], high[:, None])
                total = tl.dot(weight, x, total)
    out = y_ptr + (tl.program_id(1) * M).to(tl.int64) * (CLASSES * LOCAL) + (member + CLASSES * local)[:, None]
    if GROUPS > 0:
        total = 0.5 * tl.sum(tl.reshape(total, (ROWS, M, GROUPS)), axis=2)
    tl.store(out + tl.arange(0, M)[None, :] * (CLASSES * LOCAL), total)


def run_length(group_size: int, width: int, scaled_products: bool, tile: Tile) -> int:
    """Bytes at once: a run of so many columns touches `GROUPS_AT_ONCE` groups at most, two where weights are scaled."""

    def fits(length: int) -> bool:
        shared = tile.num_stages * 5 * width * length * 2 <= SHARED_BYTES
        return shared and (
            (length - 1) // group_size + 2 <= GROUPS_AT_ONCE if scaled_products else length <= group_size
        )

    length = tile.codes
    while length > SHORTEST_RUN and not fits(length):
        length //= 2
    return length


def is_fused(M: int, group_size: int, dtype: jnp.dtype) -> bool:
    """Whether the fused kernel takes so many rows."""
    most = FUSED_ROWS if group_size >= SHORTEST_RUN else SCALED_PRODUCTS_ROWS
    return most >= M and dtype == jnp.bfloat16


def runs_of_activations(x: jax.Array, P: int, G: int, classes: int, tiles: int, length: int, groups: int) -> jax.Array:
    """Activations `(M, K)` as the fused kernel meets them, `(classes, 5, tiles, M * max(groups, 1), length)`."""
    M, K = x.shape
    phase = (np.arange(classes) * P % 4)[:, None, None, None]
    plane = jnp.arange(5)[:, None, None] * P
    byte = jnp.arange(tiles)[:, None] * length + jnp.arange(length) - phase
    column = plane + byte
    inside = (byte >= 0) & (byte < P) & (column < K)
    runs = jnp.where(inside[..., None, :], jnp.moveaxis(x[:, jnp.clip(column, 0, K - 1)], 0, -2), jnp.bfloat16(0))
    if not groups:
        return runs
    first = jnp.maximum(column[..., :1], 0) // G
    own = (column // G - first)[..., None, :] == jnp.arange(groups)[:, None]
    each = jnp.where(own[..., None, :, :], runs[..., :, None, :], jnp.bfloat16(0))
    return each.reshape(*each.shape[:3], M * groups, length)


def pairs_of_scales(scale: jax.Array, classes: int, local: int) -> jax.Array:
    """Half of each scale and of the next group's in bfloat16, `int32 (R, classes, local)`, rows by class."""
    N, R = scale.shape
    half = jax.lax.bitcast_convert_type((scale * 0.5).astype(jnp.bfloat16), jnp.uint16).astype(jnp.uint32)
    pair = half | (jnp.concatenate([half[:, 1:], half[:, -1:]], axis=1) << 16)
    pair = jnp.pad(pair, ((0, classes * local - N), (0, 0))).reshape(local, classes, R)
    return jax.lax.bitcast_convert_type(pair.transpose(2, 1, 0), jnp.int32)


def fused(x: jax.Array, trits: jax.Array, scale: jax.Array, *, group_size: int, tile: Tile | None = None) -> jax.Array:
    """`y = x W^T` for few rows of bfloat16."""
    M, (N, P), R = x.shape[0], trits.shape, scale.shape[1]
    scaled_products = M <= SCALED_PRODUCTS_ROWS
    tile = tile or (SCALED_PRODUCTS if scaled_products else SCALED_WEIGHTS)
    groups = GROUPS_AT_ONCE if scaled_products else 0
    padded = triton.next_power_of_2(M) if scaled_products else max(16, triton.next_power_of_2(M))
    length = run_length(group_size, padded * max(groups, 1), scaled_products, tile)
    classes = min(4 // gcd(P, 4), N)
    tiles = triton.cdiv(P + (3 if classes > 1 else 0), length)
    blocks = triton.cdiv(triton.cdiv(N, classes), tile.rows)
    each = triton.cdiv(tiles, max(1, tile.programs // (classes * blocks)))
    splits = triton.cdiv(tiles, each)
    local = blocks * tile.rows
    x = jnp.pad(x, ((0, padded - M), (0, 0)))
    parts = launch(
        few_rows,
        runs_of_activations(x, P, group_size, classes, tiles, length, groups),
        trits,
        scale if scaled_products else pairs_of_scales(scale, classes, local),
        out=jax.ShapeDtypeStruct((splits, padded, local * classes), jnp.float32),
        grid=(classes * blocks, splits),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        N=N,
        P=P,
        R=R,
        G=group_size,
        CLASSES=classes,
        BLOCKS=blocks,
        TILES=tiles,
        TILES_EACH=each,
        M=padded,
        GROUPS=groups,
        ROWS=tile.rows,
        BYTES=length,
    )
    return jnp.sum(parts[:, :M, :N], axis=0).astype(x.dtype)


def dense(x: jax.Array, trits: jax.Array, scale: jax.Array, *, group_size: int) -> jax.Array:
    """`y = x W^T` through the weight."""
    w_NxK = weight_of(trits, scale, in_features=x.shape[1], group_size=group_size, dtype=x.dtype)
    return jax.lax.dot_general(x, w_NxK, (((1,), (1,)), ((), ())), precision=precision_of(x.dtype))


def forward(x: jax.Array, trits: jax.Array, scale: jax.Array, *, group_size: int) -> jax.Array:
    """See `api.packed_matmul`."""
    check_size("packed_matmul", "trits", trits)
    check_size("packed_matmul", "scale", scale)
    chosen = fused if is_fused(x.shape[0], group_size, x.dtype) else dense
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
