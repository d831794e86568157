"""`arbs smoke`: does a model run here, how fast, and in how much memory?"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any

import jax
import numpy as np
import tyro

from arbs_jax.cli.display import console, megabytes, table
from arbs_jax.cli.options import ModelFlags, whole
from arbs_jax.cli.runs import admitted, make_room
from arbs_jax.compilation import enable_cache
from arbs_jax.config import RunConfig
from arbs_jax.errors import ConfigError, StateError
from arbs_jax.training.program import Program
from arbs_jax.training.room import check_room, peak_bytes


@dataclass(frozen=True)
class Smoke:
    """Run a fresh model once on random bytes: forward, and with --backward one update of its state.

    Without --model and --preset: the smallest ARB model, one window of 64 bytes. Nothing is written but the compilation
    cache.
    """

    model: Annotated[ModelFlags, tyro.conf.arg(name="")] = ModelFlags()  # noqa: RUF009
    backward: bool = False
    """Also take training steps."""
    runs: Annotated[int, whole("--runs")] = 3
    """Warm runs of each kind; the median is shown."""
    json: bool = False
    """Print one JSON object in place of the table."""

    def resolve(self) -> RunConfig:
        """The configuration: the flags, on one window; forward takes as many as a step."""
        flags = self.model
        if flags.model is None and flags.preset is None:
            flags = replace(flags, model="arb")
        if flags.batch is None:
            flags = replace(flags, batch=1)
        config = flags.resolve()
        return replace(config, log=replace(config.log, eval_windows=config.train.batch))


def run(args: Smoke) -> None:
    """Carries out `arbs smoke`."""
    if args.runs < 1:
        raise ConfigError(f"--runs must be at least 1, got {args.runs}")
    config = args.resolve()
    enable_cache()
    program = Program(config)
    account, room = admitted(program)
    result: dict[str, Any] = {
        "preset": config.preset,
        "rule": config.rule.name,
        "logical_ternary_weights": account.logical_ternary_weights,
        "state_megabytes": account.state_bytes / 1e6,
    }
    # All is compiled before anything is there: the compiler tries kernels out, in memory of its own.
    compiling, forward = _timed(program.compile_evaluation)
    result["forward_cold"] = compiling
    need = peak_bytes(forward)
    check_room(need, room, "this forward pass")
    step: Any = None
    if args.backward:
        compiling, step = _timed(program.compile_step)
        result |= {"step_cold": compiling, "step_planned_megabytes": peak_bytes(step) / 1e6}
        need = max(need, peak_bytes(step))
        check_room(need, room)
    make_room(need, program)
    result["seconds_init"], state = _timed(lambda: jax.block_until_ready(program.init_state()))

    rng = np.random.default_rng(config.train.seed)
    train = config.train
    tokens = rng.integers(0, 256, (train.accum, train.batch, train.context + 1), dtype=np.uint8)
    windows = rng.integers(0, 256, (config.validation_batch, train.context + 1), dtype=np.uint8)
    valid = np.ones(windows.shape[0], bool)
    cold, warm, nats = several(lambda: forward(state.ternary, state.memory, windows, valid), args.runs)
    result["forward_cold"] += cold
    result["forward_warm"] = warm
    result["nats_per_byte"] = float(nats) / (windows.shape[0] * program.family.predicted(train.context))
    if args.backward:
        held = [state]
        del state  # The step takes its memory over.
        peaks: list[float | None] = []

        def once() -> float:
            held[0], metrics = step(held[0], tokens)
            loss = float(jax.block_until_ready(metrics)["loss"])
            peaks.append(_peak())
            return loss

        cold, warm, loss = several(once, args.runs)
        result["step_cold"] += cold
        result |= {"step_warm": warm, "nats_per_byte": loss, "peak_megabytes_after_each_step": peaks}
    result["device_peak_megabytes"] = _peak()
    if not math.isfinite(result["nats_per_byte"]):
        raise StateError(f"the loss of a fresh {config.preset} is {result['nats_per_byte']}")
    if args.json:
        print(json.dumps(result))
        return
    console.print(table(f"{config.preset}, rule {config.rule.name}", ("", "value"), list(_rows(result, account))))


def _peak() -> float | None:
    """The most megabytes that this process held on the device so far; None where it does not tell."""
    peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return None if peak is None else peak / 1e6


def several(function: Callable[[], Any], runs: int) -> tuple[float, float, Any]:
    """(seconds of a first call, the median of those of the next, the last result)."""
    results = [_timed(lambda: jax.block_until_ready(function())) for _ in range(runs + 1)]
    return results[0][0], float(np.median([seconds for seconds, _ in results[1:]])), results[-1][1]


def _timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """(seconds, what it gives)."""
    began = time.perf_counter()
    result = function()
    return time.perf_counter() - began, result


def _rows(result: dict[str, Any], account: Any) -> Any:
    """Lines for people."""
    yield "logical ternary weights", f"{result['logical_ternary_weights']:,}"
    yield "persistent state", megabytes(account.state_bytes)
    yield "fresh state", f"{result['seconds_init']:.1f} s"
    for name in ("forward", "step"):
        if f"{name}_cold" in result:
            yield f"{name}, cold", f"{result[f'{name}_cold']:.1f} s"
            yield f"{name}, warm", f"{result[f'{name}_warm'] * 1e3:.1f} ms"
    if "step_planned_megabytes" in result:
        yield "device memory of a step, by the compiler", f"{result['step_planned_megabytes']:,.0f} MB"
    yield "loss", f"{result['nats_per_byte']:.3f} nats/byte"
    if result["device_peak_megabytes"] is None:
        yield "device peak", "not told by this device"
        return
    yield "device peak", f"{result['device_peak_megabytes']:,.0f} MB"
    if "peak_megabytes_after_each_step" in result:
        first, *_, last = result["peak_megabytes_after_each_step"]
        yield "device peak, first to last step", f"{first:,.0f} to {last:,.0f} MB"
