"""Products of few rows by a Hopper kernel that decodes weights into the registers from which tensor cores read them.

A warpgroup makes 64 rows of `y^T = W x^T`: codes and activations arrive in shared memory by asynchronous copies,
several tiles ahead; each thread turns eight codes of a row and eight of another into its fragments of `W`, all five
planes of them, and the warpgroup's product takes those from registers and `x^T` from shared memory. The warpgroups of
a block share what it copies of x. Blocks that share the reduction leave partial sums, which XLA adds.

The order of the products' inner axis is free, as long as both operands agree. In 32 bytes of a row a thread takes eight
neighbours, where its fragment has columns 2q, 2q + 1, 2q + 8, 2q + 9 of each sixteen: x is brought into that order.
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
from arbs_kernels.packed_matmul.five_planes import FIVE_PLANES
from arbs_kernels.selection import UnsupportedError
from arbs_kernels.triton_launch import one_by_one

MOST_ROWS = 64
"""Of activations."""
RUN = 32
"""Bytes of a row that are decoded at once, and columns that share a scale."""
WIDTH = 64
"""Bytes of a row that are copied at once."""
SWIZZLE = 2 * RUN
"""Bytes of a row of x in shared memory."""
WARPGROUP_ROWS = 64
MOST_WARPGROUPS = 3
"""Of a block, beside the one that copies. With four of them the pipeline asks for more registers than a block of 640
threads was given at its launch (112 for each of 512, 40 for each of 128, of 96 for all) and waits for them forever."""


@dataclass(frozen=True)
class Cut:
    """How the kernel is cut on one shape."""

    warpgroups: int
    """Of a block, 64 rows of W each."""
    steps: int
    """Tiles of WIDTH bytes that a block takes."""
    splits: int
    """Blocks that share the reduction of the same rows."""
    ahead: int
    """Tiles in flight."""

    @property
    def rows(self) -> int:
        """Of W, of a block."""
        return WARPGROUP_ROWS * self.warpgroups


def cut_of(N: int, P: int, M: int) -> Cut:
    """As many blocks as there are multiprocessors, or a few less; `M` is a multiple of 8."""
    warpgroups = min(MOST_WARPGROUPS, pl.cdiv(N, WARPGROUP_ROWS))
    blocks = pl.cdiv(N, WARPGROUP_ROWS * warpgroups)
    tiles = pl.cdiv(P, WIDTH)
    steps = pl.cdiv(tiles, min(tiles, max(1, multiprocessors() // blocks)))
    rows = WARPGROUP_ROWS * warpgroups
    tile_bytes = rows * WIDTH + TRITS_PER_BYTE * (M * WIDTH + rows * WIDTH // RUN) * 2
    return Cut(warpgroups, steps, pl.cdiv(tiles, steps), min(steps, 8, (SHARED_BYTES - 4096) // tile_bytes))


def in_order(values: jax.Array) -> jax.Array:
    """Columns `(..., 32 j)` in the order of fragments: of 32, thread q's eight are columns 2q, 2q + 1, 2q + 8, ..."""
    runs = values.reshape(*values.shape[:-1], -1, 4, 2, 2, 2)
    return jnp.moveaxis(runs, -4, -2).reshape(values.shape)


