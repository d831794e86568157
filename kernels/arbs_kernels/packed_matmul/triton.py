"""Packed products by Triton kernels: few rows of bfloat16 activations straight from the bytes, many through the weight.

`whole_windows_kernel` has the kernel for the fewest rows and most matrices, `few_rows_kernel` that for all; here is how
they are cut, and in what order x lies for the second.
"""

from dataclasses import dataclass, replace
from math import gcd

import jax
import jax.numpy as jnp
import triton

from arbs_kernels.packed_decode.triton import weight_of
from arbs_kernels.packed_matmul.few_rows_kernel import few_rows
from arbs_kernels.packed_matmul.prepared import as_prepared, as_rows
from arbs_kernels.packed_matmul.reference import precision_of
from arbs_kernels.packed_matmul.whole_windows_kernel import WINDOW, whole_windows
from arbs_kernels.triton_launch import check_size, launch, one_by_one

FUSED_ROWS = 64
"""Most rows of the fused kernels."""
WHOLE_ROWS = 16
"""Most rows of that for whole windows."""


@dataclass(frozen=True)
class Tile:
    """How the fused kernel is cut; powers of two but `ahead` and `splits`."""

    row_tiles: int
    """Times 16 rows of W of one warp, which share what it loads of x."""
    row_warps: int
    """Warps side by side along the rows, which meet in the cache what they load of x."""
    depth_warps: int
    """Warps that share the reduction, a tile each by turns; their sums are added within the program."""
    words: int = 4
    """Times four codes of a row that a thread takes in one go, 4 or 8; 4 where groups have less than 32 columns."""
    chunk: int = 1
    """Words that are decoded, and whose x is loaded, at once; 1 or 2."""
    ahead: int = 1
    """Tiles asked for before the one at hand is computed."""
    splits: int = 1
    """Programs that share the reduction; their sums are added by another kernel."""
    direct_x: bool = True
    """Whether x is read as it is where that is possible, not from a copy in the order of fragments."""


_SMS = 132
"""Multiprocessors to fill at once, those of an H200; on others programs wait for each other, no more."""


