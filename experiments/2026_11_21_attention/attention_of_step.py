"""A training step with each implementation of attention: seconds, memory, and whether it repeats bit for bit.

    python attention_of_step.py --shapes 64x256 16x1024 --attention xla cudnn

`latent10` beside QAT with AdamW, both with the same attention; arms interleaved, medians over fresh random bytes.
"""

import argparse
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent / "2026_11_20_rules"))
from baselines import QAT
from harness import Setting

from arbs_jax.training.program import Program


def lowered(arm: str, setting: Setting, attention: str) -> tuple[Any, Any]:
    """(a lowered step, a function that makes a fresh state)."""
    config = setting.config("latent10")
    program = Program(replace(config, model=replace(config.model, attention=attention)))
    tokens = jax.ShapeDtypeStruct((1, setting.batch, setting.context + 1), jnp.uint8)
    if arm == "latent10":
        return program.step.lower(program.abstract_state, tokens), program.init_state
    depth = program.config.model.layers
    init = jax.jit(lambda: QAT.init(program.specs, depth, jnp.uint32(0), jnp.float32(2e-3)))
    step = jax.jit(QAT.step(program.model, setting.steps), donate_argnums=0)
    return step.lower(jax.eval_shape(init), tokens), init


def repeats(step: Any, init: Any, batches: list[np.ndarray]) -> bool:
    """Whether two runs from one state end in the same bits."""
    ends = []
    for _ in range(2):
        state = init()
        for tokens in batches[:8]:
            state, _ = step(state, tokens)
        ends.append(jax.tree.map(np.asarray, state))
    return all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, ends), strict=True))


def main() -> None:
    """Parses flags, compiles all arms at once, times, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="byte-50m")
    parser.add_argument("--shapes", nargs="+", default=["64x256", "16x1024"])
    parser.add_argument("--attention", nargs="+", default=["xla", "cudnn"])
    parser.add_argument("--remat", nargs="+", type=int, default=[1])
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    waiting: dict[tuple[str, int, str, str], tuple[Any, Any]] = {}
    with ThreadPoolExecutor() as pool:
        for shape in args.shapes:
            batch, context = map(int, shape.split("x"))
            for remat in args.remat:
                setting = Setting(args.preset, 1000, batch, context, dtype="bfloat16", remat=bool(remat))
                for attention in args.attention:
                    for arm in ("latent10", "qat"):
                        program, init = lowered(arm, setting, attention)
                        waiting[shape, remat, attention, arm] = pool.submit(program.compile), init
        arms = {key: (future.result(), init) for key, (future, init) in waiting.items()}
    rng = np.random.default_rng(0)
    batches = {
        shape: [
            rng.integers(0, 256, (1, int(shape.split("x")[0]), int(shape.split("x")[1]) + 1)).astype(np.uint8)
            for _ in range(args.steps + 3)
        ]
        for shape in args.shapes
    }
    states = {key: init() for key, (_, init) in arms.items()}
    seconds: dict[Any, list[float]] = {key: [] for key in arms}
    for index in range(args.steps + 3):
        for key, (step, _) in arms.items():
            began = time.perf_counter()
            states[key], _ = jax.block_until_ready(step(states[key], batches[key[0]][index]))
            if index >= 3:
                seconds[key].append(time.perf_counter() - began)
    table = Table(title=f"{args.preset}, {jax.devices()[0].device_kind}", title_justify="left")
    for column in (
        "batch x context",
        "remat",
        "attention",
        "arm",
        "ms/step",
        "against qat",
        "temporaries MB",
        "repeats",
    ):
        table.add_column(column)
    for key, (step, init) in arms.items():
        shape, remat, attention, arm = key
        ratio = np.median(seconds[key]) / np.median(seconds[shape, remat, attention, "qat"])
        table.add_row(
            shape,
            str(remat),
            attention,
            arm,
            f"{np.median(seconds[key]) * 1e3:.2f}",
            f"{ratio:.2f}x",
            f"{step.memory_analysis().temp_size_in_bytes / 1e6:.0f}",
            str(repeats(step, init, batches[shape])) if arm == "latent10" else "",
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
