"""The Mosaic product of few rows under several cuts, beside the dense product and Triton's; and what its halves take.

    python experiments/2026_11_28_mosaic_few_rows/time_cuts.py [--rows 8 16 64] [--sizes 10240 8192 4096] [--halves]
        [--warpgroups 2 3 4]

With `--halves`, also the kernel without its decoding, and without that and its products: their results are wrong, on
purpose.
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).parents[1] / "2026_11_21_kernels"))

import time_few_rows as timing

from arbs_kernels.codec import packed_width
from arbs_kernels.mosaic_support import padded
from arbs_kernels.packed_matmul import mosaic_gpu, triton

CALLS = 6
"""Of a program."""


def no_decoding(rest, scale_ref, plane):
    """In place of `mosaic_gpu.weights_of`."""
    return rest, rest


def nothing(total, weights, x_ref):
    """In place of `mosaic_gpu.added`, once nothing is decoded either: copies are left."""
    return total


HALVES = {
    "without decoding": {"weights_of": no_decoding},
    "copies alone": {"added": nothing, "weights_of": no_decoding},
}


def main() -> None:
    """A line each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 16, 64])
    parser.add_argument("--sizes", type=int, nargs="+", default=[10240, 8192, 4096])
    parser.add_argument("--warpgroups", type=int, nargs="*", default=[2, 3, 4])
    parser.add_argument("--halves", action="store_true")
    flags = parser.parse_args()
    print(jax.devices()[0].device_kind, jax.__version__, flush=True)
    for case in timing.MOSAIC_CHECKED:
        timing.line(f"check {case[0]}x{case[1]}x{case[2]} G={case[3]}", partial(timing.checked, *case))
    for N in flags.sizes:
        P = packed_width(N)
        matrices = [timing.prepared(*timing.matrix(seed, N, N)) for seed in range(4)]
        weights = [jax.random.normal(jax.random.key(seed), (N, N), jnp.bfloat16) for seed in range(2)]
        for M in flags.rows:
            x = jax.device_put(timing.normal(M, M, N))
            sets = [(x, *both) for both in matrices]
            dense = timing.timed(f"{N}: M={M} jnp.dot", lambda x, w: jnp.dot(x, w.T), [(x, w) for w in weights])
            tile = triton.tile_of(M, N, P)
            run = partial(triton.fused, group_size=timing.G, tile=tile)
            timing.timed(f"{N}: M={M} Triton", run, sets, dense, CALLS)
            wide = padded(M, 8)
            mosaic = partial(mosaic_gpu.few_rows, group_size=timing.G)
            for warpgroups in flags.warpgroups:
                cut = mosaic_gpu.cut_with(warpgroups, N, P, wide)
                chosen = " (chosen)" if cut == mosaic_gpu.cut_of(N, P, wide) else ""
                what = f"{N}: M={M} Mosaic {warpgroups} {cut.steps}x{cut.splits} {cut.ahead}{chosen}"
                timing.timed(what, partial(mosaic, cut=cut), sets, dense, CALLS)
            if flags.halves and flags.sizes[0] == N:
                for what, stand_ins in HALVES.items():
                    mosaic_gpu.launched.clear_cache()  # It has been traced with what the stand-ins stand for.
                    with mock.patch.multiple(mosaic_gpu, **stand_ins):
                        timing.timed(f"{N}: M={M} {what}", mosaic, sets, dense, CALLS)
                    mosaic_gpu.launched.clear_cache()


if __name__ == "__main__":
    main()
