"""`arbs bench`: the packed operators against dense products and against what the machine can do at best."""

import datetime
import json
import re
import signal
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import tyro
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from arbs_jax.cli.display import console, errors
from arbs_jax.cli.options import choice, parsed
from arbs_jax.compilation import enable_cache
from arbs_jax.errors import ConfigError
from arbs_jax.signals import handled
from arbs_kernels import timing, tuning
from arbs_kernels.backends import compute_capability, device_kind
from arbs_kernels.benchmarks import BENCHMARKS, Benchmark, agree, make
from arbs_kernels.cases import Case
from arbs_kernels.selection import UnsupportedError, select
from arbs_kernels.shapes import GROUP_SIZES

_fresh = jax.jit(make, static_argnums=(0, 1, 2))
_TUNED_ROWS = (1, 16, 64, 256, 1024, 4096, 16384)
_TUNED_SIDES = (2048, 4096, 8192)


def _case(text: str) -> Case:
    sizes = re.fullmatch(r"(\d+)x(\d+)x(\d+)g(\d+)(?:e(\d+))?", text)
    if sizes is None:
        raise ValueError(text)
    rows, out_features, in_features, group_size, experts = (int(size) for size in sizes.groups("1"))
    if min(rows, out_features, in_features, experts) < 1 or experts > rows or group_size not in GROUP_SIZES:
        raise ValueError(text)
    return Case(rows, out_features, in_features, group_size, "asked for", experts)


_SHAPE = parsed(
    "--shapes",
    _case,
    "MxNxKgG",
    f"MxNxKgG as 64x4096x4096g32, all at least 1, G one of {', '.join(map(str, GROUP_SIZES))}; "
    "with eX for X experts that share the M rows, as 8192x512x2048g32e64",
)


@dataclass(frozen=True)
class Bench:
    """Time the packed operators on this machine, each against the dense operation that it stands in for and against the
    roofline: the time that its bytes and operations take at the bandwidth and matrix rate measured in the same run.
    """

    shapes: Annotated[
        tuple[Annotated[Case, _SHAPE], ...],
        tyro.conf.arg(
            help="Rows of activations, out_features, in_features, group_size; eX: experts of grouped products.",
            help_behavior_hint="(default: large layers on a GPU, small ones on a CPU)",
        ),
    ] = ()
    ops: Annotated[
        tuple[Annotated[str, choice("--ops", BENCHMARKS)], ...],
        tyro.conf.arg(help=f"Of {', '.join(BENCHMARKS)}.", help_behavior_hint="(default: all)"),
    ] = ()
    implementations: Annotated[
        tuple[str, ...],
        tyro.conf.arg(
            help="Implementations by name.", help_behavior_hint="(default: all that run here)", metavar="NAME"
        ),
    ] = ()
    dtype: Annotated[str, choice("--dtype", ("float32", "bfloat16"))] = "bfloat16"
    """Activations, and the weight of the dense operation."""
    json: Annotated[
        Path | None,
        tyro.conf.arg(help="Write the rows to this file, too.", help_behavior_hint="(default: none)", metavar="FILE"),
    ] = None
    tune: bool = False
    """Try all tile sizes as well, and write the fastest to the table that picks implementations on this device."""


@dataclass(frozen=True)
class _Arm:
    """One thing to time."""

    operator: str
    case: Case
    implementation: str | None
    """None: the dense counterpart."""
    tiles: Mapping[str, Any] | None = None

    def __str__(self) -> str:
        tiles = "".join(f" {name}={size}" for name, size in (self.tiles or {}).items())
        return f"{self.operator} {self.case} {self.implementation or 'dense'}{tiles}"


@dataclass(frozen=True)
class _Measured:
    """Seconds of what ran, and why the rest did not."""

    seconds: dict[tuple[str, str, str | None, str], float]
    skipped: list[str]
    failed: list[str]


def run(args: Bench) -> int:
    """Carries out `arbs bench`; 1 where an implementation failed."""
    enable_cache()
    dtype = jnp.dtype(args.dtype)
    operators = list(dict.fromkeys(args.ops)) or list(BENCHMARKS)
    implementations = {name: _implementations(name, args.implementations, operators) for name in operators}
    arms = list(_arms(args, implementations, dtype))
    _check_writable(args)
    measured = _Measured({}, [], [])
    with _progress(len(arms) + 2) as progress:
        task = progress.add_task("probing the machine", total=len(arms) + 2)
        bandwidth = timing.copy_bandwidth()
        progress.advance(task)
        rate = timing.matrix_rate(dtype, 8192 if compute_capability() > 0 else 512)
        progress.advance(task)
        try:
            for arm in arms:
                progress.update(task, description=str(arm))
                _measure(arm, dtype, measured, check=args.tune)
                progress.advance(task)
        except BaseException:
            # Stopped halfway, minutes of measurements are still worth having; tables are only tuned by whole runs.
            # `timeout` sends its signal to the process and once more to its group, and people press Ctrl-C twice.
            with handled(signal.SIG_IGN, signal.SIGINT):
                _report(replace(args, tune=False), operators, arms, dtype, measured, bandwidth, rate)
            raise
    _report(args, operators, arms, dtype, measured, bandwidth, rate)
    return 1 if measured.failed else 0


