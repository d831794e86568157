"""Seconds and memory of one training step: each rule beside AdamW on float weights, same model.

    python experiments/2026_11_20_rules/step_cost.py --preset byte-50m --batch 64 --context 256

Times are medians over steps on fresh random bytes, the arms interleaved; memory is the compiler's own account of the
step (state and batch, temporaries) with the state updated in place.
"""

import argparse
import json
import time
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


def arms(
    setting: Setting, rules: list[str], layers: list[int], baselines: list[str]
) -> dict[tuple[str, int], tuple[Any, Any]]:
    """{(name, layers at once): (compiled step, fresh state)}; a step is `(state, tokens) -> (state, anything)`."""
    tokens = jax.ShapeDtypeStruct((1, setting.batch, setting.context + 1), jnp.uint8)
    made: dict[tuple[str, int], tuple[Any, Any]] = {}
    for rule in rules:
        for together in layers:
            config = setting.config(rule)
            program = Program(replace(config, train=replace(config.train, layers_at_once=together)))
            made[rule, together] = (program.step.lower(program.abstract_state, tokens).compile(), program.init_state())
    program = Program(setting.config("latent10"))
    for name in baselines:
        arm, depth = BASELINES[name], program.config.model.layers
        state = jax.jit(partial(arm.init, program.specs, depth, jnp.uint32(0), jnp.float32(2e-3)))()
        step = jax.jit(arm.step(program.model, setting.steps), donate_argnums=0)
        made[name, 0] = (step.lower(state, tokens).compile(), state)
    return made


def main() -> None:
    """Parses flags, times, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="byte-50m")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--remat", type=int, default=0)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rules", nargs="+", default=["latent10", "latent6", "latent4", "latent18", "integral"])
    parser.add_argument("--baselines", nargs="+", default=["qat"], help="the first is the one compared with")
    parser.add_argument("--layers-at-once", nargs="+", type=int, default=[1])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    setting = Setting(args.preset, 1000, args.batch, args.context, dtype=args.dtype, remat=bool(args.remat))
    made = arms(setting, args.rules, args.layers_at_once, args.baselines)
    rng = np.random.default_rng(0)
    seconds: dict[tuple[str, int], list[float]] = {name: [] for name in made}
    states = {name: state for name, (_, state) in made.items()}
    for index in range(args.steps + 3):
        tokens = rng.integers(0, 256, (1, setting.batch, setting.context + 1)).astype(np.uint8)
        for name, (step, _) in made.items():
            began = time.perf_counter()
            states[name], _ = jax.block_until_ready(step(states[name], tokens))
            if index >= 3:
                seconds[name].append(time.perf_counter() - began)
    rows = []
    for name, (step, _) in made.items():
        memory = step.memory_analysis()
        state = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(states[name]))
        rows.append(
            {
                "rule": name[0],
                "layers_at_once": name[1],
                "seconds": float(np.median(seconds[name])),
                "baseline": args.baselines[0],
                "ratio": float(np.median(seconds[name]) / np.median(seconds[args.baselines[0], 0])),
                "bytes_per_second": float(setting.batch * setting.context / np.median(seconds[name])),
                "state_bytes": state,
                "temporary_bytes": memory.temp_size_in_bytes,
                **{key: getattr(args, key) for key in ("preset", "batch", "context", "dtype", "remat")},
                "device": jax.devices()[0].device_kind,
            }
        )
    table = Table(title=f"{args.preset}, batch {args.batch} x {args.context}, remat {args.remat}", title_justify="left")
    for name in (
        "rule",
        "layers at once",
        "ms/step",
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
            f"{row['seconds'] * 1e3:.2f}",
            f"{row['ratio']:.2f}x",
            f"{row['state_bytes'] / 1e6:.1f}",
            f"{row['temporary_bytes'] / 1e6:.1f}",
            f"{total / 1e6:.1f}",
        )
    Console(width=110).print(table)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("a") as file:
            file.writelines(f"{json.dumps(row)}\n" for row in rows)


if __name__ == "__main__":
    main()
