"""The score by a Triton kernel: a tile of the gradient is made, compared and summed in registers, and never written."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from arbs_kernels.backends import compute_capability
from arbs_kernels.packed_decode.triton import power_of_plane, trit_of
from arbs_kernels.shapes import group_count
from arbs_kernels.triton_launch import check_size, launch, one_by_one


@dataclass(frozen=True)
class Tile:
    """A tile of the gradient."""

    rows: int
    """Of N, a power of two."""
    columns: int
    """Of K, a power of two and no less than the largest group."""
    depth: int
    """Of M at once."""
    num_warps: int
    num_stages: int
    band: int = 8
    """Row tiles that are visited before the next column tile: their operands stay in the cache."""


BIG = Tile(rows=128, columns=256, depth=64, num_warps=8, num_stages=3)
"""bfloat16 on data-centre GPUs since Hopper, which have 227 KiB for one program."""
SMALL = Tile(rows=64, columns=256, depth=32, num_warps=8, num_stages=3)
"""bfloat16 on others: 61 KiB."""
FLOAT32 = Tile(rows=32, columns=256, depth=16, num_warps=8, num_stages=2)
"""No tensor core multiplies float32 in full."""


@triton.jit
def tile_votes(
    x_ptr,
    dy_ptr,
    trits_ptr,
    score_ptr,
    tile,
    begin,
    end,
    WHOLE_DEPTHS: tl.constexpr,
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
    """Votes of activations' rows [begin, end) in one tile of a matrix: ROWS rows, the WHOLE groups that COLUMNS hold.

    GROUPS is WHOLE as a power of two; WHOLE_DEPTHS: whether DEPTH divides end - begin.
    """
    USED: tl.constexpr = WHOLE * G
    down: tl.constexpr = (N + ROWS - 1) // ROWS
    along: tl.constexpr = (K + USED - 1) // USED
    top = tile // (BAND * along) * BAND
    height = tl.minimum(down - top, BAND)
    within = tile % (BAND * along)
    across = within // height
    rows = (top + within % height) * ROWS + tl.arange(0, ROWS)
    offset = tl.arange(0, COLUMNS)
    columns = across * USED + offset
    depth = tl.arange(0, DEPTH)
    own = (offset < USED) & (columns < K)

    dw = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(begin, end, DEPTH):
        # What the shapes rule out costs no mask: these conditions are known to the compiler.
        left_mask = (rows < N)[None, :] | (N % ROWS == 0)
        right_mask = (columns < K)[None, :] | (K % COLUMNS == 0) & (USED == COLUMNS)
        if not WHOLE_DEPTHS:
            left_mask &= (first + depth < end)[:, None]
            right_mask &= (first + depth < end)[:, None]
        dy = tl.load(dy_ptr + (first + depth)[:, None] * N + rows[None, :], mask=left_mask, other=0.0)
        x = tl.load(x_ptr + (first + depth)[:, None] * K + columns[None, :], mask=right_mask, other=0.0)
        dw = tl.dot(tl.trans(dy), x, dw, input_precision="ieee")

    plane = columns // P
    held = (rows < N)[:, None] & own[None, :]
    codes = tl.load(trits_ptr + rows[:, None] * P + (columns - plane * P)[None, :], mask=held, other=0)
    trits = trit_of(codes, power_of_plane(plane)[None, :])
    # A NaN is neither above nor below 0.
    agreement = tl.where(dw > 0, trits, tl.where(dw < 0, -trits, 0))
    group = tl.arange(0, GROUPS)
    if USED == COLUMNS:
        agreement = tl.where(held, agreement, 0)
        score = tl.sum(tl.reshape(agreement, (ROWS, GROUPS, G)), axis=2)
    else:
        # Groups of no power of two are summed by a product with their indicators: exact, for sums are below 2^8.
        member = own[:, None] & (offset[:, None] // G == group[None, :])
        score = tl.dot(agreement.to(tl.bfloat16), member.to(tl.bfloat16)).to(tl.int32)
    theirs = across * WHOLE + group
    kept = (rows < N)[:, None] & ((group < WHOLE) & (theirs < R))[None, :]
    tl.store(score_ptr + rows[:, None] * R + theirs[None, :], score, mask=kept)


@triton.jit
def votes(
    x_ptr,
    dy_ptr,
    trits_ptr,
    score_ptr,
    M: tl.constexpr,
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
    """Votes of all rows, a tile of the matrix for each program."""
    tile_votes(
        x_ptr,
        dy_ptr,
        trits_ptr,
        score_ptr,
        tl.program_id(0),
        0,
        M,
        M % DEPTH == 0,
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


def tile_of(dtype: jnp.dtype) -> Tile:
    """The tile for this dtype and device."""
    if dtype == jnp.float32:
        return FLOAT32
    return BIG if 9.0 <= compute_capability() < 12.0 else SMALL


def score(x: jax.Array, dy: jax.Array, trits: jax.Array, *, group_size: int) -> jax.Array:
    """See `api.correlation_score`."""
    return one_by_one(score_of, x, dy, trits, group_size=group_size)


def cut_of(K: int, trits: jax.Array, group_size: int, tile: Tile) -> tuple[int, dict[str, int]]:
    """(tiles that a matrix of trits `(..., N, P)` is cut into, the constants of `tile_votes`)."""
    N, P = trits.shape[-2:]
    whole = tile.columns // group_size
    sizes = {"N": N, "K": K, "P": P, "R": group_count(K, group_size), "G": group_size}
    cut = {"WHOLE": whole, "GROUPS": triton.next_power_of_2(whole), "ROWS": tile.rows, "COLUMNS": tile.columns}
    tiles = triton.cdiv(N, tile.rows) * triton.cdiv(K, whole * group_size)
    return tiles, {**sizes, **cut, "DEPTH": tile.depth, "BAND": tile.band}


def score_of(x: jax.Array, dy: jax.Array, trits: jax.Array, *, group_size: int, tile: Tile | None = None) -> jax.Array:
    """`score` with its tile."""
    for name, array in (("x", x), ("dy", dy), ("trits", trits)):
        check_size("correlation_score", name, array)
    tile = tile or tile_of(x.dtype)
    tiles, constants = cut_of(x.shape[1], trits, group_size, tile)
    return launch(
        votes,
        x,
        dy,
        trits,
        out=jax.ShapeDtypeStruct((constants["N"], constants["R"]), jnp.int32),
        grid=(tiles,),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        M=x.shape[0],
        **constants,
    )
