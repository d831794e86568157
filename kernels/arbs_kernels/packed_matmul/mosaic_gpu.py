"""Products of few rows by a Hopper kernel that decodes weights into the registers from which tensor cores read them.

A warpgroup makes 64 rows of `y^T = W x^T`: codes, scales and activations arrive in shared memory by asynchronous
copies, several tiles ahead; each thread turns eight codes of a row and eight of another into its fragments of `W`, one
plane after another, and the warpgroup's product takes those from registers and `x^T` from shared memory while the next
plane is decoded. The warpgroups of a block share what it copies of x. Blocks that share the reduction leave partial
sums, which XLA adds.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from arbs_kernels.backends import is_interpreted
from arbs_kernels.codec import TRITS_PER_BYTE
from arbs_kernels.mosaic_support import SHARED_BYTES, check_hopper, multiprocessors, padded
from arbs_kernels.packed_matmul.five_planes import DIGITS, FACTORS, FRACTIONS
from arbs_kernels.packed_matmul.prepared import as_prepared
from arbs_kernels.selection import UnsupportedError
from arbs_kernels.triton_launch import one_by_one

MOST_ROWS = 64
"""Of activations."""
RUN = 32
"""Bytes of a row that are decoded at once, and columns that share a scale."""
WARPGROUP_ROWS = 64
MOST_WARPGROUPS = 4
"""Of a block, beside the one that copies."""
MOST_AHEAD = 8
"""Tiles in flight."""
IN_FLIGHT = 3
"""Products that a warpgroup has begun and not awaited while it decodes the next plane: each holds its registers."""
COPYING_REGISTERS = 32
"""Of a thread that copies; computing ones share the others."""
MOST_REGISTERS = 240
"""Of a thread."""


@dataclass(frozen=True)
class Cut:
    """How the kernel is cut on one shape."""

    width: int
    """Bytes of a row that are copied at once, one or two runs: copies of codes want rows of whole ones."""
    warpgroups: int
    """Of a block, 64 rows of W each."""
    steps: int
    """Tiles of `width` bytes that a block takes."""
    splits: int
    """Blocks that share the reduction of the same rows."""
    ahead: int
    """Tiles in flight."""

    @property
    def rows(self) -> int:
        """Of W, of a block."""
        return WARPGROUP_ROWS * self.warpgroups

    @property
    def computing_registers(self) -> int:
        """Of a thread that computes: its share of those that the block was launched with."""
        launched = min(65536 // (128 * (self.warpgroups + 1)) // 8 * 8, MOST_REGISTERS)
        return min((launched * (self.warpgroups + 1) - COPYING_REGISTERS) // self.warpgroups // 8 * 8, MOST_REGISTERS)


def cut_of(N: int, P: int, M: int) -> Cut:
    """The cut that should take least time; `M` is a multiple of 8."""

    def work(cut: Cut) -> tuple[float, int]:
        # Of steps as an H200 took them: a multiprocessor's warpgroups share what it computes, and a step costs besides
        # as much as one of them; partial sums are written and read.
        waves = pl.cdiv(cut.splits * pl.cdiv(N, cut.rows), multiprocessors())
        return waves * cut.steps * (cut.warpgroups + 1) + 1.5 * cut.splits * N * max(M, 32) / 2**18, -cut.warpgroups

    most = min(MOST_WARPGROUPS, pl.cdiv(N, WARPGROUP_ROWS))
    return min((cut_with(warpgroups, N, P, M) for warpgroups in range(1, most + 1)), key=work)


def cut_with(warpgroups: int, N: int, P: int, M: int) -> Cut:
    """The cut with so many warpgroups a block, all blocks at once if that is possible."""
    width = 2 * RUN if P % (2 * RUN) == 0 else RUN
    tiles, rows = P // width, WARPGROUP_ROWS * warpgroups
    steps = pl.cdiv(tiles, min(tiles, max(1, multiprocessors() // pl.cdiv(N, rows))))
    tile_bytes = rows * width + TRITS_PER_BYTE * (M * width + rows * width // RUN) * 2
    ahead = min(steps, MOST_AHEAD, (SHARED_BYTES - 4096) // tile_bytes)
    return Cut(width, warpgroups, steps, pl.cdiv(tiles, steps), ahead)


def kernel(
    x: Any,
    trits: Any,
    scale: Any,
    sums: Any,
    x_tiles: Any,
    trits_tiles: Any,
    scale_tiles: Any,
    arrived: Any,
    free: Any,
    *,
    group_size: int,
    together: int,
    cut: Cut,
) -> None:
    """Partial sums float32 (splits, N, M), of x (M, K), trits (N, P), scales (R, N), those of `together` runs in a row;
    the rest is shared memory, of as many tiles as are in flight."""
    M, P, width, runs = x_tiles.shape[2], trits.shape[1], cut.width, cut.width // RUN
    block, split, wg = (lax.axis_index(name) for name in ("block", "split", "wg"))
    first = split * cut.steps
    steps = jnp.minimum(cut.steps, P // width - first)

    @pl.when(wg == cut.warpgroups)
    def _() -> None:
        plgpu.set_max_registers(COPYING_REGISTERS, action="decrease")

        @pl.loop(0, steps)
        def _(step: Any) -> None:
            slot = lax.rem(step, cut.ahead)
            at = (first + step) * width

            @pl.when(step >= cut.ahead)
            def _() -> None:
                plgpu.barrier_wait(free.at[slot])

            theirs = pl.ds(block * cut.rows, cut.rows)
            copy = functools.partial(plgpu.copy_gmem_to_smem, barrier=arrived.at[slot])
            copy(trits.at[theirs, pl.ds(at, width)], trits_tiles.at[slot])
            for plane in range(TRITS_PER_BYTE):  # Past the ends of x and of the groups, copies are zeros.
                column = plane * P + at
                copy(x.at[pl.ds(0, M), pl.ds(column, width)], x_tiles.at[slot, plane])
                for run in range(0, runs, together):
                    group = lax.div(column + run * RUN, group_size)
                    copy(scale.at[pl.ds(group, together), theirs], scale_tiles.at[slot, plane, pl.ds(run, together)])

        @pl.loop(jnp.maximum(steps - cut.ahead, 0), steps)
        def _(step: Any) -> None:
            plgpu.barrier_wait(free.at[lax.rem(step, cut.ahead)])

    @pl.when(wg < cut.warpgroups)
    def _() -> None:
        plgpu.set_max_registers(cut.computing_registers, action="increase")
        mine = pl.ds(wg * WARPGROUP_ROWS, WARPGROUP_ROWS)
        place = pl.ds(block * cut.rows + wg * WARPGROUP_ROWS, WARPGROUP_ROWS)

        def multiply(step: Any, total: Any) -> Any:
            slot = lax.rem(step, cut.ahead)
            plgpu.barrier_wait(arrived.at[slot])
            for run in range(runs):
                theirs = scale_tiles.at[slot, :, run, mine]
                rest = codes_of(trits_tiles.at[slot, mine], run, width)
                for plane in range(TRITS_PER_BYTE):
                    weights, rest = weights_of(rest, theirs.at[plane], plane)
                    total = added(total, weights, x_tiles.at[slot, plane, :, pl.ds(run * RUN, RUN)])
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(free.at[slot])
            return total

        # Weights were twice what they should be.
        if is_interpreted():
            total = lax.fori_loop(0, steps, multiply, jnp.zeros((WARPGROUP_ROWS, M), jnp.float32))
            sums[split, place, :] = 0.5 * total
            return

        @functools.partial(pl.run_scoped, total=plgpu.ACC((WARPGROUP_ROWS, M), jnp.float32))
        def _(total: Any) -> None:
            @pl.loop(0, steps)
            def _(step: Any) -> None:
                multiply(step, total)

            sums[split, place, :] = 0.5 * total[...]


def added(total: Any, weights: jax.Array, x_ref: Any) -> Any:
    """The sums with the product of a plane's weights (64, 32) and x (M, 32), begun."""
    if is_interpreted():  # Where products take no operand from registers.
        return total + weights.astype(jnp.float32) @ x_ref[...].astype(jnp.float32).T
    plgpu.wgmma(total, weights, x_ref.transpose((1, 0)))
    plgpu.wgmma_wait(IN_FLIGHT)
    return total


