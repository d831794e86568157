"""The Mosaic product of few rows, simulated on a CPU beside the reference; with `--compile`, compiled for an H200.

    python experiments/2026_11_28_mosaic_few_rows/check.py
    JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 JAX_PLATFORMS=cpu,cuda MOSAIC_GPU_DUMP_PTXAS=1 \
        python experiments/2026_11_28_mosaic_few_rows/check.py --compile

The compiler needs no device, but `jax[cuda13]`; it says how many registers the kernel takes.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "2026_11_21_update_kernels"))

from arbs_kernels import backends
from arbs_kernels.codec import pack_rows, packed_width
from arbs_kernels.mosaic_support import padded
from arbs_kernels.packed_matmul import mosaic_gpu, reference
from arbs_kernels.shapes import group_count

SHAPES = ((1, 64, 320, 32), (5, 208, 2053, 32), (16, 136, 2048, 256), (9, 64, 2560, 64), (64, 640, 3200, 96))
"""(M, N, K, G)"""


def simulate(M: int, N: int, K: int, group_size: int) -> str:
    """Largest difference from the reference on the same rounded scales, of the largest result."""
    rng = np.random.default_rng(0)
    trits = pack_rows(jnp.asarray(rng.integers(-1, 2, (N, K)), jnp.int8))
    scale = jnp.asarray(np.exp2(rng.uniform(-4, 0, (N, group_count(K, group_size)))), jnp.bfloat16)
    x = jnp.asarray(rng.standard_normal((M, K)), jnp.bfloat16)
    with backends.interpreted():
        got = jax.jit(partial(mosaic_gpu.forward, group_size=group_size))(x, trits, scale.astype(jnp.float32))
    expected = reference.forward(x.astype(jnp.float32), trits, scale.astype(jnp.float32), group_size=group_size)
    error = float(jnp.max(jnp.abs(got - expected)) / jnp.max(jnp.abs(expected)))
    return f"{'ok' if error < 2**-8 else 'WRONG'}, {error:.1e}"


def compiled(M: int, N: int, K: int, group_size: int) -> str:
    """How the kernel is cut."""
    from kernels_of_step import target  # it wants jax[cuda13]

    mosaic_gpu.check_hopper = lambda *_: None
    mosaic_gpu.multiprocessors = lambda: 132
    P, device = packed_width(K), target()
    shapes = (((M, K), jnp.bfloat16), ((N, P), jnp.uint8), ((N, group_count(K, group_size)), jnp.float32))
    arguments = [jax.ShapeDtypeStruct(shape, dtype, sharding=device) for shape, dtype in shapes]
    jax.jit(partial(mosaic_gpu.forward, group_size=group_size)).lower(*arguments).compile()
    return str(mosaic_gpu.cut_of(N, P, padded(M, 8)))


def main() -> None:
    """A line for each shape."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compile", action="store_true")
    flags = parser.parse_args()
    large = ((1, 10240, 10240, 32), (64, 10240, 10240, 32), (64, 8192, 8192, 32))
    for shape in SHAPES + large if flags.compile else SHAPES:
        print(*shape, (compiled if flags.compile else simulate)(*shape), flush=True)


if __name__ == "__main__":
    main()
