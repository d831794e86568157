"""Where the time of the fused product of few rows goes: right first, then each tile whole, then the parts of one call.

    python experiments/2026_11_21_kernels/time_few_rows.py [--rows 1 16 64] [--sizes 10240 8192 4096] [--no-checks]
        [--own-tiles] [--mosaic] [--calls 60]

One line each, as soon as it is known, each time beside the dense product of the same run; a failure is a line too.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2] / "kernels"))
from arbs_kernels.codec import packed_width
from arbs_kernels.packed_matmul import mosaic_gpu, triton
from arbs_kernels.packed_matmul.prepared import prepared_scale

G = 32
Tile = triton.Tile
TILES = {
    (1, 10240): [Tile(1, 1, 4), Tile(1, 1, 4, chunk=2), Tile(1, 1, 2, words=8), Tile(1, 1, 4, ahead=2)],
    (1, 8192): [Tile(1, 1, 4), Tile(1, 1, 4, words=8), Tile(1, 1, 8), Tile(1, 1, 4, ahead=2)],
    (1, 4096): [Tile(1, 1, 8), Tile(1, 1, 8, words=8), Tile(1, 1, 16), Tile(1, 1, 4)],
    (16, 10240): [Tile(1, 1, 4, direct_x=False), Tile(2, 1, 4), Tile(2, 4, 1, splits=4, direct_x=False)],
    (16, 8192): [Tile(1, 1, 4, direct_x=False), Tile(1, 1, 8, words=8, direct_x=False), Tile(2, 1, 4)],
    (16, 4096): [Tile(1, 1, 8, words=8, direct_x=False), Tile(1, 1, 8, direct_x=False), Tile(2, 1, 8)],
    (64, 10240): [Tile(2, 8, 1, splits=3, direct_x=False), Tile(2, 4, 1, splits=3, direct_x=False)],
    (64, 8192): [Tile(2, 8, 1, splits=4, direct_x=False), Tile(2, 4, 1, splits=4, direct_x=False)],
    (64, 4096): [Tile(2, 8, 1, splits=8, direct_x=False), Tile(1, 8, 1, splits=4, direct_x=False)],
}
"""To try, by rows of x and size."""
CHECKED = [
    (1, 64, 1280, 32, None),
    (1, 64, 1640, 32, None),
    (2, 130, 1002, 8, None),
    (3, 48, 2048, 96, Tile(1, 2, 2, words=8, chunk=2)),
    (9, 70, 1003, 16, None),
    (16, 640, 1280, 32, Tile(2, 1, 4)),
    (40, 65, 1002, 64, None),
    (64, 512, 3200, 32, None),
]
"""(M, N, K, G, tile) whose products are compared with sums in float64."""
MOSAIC_CHECKED = [
    (1, 64, 320, 32, "mosaic"),
    (5, 208, 2053, 32, "mosaic"),
    (16, 4096, 4096, 256, "mosaic"),
    (64, 640, 3200, 96, "mosaic"),
]
"""The same, by the Mosaic kernel, in place of Triton's with `--mosaic`."""


def line(what: str, test: Callable[[], str]) -> None:
    """`what: test()`, or its exception in one line."""
    start = time.perf_counter()
    try:
        result = test()
    except Exception as error:
        result = f"FAILED {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    print(f"{what:<62s} {result}   ({time.perf_counter() - start:.1f} s)", flush=True)