def fragment() -> Any:
    """A plane of a run, in registers as a warpgroup's product takes it."""
    return plgpu.ShapeDtypeStruct((WARPGROUP_ROWS, RUN), jnp.bfloat16, layout=plgpu.Layout.WGMMA)


def codes_of(trits_ref: Any, run: int, width: int) -> jax.Array:
    """A run of the codes in shared memory (64, width), each where its weights of any plane will be."""
    if is_interpreted():
        return trits_ref[:, pl.ds(run * RUN, RUN)].astype(jnp.int32)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(code_transforms(width)),), return_type=fragment())
    def native(_: Any, trits: Any) -> Any:
        return code_fragment(trits, run, width)

    return native(trits_ref)


def weights_of(rest: jax.Array, scale_ref: Any, plane: int) -> tuple[jax.Array, jax.Array]:
    """Twice the weights of a plane, bfloat16 (64, 32), of what planes before it left of the codes and of scales (64,);
    and what it leaves."""
    if is_interpreted():
        trits = 2 * ((rest * 3 >> 8) - 1)
        return trits.astype(jnp.bfloat16) * scale_ref[...][:, None], rest * 3 % 256

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType()), return_type=(fragment(), fragment()))
    def native(_: Any, rest: Any, scale: Any) -> tuple[Any, Any]:
        return plane_fragments(rest, scale, plane)

    return native(rest, scale_ref)


