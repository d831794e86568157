"""Every Triton kernel on the GPU at hand: right against the reference, then how fast, by tile.

    python experiments/2026_11_21_kernels/check_triton.py [--no-times] [--no-checks] [--sizes 10240 8192 4096]

Prints a line for each; a failure is one more line, not the end. Tiles are tried on the first of the sizes.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2] / "kernels"))

from arbs_kernels.codec import pack_rows, packed_width
from arbs_kernels.correlation_score import reference as score_reference
from arbs_kernels.correlation_score import triton as score_triton
from arbs_kernels.packed_decode import reference as decode_reference
from arbs_kernels.packed_decode import triton as decode_triton
from arbs_kernels.packed_matmul import triton as matmul_triton
from arbs_kernels.row_gather import reference as gather_reference
from arbs_kernels.row_gather import triton as gather_triton

SHAPES = [(1, 1, 1, 32), (2, 3, 5, 4), (3, 17, 81, 16), (5, 33, 70, 32), (17, 31, 257, 128), (129, 130, 131, 32)]
SHAPES += [(64, 300, 1003, 32), (1, 640, 8192, 32), (40, 512, 4096, 128), (20, 130, 1624, 6), (300, 640, 1280, 96)]
SHAPES += [(1, 1280, 1280, 32)]
"""(M, N, K, G)."""


def line(what: str, test: Callable[[], str]) -> None:
    """`what: test()`, or its exception in one line."""
    try:
        result = test()
    except Exception as error:
        result = f"FAILED {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    print(f"{what:<58s} {result}", flush=True)


def matrix(key: int, N: int, K: int, G: int) -> tuple[jax.Array, jax.Array]:
    """Random trits, packed, and scales."""
    rng = np.random.default_rng(key)
    trits = jax.jit(pack_rows)(rng.integers(-1, 2, (N, K), dtype=np.int8))
    return trits, jnp.asarray(np.exp2(rng.uniform(-4, 0, (N, -(-K // G)))), jnp.float32)


def compared(got: jax.Array, expected: jax.Array, exact: bool, magnitude: jax.Array | None = None) -> str:
    """ "ok", or what is off; errors of products are told against the sums of absolute values."""
    got_dtype = got.dtype
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    if got.shape != expected.shape:
        return f"WRONG shape {got.shape}, not {expected.shape}"
    off = np.abs(got - expected)
    if exact:
        wrong = ~(off == 0)
        return (
            "ok, exact" if not wrong.any() else f"WRONG at {wrong.sum()} of {wrong.size}, first {np.argwhere(wrong)[0]}"
        )
    worst = float(np.max(off / (np.asarray(magnitude, np.float64) + 1e-30)))
    verdict = "ok" if worst < (2**-7 if got_dtype == jnp.bfloat16 else 2**-20) else "WRONG"
    return f"{verdict}, largest error {worst:.1e} of the sum of absolute values"


def checks() -> None:
    """All kernels on small shapes."""
    for M, N, K, G in SHAPES:
        trits, scale = matrix(N + K, N, K, G)
        for dtype in (jnp.bfloat16, jnp.float32):
            name = f"{M}x{N}x{K} G={G} {jnp.dtype(dtype).name}"
            check_shape(name, M, K, G, dtype, trits, scale)


def check_shape(name: str, M: int, K: int, G: int, dtype: Any, trits: jax.Array, scale: jax.Array) -> None:
    """All kernels on one matrix."""
    rng = np.random.default_rng(1)
    N = trits.shape[0]
    x, dy = (jnp.asarray(rng.standard_normal((M, width)), dtype) for width in (K, N))
    wide = {"in_features": K, "group_size": G}
    weight = decode_reference.weight(trits, scale, dtype=dtype, **wide)
    exact, absolute = (np.asarray(w, np.float64) for w in (weight, jnp.abs(weight)))
    left, right = np.asarray(x, np.float64), np.asarray(dy, np.float64)
    run = jax.jit(partial(decode_triton.weight, dtype=dtype, **wide))
    line(f"decode {name}", lambda: compared(run(trits, scale), weight, True))
    forward = jax.jit(partial(matmul_triton.forward, group_size=G))
    line(
        f"forward {name}",
        lambda: compared(forward(x, trits, scale), left @ exact.T, False, np.abs(left) @ absolute.T),
    )
    gradient = jax.jit(partial(matmul_triton.input_gradient, **wide))
    line(
        f"input gradient {name}",
        lambda: compared(gradient(dy, trits, scale), right @ exact, False, np.abs(right) @ absolute),
    )
    whole = [jnp.asarray(rng.integers(-2, 3, (M, width)), dtype) for width in (K, N)]
    score = jax.jit(partial(score_triton.score, group_size=G))
    expected = score_reference.score(*whole, trits, group_size=G)
    line(f"score {name}", lambda: compared(score(*whole, trits), expected, True))
    ids = jnp.asarray(rng.integers(-N, N + 2, M), jnp.int32)
    gather = jax.jit(partial(gather_triton.gather, dtype=dtype, **wide))
    rows = gather_reference.gather(ids, trits, scale, dtype=dtype, **wide)
    line(f"gather {name}", lambda: compared(gather(ids, trits, scale), rows, True))


def seconds(function: Callable[..., jax.Array], sets: Sequence[tuple[jax.Array, ...]], calls: int) -> float:
    """Device time of one call: `calls` of them on rotating inputs in one program, one after another; a median."""

    def program(sets: Sequence[tuple[jax.Array, ...]]) -> jax.Array:
        token = jnp.zeros((), jnp.float32)
        for call in range(calls):
            *arguments, token = jax.lax.optimization_barrier((*sets[call % len(sets)], token))
            result, token = jax.lax.optimization_barrier((function(*arguments), token))
            token = token + result[(0,) * result.ndim].astype(jnp.float32)
        return token

    run = jax.jit(program)
    run(sets).block_until_ready()
    took = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(4):
            result = run(sets)
        result.block_until_ready()
        took.append((time.perf_counter() - start) / (4 * calls))
    return statistics.median(took)


def timed(what: str, function: Callable[..., jax.Array], sets: Sequence[tuple], work: float, unit: str) -> None:
    """A line: microseconds and `work` a second."""

    def test() -> str:
        took = seconds(function, sets, calls=10)
        return f"{took * 1e6:9.1f} us  {work / took / 1e12:8.2f} {unit}"

    line(what, test)


def times(N: int, all_tiles: bool, G: int = 32) -> None:
    """All kernels on a square matrix."""
    K = N
    P = packed_width(K)
    matrices = [matrix(key, N, K, G) for key in range(4)]
    wide = {"in_features": K, "group_size": G}
    weights = [(decode_reference.weight(*both, dtype=jnp.bfloat16, **wide),) for both in matrices[:2]]
    written = N * K * 2 + N * P + matrices[0][1].size * 4
    timed(f"{N}: copy of the weight", lambda w: -w, weights, N * K * 4, "TB/s")
    for chunks, num_warps in ((512, 4), (1024, 4), (1024, 8), (256, 4))[: 4 if all_tiles else 1]:
        run = partial(decode_triton.weight_of, dtype=jnp.bfloat16, chunks=chunks, num_warps=num_warps, **wide)
        timed(f"{N}: decode bfloat16, {chunks} chunks, {num_warps} warps", run, matrices, written, "TB/s")
    run = partial(decode_triton.weight_of, dtype=jnp.float32, **wide)
    timed(f"{N}: decode float32", run, matrices, written + N * K * 2, "TB/s")
    for M in (1, 16, 64, 1024, 4096):
        products(N, M, G, matrices, weights)
    for M in (4096, 16384):
        scores(N, M, G, matrices, all_tiles and M == 4096)


def normal(key: int, *shape: int) -> jax.Array:
    """bfloat16 activations."""
    return jax.random.normal(jax.random.key(key), shape, jnp.bfloat16)


def products(N: int, M: int, G: int, matrices: Sequence[tuple], weights: Sequence[tuple]) -> None:
    """Both products of M rows."""
    flops = 2.0 * M * N * N
    x = normal(M, M, N)
    timed(f"{N}: M={M} jnp.dot", lambda x, w: jnp.dot(x, w.T), [(x, w) for (w,) in weights], flops, "TFLOP/s")
    sets = [(x, *both) for both in matrices]
    timed(f"{N}: M={M} forward", partial(matmul_triton.forward, group_size=G), sets, flops, "TFLOP/s")
    run = partial(matmul_triton.input_gradient, in_features=N, group_size=G)
    timed(f"{N}: M={M} input gradient", run, sets, flops, "TFLOP/s")


def scores(N: int, M: int, G: int, matrices: Sequence[tuple], all_tiles: bool) -> None:
    """The score of M rows."""
    flops = 2.0 * M * N * N
    sets = [(normal(key, M, N), normal(key + 9, M, N), matrices[key][0]) for key in range(2)]
    timed(f"{N}: M={M} dy^T x", lambda x, dy, trits: jnp.dot(dy.T, x), sets, flops, "TFLOP/s")
    base = score_triton.BIG
    tiles = [base, replace(base, num_stages=4), replace(base, band=4), replace(base, band=16)]
    tiles += [replace(base, num_stages=4, depth=32), replace(base, rows=64, num_warps=4), score_triton.SMALL]
    for tile in tiles[: len(tiles) if all_tiles else 1]:
        run = partial(score_triton.score_of, group_size=G, tile=tile)
        timed(f"{N}: M={M} score, {describe(tile, base)}", run, sets, flops, "TFLOP/s")


def describe(tile: Any, base: Any) -> str:
    """What differs from the default tile."""
    changed = [f"{name}={value}" for name, value in vars(tile).items() if value != getattr(base, name)]
    return ", ".join(changed) or "default tile"


def main() -> None:
    """Parses flags, checks, times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-checks", action="store_true")
    parser.add_argument("--no-times", action="store_true")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10240, 4096])
    flags = parser.parse_args()
    print(jax.devices()[0].device_kind, jax.__version__)
    if not flags.no_checks:
        checks()
    if not flags.no_times:
        for size in flags.sizes:
            times(size, size == flags.sizes[0])


if __name__ == "__main__":
    main()
