"""From a configuration to compiled functions: the same shapes for training, warm-up and evaluation."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from arbs_jax.config import RunConfig
from arbs_jax.data import ValidationBatch
from arbs_jax.layers import COLLECTION, TernaryConfig
from arbs_jax.models.byte_lm import ByteLM, cross_entropy
from arbs_jax.models.byte_stages import byte_stages
from arbs_jax.rules import make_rule
from arbs_jax.state import validate_tree
from arbs_jax.training.layerwise import Sweep
from arbs_jax.training.step import TrainState, fresh_state, jit_step, make_step
from arbs_jax.votes import matrix_specs


@dataclass(frozen=True)
class Program:
    """A run's model and its pure functions."""

    config: RunConfig

    @cached_property
    def ternary(self) -> TernaryConfig:
        """Rule, group size and operators of every matrix."""
        config = self.config
        return TernaryConfig(
            rule=make_rule(
                config.rule,
                steps=config.train.steps,
                votes_per_step=config.train.accum,
                dtype=config.model.dtype,
            ),
            group_size=config.group_size,
            init=config.init,
            implementation=None if config.train.kernel == "auto" else config.train.kernel,
        )

    @cached_property
    def model(self) -> Any:
        """The Linen model, a `ByteLM`; untyped because Linen types `apply` as a union with mutable collections."""
        return ByteLM(self.config.model, self.ternary)

    @cached_property
    def specs(self) -> Any:
        """Logical shapes of every matrix."""
        return matrix_specs(self.model, jax.ShapeDtypeStruct((1, 8), jnp.int32))

    def variables(self, seed: jax.Array) -> Any:
        """All collections of a fresh model, from an integer seed (); pure."""
        return self.model.init(jax.random.key(seed), jnp.zeros((1, 8), jnp.int32))

    @cached_property
    def abstract_variables(self) -> Any:
        """Shapes and dtypes of `variables`; nothing is allocated."""
        return jax.eval_shape(self.variables, jax.ShapeDtypeStruct((), jnp.uint32))

    @cached_property
    def _init(self) -> Any:
        return jax.jit(lambda seed: fresh_state(self.variables(seed)[COLLECTION]))

    def init_state(self) -> TrainState:
        """Fresh state on the device, from the configured seed."""
        return self._init(self._seed)

    def compile_init(self) -> None:
        """Compiles `init_state` ahead of time."""
        self._init.lower(self._seed).compile()

    @property
    def _seed(self) -> np.uint32:
        return np.uint32(self.config.train.seed)

    @cached_property
    def abstract_state(self) -> TrainState:
        """Shapes and dtypes of the persistent state."""
        return jax.eval_shape(self._init, self._seed)

    def check(self, ternary: Any) -> None:
        """Validates dtypes, shapes and ranges of every leaf; raises StateError naming the first that is wrong."""
        validate_tree(ternary, self.specs)

    @cached_property
    def step(self) -> Any:
        """The jitted, donated training step on tokens uint8 (accum, batch, context + 1)."""
        return jit_step(make_step(self.sweep, self.config.train.seed))

    @cached_property
    def sweep(self) -> Sweep:
        """Forward, backward and update, before it becomes a step."""
        stages = byte_stages(self.config.model, self.ternary)
        config = self.config
        return Sweep(
            stages,
            self.ternary.rule,
            self.specs,
            remat=config.model.remat,
            layers_at_once=config.train.layers_at_once,
            dtype=config.model.dtype,
        )

    def compile_step(self) -> Any:
        """The step compiled ahead of time for this configuration's exact shapes."""
        train = self.config.train
        tokens = jax.ShapeDtypeStruct((train.accum, train.batch, train.context + 1), jnp.uint8)
        return self.step.lower(self.abstract_state, tokens).compile()

    @cached_property
    def _nats(self) -> Any:
        @jax.jit
        def nats(ternary: Any, tokens: jax.Array, valid: jax.Array) -> jax.Array:
            tokens = tokens.astype(jnp.int32)
            losses = cross_entropy(self.model.apply({COLLECTION: ternary}, tokens[:, :-1]), tokens[:, 1:])
            return jnp.sum(jnp.where(valid[:, None], losses, 0.0))

        return nats

    def compile_evaluation(self) -> None:
        """Compiles one validation batch ahead of time."""
        batch, window = self.config.validation_batch, self.config.train.context + 1
        tokens, valid = jax.ShapeDtypeStruct((batch, window), jnp.uint8), jax.ShapeDtypeStruct((batch,), jnp.bool_)
        self._nats.lower(self.abstract_state.ternary, tokens, valid).compile()

    def evaluate(self, ternary: Any, batches: list[ValidationBatch]) -> float:
        """Mean nats per byte over all valid windows."""
        totals = [self._nats(ternary, batch.windows, batch.valid) for batch in batches]
        count = sum(int(batch.valid.sum()) * (batch.windows.shape[1] - 1) for batch in batches)
        return float(np.sum([np.float64(total) for total in totals]) / count)
