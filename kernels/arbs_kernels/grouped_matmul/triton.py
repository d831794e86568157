"""Grouped products and scores by Triton kernels: a program finds the expert of its tile among `group_sizes` by itself.

Products of few rows an expert decode weights as they meet them, so that experts without rows cost nothing; those of
many read weights that `packed_decode` wrote for the length of the call. The grid holds as many tiles of rows as the
worst sizes could need. Rows of no expert are those of one more expert, whose product is 0.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from arbs_kernels.backends import compute_capability
from arbs_kernels.correlation_score.triton import Tile as ScoreTile
from arbs_kernels.correlation_score.triton import cut_of, tile_votes
from arbs_kernels.correlation_score.triton import tile_of as score_tile_of
from arbs_kernels.packed_decode.triton import power_of_plane, trit_of, weight_of
from arbs_kernels.triton_launch import check_size, launch, one_by_one

FEW_ROWS = 8
"""An expert, on average, up to which weights are decoded in the product: then few experts have more than one tile."""


@dataclass(frozen=True)
class Tile:
    """A tile of the result; powers of two, no less than 16."""

    rows: int
    """Of one expert: of activations, or of its gradient."""
    columns: int
    depth: int
    """Of the sum at once."""
    num_warps: int
    num_stages: int


BIG = Tile(rows=128, columns=256, depth=64, num_warps=8, num_stages=3)
"""bfloat16 on data-centre GPUs since Hopper."""
LOW = Tile(rows=64, columns=256, depth=64, num_warps=4, num_stages=4)
"""The same for experts that would leave most of a larger tile empty."""
SMALL = Tile(rows=64, columns=128, depth=32, num_warps=4, num_stages=4)
"""bfloat16 on other GPUs, 48 KiB; and where rows are no multiples of 16 bytes: fewer numbers are on their way then."""
FLOAT32 = Tile(rows=32, columns=128, depth=16, num_warps=8, num_stages=2)
"""No tensor core multiplies float32 in full."""
FEW = Tile(rows=16, columns=32, depth=128, num_warps=4, num_stages=1)
"""Decoding in the product: many programs, for each waits for its bytes."""
FEW_FLOAT32 = Tile(rows=16, columns=32, depth=32, num_warps=4, num_stages=1)


@triton.jit
def rows_of_tile(sizes_ptr, tile, M: tl.constexpr, X: tl.constexpr, ENTRIES: tl.constexpr, ROWS: tl.constexpr):
    """(expert, its first row in this tile, the end of its rows); expert X has the rows of none, those after it no tile.

    ENTRIES is a power of two above X.
    """
    entry = tl.arange(0, ENTRIES)
    sizes = tl.load(sizes_ptr + entry, mask=entry < X, other=0)
    sizes = tl.where(entry == X, M, sizes)
    end = tl.cumsum(sizes, 0)
    begin = tl.minimum(end - sizes, M)
    end = tl.minimum(end, M)
    tiles = (end - begin + ROWS - 1) // ROWS
    end_tile = tl.cumsum(tiles, 0)
    expert = tl.sum((end_tile <= tile).to(tl.int32), 0)
    here = entry == expert
    first = tl.sum(tl.where(here, begin + (tile - end_tile + tiles) * ROWS, 0), 0)
    return expert, first, tl.sum(tl.where(here, end, 0), 0)


@triton.jit
def weights_at(
    w_ptr,
    scale_ptr,
    n,
    k,
    k0,
    inside,
    K: tl.constexpr,
    P: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
    PACKED: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Weights (n, k) of an expert: from its bytes if PACKED, else as they are; 0 outside. Tiles of k begin at `k0`."""
    if PACKED:
        if k.shape[0] <= P:  # Two planes at most.
            end = (k0 // P + 1) * P
            power = tl.where(k < end, power_of_plane(k0 // P), power_of_plane(k0 // P + 1))
            byte = k - tl.where(k < end, end - P, end)
        else:
            power = power_of_plane(k // P)
            byte = k % P
        codes = tl.load(w_ptr + n[:, None] * P + byte[None, :], mask=inside, other=0)
        scale = tl.load(scale_ptr + n[:, None] * R + (k // G)[None, :], mask=inside, other=0.0)
        weights = (trit_of(codes, power[None, :]).to(tl.float32) * scale).to(DTYPE)
    else:
        weights = tl.load(w_ptr + n[:, None] * K + k[None, :], mask=inside, other=0.0)
    return weights


@triton.jit
def products(
    left_ptr,
    sizes_ptr,
    w_ptr,
    scale_ptr,
    out_ptr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
    X: tl.constexpr,
    ENTRIES: tl.constexpr,
    FORWARD: tl.constexpr,
    PACKED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """`x W^T` (M, N) of `x` (M, K) if FORWARD, else `dy W` (M, K) of `dy` (M, N); w: packed (X, N, P), or (X, N, K)."""
    WIDTH: tl.constexpr = N if FORWARD else K
    INNER: tl.constexpr = K if FORWARD else N
    ALONG: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    expert, first, end = rows_of_tile(sizes_ptr, tl.program_id(0) // ALONG, M, X, ENTRIES, ROWS)
    if expert > X:
        return
    rows = first + tl.arange(0, ROWS)
    left_column = tl.program_id(0) % ALONG * COLUMNS
    columns = left_column + tl.arange(0, COLUMNS)
    w_ptr += expert.to(tl.int64) * (N * (P if PACKED else K))
    scale_ptr += expert.to(tl.int64) * (N * R)
    # Rows of the experts that follow are multiplied, too, and not stored.
    left_ptrs = left_ptr + tl.minimum(rows, M - 1)[:, None] * INNER
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, tl.where(expert < X, INNER, 0), DEPTH):
        at = start + tl.arange(0, DEPTH)
        # What the shapes rule out costs no mask: these conditions are known to the compiler.
        inner = (at < INNER) | (INNER % DEPTH == 0)
        outer = (columns < WIDTH) | (WIDTH % COLUMNS == 0)
        left = tl.load(left_ptrs + at[None, :], mask=inner[None, :], other=0.0)
        if FORWARD:
            inside = outer[:, None] & inner[None, :]
            w = weights_at(w_ptr, scale_ptr, columns, at, start, inside, K, P, R, G, PACKED, dtype)
            total = tl.dot(left, tl.trans(w), total, input_precision="ieee")
        else:
            inside = inner[:, None] & outer[None, :]
            w = weights_at(w_ptr, scale_ptr, at, columns, left_column, inside, K, P, R, G, PACKED, dtype)
            total = tl.dot(left, w, total, input_precision="ieee")
    kept = (rows < end)[:, None] & (columns < WIDTH)[None, :]
    tl.store(out_ptr + rows[:, None] * WIDTH + columns[None, :], total.to(dtype), mask=kept)


@triton.jit
def votes(
    x_ptr,
    dy_ptr,
    sizes_ptr,
    trits_ptr,
    score_ptr,
    M: tl.constexpr,
    X: tl.constexpr,
    ENTRIES: tl.constexpr,
    TILES: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
    WHOLE: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    BAND: tl.constexpr,
):
    """Scores (X, N, R): one of the TILES tiles of one expert for each program."""
    expert = tl.program_id(0) // TILES
    entry = tl.arange(0, ENTRIES)
    sizes = tl.load(sizes_ptr + entry, mask=entry < X, other=0)
    begin = tl.sum(tl.where(entry < expert, sizes, 0), 0)
    end = begin + tl.sum(tl.where(entry == expert, sizes, 0), 0)
    tile_votes(
        x_ptr,
        dy_ptr,
        trits_ptr + expert * (N * P),
        score_ptr + expert * (N * R),
        tl.program_id(0) % TILES,
        tl.minimum(begin, M),
        tl.minimum(end, M),
        False,
        N,
        K,
        P,
        R,
        G,
        WHOLE,
        GROUPS,
        ROWS,
        COLUMNS,
        DEPTH,
        BAND,
    )


def is_fused(M: int, experts: int) -> bool:
    """Whether so many rows decode weights in the product."""
    return experts * FEW_ROWS >= M


def tile_of(M: int, experts: int, N: int, K: int, dtype: jnp.dtype) -> Tile:
    """The tile for so many rows of a dtype on this device."""
    if is_fused(M, experts):
        return FEW_FLOAT32 if dtype == jnp.float32 else FEW
    if dtype == jnp.float32:
        return FLOAT32
    if N % 8 or K % 8 or not 9.0 <= compute_capability() < 12.0:
        return SMALL
    return BIG if experts * (BIG.rows // 2) <= M else LOW


def table_entries(experts: int) -> int:
    """Of the table of experts in a program: one more than there are, as a power of two that fills a warp."""
    return max(32, triton.next_power_of_2(experts + 1))


def product_of(
    operator: str,
    left: jax.Array,
    group_sizes: jax.Array,
    trits: jax.Array,
    scale: jax.Array,
    *,
    in_features: int,
    group_size: int,
    forward: bool,
    tile: Tile | None = None,
    packed: bool | None = None,
) -> jax.Array:
    """Either product, with its tile, and whether it decodes."""
    M, (X, N, P), K, R = left.shape[0], trits.shape, in_features, scale.shape[-1]
    out = jax.ShapeDtypeStruct((M, N if forward else K), left.dtype)
    one = jax.ShapeDtypeStruct((N, K), left.dtype)
    arrays = {
        "x" if forward else "dy": left,
        "trits": trits,
        "scale": scale,
        "the result": out,
        "one expert's weights": one,
    }
    for name, array in arrays.items():
        check_size(operator, name, array)
    if M == 0:
        return jnp.zeros(out.shape, out.dtype)
    tile = tile or tile_of(M, X, N, K, left.dtype)
    packed = is_fused(M, X) if packed is None else packed
    w = trits
    if not packed:
        wide = {"in_features": K, "group_size": group_size, "dtype": left.dtype}
        w = weight_of(trits.reshape(X * N, P), scale.reshape(X * N, R), **wide)
    # Every expert with rows, and the rows of none, may end with a tile that is not full.
    down = min(M, M // tile.rows + X + 1)
    return launch(
        products,
        left,
        group_sizes,
        w,
        scale,
        out=out,
        grid=(down * triton.cdiv(out.shape[1], tile.columns),),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        M=M,
        N=N,
        K=K,
        P=P,
        R=R,
        G=group_size,
        X=X,
        ENTRIES=table_entries(X),
        FORWARD=forward,
        PACKED=packed,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        DEPTH=tile.depth,
    )


def forward(x: jax.Array, group_sizes: jax.Array, trits: jax.Array, scale: jax.Array, *, group_size: int) -> jax.Array:
    """See `api.grouped_matmul`."""

    def run(*arrays: jax.Array) -> jax.Array:
        return product_of("grouped_matmul", *arrays, in_features=x.shape[-1], group_size=group_size, forward=True)

    return one_by_one(run, x, group_sizes, trits, scale)


def input_gradient(
    dy: jax.Array, group_sizes: jax.Array, trits: jax.Array, scale: jax.Array, *, in_features: int, group_size: int
) -> jax.Array:
    """See `api.grouped_matmul_input_gradient`."""

    def run(*arrays: jax.Array) -> jax.Array:
        operator, wide = "grouped_matmul_input_gradient", {"in_features": in_features, "group_size": group_size}
        return product_of(operator, *arrays, **wide, forward=False)

    return one_by_one(run, dy, group_sizes, trits, scale)


def score(x: jax.Array, dy: jax.Array, group_sizes: jax.Array, trits: jax.Array, *, group_size: int) -> jax.Array:
    """See `api.grouped_score`."""
    return one_by_one(score_of, x, dy, group_sizes, trits, group_size=group_size)


def score_of(
    x: jax.Array,
    dy: jax.Array,
    group_sizes: jax.Array,
    trits: jax.Array,
    *,
    group_size: int,
    tile: ScoreTile | None = None,
) -> jax.Array:
    """`score` with its tile."""
    X = trits.shape[0]
    tile = tile or score_tile_of(x.dtype)
    tiles, constants = cut_of(x.shape[1], trits, group_size, tile)
    out = jax.ShapeDtypeStruct((X, constants["N"], constants["R"]), jnp.int32)
    for name, array in {"x": x, "dy": dy, "trits": trits, "the result": out}.items():
        check_size("grouped_score", name, array)
    if x.shape[0] == 0:
        return jnp.zeros(out.shape, out.dtype)
    return launch(
        votes,
        x,
        dy,
        group_sizes,
        trits,
        out=out,
        grid=(X * tiles,),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        M=x.shape[0],
        X=X,
        ENTRIES=table_entries(X),
        TILES=tiles,
        **constants,
    )
