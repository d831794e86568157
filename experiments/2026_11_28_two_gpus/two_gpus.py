"""Two GPUs that share the micro-batches of a step: are their states the same, and how much faster are they?

    python two_gpus.py --preset byte-50m --batch 64 --context 256
    python two_gpus.py --preset byte-1b --batch 16 --context 1024 --products dtype float8

Three arms by turns: one GPU with one micro-batch a step, one with two, two with one each. Times are medians of steps on
fresh random bytes. After as many steps every leaf is compared between the two GPUs, bit for bit, and with that of the
one GPU that took the same two micro-batches.
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent / "2026_11_20_rules"))
from harness import Setting

from arbs_jax.training.program import Program

ARMS = {"1 GPU, 1 micro-batch": (1, 1), "1 GPU, 2 micro-batches": (1, 2), "2 GPUs, 1 micro-batch each": (2, 2)}
SKIPPED = 3
"""Steps before the clock counts."""


def differing(one: Any, other: Any) -> int:
    """Bytes that differ between two trees of arrays."""

    def codes(leaf: jax.Array) -> np.ndarray:
        return np.frombuffer(np.asarray(leaf).tobytes(), np.uint8)

    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return sum(int(np.count_nonzero(codes(a) != codes(b))) for a, b in pairs)


def replicas(state: Any) -> list[Any]:
    """The state as each of its devices holds it."""
    count = len(jax.tree.leaves(state)[0].addressable_shards)
    return [jax.tree.map(lambda leaf, at=at: leaf.addressable_shards[at].data, state) for at in range(count)]


def main() -> None:
    """Parses flags, runs, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="byte-50m")
    parser.add_argument("--batch", type=int, default=64, help="of a micro-batch")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--rules", nargs="+", default=["latent10"])
    parser.add_argument("--products", nargs="+", default=["dtype"])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    setting = Setting(args.preset, 1000, args.batch, args.context, dtype=args.dtype, remat=True)
    rows = []
    for rule in args.rules:
        for products in args.products:
            rows += compare(setting, rule, products, args.steps)
    show(args, rows)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("a") as file:
            file.writelines(f"{json.dumps(row)}\n" for row in rows)


def compare(setting: Setting, rule: str, products: str, steps: int) -> list[dict[str, Any]]:
    """A row for every arm."""
    config = setting.config(rule)
    programs = {}
    for name, (devices, accum) in ARMS.items():
        train = replace(config.train, devices=devices, accum=accum, products=products)
        programs[name] = Program(replace(config, train=train))
    step: dict[str, Any] = {}
    for name, program in programs.items():
        accum = program.config.train.accum
        tokens = jax.ShapeDtypeStruct((accum, setting.batch, setting.context + 1), jnp.uint8)
        step[name] = program.step.lower(program.abstract_state, tokens).compile()
    states = {name: program.init_state() for name, program in programs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ARMS}
    loss: dict[str, float] = {}
    rng = np.random.default_rng(0)
    for index in range(steps + SKIPPED):
        drawn = rng.integers(0, 256, (2, setting.batch, setting.context + 1)).astype(np.uint8)
        for name, (_, accum) in ARMS.items():
            began = time.perf_counter()
            states[name], metrics = jax.block_until_ready(step[name](states[name], drawn[:accum]))
            if index >= SKIPPED:
                seconds[name].append(time.perf_counter() - began)
            loss[name] = float(metrics["loss"])
    alone, _, both = ARMS
    first, second = replicas(states[both])
    same = {both: differing(first, second)}
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(first))
    apart = differing(replicas(states["1 GPU, 2 micro-batches"])[0], first)
    per_byte = {name: float(np.median(times)) / ARMS[name][1] for name, times in seconds.items()}
    return [
        {
            "arm": name,
            "rule": rule,
            "products": products,
            "preset": setting.preset,
            "batch": setting.batch,
            "context": setting.context,
            "seconds": float(np.median(seconds[name])),
            "bytes_per_second": setting.batch * setting.context / per_byte[name],
            "speedup": per_byte[alone] / per_byte[name],
            "loss": loss[name],
            "state_bytes": whole,
            "bytes_that_differ_between_gpus": same.get(name),
            "bytes_that_differ_from_one_gpu": apart if name == both else None,
            "temporary_bytes": step[name].memory_analysis().temp_size_in_bytes,
            "device": jax.devices()[0].device_kind,
        }
        for name in ARMS
    ]


def show(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """The table."""
    title = f"{args.preset}, {args.batch} x {args.context} bytes a micro-batch, {jax.devices()[0].device_kind}"
    table = Table(title=title, title_justify="left")
    for name in ("arm", "rule", "products", "ms/step", "speed-up", "loss", "differ between GPUs", "from one GPU", "MB"):
        table.add_column(name, justify="left" if name == "arm" else "right")
    for row in rows:
        between, apart = row["bytes_that_differ_between_gpus"], row["bytes_that_differ_from_one_gpu"]
        table.add_row(
            row["arm"],
            row["rule"],
            row["products"],
            f"{row['seconds'] * 1e3:.2f}",
            f"{row['speedup']:.2f}x",
            f"{row['loss']:.4f}",
            "" if between is None else str(between),
            "" if apart is None else f"{apart / row['state_bytes']:.2%}",
            f"{(row['state_bytes'] + row['temporary_bytes']) / 1e6:,.0f}",
        )
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
