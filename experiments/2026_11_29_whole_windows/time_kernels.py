"""Triton's two kernels for few rows beside each other, under several cuts, and beside Mosaic's and the dense product.

    python experiments/2026_11_29_whole_windows/time_kernels.py [--shapes 1x8192x8192 16x4096x4096] [--fixed-point]

With `--fixed-point` also the kernel of one row in integers that was not kept; first its results are compared.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import jax

sys.path.insert(0, str(Path(__file__).parents[1] / "2026_11_21_kernels"))

import time_few_rows as timing
from fixed_point_kernel import one_row

from arbs_kernels.codec import packed_width
from arbs_kernels.packed_matmul import mosaic_gpu, prepared_scale, triton
from arbs_kernels.triton_launch import launch

G = timing.G
CUTS = {1: [(1, 4), (1, 8), (2, 8), (2, 16)], 8: [(1, 4), (1, 8), (2, 8), (3, 8)], 16: [(1, 8), (4, 8), (5, 8)]}
"""(Tiles of 16 rows, warps) of a program, by the largest number of rows of x."""


def fixed_point(x: jax.Array, trits: jax.Array, columns: jax.Array, *, cut: tuple[int, int]) -> jax.Array:
    """`y` (1, N) by integers."""
    (K, (N, P)), (row_tiles, warps) = (x.shape[1], trits.shape), cut
    return launch(
        one_row,
        x,
        trits,
        columns,
        out=jax.ShapeDtypeStruct((1, N), x.dtype),
        grid=(-(-N // (16 * row_tiles)),),
        num_warps=warps,
        num_stages=1,
        N=N,
        K=K,
        P=P,
        R=columns.shape[0],
        G=G,
        STEPS=-(-P // (32 * warps)),
        ROW_TILES=row_tiles,
        WARPS=warps,
    )


def checked(N: int, K: int, cut: tuple[int, int]) -> str:
    """The error of `fixed_point`."""
    error = timing.largest_error(
        lambda x, trits, scale: fixed_point(x, trits, prepared_scale(scale), cut=cut), 1, N, K, G
    )
    return f"{'ok' if error < 2**-8 else 'WRONG'}, largest error {error:.1e}"


def main() -> None:
    """A line each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=["1x4096x4096", "1x8192x8192", "8x8192x8192", "16x4096x4096"])
    parser.add_argument("--fixed-point", action="store_true")
    flags = parser.parse_args()
    print(jax.devices()[0].device_kind, jax.__version__, flush=True)
    if flags.fixed_point:
        for case in ((64, 320, (1, 4)), (48, 2048, (2, 16)), (512, 3200, (3, 16))):
            timing.line(f"check 1x{case[0]}x{case[1]} {case[2]}", partial(checked, *case))
    for shape in flags.shapes:
        M, N, K = (int(size) for size in shape.split("x"))
        matrices = [timing.prepared(*timing.matrix(seed, N, K)) for seed in range(min(12, timing.copies(N * K // 4)))]
        weights = [
            jax.random.normal(jax.random.key(seed), (N, K), "bfloat16") for seed in range(timing.copies(2 * N * K))
        ]
        x = jax.device_put(timing.normal(M, M, K))
        sets = [(x, *both) for both in matrices]
        dense = timing.timed(f"{shape}: jnp.dot", lambda x, w: jnp.dot(x, w.T), [(x, w) for w in weights])
        tile = triton.tile_of(M, N, packed_width(K))
        timing.timed(f"{shape}: few_rows", partial(triton.fused, group_size=G, tile=tile), sets, dense)
        for cut in next(cuts for rows, cuts in CUTS.items() if rows >= M):
            chosen = " (chosen)" if cut == triton.whole_cut(N, M) else ""
            timing.timed(f"{shape}: {cut}{chosen}", partial(triton.whole, group_size=G, cut=cut), sets, dense)
            if M == 1 and flags.fixed_point:
                timing.timed(f"{shape}: {cut} in integers", partial(fixed_point, cut=cut), sets, dense)
        if M > 1:
            timing.timed(f"{shape}: Mosaic", partial(mosaic_gpu.few_rows, group_size=G), sets, dense)


if __name__ == "__main__":
    main()
