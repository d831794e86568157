"""Several runs at once under `vmap`: the rules through the library's own step, the float baselines beside them.

Every run of a corpus and seed sees the same batches in the same order, the same model code and the same validation
windows; only what is kept between steps and how it moves differs.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from baselines import Baseline

from arbs_jax.audit import audit
from arbs_jax.config import RunConfig, TrainConfig
from arbs_jax.data import Corpus, split, train_windows, validation_windows
from arbs_jax.layers import COLLECTION, DENSE
from arbs_jax.models import cross_entropy, preset
from arbs_jax.models.family import family_of
from arbs_jax.rules import RuleConfig, default_group_size
from arbs_jax.training.program import Program
from arbs_jax.training.step import fresh_state, make_step

CHUNK = 25
"""Steps per dispatch."""


@dataclass(frozen=True)
class Setting:
    """What all compared runs share."""

    preset: str = "byte-3m"
    steps: int = 2000
    batch: int = 64
    context: int = 128
    dtype: str = "bfloat16"
    remat: bool = False
    windows: int = 512
    """Validation windows."""
    products: str = "dtype"
    """Of the rules, not of the baselines: "dtype" or "float8"."""

    def config(self, rule: str, learning_rate: float | None = None) -> RunConfig:
        """The library's configuration of one run."""
        return RunConfig(
            preset=self.preset,
            model=preset(self.preset, dtype=self.dtype, remat=self.remat),
            group_size=default_group_size(rule),
            rule=RuleConfig(name=rule, learning_rate=learning_rate),
            train=TrainConfig(steps=self.steps, batch=self.batch, context=self.context, products=self.products),
        )


@dataclass(frozen=True)
class Run:
    """One run: a corpus and a seed (and for a baseline its learning rate)."""

    corpus: str
    seed: int
    learning_rate: float | None = None


@dataclass(frozen=True)
class Outcome:
    """What a run came to."""

    run: Run
    val_loss: float
    train_loss: float
    curve: list[float]
    """Mean training loss of every chunk."""
    val_loss_float8: float | None = None
    """Validation with float8 products, of a run that trained with them."""


class Data:
    """Batches of all runs, stacked."""

    def __init__(self, setting: Setting, corpora: dict[str, Corpus]):
        self._setting = setting
        parts = {name: split(corpus, 0.05, minimum=setting.context + 1) for name, corpus in corpora.items()}
        self._train = {name: part[0] for name, part in parts.items()}
        self._windows = {
            name: np.concatenate([batch.windows[batch.valid] for batch in self._validation(part[1])])
            for name, part in parts.items()
        }

    def _validation(self, corpus: Corpus) -> Any:
        setting = self._setting
        return validation_windows(corpus, context=setting.context, batch=setting.batch, max_windows=setting.windows)

    def chunks(self, runs: list[Run]) -> Any:
        """Yields uint8 (steps, runs, 1, batch, context + 1) for chunks of steps."""
        setting = self._setting
        streams = {
            (run.corpus, run.seed): train_windows(
                self._train[run.corpus],
                context=setting.context,
                batch=setting.batch,
                accum=1,
                seed=run.seed,
                prefetch=0,
            )
            for run in runs
        }
        for start in range(0, setting.steps, CHUNK):
            count = min(CHUNK, setting.steps - start)
            drawn = {key: np.stack([next(stream) for _ in range(count)]) for key, stream in streams.items()}
            yield np.stack([drawn[run.corpus, run.seed] for run in runs], axis=1)

    def validation(self, runs: list[Run]) -> np.ndarray:
        """uint8 (runs, windows, context + 1), cut to the fewest windows of any corpus."""
        count = min(len(self._windows[run.corpus]) for run in runs) // 16 * 16
        return np.stack([self._windows[run.corpus][:count] for run in runs])


def _evaluate(apply: Callable[[Any, jax.Array], jax.Array], states: Any, windows: np.ndarray) -> np.ndarray:
    """Mean nats per byte of every run, float64 (runs,)."""

    @jax.jit
    def losses(states: Any, windows: jax.Array) -> jax.Array:
        def one(state: Any, tokens: jax.Array) -> jax.Array:
            tokens = tokens.astype(jnp.int32)
            return cross_entropy(apply(state, tokens[:, :-1]), tokens[:, 1:]).mean()

        return jax.vmap(one)(states, windows)

    parts = [np.asarray(losses(states, windows[:, at : at + 16])) for at in range(0, windows.shape[1], 16)]
    return np.mean(np.stack(parts).astype(np.float64), axis=0)


