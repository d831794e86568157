"""From a configuration to compiled functions: the same shapes for training, warm-up and evaluation."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from arbs_jax.compilation import deterministic_options
from arbs_jax.config import RunConfig
from arbs_jax.data import ValidationBatch
from arbs_jax.layers import COLLECTION, TernaryConfig
from arbs_jax.models.attention import takes_cudnn
from arbs_jax.models.byte_lm import ByteLM, cross_entropy
from arbs_jax.models.byte_stages import byte_stages
from arbs_jax.rules import make_rule
from arbs_jax.state import flatten_specs, validate_tree
from arbs_jax.training.layerwise import Sweep
from arbs_jax.training.step import TrainState, fresh_state, jit_step, make_step
from arbs_jax.votes import matrix_specs

GROUP_GRADIENT_BYTES = 2**27
"""Gradients, in the activations' dtype, of the layers that move together on a GPU. Moving them takes some four times
that for temporaries (`byte-50m`, with remat: 384 MB for 101)."""


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
                implementation=config.train.implementation,
            ),
            group_size=config.group_size,
            init=config.init,
            implementation=config.train.implementation,
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
        """The jitted, donated training step on tokens uint8 (accum, batch, context + 1); repeats bit for bit."""
        model, train = self.config.model, self.config.train
        q, k = (
            jax.ShapeDtypeStruct((train.batch, train.context, heads, model.head_dim), model.dtype)
            for heads in (model.heads, model.kv_heads)
        )
        options = deterministic_options() if takes_cudnn(model.attention, q, k, k) else None
        return jit_step(make_step(self.sweep, train.seed), options)

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
            layers_at_once=self.layers_at_once,
            dtype=config.model.dtype,
        )

    @property
    def layers_at_once(self) -> int:
        """Layers that move together: as configured, or on a GPU, where a step of a small model is bound by launches, as
        many as have at most `GROUP_GRADIENT_BYTES` of gradients. The rule is the same; sums may round differently."""
        config = self.config
        if config.train.layers_at_once is not None:
            return config.train.layers_at_once
        if jax.default_backend() == "cpu":
            return 1
        specs = flatten_specs(self.specs["blocks"], "blocks").values()
        layer = sum(spec.out_features * spec.in_features for spec in specs) * jnp.dtype(config.model.dtype).itemsize
        return group_within(config.model.layers, layer)

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


def group_within(layers: int, layer_bytes: int, most: int = GROUP_GRADIENT_BYTES) -> int:
    """The largest divisor of `layers` so many of which have at most `most` bytes together; at least one."""
    return max(n for n in range(1, layers + 1) if layers % n == 0 and (n == 1 or n * layer_bytes <= most))