def matrix(seed: int, N: int, K: int, group_size: int = G) -> tuple[np.ndarray, np.ndarray]:
    """Packed trits, any bytes (each decodes to trits), and scales."""
    rng = np.random.default_rng(seed)
    trits = rng.integers(0, 256, (N, packed_width(K)), np.uint8)
    return trits, np.exp2(rng.uniform(-4.0, 0.0, (N, -(-K // group_size)))).astype(np.float32)


def normal(seed: int, *shape: int) -> np.ndarray:
    """bfloat16 activations."""
    return np.random.default_rng(seed).standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)


def largest_error(run: Callable[..., jax.Array], M: int, N: int, K: int, group_size: int) -> float:
    """Of `run(x, trits, scale)` against float64 sums, of the sum of absolute values."""
    trits, scale = matrix(M, N, K, group_size)
    x = normal(1, M, K)
    fraction = trits[:, None, :] * (3 ** np.arange(5, dtype=np.uint8))[:, None]
    digits = (fraction.astype(np.int64) * 3 >> 8).reshape(N, -1)[:, :K] - 1
    w = digits * np.repeat(scale.astype(ml_dtypes.bfloat16).astype(np.float64), group_size, axis=1)[:, :K]
    exact, got = x.astype(np.float64), np.asarray(jax.jit(run)(x, trits, scale)).astype(np.float64)
    return np.max(np.abs(got - exact @ w.T) / (np.abs(exact) @ np.abs(w).T + 1e-30))


def checked(M: int, N: int, K: int, group_size: int, tile: triton.Tile | str | None) -> str:
    """The error of one of the library's kernels."""
    run = mosaic_gpu.forward if tile == "mosaic" else partial(triton.fused, tile=tile)
    error = largest_error(partial(run, group_size=group_size), M, N, K, group_size)
    return f"{'ok' if error < 2**-7 else 'WRONG'}, largest error {error:.1e}"


def seconds(
    function: Callable[..., jax.Array], sets: Sequence[tuple[jax.Array, ...]], calls: int = 60
) -> tuple[float, float]:
    """Of one call, `calls` of them on rotating inputs in one program, one after another: by the clock, a median, and of
    its kernels alone, by a profile; without a launch, which may cost more than the kernel."""

    def program(sets: Sequence[tuple[jax.Array, ...]]) -> jax.Array:
        results: list[jax.Array] = []
        for call in range(calls):
            given = sets[call % len(sets)]
            if results:
                given, results[-1] = jax.lax.optimization_barrier((given, results[-1]))
            results.append(function(*given))
        # A number of each: the host would take longer to hand out all of them than the device to compute small ones.
        return jnp.stack([result.ravel()[0] for result in results])

    run = jax.jit(program, compiler_options={"xla_gpu_command_buffer_scheduling_mode": "SERIALIZE"})
    jax.block_until_ready(run(sets))
    took = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(8):
            result = run(sets)
        jax.block_until_ready(result)
        took.append((time.perf_counter() - start) / (8 * calls))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run(sets))
        (file,) = Path(folder).rglob("*.xplane.pb")
        planes = [plane for plane in jax.profiler.ProfileData.from_file(str(file)).planes if "GPU" in plane.name]
        streams = [one for plane in planes for one in plane.lines if "Stream" in one.name]
        busy = sum(event.duration_ns for stream in streams for event in stream.events)
    return statistics.median(took), busy / calls / 1e9


def timed(
    what: str,
    function: Callable[..., jax.Array],
    sets: Sequence[tuple[jax.Array, ...]],
    dense: tuple[float, float] | None = None,
    calls: int = 60,
) -> tuple[float, float] | None:
    """A line in microseconds, by the clock and of kernels alone, and how often each goes into that of `dense`; both in
    seconds."""
    took = []

    def text() -> str:
        wall, kernels = seconds(function, sets, calls)
        took.append((wall, kernels))
        ratios = f"  {dense[0] / wall:5.2f}x {dense[1] / kernels:5.2f}x" if dense and kernels else ""
        return f"{wall * 1e6:8.1f} us, kernels {kernels * 1e6:8.1f} us{ratios}"

    line(what, text)
    return took[0] if took else None


def prepared(trits: np.ndarray, scale: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """A matrix on the device, its scales as the kernel reads them."""
    return jnp.asarray(trits), prepared_scale(jnp.asarray(scale))


def copies(size: int) -> int:
    """Of an array of so many bytes, to find none of it in the cache."""
    return max(2, -(-(2**28) // size))


def parts(N: int, M: int, tile: triton.Tile, matrices: Sequence[tuple[jax.Array, jax.Array]]) -> None:
    """What a call with fragments consists of: x in their order, the kernel on it, the sum of the splits."""
    cut = triton.cut_of(N, packed_width(N), G, tile)
    x = normal(M, M, N)
    timed(f"{N}: M={M} x in the order of fragments", lambda x: triton.fragments(x, packed_width(N), cut), [(x,)])
    ready = jax.jit(lambda x: triton.fragments(x, packed_width(N), cut))(x)

    def kernel(ready: jax.Array, trits: jax.Array, columns: jax.Array) -> jax.Array:
        return triton.partial_products(ready, trits, columns, shape=(M, N), group_size=G, cut=cut, direct_x=False)

    timed(f"{N}: M={M} the kernel alone", kernel, [(ready, *both) for both in matrices])
    if cut.splits > 1:
        partial_sums = jnp.ones((cut.splits, M, N), jnp.float32)
        timed(f"{N}: M={M} the sum of {cut.splits} splits", triton.sum_of_splits, [(partial_sums,)])


def main() -> None:
    """Checks, then times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--sizes", type=int, nargs="+", default=[10240, 8192, 4096])
    parser.add_argument("--no-checks", action="store_true")
    parser.add_argument("--mosaic", action="store_true", help="the Mosaic kernel beside Triton's")
    parser.add_argument("--own-tiles", action="store_true", help="only the tiles that the library chooses")
    parser.add_argument("--calls", type=int, default=60, help="of a program")
    flags = parser.parse_args()
    print(jax.devices()[0].device_kind, jax.__version__, flush=True)
    for case in [] if flags.no_checks else MOSAIC_CHECKED if flags.mosaic else CHECKED:
        line(f"check {case[0]}x{case[1]}x{case[2]} G={case[3]}", partial(checked, *case))
    tiny = [(jnp.asarray(normal(1, 1, 80)), *prepared(*matrix(1, 16, 80)))]
    timed("a product of nothing much: what a launch costs", partial(triton.fused, group_size=G), tiny)
    for N in flags.sizes:
        # Together they are several times what the largest cache holds.
        matrices = [prepared(*matrix(seed, N, N)) for seed in range(copies(N * N // 4))]
        weights = [jax.random.normal(jax.random.key(seed), (N, N), jnp.bfloat16) for seed in range(copies(2 * N * N))]
        for M in flags.rows:
            x = jax.device_put(normal(M, M, N))
            dense = timed(
                f"{N}: M={M} jnp.dot", lambda x, w: jnp.dot(x, w.T), [(x, w) for w in weights], None, flags.calls
            )
            for tile in [None, *([] if flags.own_tiles else TILES.get((M, N), []))]:
                cut = (
                    ", ".join(
                        f"{name}={value}" for name, value in vars(tile).items() if value != getattr(Tile, name, 0)
                    )
                    if tile
                    else "Triton"
                )
                run = partial(triton.fused, group_size=G, tile=tile)
                timed(f"{N}: M={M} {cut}", run, [(x, *both) for both in matrices], dense, flags.calls)
            if flags.mosaic:
                run = partial(mosaic_gpu.few_rows, group_size=G)
                timed(f"{N}: M={M} Mosaic", run, [(x, *both) for both in matrices], dense, flags.calls)
            if M > 1 and flags.sizes[0] == N:
                parts(N, M, triton.tile_of(M, N, packed_width(N)), matrices)


if __name__ == "__main__":
    main()
