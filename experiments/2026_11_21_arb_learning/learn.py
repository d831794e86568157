"""Does the ARB model learn? Its validation loss beside the byte model's after the same bytes, and without each part.

    python learn.py --corpus pycode.txt --arms byte-25m arb-25m arb-25m:no-graph --steps 600 --batch 32 --context 256

An arm is a preset and switches: no-vq, no-graph, no-moe, no-attention, no-kg, memory, or any field of the model's
configuration, as in max_moe_iters=1 or shield=balance+graph. All arms see the same windows in the same order and the
same rule. The ARB model predicts the bytes of a window from the fourth on, and
those are what is validated for every arm.
"""

import argparse
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from arbs_jax.config import RunConfig, TrainConfig
from arbs_jax.data import ValidationBatch, open_corpus, split, train_windows, validation_windows
from arbs_jax.layers import COLLECTION, MEMORY
from arbs_jax.models.presets import preset
from arbs_jax.rules import RuleConfig, default_group_size
from arbs_jax.training.program import Program
from arbs_jax.training.step import TrainState

SWITCHES: dict[str, dict[str, Any]] = {
    "no-vq": {"vq": False, "graph": False},
    "no-graph": {"graph": False},
    "no-moe": {"moe": False},
    "no-attention": {"attention": False},
    "no-kg": {"kg_rows": 0},
    "memory": {"memgram": True},
}


def program_of(arm: str, args: argparse.Namespace) -> Program:
    """The program of an arm."""
    name, *switches = arm.split(":")
    changes: dict[str, Any] = {}
    for switch in switches:
        field, _, value = switch.partition("=")
        changes |= {field: parsed(value)} if value else SWITCHES[switch]
    return Program(
        RunConfig(
            preset=name,
            model=preset(name, dtype=args.dtype, **changes),
            group_size=default_group_size(args.rule),
            rule=RuleConfig(name=args.rule),
            train=TrainConfig(steps=args.steps, batch=args.batch, context=args.context, seed=args.seed),
        )
    )


def parsed(value: str) -> int | float | tuple[str, ...]:
    """What a switch gives its field: a number, or names joined by +."""
    if not value[0].isdigit():
        return tuple(value.split("+"))
    return float(value) if "." in value else int(value)


def validator(program: Program, windows: list[ValidationBatch]) -> Callable[[TrainState], float]:
    """Gives mean nats of the bytes from the fourth on of every valid window."""

    @jax.jit
    def nats(state: TrainState, tokens: jax.Array, valid: jax.Array) -> jax.Array:
        losses = program.family.nats({COLLECTION: state.ternary, MEMORY: state.memory}, tokens)
        return jnp.sum(jnp.where(valid[:, None], losses[:, 3 - tokens.shape[1] :], 0.0))

    def mean(state: TrainState) -> float:
        total = sum(float(nats(state, batch.windows, batch.valid)) for batch in windows)
        return total / sum(int(batch.valid.sum()) * (batch.windows.shape[1] - 3) for batch in windows)

    return mean


def main() -> None:
    """Parses flags, trains the arms one after another, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--arms", nargs="+", default=["byte-25m", "arb-25m"])
    parser.add_argument("--rule", default="latent10")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=200)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    training, held = split(open_corpus(str(args.corpus)), 0.05, minimum=args.context + 1)
    windows = validation_windows(held, context=args.context, batch=args.batch, max_windows=256)
    programs = {arm: program_of(arm, args) for arm in args.arms}
    with ThreadPoolExecutor() as pool:
        steps = dict(zip(programs, pool.map(lambda program: program.compile_step(), programs.values()), strict=True))
    table = Table(title=f"{args.corpus.stem}, {args.rule}, {args.steps} steps of {args.batch} x {args.context}, "
                  f"{jax.devices()[0].device_kind}", title_justify="left")  # fmt: skip
    for column in ("arm", "weights", "bits/weight", "ms/step", "temporaries MB", "validation", "terms"):
        table.add_column(column)
    for arm, program in programs.items():
        batches = train_windows(training, context=args.context, batch=args.batch, accum=1, seed=args.seed, prefetch=0)
        state, seconds, losses = program.init_state(), [], {}
        metrics: dict[str, Any] = {}
        validate = validator(program, windows)
        for number in range(1, args.steps + 1):
            began = time.perf_counter()
            state, metrics = steps[arm](state, next(batches))
            jax.block_until_ready(metrics)
            if number > 5:
                seconds.append(time.perf_counter() - began)
            if number % args.every == 0 or number == args.steps:
                losses[number] = validate(state)
                print(f"{arm} step {number}: {losses[number]:.4f}", flush=True)
        terms = {name: round(float(value), 4) for name, value in metrics.items() if name.startswith("loss/")}
        row = {
            "arm": arm,
            "weights": program.account.logical_ternary_weights,
            "bits_per_weight": program.account.bits_per_weight,
            "seconds": float(np.median(seconds)),
            "temporary_bytes": steps[arm].memory_analysis().temp_size_in_bytes,
            "val_loss": losses,
            "terms": terms,
            **{key: getattr(args, key) for key in ("rule", "steps", "batch", "context", "dtype", "seed")},
            "corpus": args.corpus.stem,
            "device": jax.devices()[0].device_kind,
        }
        table.add_row(
            arm,
            f"{row['weights']:,}",
            f"{row['bits_per_weight']:.1f}",
            f"{row['seconds'] * 1e3:.1f}",
            f"{row['temporary_bytes'] / 1e6:.0f}",
            f"{losses[args.steps]:.4f}",
            " ".join(f"{name.removeprefix('loss/')} {value}" for name, value in terms.items()),
        )
        if args.out:
            with args.out.open("a") as file:
                file.write(f"{json.dumps(row)}\n")
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
