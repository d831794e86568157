"""Products of few rows by a Hopper kernel that decodes weights into the registers from which tensor cores read them.

A warpgroup makes 64 rows of `y^T = W x^T`: codes, scales and activations arrive in shared memory by asynchronous
copies, several tiles ahead; each thread turns eight codes of a row and eight of another into its fragments of `W`, all
five planes of them, and the warpgroup's product takes those from registers and `x^T` from shared memory. The warpgroups
of a block share what it copies of x. Blocks that share the reduction leave partial sums, which XLA adds.
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
from arbs_kernels.packed_matmul.five_planes import FIVE_PLANES_OF_PAIRS
from arbs_kernels.packed_matmul.scale_columns import columns_of
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
    """The cut with least work for a multiprocessor; `M` is a multiple of 8."""

    def work(cut: Cut) -> int:
        return cut.steps * cut.warpgroups * pl.cdiv(cut.splits * pl.cdiv(N, cut.rows), multiprocessors())

    most = min(MOST_WARPGROUPS, pl.cdiv(N, WARPGROUP_ROWS))
    return min((cut_with(warpgroups, N, P, M) for warpgroups in range(min(2, most), most + 1)), key=work)


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
                weights = weights_of(trits_tiles.at[slot, mine], scale_tiles.at[slot, :, :, mine], run, width)
                total = added(total, weights, x_tiles.at[slot, :, :, pl.ds(run * RUN, RUN)])
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


def added(total: Any, weights: tuple[jax.Array, ...], x_ref: Any) -> Any:
    """The sums with the products of five planes' weights (64, 32) and x (5, M, 32), begun."""
    for plane, weight in enumerate(weights):
        if is_interpreted():  # Where products take no operand from registers.
            total += weight.astype(jnp.float32) @ x_ref[plane].astype(jnp.float32).T
        else:
            plgpu.wgmma(total, weight, x_ref.at[plane].transpose((1, 0)))
    return total


def weights_of(trits_ref: Any, scale_ref: Any, run: int, width: int) -> tuple[jax.Array, ...]:
    """Twice the weights of five planes, bfloat16 (64, 32) in fragments of a warpgroup's product, of a run of codes in
    shared memory (64, width) and scales (5, width/32, 64)."""
    if is_interpreted():
        codes = trits_ref[:, pl.ds(run * RUN, RUN)].astype(jnp.int32)
        return tuple(
            (2 * ((codes * 3**plane % 256 * 3 >> 8) - 1)).astype(jnp.bfloat16) * scale_ref[plane, run, :][:, None]
            for plane in range(TRITS_PER_BYTE)
        )
    fragment = plgpu.ShapeDtypeStruct((WARPGROUP_ROWS, RUN), jnp.bfloat16, layout=plgpu.Layout.WGMMA)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(code_transforms(width)), plgpu.RefType()), return_type=(fragment,) * TRITS_PER_BYTE
    )
    def native(_: Any, trits: Any, scale: Any) -> tuple[Any, ...]:
        return fragments_of(trits, scale, run, width)

    return native(trits_ref, scale_ref)


def code_transforms(width: int) -> tuple[Any, Any]:
    """A tile of codes has its rows one after another, with their pieces of 16 bytes exchanged, so that the eight rows
    which a warp reads at once are not in the same banks."""
    return plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(width)


def fragments_of(trits: Any, scale: Any, run: int, width: int) -> tuple[Any, ...]:
    """What one thread does for `weights_of`: of each eight columns it has two, of two rows."""
    i16, i32 = ir.IntegerType.get_signless(16), ir.IntegerType.get_signless(32)
    bytes_type, pair = ir.IntegerType.get_signless(8), ir.VectorType.get((2,), ir.BF16Type.get())
    constant = functools.partial(mgpu.c, ty=i32)
    thread = arith.remui(mgpu.thread_idx(), constant(128))
    lane = arith.remui(thread, constant(32))
    row = arith.addi(arith.muli(arith.divui(thread, constant(32)), constant(16)), arith.divui(lane, constant(4)))
    within = arith.muli(arith.remui(lane, constant(4)), constant(2))
    # Rows r and r + 8 have their pieces exchanged alike.
    exchange = arith.muli(arith.remui(arith.divui(row, constant(128 // width)), constant(width // 16)), constant(16))
    codes_at, scales_at = mgpu.utils.memref_ptr(trits), mgpu.utils.memref_ptr(scale)
    strides, _ = ir.MemRefType(scale.type).get_strides_and_offset()
    shape = fragmented_array.WGMMA_LAYOUT.registers_shape((WARPGROUP_ROWS, RUN))
    planes = [np.empty((RUN // 8, 2), object) for _ in range(TRITS_PER_BYTE)]

    def two_codes(own: Any, column: int) -> Any:
        piece = arith.xori(exchange, constant(column // 16 * 16))
        place = arith.addi(
            arith.addi(arith.muli(own, constant(width)), within), arith.addi(piece, constant(column % 16))
        )
        return llvm.load(i16, mgpu.utils.getelementptr(codes_at, [place], bytes_type), alignment=2)

    for lower in range(2):
        own = arith.addi(row, constant(8 * lower))
        scales = []
        for plane in range(TRITS_PER_BYTE):
            at = arith.addi(own, constant(plane * strides[0] + run * strides[1]))
            scales.append(llvm.load(i16, mgpu.utils.getelementptr(scales_at, [at], i16), alignment=2))
        for half in range(2):
            pairs = [arith.extui(i32, two_codes(own, run * RUN + half * 16 + upper * 8)) for upper in range(2)]
            trits_of: Any = llvm.inline_asm(
                llvm.StructType.get_literal([i32] * 10), pairs, FIVE_PLANES_OF_PAIRS, ",".join(["=r"] * 10 + ["r"] * 2)
            )
            for plane in range(TRITS_PER_BYTE):
                for upper in range(2):
                    both = llvm.extractvalue(i32, trits_of, (2 * plane + upper,))
                    weights: Any = llvm.inline_asm(i32, [both, scales[plane]], SCALED, "=r,r,h")
                    planes[plane][2 * half + upper, lower] = mgpu.utils.bitcast(weights, pair)
    return tuple(
        mgpu.FragmentedArray(
            _registers=registers.reshape(shape), _layout=fragmented_array.WGMMA_LAYOUT, _is_signed=None
        )
        for registers in planes
    )


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


def few_rows(x: jax.Array, trits: jax.Array, scale: jax.Array, *, group_size: int) -> jax.Array:
    """`y = x W^T` for few rows of bfloat16."""
    return few_rows_by_columns(x, trits, columns_of(scale), group_size=group_size)


def few_rows_by_columns(
    x: jax.Array, trits: jax.Array, columns: jax.Array, *, group_size: int, cut: Cut | None = None
) -> jax.Array:
    """`few_rows` with scales that are prepared."""
    N, P = trits.shape
    cut = cut or cut_of(N, P, padded(x.shape[0], 8))
    return launched(x, trits, columns, group_size=group_size, cut=cut, simulated=is_interpreted())


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
