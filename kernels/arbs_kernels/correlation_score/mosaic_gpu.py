"""The score by a persistent Hopper kernel: a tile of the gradient stays in registers, where it votes.

A block of two computing warpgroups and one that feeds them makes tile after tile of `dW = dy^T x`. The codes of a
tile's trits are copied to shared memory while its products run. A tile of columns `[c, c + COLUMNS)` needs the bytes
`c mod P` and following of each row, of which those past the row's end are its first again, in the next plane: so
rows are copied once, extended by a tile of their own beginning (0.2 bytes a weight).

Copies to shared memory begin at a multiple of 16 bytes, or the GPU takes them for an illegal instruction: so they begin
up to 15 codes early. Rows of 128 or 256 codes would all begin in the same bank of shared memory; their halves with 16
codes more never do.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.layout import Layout, with_layout_constraint
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.pallas import mosaic_gpu as plgpu

from arbs_kernels.backends import is_interpreted
from arbs_kernels.mosaic_support import SHARED_BYTES, check_hopper, multiprocessors, padded
from arbs_kernels.selection import UnsupportedError
from arbs_kernels.shapes import group_count
from arbs_kernels.triton_launch import one_by_one

ATOM = 8
"""Columns of the accumulator that a row of four lanes holds side by side."""
SWIZZLE = 128
"""Bytes of a row of operands in shared memory."""
WIDTH = SWIZZLE // 2
"""Columns of bfloat16 in such a row; tiles begin at its multiples."""
ALIGNED = 16
"""Copies begin at codes of a row that are a multiple of this."""

TOP_BITS = -(1 << 30)
"""Sign and leading exponent bit of float32, as int32."""
SIGN_BIT = -(1 << 31)


@dataclass(frozen=True)
class Tile:
    """How the kernel is cut."""

    rows: int = 256
    """Of N, a multiple of 128 (of 64 where warpgroups share them)."""
    columns: int = 128
    """Of K, a multiple of 64 and of G."""
    depth: int = 64
    """Of M at once."""
    steps: int = 3
    """Depths in flight."""
    by_rows: bool = True
    """Whether the two computing warpgroups share a tile's rows, or else its columns."""
    band: int = 8
    """Row tiles that are visited before the next column tile: their operands stay in the cache."""
    cluster: bool = False
    """Whether two blocks with neighbouring row tiles share what they read of x."""


CANDIDATES: tuple[dict[str, Any], ...] = (
    {},
    {"band": 4},
    {"band": 16},
    {"cluster": True},
    {"rows": 128, "columns": 256},
    {"rows": 128, "columns": 256, "band": 16},
    {"rows": 128, "columns": 256, "by_rows": False},
    {"rows": 128, "columns": 192, "steps": 4},
)
"""Tiles to try; a tile that does not fit the group size takes the nearest number of columns that does."""