def _report(
    args: Bench,
    operators: Sequence[str],
    arms: Sequence[_Arm],
    dtype: Any,
    measured: _Measured,
    bandwidth: float,
    rate: float,
) -> None:
    """Prints, and writes what was asked for."""
    rate = max([rate, *_dense_rates(arms, measured)])
    rows = [row for arm in arms if (row := _row(arm, dtype, measured, bandwidth, rate)) is not None]
    facts = {
        "device": device_kind(),
        "jax": jax.__version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "dtype": dtype.name,
        "copy_bytes_per_second": bandwidth,
        "matrix_operations_per_second": rate,
    }
    console.print(
        f"{device_kind()}, {dtype.name}: copies {bandwidth / 1e9:,.0f} GB/s, products {rate / 1e12:,.3g} TFLOP/s"
    )
    for name in operators:
        if of_operator := [row for row in rows if row["op"] == name]:
            console.print(_table(name, of_operator))
    for line in measured.skipped:
        console.print(f"left out: {line}")
    for line in measured.failed:
        errors.print(f"failed: {line}", style="red")
    if args.json is not None:
        content = {**facts, "skipped": measured.skipped, "failed": measured.failed, "rows": rows}
        args.json.write_text(json.dumps(content, indent=1) + "\n")
    if args.tune:
        _record(rows, dtype.name)


def _implementations(operator: str, asked: Sequence[str], operators: Sequence[str]) -> list[str]:
    """Implementations of an operator to time; one that some other operator has is passed over.

    Raises:
        ConfigError: a name that no operator has, or one that cannot run here.
    """
    table = BENCHMARKS[operator].implementations
    if not asked:
        return BENCHMARKS[operator].implementations_here()
    everywhere = {name for other in operators for name in BENCHMARKS[other].implementations}
    found = []
    for name in dict.fromkeys(asked):
        if name not in everywhere:
            known = ", ".join(sorted(everywhere))
            raise ConfigError(f"--implementations must be among {known} for these operators, got {name!r}")
        if name in table:
            try:
                select(operator, table, name)
            except UnsupportedError as error:
                raise ConfigError(f"--implementations {name}: {error}") from None
            found.append(name)
    return found


def _default_cases(benchmark: Benchmark, tune: bool) -> list[Case]:
    if tune and not benchmark.by_expert:
        return [Case(rows, side, side, 32, "tuned") for side in _TUNED_SIDES for rows in _TUNED_ROWS]
    low, high = (2**26, 2**62) if compute_capability() > 0 else (2**21, 2**26)
    return [case for case in benchmark.cases() if low < case.products <= high]


def _arms(args: Bench, implementations: Mapping[str, Sequence[str]], dtype: Any) -> Iterable[_Arm]:
    """What to time, each shape's dense arm first.

    Raises:
        ConfigError: a shape that was asked for does not fit into memory.
    """
    effort = timing.default_effort()
    for name, found in implementations.items():
        if not found:
            continue
        benchmark = BENCHMARKS[name]
        for case in dict.fromkeys(
            benchmark.shape(case) for case in args.shapes or _default_cases(benchmark, args.tune)
        ):
            inputs, output = benchmark.abstract(case, dtype)
            if not timing.rotation(timing.nbytes(inputs), timing.nbytes(output), effort):
                if args.shapes:
                    needed, budget = timing.nbytes((inputs, output)) / 1e9, timing.memory_budget() / 1e9
                    raise ConfigError(
                        f"--shapes {case}: {name} takes {needed:.1f} GB and its queue several times that; "
                        f"a benchmark may take {budget:.1f} GB here"
                    )
                continue
            yield _Arm(name, case, None)
            for implementation in found:
                tiles = benchmark.candidates(implementation) if args.tune else [None]
                yield from (_Arm(name, case, implementation, one) for one in tiles)


def _key(arm: _Arm) -> tuple[str, str, str | None, str]:
    return arm.operator, str(arm.case), arm.implementation, json.dumps(dict(arm.tiles or {}), sort_keys=True)


