"""Where the time of the fused product of few rows goes: right first, then each tile whole, then the parts of one call.

    python experiments/2026_11_21_kernels/time_few_rows.py [--rows 1 16 64] [--sizes 10240 4096]

One line each, as soon as it is known; a failure is a line too.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2] / "kernels"))

from arbs_kernels.codec import packed_width
from arbs_kernels.packed_matmul import reference, triton

G = 32
CALLS = 10
Tile = triton.Tile
TILES = {
    1: [Tile(1, 1, 4), Tile(1, 1, 8), Tile(1, 1, 8, whole_x=False), Tile(1, 2, 4), Tile(1, 1, 2, 2), Tile(2, 1, 8)],
    16: [Tile(1, 2, 4, 1, False), Tile(1, 4, 2, 1, False), Tile(2, 1, 8, 1, False), Tile(2, 2, 4, 2, False)],
    64: [Tile(1, 8, 1, 6, False), Tile(1, 4, 2, 3, False), Tile(2, 4, 1, 6, False)],
}
"""To try, by rows of x."""
CHECKED = [(1, 64, 1280), (3, 130, 1003), (9, 48, 2048), (16, 640, 1280), (40, 65, 1002), (64, 256, 1600)]
"""(M, N, K) whose products are compared with the reference, with groups of 8, 32 and 96."""


def line(what: str, test: Callable[[], str]) -> None:
    """`what: test()`, or its exception in one line."""
    start = time.perf_counter()
    try:
        result = test()
    except Exception as error:
        result = f"FAILED {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    print(f"{what:<62s} {result}   ({time.perf_counter() - start:.1f} s)", flush=True)


def matrix(key: int, N: int, K: int, group_size: int = G) -> tuple[jax.Array, jax.Array]:
    """Packed trits, any bytes (each decodes to trits), and scales."""
    trits, scales = jax.random.split(jax.random.key(key))
    scale = jnp.exp2(jax.random.uniform(scales, (N, -(-K // group_size)), minval=-4.0, maxval=0.0))
    return jax.random.bits(trits, (N, packed_width(K)), jnp.uint8), scale


def normal(key: int, *shape: int) -> jax.Array:
    """bfloat16 activations."""
    return jax.random.normal(jax.random.key(key), shape, jnp.bfloat16)


def checked(M: int, N: int, K: int, group_size: int) -> str:
    """Largest error against float64 sums, of the sum of absolute values."""
    trits, scale = matrix(M, N, K, group_size)
    x = normal(1, M, K)
    w = np.asarray(reference.decode(trits, scale, K, group_size, jnp.bfloat16), np.float64)
    exact = np.asarray(x, np.float64)
    got = np.asarray(jax.jit(partial(triton.fused, group_size=group_size))(x, trits, scale), np.float64)
    worst = np.max(np.abs(got - exact @ w.T) / (np.abs(exact) @ np.abs(w).T + 1e-30))
    return f"{'ok' if worst < 2**-7 else 'WRONG'}, largest error {worst:.1e}"


def seconds(function: Callable[..., jax.Array], sets: Sequence[tuple[jax.Array, ...]]) -> float:
    """Device time of one call: several on rotating inputs in one program, one after another; a median."""

    def program(sets: Sequence[tuple[jax.Array, ...]]) -> list[jax.Array]:
        results: list[jax.Array] = []
        for call in range(CALLS):
            given = sets[call % len(sets)]
            if results:
                given, results[-1] = jax.lax.optimization_barrier((given, results[-1]))
            results.append(function(*given))
        return results

    run = jax.jit(program)
    jax.block_until_ready(run(sets))
    took = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(8):
            result = run(sets)
        jax.block_until_ready(result)
        took.append((time.perf_counter() - start) / (8 * CALLS))
    return statistics.median(took)


def timed(what: str, function: Callable[..., jax.Array], sets: Sequence[tuple[jax.Array, ...]]) -> None:
    """A line in microseconds."""
    line(what, lambda: f"{seconds(function, sets) * 1e6:8.1f} us")


def parts(N: int, M: int, x: jax.Array, matrices: Sequence[tuple[jax.Array, jax.Array]]) -> None:
    """What a call consists of: x in the order of fragments, the kernel on it, the sum of the splits."""
    cut = triton.cut_of(N, packed_width(N), triton.tile_of(M))
    prepare = partial(triton.fragments, P=packed_width(N), classes=cut.classes, tiles=cut.tiles)
    timed(f"{N}: M={M} x in the order of fragments", prepare, [(x,)])
    ready = jax.jit(prepare)(x)

    def kernel(ready: jax.Array, trits: jax.Array, scale: jax.Array) -> jax.Array:
        return triton.partial_products(ready, trits, scale, M=M, group_size=G, cut=cut, whole_x=False)

    timed(f"{N}: M={M} the kernel alone", kernel, [(ready, *both) for both in matrices])
    if cut.splits > 1:
        partial_sums = jnp.ones((cut.splits, M, N), jnp.float32)
        timed(f"{N}: M={M} the sum of {cut.splits} splits", triton.sum_of_splits, [(partial_sums,)])


def main() -> None:
    """Checks, then times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--sizes", type=int, nargs="+", default=[10240, 4096])
    flags = parser.parse_args()
    print(jax.devices()[0].device_kind, jax.__version__, flush=True)
    for index, (M, N, K) in enumerate(CHECKED):
        group_size = (32, 8, 96)[index % 3]
        line(f"check {M}x{N}x{K} G={group_size}", partial(checked, M, N, K, group_size))
    for N in flags.sizes:
        matrices = [matrix(key, N, N) for key in range(4)]
        weights = [normal(key, N, N) for key in range(2)]
        for M in flags.rows:
            x = normal(M, M, N)
            timed(f"{N}: M={M} jnp.dot", lambda x, w: jnp.dot(x, w.T), [(x, w) for w in weights])
            for tile in TILES[M] if flags.sizes[0] == N else [triton.tile_of(M)]:
                cut = ", ".join(f"{name}={value}" for name, value in vars(tile).items())
                run = partial(triton.fused, group_size=G, tile=tile)
                timed(f"{N}: M={M} {cut}", run, [(x, *both) for both in matrices])
            parts(N, M, x, matrices)


if __name__ == "__main__":
    main()
