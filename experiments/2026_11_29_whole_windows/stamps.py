"""When the warps of the kernel for whole windows begin, finish their first step, all steps, and the sum, in cycles.

    python experiments/2026_11_29_whole_windows/stamps.py [--shapes 4096 8192 10240]

The kernel's own text with four readings of a counter in it, one row of x, caches emptied; 5, 50 and 95% of warps.
"""

import argparse
import importlib
import sys
import tempfile
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "2026_11_21_kernels"))

import time_few_rows as timing

from arbs_kernels.packed_matmul import triton
from arbs_kernels.triton_launch import launch

KERNEL = Path(triton.__file__).with_name("whole_windows_kernel.py")
CLOCK = """
_CLOCK = tl.constexpr("mov.u64 $0, %clock64; add.s64 $0, $0, $1;")


@triton.jit
def cycle(lane):
    return tl.inline_asm_elementwise(_CLOCK, "=&l,l", [lane.to(tl.int64) * 0], tl.int64, is_pure=False, pack=1)


@triton.jit
def whole_windows("""
CHANGES = {
    "\n@triton.jit\ndef whole_windows(": CLOCK,
    "    y_ptr,\n    N:": "    y_ptr,\n    t_ptr,\n    N:",
    "    lane = thread % 32\n    block": "    lane = thread % 32\n    begun = cycle(lane)\n    block",
    "    for _ in range(STEPS):\n": "    once = begun\n    for step in range(STEPS):\n",
    "        total = sums\n\n": "        total = sums\n        once = tl.where(step == 0, cycle(lane), once)\n\n",
    "    # Trits were twice": "    done = cycle(lane)\n    # Trits were twice",
}
END = """
    place = t_ptr + (tl.program_id(0) * (32 * WARPS) + thread) * 3
    tl.store(place, once - begun)
    tl.store(place + 1, done - once)
    tl.store(place + 2, cycle(lane) - done)
"""


def stamped() -> str:
    """The kernel's text with readings in it."""
    text = KERNEL.read_text()
    for old, new in CHANGES.items():
        if text.count(old) != 1:
            raise ValueError(f"the kernel has {text.count(old)} of {old!r}, not one: bring this script up to date")
        text = text.replace(old, new)
    return text + END


def run(x: jax.Array, trits: jax.Array, columns: jax.Array, *, kernel: object, cut: tuple[int, int]) -> list[jax.Array]:
    """`y`, and three spans of each thread."""
    (K, (N, P)), (row_tiles, warps) = (x.shape[1], trits.shape), cut
    programs, steps = -(-N // (16 * row_tiles)), -(-P // (32 * warps))
    out = (jax.ShapeDtypeStruct((1, N), x.dtype), jax.ShapeDtypeStruct((programs, 32 * warps, 3), "int64"))
    sizes = {"N": N, "K": K, "P": P, "R": columns.shape[0], "G": timing.G, "M": 1, "STEPS": steps}
    cuts = {"ROW_TILES": row_tiles, "WARPS": warps, "num_warps": warps, "num_stages": 1}
    return launch(kernel, x, trits, columns, out=out, grid=(programs,), **sizes, **cuts)


def main() -> None:
    """A line each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", type=int, nargs="+", default=[4096, 8192, 10240])
    flags = parser.parse_args()
    jax.config.update("jax_enable_x64", True)  # cycles are 64 bits
    print(jax.devices()[0].device_kind, jax.__version__, flush=True)
    empty, large = jax.jit(lambda values: values * 1.5), jnp.ones(2**26, jnp.float32)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "stamped.py").write_text(stamped())
        sys.path.insert(0, folder)
        kernel = importlib.import_module("stamped").whole_windows
        for N in flags.shapes:
            matrix, x = timing.prepared(*timing.matrix(0, N, N)), jax.device_put(timing.normal(1, 1, N))
            cut = triton.whole_cut(N, 1)
            timed = jax.jit(partial(run, kernel=kernel, cut=cut))
            for _ in range(4):
                jax.block_until_ready(empty(large))
                spans = np.asarray(timed(x, *matrix)[1])[:, ::32].reshape(-1, 3)
            steps = -(-matrix[0].shape[1] // (32 * cut[1]))
            names = ("first step", f"{steps - 1} more", "sum")
            found = (np.percentile(spans[:, index], [5, 50, 95]).astype(int) for index in range(3))
            print(N, cut, "; ".join(f"{name} {span}" for name, span in zip(names, found, strict=True)), flush=True)


if __name__ == "__main__":
    main()
