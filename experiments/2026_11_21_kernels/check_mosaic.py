"""The Mosaic kernels on the Hopper GPU at hand: right against the reference, then how fast, by tile.

    python experiments/2026_11_21_kernels/check_mosaic.py [--no-times] [--no-checks] [--sizes 10240 8192 4096]

Prints a line for each; a failure is one more line, not the end. All tiles are tried on the first of the sizes and the
first number of rows, and the fastest three of them on the others.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2] / "kernels"))

from arbs_kernels.codec import pack_rows
from arbs_kernels.correlation_score import mosaic_gpu as score_mosaic
from arbs_kernels.correlation_score import reference as score_reference

SHAPES = [(1, 1, 1, 32), (2, 3, 5, 4), (7, 48, 64, 6), (9, 40, 96, 12), (3, 17, 81, 16), (5, 33, 70, 32)]
SHAPES += [(17, 31, 257, 128), (6, 24, 300, 256), (129, 130, 131, 8), (300, 640, 1280, 96), (64, 300, 10003, 32)]
SHAPES += [(64, 300, 1300, 32), (64, 300, 1303, 12), (1000, 2048, 4096, 32), (1000, 2048, 8192, 32)]
"""(M, N, K, G). Tiles begin at codes that no copy can begin at where K is 10003, 1300, 1303, 4096 or 8192."""
TILED_SHAPES = [(500, 1000, 3000, 32), (500, 1000, 3003, 32)]
"""On which every candidate is checked: codes of even and of odd addresses."""
CALLS = 24
"""Of one timed run."""


def line(what: str, test: Callable[[], str]) -> None:
    """`what: test()`, or its exception in one line."""
    try:
        result = test()
    except Exception as error:
        result = f"FAILED {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    print(f"{what:<66s} {result}", flush=True)


def packed(key: int, N: int, K: int) -> jax.Array:
    """Random trits, packed."""
    return jax.jit(pack_rows)(np.random.default_rng(key).integers(-1, 2, (N, K), dtype=np.int8))


def whole(rng: np.random.Generator, *shape: int) -> jax.Array:
    """Small integers, whose products are summed exactly in any order; ties are frequent."""
    return jnp.asarray(rng.integers(-2, 3, shape), jnp.bfloat16)


def check(M: int, N: int, K: int, G: int, tiles: Mapping[str, Any]) -> None:
    """The score of one shape: exact on integers, and on normal numbers off in no more than a few doubtful signs."""
    name = f"score {M}x{N}x{K} G={G} {dict(tiles) or ''}"
    rng = np.random.default_rng(M + N + K)
    trits = packed(N, N, K)
    run = jax.jit(partial(score_mosaic.score, group_size=G, tiles=tiles))
    expected = jax.jit(partial(score_reference.score, group_size=G))

    def exact() -> str:
        x, dy = whole(rng, M, K), whole(rng, M, N)
        got, right = np.asarray(run(x, dy, trits)), np.asarray(expected(x, dy, trits))
        if got.shape != right.shape:
            return f"WRONG shape {got.shape}, not {right.shape}"
        wrong = got != right
        if wrong.any():
            return f"WRONG at {wrong.sum()} of {wrong.size}, first {np.argwhere(wrong)[0]}: {got[wrong][0]}"
        return "ok, exact"

    def normals() -> str:
        x, dy = (jnp.asarray(rng.standard_normal((M, width)), jnp.bfloat16) for width in (K, N))
        off = np.abs(np.asarray(run(x, dy, trits)) - np.asarray(expected(x, dy, trits)))
        verdict = "ok" if off.sum() <= 2 + 1e-4 * N * K else "WRONG"
        return f"{verdict}, {off.sum()} votes of {N * K} differ"

    line(name, exact)
    if M * N * K >= 10**9:
        line(name + " normal", normals)


def checks() -> None:
    """All shapes, all candidates."""
    for M, N, K, G in SHAPES:
        check(M, N, K, G, {})
    for shape, tiles in product(TILED_SHAPES, score_mosaic.CANDIDATES):
        check(*shape, tiles)


def seconds(function: Callable[..., jax.Array], sets: Sequence[tuple[jax.Array, ...]]) -> float:
    """Of one call: many on rotating inputs, queued; a median over repetitions."""
    run = jax.jit(function)
    for arguments in sets:
        run(*arguments).block_until_ready()
    took = []
    for _ in range(5):
        start = time.perf_counter()
        for call in range(CALLS):
            result = run(*sets[call % len(sets)])
        result.block_until_ready()
        took.append((time.perf_counter() - start) / CALLS)
    return statistics.median(took)


def timed(what: str, function: Callable[..., jax.Array], sets: Sequence[tuple], flops: float) -> float:
    """A line: microseconds and TFLOP/s. Returns the seconds, infinite where it failed."""
    took = float("inf")

    def test() -> str:
        nonlocal took
        took = seconds(function, sets)
        return f"{took * 1e6:9.1f} us  {flops / took / 1e12:8.1f} TFLOP/s"

    line(what, test)
    return took


def normal(key: int, *shape: int) -> jax.Array:
    """bfloat16 activations."""
    return jax.random.normal(jax.random.key(key), shape, jnp.bfloat16)


def times(M: int, N: int, candidates: Sequence[Mapping[str, Any]], G: int = 32) -> list[Mapping[str, Any]]:
    """The score beside the products. Returns the candidates, the fastest first."""
    flops = 2.0 * M * N * N
    sets = [(normal(key, M, N), normal(key + 9, M, N), packed(key, N, N)) for key in range(3)]
    products = [both[:2] for both in sets]
    short = timed(
        f"{N}: M={M} dy^T x in bfloat16", partial(score_reference.weight_gradient, dtype=jnp.bfloat16), products, flops
    )
    full = timed(f"{N}: M={M} dy^T x in float32", score_reference.weight_gradient, products, flops)
    timed(f"{N}: M={M} score, xla", partial(score_reference.score, group_size=G), sets, flops)
    extended = partial(score_mosaic.extended, columns=256)
    timed(f"{N}: M={M} of that, codes extended", extended, [both[2:] for both in sets], 0.0)
    took = {}
    for index, tiles in enumerate(candidates):
        run = partial(score_mosaic.score, group_size=G, tiles=tiles)
        took[index] = timed(f"{N}: M={M} score, {dict(tiles) or 'default tile'}", run, sets, flops)
    fastest = sorted(took, key=lambda index: took[index])
    best = took[fastest[0]]
    print(
        f"{N}: M={M} best {dict(candidates[fastest[0]])}: {short / best:.3f} of bfloat16, {full / best:.3f} of float32"
    )
    return [candidates[index] for index in fastest]


def main() -> None:
    """Parses flags, checks, times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-checks", action="store_true")
    parser.add_argument("--no-times", action="store_true")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10240, 8192, 4096])
    parser.add_argument("--rows", type=int, nargs="+", default=[4096, 16384])
    flags = parser.parse_args()
    print(jax.devices()[0].device_kind, jax.__version__)
    if not flags.no_checks:
        checks()
    if not flags.no_times:
        candidates: Sequence[Mapping[str, Any]] = score_mosaic.CANDIDATES
        for size in flags.sizes:
            for rows in flags.rows:
                candidates = times(rows, size, candidates)[:3]


if __name__ == "__main__":
    main()