def _drive(step: Any, states: Any, data: Data, runs: list[Run]) -> tuple[Any, np.ndarray, float]:
    """(states, losses (steps, runs), seconds a step of one run once compiled)."""

    @jax.jit
    def chunk(states: Any, tokens: jax.Array) -> tuple[Any, jax.Array]:
        return jax.lax.scan(lambda carry, batch: jax.vmap(step)(carry, batch), states, tokens)

    losses: list[Any] = []
    began, counted = 0.0, 0
    for index, tokens in enumerate(data.chunks(runs)):
        states, loss = chunk(states, tokens)
        losses.append(loss)
        if index == 0:
            jax.block_until_ready(loss)
            began = time.perf_counter()
        else:
            counted += len(tokens)
    jax.block_until_ready(states)
    seconds = (time.perf_counter() - began) / max(counted * len(runs), 1)
    return states, np.concatenate([np.asarray(loss) for loss in losses]), seconds


def _outcomes(runs: list[Run], losses: np.ndarray, validation: np.ndarray) -> list[Outcome]:
    curves = losses[: len(losses) // CHUNK * CHUNK].reshape(-1, CHUNK, len(runs)).mean(axis=1)
    return [
        Outcome(run, float(validation[i]), float(losses[-100:, i].mean()), [round(float(x), 4) for x in curves[:, i]])
        for i, run in enumerate(runs)
    ]


def train_rule(
    setting: Setting, rule: str, data: Data, runs: list[Run], learning_rate: float | None = None
) -> tuple[list[Outcome], float, float]:
    """(outcomes, bits per weight by the audit, seconds a step and run)."""
    program = Program(setting.config(rule, learning_rate))
    bits = audit(program.abstract_variables, program.specs).bits_per_weight
    # The step is built without its seed, so that runs of several seeds share one program.
    sweep = program.sweep

    def step(carry: Any, tokens: jax.Array) -> tuple[Any, jax.Array]:
        state, seed = carry
        state, metrics = make_step(sweep, seed)(state, tokens)
        return (state, seed), metrics["loss"]

    seeds = jnp.asarray([run.seed for run in runs], jnp.uint32)
    states = jax.jit(jax.vmap(lambda seed: fresh_state(program.variables(seed)[COLLECTION])))(seeds)
    (states, _), losses, seconds = _drive(step, (states, seeds), data, runs)
    windows = data.validation(runs)

    def judged(module: Any) -> np.ndarray:
        return _evaluate(lambda state, tokens: module.apply({COLLECTION: state}, tokens), states.ternary, windows)

    outcomes = _outcomes(runs, losses, judged(program.model))
    if program.config.train.float8:
        as_trained = judged(family_of(program.config.model, replace(program.ternary, float8=True)).module)
        outcomes = [replace(own, val_loss_float8=float(as_trained[i])) for i, own in enumerate(outcomes)]
    return outcomes, bits, seconds


def train_baseline(setting: Setting, baseline: Baseline, data: Data, runs: list[Run]) -> tuple[list[Outcome], float]:
    """(outcomes, seconds a step and run); every run has its own learning rate."""
    program = Program(setting.config("latent10"))
    step = baseline.step(program.model, setting.steps)
    seeds = jnp.asarray([run.seed for run in runs], jnp.uint32)
    rates = jnp.asarray([run.learning_rate for run in runs], jnp.float32)
    states = jax.jit(jax.vmap(lambda seed, rate: baseline.init(program.specs, setting_layers(program), seed, rate)))(
        seeds, rates
    )
    states, losses, seconds = _drive(step, states, data, runs)
    apply = lambda params, tokens: program.model.apply({DENSE: baseline.weights(params)}, tokens)  # noqa: E731
    validation = _evaluate(apply, states.params, data.validation(runs))
    return _outcomes(runs, losses, validation), seconds


def setting_layers(program: Program) -> int:
    """Layers of the model, which its specs do not tell."""
    return program.config.model.layers


def with_preset(setting: Setting, name: str) -> Setting:
    """The setting with another model shape."""
    return replace(setting, preset=name)