def _measure(arm: _Arm, dtype: Any, measured: _Measured, *, check: bool) -> None:
    """Times one arm; an implementation that refuses or breaks is noted, and the benchmark goes on."""
    benchmark = BENCHMARKS[arm.operator]
    dense = arm.implementation is None
    names = benchmark.dense_inputs if dense else benchmark.inputs
    call = benchmark.dense if dense else benchmark.call(arm.case, dtype, str(arm.implementation), arm.tiles)
    effort = timing.default_effort()
    try:
        shapes = jax.eval_shape(lambda: make(names, arm.case, dtype, 0))
        output = jax.eval_shape(call, *shapes)
        count = timing.rotation(timing.nbytes(shapes), timing.nbytes(output), effort)
        if count == 0:
            measured.skipped.append(f"{arm}: {timing.nbytes((shapes, output)) / 1e9:.1f} GB do not fit")
            return
        sets = [_fresh(names, arm.case, dtype, seed) for seed in range(count)]
        if check and not dense and not _is_right(benchmark, arm, dtype, call, sets[0]):
            measured.failed.append(f"{arm}: its result is not that of 'xla'")
            return
        measured.seconds[_key(arm)] = timing.seconds_per_call(call, sets, effort)
    except UnsupportedError as error:
        measured.skipped.append(f"{arm}: {error}")
    except Exception as error:  # a kernel's compiler may raise anything; the other arms are still wanted
        measured.failed.append(f"{arm}: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}")


def _is_right(benchmark: Benchmark, arm: _Arm, dtype: Any, call: Any, inputs: tuple[jax.Array, ...]) -> bool:
    if arm.implementation == "xla":
        return True
    expected = jax.jit(benchmark.call(arm.case, dtype, "xla"))(*inputs)
    return agree(arm.operator, jax.jit(call)(*inputs), expected)


def _dense_rates(arms: Sequence[_Arm], measured: _Measured) -> list[float]:
    """Operations a second of the dense products: a machine's best may be at their shapes and not at the probe's."""
    return [
        BENCHMARKS[arm.operator].operations(arm.case) / measured.seconds[_key(arm)]
        for arm in arms
        if arm.implementation is None and _key(arm) in measured.seconds
    ]


def _row(arm: _Arm, dtype: Any, measured: _Measured, bandwidth: float, rate: float) -> dict[str, Any] | None:
    seconds = measured.seconds.get(_key(arm))
    if arm.implementation is None or seconds is None:
        return None
    benchmark, case = BENCHMARKS[arm.operator], arm.case
    dense = measured.seconds.get(_key(_Arm(arm.operator, case, None)))
    bytes_moved, operations = benchmark.bytes_moved(case, dtype), benchmark.operations(case)
    roofline = max(bytes_moved / bandwidth, operations / rate)
    return {
        "op": arm.operator,
        "implementation": arm.implementation,
        "tiles": None if arm.tiles is None else dict(arm.tiles),
        "M": case.rows,
        "N": case.out_features,
        "K": case.in_features,
        "G": case.group_size,
        "X": case.experts,
        "shape": str(case),
        "seconds": seconds,
        "dense_seconds": dense,
        "roofline_seconds": roofline,
        "bytes": bytes_moved,
        "operations": operations,
        "ratio_to_dense": None if dense is None else dense / seconds,
        "ratio_to_roofline": roofline / seconds,
    }


def _progress(total: int) -> Progress:
    return Progress(
        TextColumn(f"{{task.completed}}/{total}"),
        BarColumn(bar_width=24),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def _table(operator: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """Faster than dense is green; the bar is the share of the roofline."""
    made = Table(title=operator, title_justify="left", title_style="bold")
    made.add_column("MxNxKgG", overflow="fold")
    made.add_column("", overflow="fold")
    for name in ("time", "dense", "dense/ours"):
        made.add_column(name, justify="right", no_wrap=True)
    made.add_column("roofline/ours", no_wrap=True)
    for row in rows:
        ratio, share = row["ratio_to_dense"], row["ratio_to_roofline"]
        tiles = "".join(f" {name}={size}" for name, size in (row["tiles"] or {}).items())
        made.add_row(
            row["shape"],
            row["implementation"] + tiles,
            _duration(row["seconds"]),
            _duration(row["dense_seconds"]),
            Text("-" if ratio is None else f"{ratio:.2f}", style="green" if ratio is not None and ratio > 1 else ""),
            f"{share:4.0%} " + "█" * round(8 * min(share, 1.0)),
        )
    return made


def _check_writable(args: Bench) -> None:
    """Opens what will be written, before minutes of measuring.

    Raises:
        ConfigError: it could not be written afterwards.
    """
    for flag, path in (("--json", args.json), ("--tune", tuning.TABLE if args.tune else None)):
        try:
            if path is not None:
                path.open("a").close()
        except OSError as error:
            raise ConfigError(f"{flag}: {path} cannot be written: {error.strerror}") from None


def _record(rows: Sequence[Mapping[str, Any]], dtype: str) -> None:
    timings: dict[str, list[tuning.Timing]] = defaultdict(list)
    for row in (row for row in rows if BENCHMARKS[row["op"]].is_tuned):
        timings[row["op"]].append(
            tuning.Timing(
                rows=row["M"],
                weights=row["N"] * row["K"],
                implementation=row["implementation"],
                tiles=row["tiles"] or {},
                shape=row["shape"],
                seconds=row["seconds"],
            )
        )
    tuning.record({name: tuning.entries(found, dtype) for name, found in timings.items()}, dtype)
    console.print(f"wrote the fastest of {', '.join(timings)} for {device_kind()!r} to {tuning.TABLE}")
