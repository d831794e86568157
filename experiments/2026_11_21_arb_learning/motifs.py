"""How many motifs are in use while `arb-tiny` trains, and in how many directions their inputs lie; on a CPU.

    python motifs.py --corpus pycode.txt --arms weight_spread=0:shield=balance weight_spread=0 default

An arm is `default` or fields of the model's configuration, joined by colons. Perplexity is that of the motifs of 128
held-out windows; dimensions are the participation ratio of the covariance of the codebook's inputs.
"""

import argparse
from pathlib import Path
from typing import Any

import jax
import numpy as np
from learn import parsed
from rich.console import Console
from rich.table import Table

from arbs_jax.config import RunConfig, TrainConfig
from arbs_jax.data import open_corpus, split, train_windows, validation_windows
from arbs_jax.layers import COLLECTION
from arbs_jax.models.arb.model import ArbLM
from arbs_jax.models.presets import preset
from arbs_jax.rules import RuleConfig
from arbs_jax.training.program import Program

BATCH, CONTEXT = 16, 64


def program_of(arm: str, steps: int) -> Program:
    """The program of an arm."""
    switches = [] if arm == "default" else [switch.split("=") for switch in arm.split(":")]
    changes: dict[str, Any] = {field: parsed(value) for field, value in switches}
    train = TrainConfig(steps=steps, batch=BATCH, context=CONTEXT)
    return Program(
        RunConfig(preset="arb-tiny", model=preset("arb-tiny", **changes), rule=RuleConfig("latent10"), train=train)
    )


def perplexity(ids: jax.Array) -> float:
    """Of how often each id occurs."""
    share = np.unique(np.asarray(ids), return_counts=True)[1] / ids.size
    return float(np.exp(-(share * np.log(share)).sum()))


def dimensions(latent: jax.Array) -> float:
    """Participation ratio of the covariance's eigenvalues."""
    values = np.linalg.eigvalsh(np.cov(np.asarray(latent).reshape(-1, latent.shape[-1]).T))
    return float(values.sum() ** 2 / np.square(values).sum())


def main() -> None:
    """Parses flags, trains the arms one after another, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--arms", nargs="+", default=["default"])
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()
    training, held = split(open_corpus(str(args.corpus)), 0.05, minimum=CONTEXT + 1)
    windows = validation_windows(held, context=CONTEXT, batch=BATCH, max_windows=128)
    tokens = np.concatenate([batch.windows for batch in windows])[:, :-1]
    table = Table("arm", "step", "validation", "motifs", "dimensions", "composites", "dimensions")
    for arm in args.arms:
        program = program_of(arm, args.steps)

        @jax.jit
        def looked_up(ternary: Any, memory: Any, model: Any = program.model) -> Any:
            variables = {COLLECTION: ternary}
            x = model.apply(variables, tokens, method=ArbLM.sequence)
            return model.apply(variables, x, memory, method=ArbLM.motifs)[1:]

        step, state = program.compile_step(), program.init_state()
        batches = train_windows(training, context=CONTEXT, batch=BATCH, accum=1, seed=0, prefetch=0)
        for number in range(1, args.steps + 1):
            state, _ = step(state, next(batches))
            if number in (1, args.steps // 4, args.steps):
                books = looked_up(state.ternary, state.memory)
                seen = [f(*v) for book in books for f, v in
                        ((perplexity, [book.ids_BxS]), (dimensions, [book.latent_BxSxK]))]  # fmt: skip
                loss = program.evaluate(state, windows)
                table.add_row(arm, str(number), f"{loss:.4f}", *(f"{value:.1f}" for value in seen))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