def tile_of(group_size: int, tiles: Mapping[str, Any]) -> Tile:
    """The tile that `tiles` asks for, with columns in whole groups of this size."""
    tile = Tile(**tiles)
    if tile.columns % group_size == 0 and (tile.by_rows or tile.columns // 2 % group_size == 0):
        return tile
    odd = 192 if group_size % 3 == 0 else max(group_size, 128)
    return replace(tile, rows=128, columns=odd, by_rows=True)


def shared_bytes(tile: Tile) -> int:
    """Shared memory of a block."""
    operands = tile.steps * tile.depth * (tile.rows + tile.columns) * 2
    parts = 2 if tile.by_rows else 4  # Of a row of codes, which two copies bring to one warpgroup, or to each of both.
    return operands + tile.rows * (tile.columns + parts * ALIGNED) + 2048


def planes_of(left: jax.Array, P: int, columns: int) -> tuple[list[jax.Array], list[jax.Array]]:
    """Where planes end in a tile of columns that begins at `left`, and `3^i` of each plane and of the one after them.

    Two planes where a tile cannot touch three, otherwise all five.
    """
    if columns > P:
        return [i * P - left for i in range(1, 5)], [jnp.int32(3**i) for i in range(5)]
    plane = lax.div(left, jnp.int32(P))
    power = jnp.int32(1)
    for i in range(1, 5):
        power = jnp.where(plane >= i, jnp.int32(3**i), power)
    return [(plane + 1) * P - left], [power, power * 3]


def kernel(x: Any, dy: Any, codes: Any, score: Any, *, P: int, G: int, tile: Tile, down: int, along: int) -> None:
    """Scores int32 (groups, rows) of `down` by `along` tiles of x (M, K), dy (M, N), codes (N, P + COLUMNS + 16)."""
    M = x.shape[0]
    rows = tile.rows // 2 if tile.by_rows else tile.rows
    columns = tile.columns if tile.by_rows else tile.columns // 2
    transforms = (plgpu.TilingTransform((8, WIDTH)), plgpu.SwizzleTransform(SWIZZLE))
    half = columns // 2

    def pipeline(row: Any, column: Any, body: Any, context: Any) -> Any:
        return plgpu.emit_pipeline_warp_specialized(
            body,
            grid=(pl.cdiv(M, tile.depth),),
            memory_registers=40,
            in_specs=[
                plgpu.BlockSpec((tile.depth, tile.rows), lambda k: (k, row), transforms=transforms),
                plgpu.BlockSpec(
                    (tile.depth, tile.columns),
                    lambda k: (k, column),
                    transforms=transforms,
                    collective_axes=("cluster",) if tile.cluster else (),
                ),
            ],
            wg_axis="wg",
            num_compute_wgs=2,
            max_concurrent_steps=tile.steps,
            compute_context=context,
        )

    def nothing(*_: Any) -> None:
        """Stands for the body where only its buffers matter."""

    @functools.partial(
        pl.run_scoped,
        buffers=pipeline(0, 0, nothing, nothing).get_allocations(dy, x),
        code_refs=[plgpu.SMEM((2, rows, half + ALIGNED), jnp.uint8) for _ in range(2)],
        arrived=plgpu.Barrier(num_arrivals=2, num_barriers=2),
        collective_axes="wg",
    )
    def scope(buffers: Any, code_refs: Any, arrived: Any) -> None:
        wg = lax.axis_index("wg")

        @plgpu.nd_loop((down * along // (2 if tile.cluster else 1),), collective_axes="sm")
        def loop(info: plgpu.NDLoopInfo) -> None:
            height = down // (2 if tile.cluster else 1)
            row, column = plgpu.planar_snake(info.index[0], (height, along), 0, tile.band)
            if tile.cluster:
                row = row * 2 + lax.axis_index("cluster")
            top = row * tile.rows + (wg * rows if tile.by_rows else 0)
            left = column * tile.columns + (0 if tile.by_rows else wg * columns)

            def multiply(_: Any, dy_ref: Any, x_ref: Any, sums: Any) -> Any:
                if tile.by_rows:
                    dy_ref = dy_ref.at[:, pl.ds(wg * rows, rows)]
                else:
                    x_ref = x_ref.at[:, pl.ds(wg * columns, columns)]
                plgpu.wgmma(sums, dy_ref.transpose((1, 0)), x_ref)
                plgpu.wgmma_wait(0)
                return sums

            def compute(run: Any) -> None:
                plgpu.commit_smem()  # The codes of the last tile have been read by all threads.
                first = lax.rem(left, jnp.int32(P))
                shift = first & (ALIGNED - 1)
                for index, ref in enumerate(code_refs):
                    theirs = codes.at[pl.ds(top, rows), pl.ds(first - shift + index * half, half + ALIGNED)]
                    plgpu.copy_gmem_to_smem(theirs, ref.at[wg], arrived.at[wg])

                @functools.partial(pl.run_scoped, sums=plgpu.ACC((rows, columns), jnp.float32))
                def product(sums: Any) -> None:
                    run(sums)
                    dw = sums[...]
                    plgpu.barrier_wait(arrived.at[wg])
                    ends, powers = planes_of(left, P, columns)
                    atoms = []
                    for at in range(0, columns, ATOM):
                        ref = code_refs[at // half].at[wg, :, pl.ds(at % half + shift, ATOM)]
                        at_dw, at_ends = dw[:, at : at + ATOM], [end - at for end in ends]
                        # Tiles begin at even columns: where P is even, they begin at even codes as well.
                        atoms.append(votes(at_dw, codes_of(ref, even=P % 2 == 0), at_ends, powers))
                    for group in range(columns // G):
                        total = group_total(atoms, group, G)
                        score[lax.div(left, jnp.int32(G)) + group, pl.ds(top, rows)] = total

            pipeline(row, column, multiply, compute)(dy, x, allocations=buffers)


def codes_of(ref: Any, even: bool) -> jax.Array:
    """Codes uint8 (rows, ATOM) of shared memory, laid out as products are; `even`: they begin at an even address."""
    if even or is_interpreted():
        return plgpu.load(ref, layout=plgpu.Layout.WGMMA, optimized=False)

    # That loads the two codes of a lane at once, which must be aligned to two bytes: so one by one, and then paired.
    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),),
        return_type=plgpu.ShapeDtypeStruct((ref.shape[0], ATOM), jnp.uint8, layout=plgpu.Layout.WGMMA),
    )
    def singles(_: Any, memory: Any) -> Any:
        single = fragmented_array.WGMMA_LAYOUT_ACC_32BIT
        array = mgpu.FragmentedArray.load_untiled(memory, layout=single, is_signed=False, optimized=False)
        return array.to_layout(mgpu.WGMMA_LAYOUT)

    return singles(ref)


def votes(dw: jax.Array, codes: jax.Array, ends: list[jax.Array], powers: list[jax.Array]) -> jax.Array:
    """`2 * sign(dW) * T` float32 of one atom of columns, whose planes end at `ends`."""
    column = plgpu.broadcasted_iota(jnp.int32, dw.shape, 1, layout=plgpu.Layout.WGMMA)
    power = powers[-1]
    for end, before in zip(ends[::-1], powers[-2::-1], strict=True):
        power = jnp.where(column < end, before, power)
    fraction = codes.astype(jnp.int32) * power & 255
    # Three times (the fraction + 256) holds digit - 1 in bits 8 and 9: moved to the top, they are 2 * trit in float32.
    twice = ((fraction | 256) * (3 << 22)) & TOP_BITS
    agreement = twice ^ (lax.bitcast_convert_type(dw, jnp.int32) & SIGN_BIT)
    return jnp.where(jnp.abs(dw) > 0, lax.bitcast_convert_type(agreement, jnp.float32), 0.0)  # A NaN is not above 0.


def group_total(atoms: list[jax.Array], group: int, G: int) -> jax.Array:
    """Sum of the votes of one group, int32 `(rows,)`."""
    first, last = group * G, (group + 1) * G
    theirs = []
    for index in range(first // ATOM, -(-last // ATOM)):
        atom = atoms[index]
        low, high = first - index * ATOM, last - index * ATOM
        if low > 0 or high < ATOM:
            column = plgpu.broadcasted_iota(jnp.int32, atom.shape, 1, layout=plgpu.Layout.WGMMA)
            atom = jnp.where((column >= low) & (column < high), atom, 0.0)
        theirs.append(atom)
    return (jnp.sum(functools.reduce(jnp.add, theirs), axis=1) * 0.5).astype(jnp.int32)


def extended(trits: jax.Array, columns: int) -> jax.Array:
    """Rows of codes `(N, P)` repeated up to at least `P + columns + 16` bytes, a multiple of 16."""
    N, P = trits.shape
    width = padded(P + columns + ALIGNED, ALIGNED)
    if N * P % 4 or width > 2 * P:
        times, rest = divmod(width, P)
        return jnp.concatenate([jnp.tile(trits, (1, times)), trits[:, :rest]], axis=1)
    # XLA copies single bytes slowly: here a thread writes four.
    words = lax.bitcast_convert_type(trits.reshape(-1, 4), jnp.uint32)

    def bytes_from(place: jax.Array) -> jax.Array:
        low, high = (words.at[(place >> 2) + after].get(mode="clip") for after in (0, 1))
        shift = (place & 3).astype(jnp.uint32) * 8
        return (low >> shift) | (high << 1 << (31 - shift))

    at = jnp.arange(0, width, 4, dtype=jnp.int32)
    place = jnp.arange(N, dtype=jnp.int32)[:, None] * P + at
    before_end = (jnp.uint32(1) << (jnp.clip(P - at, 0, 3).astype(jnp.uint32) * 8)) - 1
    mask = jnp.where(at + 4 <= P, jnp.uint32(2**32 - 1), before_end)
    repeated = (bytes_from(place) & mask) | (bytes_from(place - P) & ~mask)
    return lax.bitcast_convert_type(repeated, jnp.uint8).reshape(N, width)


def score(
    x: jax.Array, dy: jax.Array, trits: jax.Array, *, group_size: int, tiles: Mapping[str, Any] | None = None
) -> jax.Array:
    """See `api.correlation_score`; `tiles` are fields of `Tile`."""
    if x.dtype != jnp.bfloat16:
        raise UnsupportedError(
            f"correlation_score: implementation 'mosaic_gpu' takes bfloat16, got {x.dtype}; pass 'triton' or 'xla'"
        )
    check_hopper("correlation_score")
    tile = tile_of(group_size, tiles or {})
    if shared_bytes(tile) > SHARED_BYTES:
        raise UnsupportedError(
            f"correlation_score: {tile} needs {shared_bytes(tile)} bytes of shared memory, more than {SHARED_BYTES}; "
            "pass fewer steps"
        )
    return one_by_one(score_of, x, dy, trits, group_size=group_size, tile=tile, simulated=is_interpreted())


@functools.partial(jax.jit, static_argnames=("group_size", "tile", "simulated"))
def score_of(
    x: jax.Array, dy: jax.Array, trits: jax.Array, *, group_size: int, tile: Tile, simulated: bool
) -> jax.Array:
    """`score` with its tile, compiled once however often a program has it."""
    (M, K), (N, P) = x.shape, trits.shape
    depth = padded(M, 8)
    x = jnp.pad(x, ((0, depth - M), (0, padded(K, WIDTH) - K)))
    dy = jnp.pad(dy, ((0, depth - M), (0, padded(N, WIDTH) - N)))
    cluster = 2 if tile.cluster else 1
    clusters: Any = {"cluster": (2,), "cluster_names": ("cluster",)} if tile.cluster else {}
    down = padded(pl.cdiv(N, tile.rows), cluster)
    along = pl.cdiv(K, tile.columns)
    run = plgpu.kernel(
        functools.partial(kernel, P=P, G=group_size, tile=tile, down=down, along=along),
        out_type=jax.ShapeDtypeStruct((along * tile.columns // group_size, down * tile.rows), jnp.int32),
        grid=(multiprocessors() // cluster,),
        grid_names=("sm",),
        **clusters,
        num_threads=3,
        thread_name="wg",
        interpret=plgpu.InterpretGPUParams() if simulated else False,
    )
    turned = run(x, dy, extended(trits, tile.columns))[: group_count(K, group_size), :N].T
    # Left to itself the compiler would rather give the matrix's corr the score's layout, and copy whole stacks of it.
    return with_layout_constraint(turned, Layout(major_to_minor=(0, 1)))