def code_transforms(width: int) -> tuple[Any, Any]:
    """A tile of codes has its rows one after another, with their pieces of 16 bytes exchanged, so that the eight rows
    which a warp reads at once are not in the same banks."""
    return plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(width)


def code_fragment(trits: Any, run: int, width: int) -> Any:
    """What one thread does for `codes_of`: of each eight columns it has two, of two rows."""
    i16, i32 = ir.IntegerType.get_signless(16), ir.IntegerType.get_signless(32)
    bytes_type, pair = ir.IntegerType.get_signless(8), ir.VectorType.get((2,), ir.BF16Type.get())
    constant = functools.partial(mgpu.c, ty=i32)
    lane, row = lane_and_row()
    within = arith.muli(arith.remui(lane, constant(4)), constant(2))
    # Rows r and r + 8 have their pieces exchanged alike.
    exchange = arith.muli(arith.remui(arith.divui(row, constant(128 // width)), constant(width // 16)), constant(16))
    codes_at = mgpu.utils.memref_ptr(trits)
    registers = np.empty((RUN // 8, 2), object)
    for lower in range(2):
        start = arith.addi(arith.muli(arith.addi(row, constant(8 * lower)), constant(width)), within)
        for eighth in range(RUN // 8):
            column = run * RUN + eighth * 8
            piece = arith.xori(exchange, constant(column // 16 * 16))
            place = arith.addi(start, arith.addi(piece, constant(column % 16)))
            both = llvm.load(i16, mgpu.utils.getelementptr(codes_at, [place], bytes_type), alignment=2)
            spread: Any = llvm.inline_asm(i32, [arith.extui(i32, both)], SPREAD, "=r,r")
            registers[eighth, lower] = mgpu.utils.bitcast(spread, pair)
    return as_fragment(registers)


def plane_fragments(rest: Any, scale: Any, plane: int) -> tuple[Any, Any]:
    """What one thread does for `weights_of`."""
    i16, i32 = ir.IntegerType.get_signless(16), ir.IntegerType.get_signless(32)
    pair = ir.VectorType.get((2,), ir.BF16Type.get())
    constant = functools.partial(mgpu.c, ty=i32)
    _, row = lane_and_row()
    digits = constant(DIGITS - 2**32)
    given = rest.registers.reshape(RUN // 8, 2)
    weights, left = np.empty_like(given), np.empty_like(given)
    for lower in range(2):
        at = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(scale), [arith.addi(row, constant(8 * lower))], i16)
        own = llvm.load(i16, at, alignment=2)
        for eighth in range(RUN // 8):
            word = mgpu.utils.bitcast(given[eighth, lower], i32)
            word = arith.addi(arith.muli(word, constant(FACTORS[plane])), digits)
            trits = arith.andi(word, digits)
            value: Any = llvm.inline_asm(i32, [trits, own], SCALED, "=r,r,h")
            weights[eighth, lower] = mgpu.utils.bitcast(value, pair)
            left[eighth, lower] = mgpu.utils.bitcast(arith.andi(word, constant(FRACTIONS)), pair)
    return as_fragment(weights), as_fragment(left)


def lane_and_row() -> tuple[Any, Any]:
    """Of a thread: its place in the warp, and the first of its two rows of 64, eight apart."""
    constant = functools.partial(mgpu.c, ty=ir.IntegerType.get_signless(32))
    thread = arith.remui(mgpu.thread_idx(), constant(128))
    lane = arith.remui(thread, constant(32))
    return lane, arith.addi(arith.muli(arith.divui(thread, constant(32)), constant(16)), arith.divui(lane, constant(4)))


def as_fragment(registers: np.ndarray) -> Any:
    """Of one thread's registers, by eights of columns and by rows."""
    shape = fragmented_array.WGMMA_LAYOUT.registers_shape((WARPGROUP_ROWS, RUN))
    return mgpu.FragmentedArray(
        _registers=registers.reshape(shape), _layout=fragmented_array.WGMMA_LAYOUT, _is_signed=None
    )


SPREAD = "prmt.b32 $0, $1, 0, 0x4140;"
"""Two bytes, each on half a register."""
SCALED = "{ .reg .b32 both; mov.b32 both, {$2, $2}; mul.rn.bf16x2 $0, $1, both; }"
"""Two weights times one scale."""


def forward(x: jax.Array, trits: jax.Array, scale: jax.Array, *, group_size: int) -> jax.Array:
    """See `api.packed_matmul`."""
    check_hopper("packed_matmul")
    (M, _), (N, P) = x.shape, trits.shape
    for fits, what, got in (
        (x.dtype == jnp.bfloat16, "bfloat16", x.dtype),
        (M <= MOST_ROWS, f"at most {MOST_ROWS} rows of x", M),
        (N % 8 == 0, "a multiple of 8 rows of trits", N),
        (P % RUN == 0, f"rows of a multiple of {RUN} bytes", P),
        (group_size % RUN == 0, f"group sizes that are multiples of {RUN}", group_size),
    ):
        if not fits:
            raise UnsupportedError(
                f"packed_matmul: implementation 'mosaic_gpu' takes {what}, got {got}; pass 'triton' or 'xla'"
            )
    return one_by_one(few_rows, x, trits, scale, group_size=group_size)


def few_rows(x: jax.Array, trits: jax.Array, scale: jax.Array, *, group_size: int, cut: Cut | None = None) -> jax.Array:
    """`y = x W^T` for few rows of bfloat16."""
    N, P = trits.shape
    cut = cut or cut_of(N, P, padded(x.shape[0], 8))
    return launched(x, trits, as_prepared(scale), group_size=group_size, cut=cut, simulated=is_interpreted())


@functools.partial(jax.jit, static_argnames=("group_size", "cut", "simulated"))
def launched(
    x: jax.Array, trits: jax.Array, columns: jax.Array, *, group_size: int, cut: Cut, simulated: bool
) -> jax.Array:
    """The kernel and what surrounds it, compiled once however often a program has it."""
    (M, K), N = x.shape, trits.shape[0]
    wide = padded(M, 8)
    blocks, runs = pl.cdiv(N, cut.rows), cut.width // RUN
    together = runs if group_size == RUN else 1
    copies = 1 + TRITS_PER_BYTE * (1 + runs // together)  # Of codes; for each plane of x, and of scales.
    transforms = (plgpu.TilingTransform((8, RUN)), plgpu.SwizzleTransform(2 * RUN))
    run = plgpu.kernel(
        functools.partial(kernel, group_size=group_size, together=together, cut=cut),
        out_type=jax.ShapeDtypeStruct((cut.splits, blocks * cut.rows, wide), jnp.float32),
        grid=(blocks, cut.splits),
        grid_names=("block", "split"),
        num_threads=cut.warpgroups + 1,
        thread_name="wg",
        scratch_types=[
            plgpu.SMEM((cut.ahead, TRITS_PER_BYTE, wide, cut.width), jnp.bfloat16, transforms=transforms),
            plgpu.SMEM((cut.ahead, cut.rows, cut.width), jnp.uint8, transforms=code_transforms(cut.width)),
            plgpu.SMEM((cut.ahead, TRITS_PER_BYTE, runs, cut.rows), jnp.bfloat16),
            plgpu.Barrier(num_arrivals=copies, num_barriers=cut.ahead),
            plgpu.Barrier(num_arrivals=cut.warpgroups, num_barriers=cut.ahead),
        ],
        interpret=plgpu.InterpretGPUParams() if simulated else False,
    )
    # Copies want rows of whole tiles.
    x = jnp.pad(x, ((0, wide - M), (0, -K % RUN)))
    return jnp.sum(run(x, trits, columns), axis=0)[:N, :M].T.astype(x.dtype)
