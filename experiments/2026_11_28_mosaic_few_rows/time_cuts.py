"""The Mosaic product of few rows under several cuts, beside the dense product and Triton's; and what its halves take.

    python experiments/2026_11_28_mosaic_few_rows/time_cuts.py [--rows 8 16 64] [--sizes 10240 8192 4096] [--halves]

With `--halves`, also the kernel without its products, and without its decoding: their results are wrong, on purpose.
"""

import argparse
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import few_rows
import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).parents[1] / "2026_11_21_kernels"))

import time_few_rows as timing

from arbs_kernels.codec import packed_width
from arbs_kernels.packed_matmul import triton

CALLS = 8
"""Of a program."""


def no_products(total, weights, x_ref):
    """In place of `few_rows.added`: weights are used, but not multiplied."""
    few_rows.plgpu.wgmma(total, sum(weights[1:], weights[0]), x_ref.at[0].transpose((1, 0)))
    return total


def no_decoding(trits_ref, scale_ref, run, width):
    """In place of `few_rows.weights_of`."""
    one = few_rows.plgpu.layout_cast(
        jnp.full((few_rows.WARPGROUP_ROWS, few_rows.RUN), 0.5, jnp.bfloat16), few_rows.plgpu.Layout.WGMMA
    )
    return (one,) * 5


def main() -> None:
    """A line each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 16, 64])
    parser.add_argument("--sizes", type=int, nargs="+", default=[10240, 8192, 4096])
    parser.add_argument("--halves", action="store_true")
    flags = parser.parse_args()
    print(jax.devices()[0].device_kind, jax.__version__, flush=True)
    for case in timing.MOSAIC_CHECKED:
        timing.line(f"check {case[0]}x{case[1]}x{case[2]} G={case[3]}", partial(timing.checked, *case))
    for N in flags.sizes:
        P = packed_width(N)
        given = [tuple(jnp.asarray(array) for array in timing.matrix(seed, N, N)) for seed in range(4)]
        columns = [timing.prepared(*both) for both in given]
        by_run = [(trits, few_rows.scales_by_run(scale, P, timing.G)) for trits, scale in given]
        weights = [jax.random.normal(jax.random.key(seed), (N, N), jnp.bfloat16) for seed in range(2)]
        for M in flags.rows:
            x = jax.device_put(timing.normal(M, M, N))
            dense = timing.timed(f"{N}: M={M} jnp.dot", lambda x, w: jnp.dot(x, w.T), [(x, w) for w in weights])
            tile = triton.tile_of(M, N, P)
            run = partial(triton.fused_by_columns, group_size=timing.G, tile=tile)
            timing.timed(f"{N}: M={M} Triton", run, [(x, *both) for both in columns], dense, CALLS)
            for warpgroups in (2, 3, 4):
                for held in (False, True):
                    cut = replace(few_rows.cut_of(N, P, -(-M // 8) * 8, warpgroups), held=held)
                    what = f"{N}: M={M} Mosaic {warpgroups} {cut.steps}x{cut.splits} {cut.ahead}{' held' * held}"
                    sets = [(x, *both) for both in by_run]
                    timing.timed(what, partial(few_rows.few_rows, cut=cut), sets, dense, CALLS)
            if flags.halves and N == flags.sizes[0]:
                cut = replace(few_rows.cut_of(N, P, -(-M // 8) * 8, 3), held=False)
                for name, stand_in in (("added", no_products), ("weights_of", no_decoding)):
                    real = getattr(few_rows, name)
                    setattr(few_rows, name, stand_in)
                    sets = [(x, *both) for both in by_run]
                    what = f"{N}: M={M} {stand_in.__name__}"
                    timing.timed(what, lambda *given, cut=cut: few_rows.few_rows(*given, cut=cut), sets, dense, CALLS)
                    setattr(few_rows, name, real)


if __name__ == "__main__":
    main()