def kernel(x: Any, trits: Any, scale: Any, sums: Any, *, cut: Cut) -> None:
    """Partial sums float32 (splits, N, M), of x (5, M, P), trits (N, P), scales (5, P/32, N)."""
    M = x.shape[1]
    block, split = lax.axis_index("block"), lax.axis_index("split")

    def at(step: Any) -> Any:
        return split * cut.steps + step

    def multiply(_: Any, x_ref: Any, trits_ref: Any, scale_ref: Any, total: Any) -> Any:
        mine = pl.ds(lax.axis_index("wg") * WARPGROUP_ROWS, WARPGROUP_ROWS)
        for run in range(WIDTH // RUN):
            weights = weights_of(trits_ref.at[mine], scale_ref.at[:, :, mine], run)
            columns = [x_ref.at[plane, :, pl.ds(run * RUN, RUN)] for plane in range(TRITS_PER_BYTE)]
            total = added(total, weights, columns)
        return total

    def compute(run: Any) -> None:
        mine = pl.ds(block * cut.rows + lax.axis_index("wg") * WARPGROUP_ROWS, WARPGROUP_ROWS)
        if is_interpreted():
            sums[split, mine, :] = 0.5 * run(jnp.zeros((WARPGROUP_ROWS, M), jnp.float32))
            return

        @functools.partial(pl.run_scoped, total=plgpu.ACC((WARPGROUP_ROWS, M), jnp.float32))
        def product(total: Any) -> None:
            run(total)
            sums[split, mine, :] = 0.5 * total[...]  # Weights were twice what they should be.

    transforms = (plgpu.TilingTransform((8, RUN)), plgpu.SwizzleTransform(SWIZZLE))
    plgpu.emit_pipeline_warp_specialized(
        multiply,
        grid=(cut.steps,),
        memory_registers=40,
        in_specs=[
            plgpu.BlockSpec((TRITS_PER_BYTE, M, WIDTH), lambda k: (0, 0, at(k)), transforms=transforms),
            plgpu.BlockSpec((cut.rows, WIDTH), lambda k: (block, at(k))),
            plgpu.BlockSpec((TRITS_PER_BYTE, WIDTH // RUN, cut.rows), lambda k: (0, at(k), block)),
        ],
        wg_axis="wg",
        num_compute_wgs=cut.warpgroups,
        max_concurrent_steps=cut.ahead,
        compute_context=compute,
    )(x, trits, scale)


def added(total: Any, weights: tuple[jax.Array, ...], columns: list[Any]) -> Any:
    """The sums with the products of five planes' weights (64, 32) and x (M, 32)."""
    if is_interpreted():  # Where products take no operand from registers.
        for weight, x_ref in zip(weights, columns, strict=True):
            total += weight.astype(jnp.float32) @ x_ref[...].astype(jnp.float32).T
        return total
    for weight, x_ref in zip(weights, columns, strict=True):
        plgpu.wgmma(total, weight, x_ref.transpose((1, 0)))
    plgpu.wgmma_wait(0)
    return total


def weights_of(trits_ref: Any, scale_ref: Any, run: int) -> tuple[jax.Array, ...]:
    """Twice the weights of five planes, bfloat16 (64, 32) in the order of fragments, of a run of codes in shared memory
    (64, WIDTH) and scales (5, WIDTH/32, 64)."""
    if is_interpreted():
        codes = in_order(trits_ref[:, pl.ds(run * RUN, RUN)].astype(jnp.int32))
        return tuple(
            (2 * ((codes * 3**plane % 256 * 3 >> 8) - 1)).astype(jnp.bfloat16) * scale_ref[plane, run, :][:, None]
            for plane in range(TRITS_PER_BYTE)
        )
    fragment = plgpu.ShapeDtypeStruct((WARPGROUP_ROWS, RUN), jnp.bfloat16, layout=plgpu.Layout.WGMMA)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()), return_type=(fragment,) * TRITS_PER_BYTE)
    def native(_: Any, trits: Any, scale: Any) -> tuple[Any, ...]:
        return fragments_of(trits, scale, run)

    return native(trits_ref, scale_ref)


def fragments_of(trits: Any, scale: Any, run: int) -> tuple[Any, ...]:
    """What one thread does for `weights_of`."""
    i16, i32 = ir.IntegerType.get_signless(16), ir.IntegerType.get_signless(32)
    bytes_type, pair = ir.IntegerType.get_signless(8), ir.VectorType.get((2,), ir.BF16Type.get())
    constant = functools.partial(mgpu.c, ty=i32)
    thread = arith.remui(mgpu.thread_idx(), constant(128))
    lane = arith.remui(thread, constant(32))
    row = arith.addi(arith.muli(arith.divui(thread, constant(32)), constant(16)), arith.divui(lane, constant(4)))
    codes_at, scales_at = mgpu.utils.memref_ptr(trits), mgpu.utils.memref_ptr(scale)
    strides, _ = ir.MemRefType(scale.type).get_strides_and_offset()
    width = ir.MemRefType(trits.type).get_strides_and_offset()[0][0]
    layout = fragmented_array.WGMMA_LAYOUT
    shape = layout.registers_shape((WARPGROUP_ROWS, RUN))
    planes = [np.empty((RUN // 8, 2), object) for _ in range(TRITS_PER_BYTE)]
    for lower in range(2):
        own = arith.addi(row, constant(8 * lower))
        place = arith.addi(
            arith.muli(own, constant(width)),
            arith.addi(arith.muli(arith.remui(lane, constant(4)), constant(8)), constant(run * RUN)),
        )
        eight = llvm.load(
            ir.VectorType.get((2,), i32), mgpu.utils.getelementptr(codes_at, [place], bytes_type), alignment=8
        )
        twice = []
        for plane in range(TRITS_PER_BYTE):
            at = arith.addi(own, constant(plane * strides[0] + run * strides[1]))
            one = llvm.load(i16, mgpu.utils.getelementptr(scales_at, [at], i16), alignment=2)
            twice.append(arith.muli(arith.extui(i32, one), constant(0x10001)))
        for half in range(2):
            word = llvm.extractelement(eight, constant(half))
            trits_of = llvm.inline_asm(
                llvm.StructType.get_literal([i32] * 10), [word], FIVE_PLANES, ",".join(["=r"] * 10 + ["r"])
            )
            for plane in range(TRITS_PER_BYTE):
                for upper in range(2):
                    both = llvm.extractvalue(i32, trits_of, (2 * plane + upper,))
                    weights = llvm.inline_asm(i32, [both, twice[plane]], "mul.rn.bf16x2 $0, $1, $2;", "=r,r,r")
                    planes[plane][2 * half + upper, lower] = mgpu.utils.bitcast(weights, pair)
    return tuple(
        mgpu.FragmentedArray(_registers=registers.reshape(shape), _layout=layout, _is_signed=None)
        for registers in planes
    )


def forward(x: jax.Array, trits: jax.Array, scale: jax.Array, *, group_size: int) -> jax.Array:
    """See `api.packed_matmul`."""
    check_hopper("packed_matmul")
    M, P = x.shape[0], trits.shape[1]
    for what, fits, got in (
        ("bfloat16", x.dtype == jnp.bfloat16, x.dtype),
        (f"at most {MOST_ROWS} rows", M <= MOST_ROWS, M),
        (f"rows of a multiple of {RUN} bytes", P % RUN == 0, P),
        (f"group sizes that are multiples of {RUN}", group_size % RUN == 0, group_size),
    ):
        if not fits:
            raise UnsupportedError(
                f"packed_matmul: implementation 'mosaic_gpu' takes {what}, got {got}; pass 'triton' or 'xla'"
            )
    return one_by_one(few_rows, x, trits, scales_by_run(scale, P, group_size))


def scales_by_run(scale: jax.Array, P: int, group_size: int) -> jax.Array:
    """bfloat16 `(5, P/32, N)` of `(N, R)`: each run of 32 columns has its group's scale."""
    groups = np.minimum(np.arange(0, TRITS_PER_BYTE * P, RUN) // group_size, scale.shape[1] - 1)
    # Copies want rows of whole 16 bytes.
    columns = jnp.pad(scale.astype(jnp.bfloat16), ((0, -scale.shape[0] % 8), (0, 0))).T
    if not np.array_equal(groups, np.arange(len(columns))):
        columns = columns[groups]
    return columns.reshape(TRITS_PER_BYTE, P // RUN, -1)


def few_rows(x: jax.Array, trits: jax.Array, scale: jax.Array) -> jax.Array:
    """`forward` with scales by runs."""
    (M, K), (N, P) = x.shape, trits.shape
    wide = padded(M, 8)
    planes = jnp.pad(x, ((0, wide - M), (0, TRITS_PER_BYTE * P - K))).reshape(wide, TRITS_PER_BYTE, P)
    cut = cut_of(N, P, wide)
    blocks = pl.cdiv(N, cut.rows)
    run = plgpu.kernel(
        functools.partial(kernel, cut=cut),
        out_type=jax.ShapeDtypeStruct((cut.splits, blocks * cut.rows, wide), jnp.float32),
        grid=(blocks, cut.splits),
        grid_names=("block", "split"),
        num_threads=cut.warpgroups + 1,
        thread_name="wg",
        interpret=plgpu.InterpretGPUParams() if is_interpreted() else False,
    )
    sums = run(in_order(planes.transpose(1, 0, 2)), trits, scale)
    return jnp.sum(sums, axis=0)[:N, :M].T.astype(x.dtype)