def tile_of(M: int, N: int, P: int) -> Tile:
    """The tile for so many rows of x and of W."""
    sixteens = triton.cdiv(N, 16 * _SMS)
    aligned = P % 16 == 0
    if M <= 8:
        # All programs at once, 16 to 20 warps for each multiprocessor.
        return Tile(1, 1, 16 if sixteens <= 2 else 4, direct_x=M <= 4)
    if M <= 16:
        if sixteens <= 2:
            return Tile(1, 1, 8, words=8, direct_x=False)
        return Tile(2, 1, 4) if aligned else Tile(1, 1, 4, direct_x=False)
    # Rows that begin anywhere take more registers: two scales for each run.
    row_tiles, row_warps = (2, 4) if aligned else (1, 8)
    return Tile(row_tiles, row_warps, 1, splits=max(1, _SMS // triton.cdiv(N, 128 * row_tiles)), direct_x=False)


def fragments(x: jax.Array, P: int, cut: "Cut") -> jax.Array:
    """Activations `(M, K)` in the order that threads read them, `(classes, 5, tiles, ceil(M/8), chunks, 8, 4, c, 4)`.

    The last axes are the row of x, the thread's run of bytes, words that are read at once, and the place in the word.
    """
    M, K = x.shape
    blocks = triton.cdiv(M, 8)
    words, together = cut.tile.words, cut.tile.chunk
    planes = jnp.pad(x, ((0, 8 * blocks - M), (0, 5 * P - K))).reshape(8 * blocks, 5, P)
    room = cut.tiles * 16 * words - P
    phases = [member * P % 4 for member in range(cut.classes)]
    shifted = jnp.stack([jnp.pad(planes, ((0, 0), (0, 0), (phase, room - phase))) for phase in phases])
    shape = (cut.classes, blocks, 8, 5, cut.tiles, 4, words // together, together, 4)
    return shifted.reshape(shape).transpose(0, 3, 4, 1, 6, 2, 5, 7, 8)


@dataclass(frozen=True)
class Cut:
    """A tile on one shape."""

    tile: Tile
    classes: int
    blocks: int
    """Programs along the rows of one class."""
    steps: int
    """Tiles of one warp."""
    tiles: int
    """Of a row, with those that only fill up."""
    splits: int
    whole: bool
    """Whether all tiles are full."""


def cut_of(N: int, P: int, group_size: int, tile: Tile) -> Cut:
    """How `tile` cuts a matrix."""
    if group_size < 32:
        tile = replace(tile, words=4)
    bytes_each = 16 * tile.words
    classes = min(4 // gcd(P, 4), N)
    blocks = triton.cdiv(triton.cdiv(N, classes), 16 * tile.row_tiles * tile.row_warps)
    needed = triton.cdiv(P + (3 if classes > 1 else 0), bytes_each)
    steps = triton.cdiv(needed, tile.splits * tile.depth_warps)
    splits = triton.cdiv(needed, steps * tile.depth_warps)
    tiles = steps * tile.depth_warps * splits
    return Cut(tile, classes, blocks, steps, tiles, splits, tiles * bytes_each == P)


def partial_products(
    x: jax.Array,
    trits: jax.Array,
    columns: jax.Array,
    *,
    shape: tuple[int, int],
    group_size: int,
    cut: Cut,
    direct_x: bool,
) -> jax.Array:
    """`(splits, M, N)`, float32, or bfloat16 where there is one split; `x` of `shape` and the columns of scales as
    `few_rows` takes them."""
    (M, K), (N, P) = shape, trits.shape
    return launch(
        few_rows,
        x,
        trits,
        columns,
        out=jax.ShapeDtypeStruct((cut.splits, M, N), x.dtype if cut.splits == 1 else jnp.float32),
        grid=(cut.classes * cut.blocks, cut.splits),
        num_warps=cut.tile.row_warps * cut.tile.depth_warps,
        num_stages=1,
        N=N,
        K=K,
        P=P,
        R=columns.shape[0],
        G=group_size,
        M=M,
        CLASSES=cut.classes,
        BLOCKS=cut.blocks,
        STEPS=cut.steps,
        TILES=cut.tiles,
        WHOLE=cut.whole,
        DIRECT_X=direct_x,
        WORDS=cut.tile.words,
        CHUNK=cut.tile.chunk,
        AHEAD=min(cut.tile.ahead, cut.steps - 1),
        ROW_TILES=cut.tile.row_tiles,
        ROW_WARPS=cut.tile.row_warps,
        DEPTH_WARPS=cut.tile.depth_warps,
    )


def sum_of_splits(parts: jax.Array) -> jax.Array:
    """`(M, N)` bfloat16 of `(splits, M, N)`."""
    return jnp.sum(parts, axis=0, dtype=jnp.float32).astype(jnp.bfloat16)


def is_direct(M: int, K: int, P: int) -> bool:
    """Whether the fused kernel can read x as it is: by pairs for very few rows, by eights for more."""
    return K % 2 == 0 if M <= 4 else K % 8 == 0 and P % 8 == 0


def is_whole(x_shape: tuple[int, int], N: int, P: int, group_size: int) -> bool:
    """Whether `whole_windows` takes the product (one scale for each plane of a window, loads of whole ones), and is the
    faster one: two to eight rows of x are not where five programs of its are too many for a multiprocessor, and four
    too few."""
    (M, K), window = x_shape, WINDOW.value
    takes = M <= WHOLE_ROWS and P % window == 0 and group_size % window == 0 and K % 8 == 0 and N % 2 == 0 and N >= 16
    return takes and (M == 1 or M > 8 or not 4 * _SMS < triton.cdiv(N, 16) <= 6 * _SMS)


def whole_cut(N: int, M: int) -> tuple[int, int]:
    """Tiles of 16 rows of a program, and its warps, as they were fastest on an H200: where it is possible all programs
    at once, and then few tiles for one row, which makes little of what tiles share."""
    tiles = triton.cdiv(N, 16)
    if tiles <= _SMS:
        return 1, 16
    if tiles <= 2 * _SMS:
        return (2, 16) if M == 1 else (1, 8)
    if M > 8:
        return min((4, 5), key=lambda some: some * triton.cdiv(tiles, some * _SMS)), 8
    if tiles <= 4 * _SMS:
        return (1 if M == 1 else 2), 8
    return (2, 8) if M == 1 and tiles <= 6 * _SMS else (1, 4)


def whole(
    x: jax.Array, trits: jax.Array, columns: jax.Array, *, group_size: int, cut: tuple[int, int] | None = None
) -> jax.Array:
    """`(M, N)` where `is_whole`."""
    (M, K), (N, P) = x.shape, trits.shape
    row_tiles, warps = cut or whole_cut(N, M)
    return launch(
        whole_windows,
        x,
        trits,
        columns,
        out=jax.ShapeDtypeStruct((M, N), x.dtype),
        grid=(triton.cdiv(N, 16 * row_tiles),),
        num_warps=warps,
        num_stages=1,
        N=N,
        K=K,
        P=P,
        R=columns.shape[0],
        G=group_size,
        M=M,
        STEPS=triton.cdiv(P, WINDOW.value * warps),
        ROW_TILES=row_tiles,
        WARPS=warps,
    )


def fused(x: jax.Array, trits: jax.Array, scale: jax.Array, *, group_size: int, tile: Tile | None = None) -> jax.Array:
    """`y = x W^T` for few rows of bfloat16; with a tile by `few_rows` in any case."""
    (M, K), (N, P), columns = x.shape, trits.shape, as_prepared(scale)
    if tile is None and is_whole((M, K), N, P, group_size):
        return whole(x, trits, columns, group_size=group_size)
    cut = cut_of(N, P, group_size, tile or tile_of(M, N, P))
    direct_x = cut.tile.direct_x and is_direct(M, K, P)
    given = x if direct_x else fragments(x, P, cut)
    parts = partial_products(given, trits, columns, shape=(M, K), group_size=group_size, cut=cut, direct_x=direct_x)
    return parts[0] if cut.splits == 1 else sum_of_splits(parts)


def is_fused(M: int, dtype: jnp.dtype) -> bool:
    """Whether the fused kernel takes so many rows."""
    return M <= FUSED_ROWS and dtype == jnp.bfloat16


def dense(x: jax.Array, trits: jax.Array, scale: jax.Array, *, group_size: int) -> jax.Array:
    """`y = x W^T` through the weight."""
    w_NxK = weight_of(trits, as_rows(scale), in_features=x.shape[1], group_size=group_size, dtype=x.dtype)
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
