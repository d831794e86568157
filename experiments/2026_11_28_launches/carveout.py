"""Time of the few-row kernel by how a multiprocessor's memory is split between L1 cache and shared memory.

    python experiments/2026_11_28_launches/carveout.py

Needs CuPy and nvcc's ptxas on a Hopper GPU: the kernel is launched without XLA, from PTX (which the driver compiles)
and from machine code, at several preferences. Microseconds a launch, the median of five times forty on four rotating
matrices of 10240 x 10240, G = 32.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import cupy
import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2] / "kernels"))

from arbs_kernels import triton_launch
from arbs_kernels.packed_matmul import triton
from arbs_kernels.triton_launch import Compiled

SIDE, GROUP = 10240, 32
SHARED_BYTES = 512
"""What the kernel needs to add up its warps."""
PREFERENCES = (-1, 0, 10, 25, 50, 100)
"""Percent of the memory to be shared; -1 leaves it to the driver."""


def kernel() -> tuple[Compiled, tuple[int, ...]]:
    """The kernel of one row, and its grid."""
    found: list[Compiled] = []
    compiled = triton_launch.compiled
    triton_launch.compiled = lambda *arguments: found.append(compiled(*arguments)) or found[-1]
    width, groups = SIDE // 5, SIDE // GROUP
    shapes = (
        jax.ShapeDtypeStruct((1, SIDE), jnp.bfloat16),
        jax.ShapeDtypeStruct((SIDE, width), jnp.uint8),
        jax.ShapeDtypeStruct((groups, SIDE), jnp.bfloat16),
    )
    jax.eval_shape(lambda *given: triton.fused(*given, group_size=GROUP), *shapes)
    cut = triton.cut_of(SIDE, width, GROUP, triton.tile_of(1, SIDE, width))
    return found[0], (cut.classes * cut.blocks, cut.splits)


def microseconds(function: cupy.RawKernel, grid: tuple[int, ...], threads: int, shared: int) -> float:
    """Of a launch."""
    rng = np.random.default_rng(0)
    x = cupy.asarray(rng.integers(0, 2**14, SIDE).astype(np.uint16))
    matrices = [
        (
            cupy.asarray(rng.integers(0, 256, (SIDE, SIDE // 5), np.uint8)),
            cupy.asarray(rng.integers(2**13, 2**14, (SIDE // GROUP, SIDE)).astype(np.uint16)),
        )
        for _ in range(4)
    ]
    y, scratch = cupy.empty(SIDE, np.uint16), cupy.empty(16, np.uint8)
    took = []
    for _ in range(6):
        began, ended = cupy.cuda.Event(), cupy.cuda.Event()
        began.record()
        for trits, scale in matrices * 10:
            function(grid, (threads,), (x, trits, scale, y, scratch, scratch), shared_mem=shared)
        ended.record()
        ended.synchronize()
        took.append(cupy.cuda.get_elapsed_time(began, ended) * 1e3 / 40)
    return sorted(took[1:])[2]


def main() -> None:
    """Compiles, times, prints."""
    made, grid = kernel()
    # As Triton gives it: shared memory is asked for at the launch.
    ptx = made.ptx.replace(f"global_smem[{SHARED_BYTES}]", "global_smem[]").replace(
        ".shared .al", ".extern .shared .al"
    )
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        subprocess.run(["ptxas", "-arch=sm_90a", "-O3", str(source), "-o", str(binary)], check=True)
        for path in (source, binary):
            for preference in PREFERENCES:
                function = cupy.RawModule(path=str(path)).get_function(made.name)
                function.preferred_shared_memory_carveout = preference
                spent = microseconds(function, grid, made.threads, SHARED_BYTES)
                print(f"{path.suffix[1:]:5s} shared {preference:4d}%  {spent:6.2f} us", flush=True)


if __name__ == "__main__":
    main()
