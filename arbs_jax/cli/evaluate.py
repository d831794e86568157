"""`arbs eval`: nats and bits per byte of a run on its validation text or on another text."""

import json
import math
from dataclasses import dataclass, replace
from typing import Annotated

import tyro

from arbs_jax.cli.display import console, table
from arbs_jax.cli.options import CheckpointFlag, KernelFlag, RunFlag, about, saved_config, whole
from arbs_jax.cli.runs import open_run, run_path
from arbs_jax.compilation import enable_cache
from arbs_jax.data import open_corpus, unigram_entropy, validation_windows
from arbs_jax.errors import ConfigError
from arbs_jax.training.inputs import Inputs


@dataclass(frozen=True)
class Evaluate:
    """Measure a run in nats and bits per byte."""

    run: RunFlag = None
    checkpoint: CheckpointFlag = None
    data: Annotated[
        str | None,
        tyro.conf.arg(
            help="File, folder or glob, all of it.",
            help_behavior_hint="(default: the run's validation text)",
            metavar="PATH",
        ),
    ] = None
    ctx: Annotated[int | None, whole("--ctx"), about("Bytes in a window.", "as trained")] = None
    windows: Annotated[int, whole("--windows")] = 1024
    """Windows, at most, spread evenly."""
    kernel: KernelFlag = None
    json: bool = False
    """Print one JSON object in place of the table."""


def run(args: Evaluate) -> None:
    """Carries out `arbs eval`."""
    if args.windows < 1:
        raise ConfigError(f"--windows must be at least 1, got {args.windows}")
    enable_cache()
    path = run_path(args.run)
    # The text held out depends on the context trained with, so it is opened before another one is asked for.
    saved = config = saved_config(path)
    if args.ctx is not None:
        config = replace(saved, train=replace(saved.train, context=args.ctx))
    opened = open_run(path, args.checkpoint, config, args.kernel)
    if args.data is None:
        inputs = Inputs.open(saved)
        corpus, name, entropy = inputs.validation, f"{inputs.name} (validation)", inputs.unigram_entropy
    else:
        corpus = open_corpus(args.data)
        name, entropy = corpus.name, unigram_entropy(corpus)
    context = config.train.context
    batches = validation_windows(
        corpus, context=context, batch=min(args.windows, 4 * config.train.batch), max_windows=args.windows
    )
    nats = opened.program.evaluate(opened.state, batches)
    count = sum(int(batch.valid.sum()) for batch in batches) * opened.program.family.predicted(context)
    result = {
        "run": str(path),
        "step": opened.step,
        "corpus": name,
        "context": context,
        "bytes": count,
        "nats_per_byte": nats if math.isfinite(nats) else None,
        "bits_per_byte": nats / math.log(2) if math.isfinite(nats) else None,
        "unigram_entropy": entropy,
    }
    if args.json:
        print(json.dumps(result))
        return
    rows = [("model", nats), ("unigram entropy", entropy), ("gained over unigram", entropy - nats)]
    console.print(
        table(
            f"{path} at step {opened.step} on {name}: {count:,} bytes in windows of {context}",
            ("", "nats/byte", "bits/byte"),
            [(label, f"{value:.4f}", f"{value / math.log(2):.4f}") for label, value in rows],
        )
    )
