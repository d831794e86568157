"""Where the device time of a training step goes: a trace of kernels, named by the Python function that asked for them.

    python trace_of_step.py --arms latent10:12 qat --preset byte-50m

An arm is a rule, how many layers move at once and the operands of products (`latent10:12:float8`), or `qat`.
Kernels are matched to the compiled program by name, and
the program's metadata gives the innermost function of this library. "once" are kernels outside the loops over layers.
"""

import argparse
import collections
import gzip
import json
import re
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from kernels_of_step import computations, operations
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent / "2026_11_20_rules"))
from baselines import QAT
from harness import Setting

from arbs_jax.training.program import Program

STEPS = 4


def built(arm: str, setting: Setting) -> tuple[Any, Any]:
    """(compiled step, fresh state)."""
    rule, together, operands = (*arm.split(":"), *("1", "dtype")[arm.count(":") :])
    tokens = jax.ShapeDtypeStruct((1, setting.batch, setting.context + 1), jnp.uint8)
    config = setting.config("latent10" if rule == "qat" else rule)
    train = replace(config.train, layers_at_once=int(together), products=operands)
    program = Program(replace(config, train=train))
    if rule != "qat":
        return program.step.lower(program.abstract_state, tokens).compile(), program.init_state()
    state = jax.jit(lambda: QAT.init(program.specs, program.config.model.layers, jnp.uint32(0), jnp.float32(2e-3)))()
    step = jax.jit(QAT.step(program.model, setting.steps), donate_argnums=0)
    return step.lower(state, tokens).compile(), state


def table_of(text: str, name: str) -> dict[int, str]:
    """A numbered table at the head of a compiled program's text."""
    lines = text.split(f"\n{name}\n", 1)[1].split("\n\n", 1)[0].splitlines()
    return {int(line.split(" ", 1)[0]): line.split(" ", 1)[1] for line in lines}


def sources(text: str) -> dict[int, str]:
    """Stack frame to the innermost function of this library (or of the experiment) above it."""
    files, functions = table_of(text, "FileNames"), table_of(text, "FunctionNames")
    locations, frames = table_of(text, "FileLocations"), table_of(text, "StackFrames")

    def number(text: str, key: str) -> int:
        found = re.search(rf"{key}=(\d+)", text)
        return int(found.group(1)) if found else 0

    def named(frame: int) -> str:
        while frame in frames:
            location = locations[number(frames[frame], "file_location_id")]
            file = files[number(location, "file_name_id")].strip('"')
            if "arbs_" in file or "baselines" in file:
                where = "/".join(Path(file).parts[-2:])
                return f"{where}:{functions[number(location, 'function_name_id')]}".replace('"', "")
            parent = number(frames[frame], "parent_frame_id")
            if parent == frame:
                break
            frame = parent
        return "?"

    return {frame: named(frame) for frame in frames}


def origins(text: str) -> dict[str, tuple[str, int]]:
    """Instruction name to (source, times it runs in a step)."""
    by_name, entry = computations(text)
    named = sources(text)
    found: dict[str, tuple[str, int]] = {}

    def source(lines: list[str]) -> str:
        counted = collections.Counter(
            named.get(int(frame), "?") for line in lines for frame in re.findall(r"stack_frame_id=(\d+)", line)
        )
        counted.pop("?", None)
        return counted.most_common(1)[0][0] if counted else "?"

    def walk(name: str, times: int) -> None:
        for operation, line in operations(by_name[name]):
            label = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line)
            called = re.findall(r"(?:calls|to_apply|body)=%?([\w.\-]+)", line)
            if operation == "while":
                trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
                walk(called[-1], times * int(trips.group(1) if trips else 1))
            elif operation == "call":
                walk(called[0], times)
            elif label:
                inner = [inside for computation in called for inside in by_name.get(computation, [])]
                own = source([line])
                found[re.sub(r"\W", "_", label.group(1))] = (own if own != "?" else source(inner), times)

    walk(entry, 1)
    return found


def trace(step: Any, state: Any, setting: Setting) -> tuple[collections.Counter[str], collections.Counter[str], float]:
    """(nanoseconds by kernel, launches by kernel, nanoseconds from first to last) over `STEPS` steps."""
    tokens = np.random.default_rng(0).integers(0, 256, (1, setting.batch, setting.context + 1)).astype(np.uint8)
    for _ in range(3):
        state, _ = step(state, tokens)
    jax.block_until_ready(state)
    times: collections.Counter[str] = collections.Counter()
    launches: collections.Counter[str] = collections.Counter()
    first, last = float("inf"), 0.0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(STEPS):
                state, _ = step(state, tokens)
            jax.block_until_ready(state)
        (file,) = Path(folder).rglob("*.xplane.pb")
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            for line in plane.lines if "GPU" in plane.name else ():
                for event in line.events if "Stream" in line.name else ():
                    name = re.sub(r"\W", "_", event.name)
                    times[name] += event.duration_ns
                    launches[name] += 1
                    first, last = min(first, event.start_ns), max(last, event.start_ns + event.duration_ns)
    return times, launches, last - first


def main() -> None:
    """Parses flags, traces, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arms", nargs="+", default=["latent10:12", "qat"])
    parser.add_argument("--preset", default="byte-50m")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--remat", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for every kernel's time (JSON) and the compiled program")
    args = parser.parse_args()
    setting = Setting(args.preset, 1000, args.batch, args.context, dtype="bfloat16", remat=bool(args.remat))
    for arm in args.arms:
        step, state = built(arm, setting)
        times, launches, span = trace(step, state, setting)
        text = step.as_text()
        origin = origins(text)
        totals: dict[tuple[str, str], list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
        for name, spent in times.items():
            source, runs = origin.get(name, (f"? {name[:40]}", 0))
            entry = totals["once" if runs <= 1 else "per layer", source]
            entry[0] += spent / STEPS
            entry[1] += launches[name] / STEPS
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            each = [(name, spent / STEPS / 1e6, launches[name] / STEPS, *origin.get(name, ("?", 0)))
                    for name, spent in times.most_common()]  # fmt: skip
            stem = arm.replace(":", "_")
            (args.out / f"{stem}.json").write_text("\n".join(map(json.dumps, each)))
            (args.out / f"{stem}.hlo.gz").write_bytes(gzip.compress(text.encode()))
        table = Table(title=f"{arm}, {args.preset}, remat {args.remat}: {span / STEPS / 1e6:.2f} ms/step, "
                      f"{sum(launches.values()) / STEPS:.0f} kernels", title_justify="left")  # fmt: skip
        for column in ("where", "source", "ms", "kernels"):
            table.add_column(column, justify="right" if column in ("ms", "kernels") else "left")
        for where in ("once", "per layer"):
            rows = sorted(((spent, count, source) for (w, source), (spent, count) in totals.items() if w == where))
            table.add_row(
                where, "all", f"{sum(row[0] for row in rows) / 1e6:.2f}", f"{sum(row[1] for row in rows):.0f}"
            )
            for spent, count, source in rows[:-24:-1]:
                table.add_row("", source, f"{spent / 1e6:.3f}", f"{count:.0f}")
        Console(width=110).print(table)


if __name__ == "__main__":
    main()
