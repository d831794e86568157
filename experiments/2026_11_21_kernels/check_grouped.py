"""The Triton kernels of products by expert: right against the reference, then how fast, by tile.

    python experiments/2026_11_21_kernels/check_grouped.py [--no-times] [--no-checks]

Prints a line for each; a failure is one more line, not the end. Dense products are of equal shares of the rows.
"""

import argparse
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from check_triton import compared, line, normal, timed

from arbs_kernels.codec import packed_width
from arbs_kernels.correlation_score import triton as score_triton
from arbs_kernels.grouped_matmul import reference, triton

G = 32
CHECKED = [
    ([7], 5, 33, 32),
    ([0, 0, 5, 0, 8, 0, 9], 17, 81, 16),
    ([0, 1, 0, 2, 1, 0, 1], 40, 96, 32),
    ([150, 0, 129, 30], 72, 160, 6),
    ([300, 1, 0, 500, 700], 264, 520, 96),
    ([40] * 70, 136, 640, 256),
]
"""(rows of each expert, N, K, G); ten rows more have none."""
TIMED = [
    (8192, 8, 1024, 1024),
    (16384, 64, 512, 2048),
    (128, 64, 512, 2048),
    (16, 64, 512, 2048),
    (124, 24, 1280, 4096),
]
"""(M, X, N, K)."""
TILES = [
    triton.BIG,
    replace(triton.BIG, num_stages=4),
    triton.LOW,
    triton.Tile(128, 128, 64, 4, 4),
    triton.Tile(128, 128, 64, 8, 4),
]
FEW_TILES = [triton.FEW, triton.Tile(16, 16, 256, 4, 1), triton.Tile(16, 32, 64, 4, 1), triton.Tile(16, 64, 64, 4, 1)]
SCORE_TILES = [score_triton.BIG, replace(score_triton.BIG, rows=64, num_warps=4), score_triton.SMALL]


def matrices(key: int, X: int, N: int, K: int, group_size: int) -> tuple[jax.Array, jax.Array]:
    """Packed trits, any bytes (each decodes to trits), and scales."""
    trits, scales = jax.random.split(jax.random.key(key))
    scale = jnp.exp2(jax.random.uniform(scales, (X, N, -(-K // group_size)), minval=-4.0, maxval=0.0))
    return jax.random.bits(trits, (X, N, packed_width(K)), jnp.uint8), scale


def check(sizes: list[int], N: int, K: int, group_size: int, dtype: Any, tiles: list[tuple[Any, Any]]) -> None:
    """Both products with tiles, None for its own, and the score."""
    rng = np.random.default_rng(0)
    M, X = sum(sizes) + 10, len(sizes)
    name = f"{M}x{N}x{K} G={group_size} X={X} {jnp.dtype(dtype).name}"
    trits, scale = matrices(M, X, N, K, group_size)
    given = jnp.asarray(sizes, jnp.int32)
    for forward, inner in ((True, K), (False, N)):
        left = jnp.asarray(rng.standard_normal((M, inner)), dtype)
        wide = {"group_size": group_size} if forward else {"in_features": K, "group_size": group_size}
        plain = jax.jit(partial(reference.forward if forward else reference.input_gradient, **wide))
        expected = plain(left, given, trits, scale)
        # Bytes of ones: as large as weights can be, for a sum of absolute values.
        magnitude = plain(jnp.abs(left), given, jnp.full_like(trits, 255), scale)
        for tile, packed in tiles:
            run = partial(triton.product_of, "check", in_features=K, group_size=group_size, forward=forward)
            run = jax.jit(partial(run, tile=tile, packed=packed))
            what = f"{'forward' if forward else 'gradient'} {name}{'' if tile is None else f' packed={packed}'}"
            line(what, partial(product, run, (left, given, trits, scale), expected, magnitude))
    x, dy = (jnp.asarray(rng.integers(-2, 3, (M, width)), dtype) for width in (K, N))
    score = jax.jit(partial(triton.score, group_size=group_size))
    expected = jax.jit(partial(reference.score, group_size=group_size))(x, dy, given, trits)
    line(f"score {name}", lambda: compared(score(x, dy, given, trits), expected, True))


def product(run: Any, arrays: tuple[jax.Array, ...], expected: jax.Array, magnitude: jax.Array) -> str:
    """Whether `run` gives what is expected."""
    return compared(run(*arrays), expected, False, magnitude)


def times(M: int, X: int, N: int, K: int) -> None:
    """Both products and the score, and their dense counterparts."""
    flops = 2.0 * M * N * K
    sizes = jnp.full((X,), M // X, jnp.int32)
    stacks = [matrices(key, X, N, K, G) for key in range(2)]
    weights = [normal(key, X, N, K) for key in range(2)]
    each = max(1, M // X)
    few = triton.is_fused(M, X)
    tiles = [(tile, False) for tile in ([triton.LOW] if few else TILES)]
    tiles += [(tile, True) for tile in (FEW_TILES if few else [])]
    for forward, inner in ((True, K), (False, N)):
        label = f"{M}x{N}x{K} X={X} {'forward' if forward else 'gradient'}"
        axes = (((2,), (2 if forward else 1,)), ((0,), (0,)))
        dense = partial(jax.lax.dot_general, dimension_numbers=axes)
        timed(f"{label} dense", dense, [(normal(1, X, each, inner), w) for w in weights], flops, "TFLOP/s")
        sets = [(normal(2, M, inner), sizes, *stack) for stack in stacks]
        for tile, packed in tiles:
            run = partial(triton.product_of, "time", in_features=K, group_size=G, forward=forward)
            shape = f"{tile.rows}x{tile.columns}x{tile.depth} w{tile.num_warps} s{tile.num_stages}"
            what = f"{label} {shape}{' packed' if packed else ''}"
            timed(what, partial(run, tile=tile, packed=packed), sets, flops, "TFLOP/s")
    rows = [(normal(key, M, K), normal(key + 9, M, N)) for key in range(2)]
    label = f"{M}x{N}x{K} X={X} score"

    def gradient(x: jax.Array, dy: jax.Array) -> jax.Array:
        return jax.lax.dot_general(dy, x, (((1,), (1,)), ((0,), (0,))))

    timed(f"{label} dense", gradient, [(normal(1, X, each, K), normal(2, X, each, N))] * 2, flops, "TFLOP/s")
    sets = [(*pair, sizes, stack[0]) for pair, stack in zip(rows, stacks, strict=True)]
    for tile in SCORE_TILES:
        what = f"{label} {tile.rows}x{tile.columns}x{tile.depth} w{tile.num_warps} s{tile.num_stages}"
        timed(what, partial(triton.score_of, group_size=G, tile=tile), sets, flops, "TFLOP/s")


def main() -> None:
    """Parses flags, checks, times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-checks", action="store_true")
    parser.add_argument("--no-times", action="store_true")
    flags = parser.parse_args()
    print(jax.devices()[0].device_kind, jax.__version__, flush=True)
    if not flags.no_checks:
        for sizes, N, K, group_size in CHECKED:
            for dtype in (jnp.bfloat16, jnp.float32):
                check(sizes, N, K, group_size, dtype, [(None, None), (triton.FEW_FLOAT32, True)])
        check(*CHECKED[-2], jnp.bfloat16, [(tile, False) for tile in TILES] + [(tile, True) for tile in FEW_TILES])
    if not flags.no_times:
        for case in TIMED:
            times(*case)


if __name__ == "__main__":
    main()
