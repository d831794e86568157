"""Calling `arbs` in this process and in others, and reading what it left behind."""

import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arbs_jax.cli.main import main
from arbs_jax.models import PRESETS, VOCABULARY
from arbs_jax.run.checkpoints import Checkpointer
from arbs_jax.run.metrics import read_metrics

STEPS = 200
"""Enough that a process is still at it when the test has seen its first rows."""
LOG_INTERVAL, SAVE_INTERVAL, EVAL_INTERVAL = 5, 60, 150
_PATIENCE = 240.0
"""Seconds after which a process that shows no progress fails the test, on a machine however slow."""


@dataclass(frozen=True)
class Reference:
    """A run that was never interrupted."""

    run: Path
    rule: str
    accum: int
    steps: int


def weights(preset: str) -> int:
    """Ternary weights of a preset, from the architecture's description."""
    model = PRESETS[preset]
    query, key = model.heads * model.head_dim, model.kv_heads * model.head_dim
    block = model.width * (2 * query + 2 * key + 3 * model.hidden)
    return model.layers * block + (1 if model.tied else 2) * VOCABULARY * model.width


def flags(rule: str = "integral", accum: int = 1, steps: int = STEPS) -> list[str]:
    """A model of the smallest preset, trained on very little."""
    settings: dict[str, Any] = {
        "preset": "byte-0.4m",
        "rule": rule,
        "accum": accum,
        "steps": steps,
        "ctx": 16,
        "batch": 2,
        "log-interval": LOG_INTERVAL,
        "save-interval": SAVE_INTERVAL,
        "eval-interval": EVAL_INTERVAL,
    }
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def call(*words: Any) -> int:
    """`arbs WORDS` in this process; the exit status."""
    return main([str(word) for word in words])


def command(*words: Any) -> list[str]:
    """`arbs WORDS` as a process of its own."""
    return [sys.executable, "-m", "arbs_jax.cli.main", *map(str, words)]


def start(*words: Any) -> subprocess.Popen[str]:
    """Starts `arbs WORDS`."""
    return subprocess.Popen(command(*words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(*words: Any) -> subprocess.CompletedProcess[str]:
    """Runs `arbs WORDS` to its end."""
    return subprocess.run(command(*words), capture_output=True, text=True, timeout=_PATIENCE, check=False)


def wait_for_step(process: subprocess.Popen[str], run: Path, step: int) -> None:
    """Waits until a training process has logged `step`."""
    deadline = time.monotonic() + _PATIENCE
    metrics = run / "metrics.jsonl"
    while not (metrics.exists() and any(row["step"] >= step for row in read_metrics(metrics))):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.003)


def restore(run: Path, which: str | int = "latest") -> tuple[dict[str, Any], dict[str, Any]]:
    """(tree, metadata) of a checkpoint."""
    with Checkpointer(run / "checkpoints") as reader:
        return reader.restore(which)


def tags(run: Path) -> dict[str, int]:
    """{name: step} of a run's named checkpoints."""
    with Checkpointer(run / "checkpoints") as reader:
        return reader.tags()


def compiled(out: str) -> dict[str, bool]:
    """{what: whether it was compiled, not read from the cache}, from the output of warmup or train."""
    found = re.findall(
        r"(training step|initial state|validation|state)\W+(?:in )?[\d.]+ s \((compiled|from the cache)", out
    )
    return {what: how == "compiled" for what, how in found}
