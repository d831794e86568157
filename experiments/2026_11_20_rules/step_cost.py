"""Seconds and memory of one training step: each rule beside AdamW on float weights, same model.

    python experiments/2026_11_20_rules/step_cost.py --preset byte-50m --batch 64 --context 256

Arms take turns of `--steps` steps on fresh random bytes, with one step in flight, as the training loop has it; and of
as many each of which is waited for, which adds what a host takes to start one. Times are medians over turns, ratios are
of the former. Memory is the compiler's own account of the step (state and batch, temporaries) with the state updated in
place.
"""

import argparse
import itertools
import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from baselines import ADAMW, ADAMW_BF16, QAT
from harness import Setting
from rich.console import Console
from rich.table import Table

from arbs_jax.training.program import Program

BASELINES = {arm.name: arm for arm in (QAT, ADAMW, ADAMW_BF16)}


Arm = tuple[str, int, bool, str, str]
"""Name, layers at once (0 for baselines), remat, implementation of the operators and operands of products (both "" for
baselines)."""


def arms(
    setting: Setting,
    rules: list[str],
    layers: list[int],
    kernels: list[str],
    products: list[str],
    baselines: list[str],
) -> dict[Arm, tuple[Any, Any]]:
    """(a lowered step `(state, tokens) -> (state, anything)`, a function that makes a fresh state) of each."""
    tokens = jax.ShapeDtypeStruct((1, setting.batch, setting.context + 1), jnp.uint8)
    made: dict[Arm, tuple[Any, Any]] = {}
    for rule, together, kernel, operands in itertools.product(rules, layers, kernels, products):
        config = setting.config(rule)
        train = replace(config.train, layers_at_once=together, kernel=kernel, products=operands)
        program = Program(replace(config, train=train))
        lowered = program.step.lower(program.abstract_state, tokens)
        made[rule, together, setting.remat, kernel, operands] = lowered, program.init_state
    program = Program(setting.config("latent10"))
    for name in baselines:
        arm, depth = BASELINES[name], program.config.model.layers
        init = jax.jit(partial(arm.init, program.specs, depth, jnp.uint32(0), jnp.float32(2e-3)))
        step = jax.jit(arm.step(program.model, setting.steps), donate_argnums=0)
        made[name, 0, setting.remat, "", ""] = (step.lower(jax.eval_shape(init), tokens), init)
    return made


def compiled(made: dict[Arm, tuple[Any, Any]]) -> dict[Arm, Any]:
    """All at once: the compiler uses one core for most of its time."""
    with ThreadPoolExecutor() as pool:
        waiting = {arm: pool.submit(lowered.compile) for arm, (lowered, _) in made.items()}
        return {arm: future.result() for arm, future in waiting.items()}


def random_batches(steps: int, batch: int, context: int) -> list[np.ndarray]:
    """Of bytes with no structure."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (1, batch, context + 1)).astype(np.uint8) for _ in range(steps)]


def timed(step: Any, state: Any, batches: list[np.ndarray], ahead: bool) -> tuple[Any, float]:
    """(the state after a step on each batch, seconds a step), the host a step `ahead` of the device or waiting."""
    pending: Any = None
    began = time.perf_counter()
    for tokens in batches:
        state, looks = step(state, tokens)
        jax.block_until_ready(pending if ahead else (state, looks))
        pending = looks
    jax.block_until_ready((state, pending))
    return state, (time.perf_counter() - began) / len(batches)


def by_turns(
    steps: dict[Any, Any], states: dict[Any, Any], batches: list[np.ndarray], turns: int, ahead: bool
) -> dict[Any, float]:
    """Seconds a step of every arm, medians over turns of `timed`; the states move on."""
    seconds: dict[Any, list[float]] = {arm: [] for arm in steps}
    for turn in range(-1, turns):  # The first is for warming up.
        for arm, step in steps.items():
            states[arm], took = timed(step, states[arm], batches, ahead)
            if turn >= 0:
                seconds[arm].append(took)
    return {arm: float(np.median(times)) for arm, times in seconds.items()}


def main() -> None:
    """Parses flags, times, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="byte-50m")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--remat", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--rules", nargs="+", default=["latent10", "latent6", "latent4", "latent18", "integral"])
    parser.add_argument("--baselines", nargs="+", default=["qat"], help="the first is the one compared with")
    parser.add_argument("--kernels", nargs="+", default=["auto"])
    parser.add_argument("--products", nargs="+", default=["dtype"])
    parser.add_argument("--layers-at-once", nargs="+", type=int, default=[1])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    made: dict[Arm, tuple[Any, Any]] = {}
    for remat in args.remat:
        setting = Setting(args.preset, 1000, args.batch, args.context, dtype=args.dtype, remat=bool(remat))
        made |= arms(setting, args.rules, args.layers_at_once, args.kernels, args.products, args.baselines)
    steps = compiled(made)
    states = {arm: init() for arm, (_, init) in made.items()}
    batches = random_batches(args.steps, args.batch, args.context)
    median, waited = (by_turns(steps, states, batches, args.turns, ahead) for ahead in (True, False))
    rows = []
    for arm, step in steps.items():
        name, together, remat, kernel, operands = arm
        state = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(states[arm]))
        rows.append(
            {
                "rule": name,
                "layers_at_once": together,
                "kernel": kernel,
                "products": operands,
                "seconds": median[arm],
                "seconds_waited_for": waited[arm],
                "baseline": args.baselines[0],
                "ratio": median[arm] / median[args.baselines[0], 0, remat, "", ""],
                "bytes_per_second": args.batch * args.context / median[arm],
                "state_bytes": state,
                "temporary_bytes": step.memory_analysis().temp_size_in_bytes,
                **{key: getattr(args, key) for key in ("preset", "batch", "context", "dtype")},
                "remat": int(remat),
                "device": jax.devices()[0].device_kind,
            }
        )
    table = Table(title=f"{args.preset}, batch {args.batch} x {args.context}", title_justify="left")
    for name in (
        "rule",
        "layers at once",
        "kernel",
        "products",
        "remat",
        "ms/step",
        "waited for",
        f"against {args.baselines[0]}",
        "state MB",
        "temporaries MB",
        "sum MB",
    ):
        table.add_column(name, justify="left" if name == "rule" else "right")
    for row in rows:
        total = row["state_bytes"] + row["temporary_bytes"]
        table.add_row(
            row["rule"],
            str(row["layers_at_once"] or ""),
            row["kernel"],
            row["products"],
            str(row["remat"]),
            f"{row['seconds'] * 1e3:.2f}",
            f"{row['seconds_waited_for'] * 1e3:.2f}",
            f"{row['ratio']:.2f}x",
            f"{row['state_bytes'] / 1e6:.1f}",
            f"{row['temporary_bytes'] / 1e6:.1f}",
            f"{total / 1e6:.1f}",
        )
    Console(width=130).print(table)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("a") as file:
            file.writelines(f"{json.dumps(row)}\n" for row in rows)


if __name__ == "__main__":
    main()
