"""From a configuration to compiled functions: the same shapes for training, warm-up and evaluation."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from arbs_jax.audit import Audit, audit
from arbs_jax.compilation import step_options
from arbs_jax.config import RunConfig
from arbs_jax.data import ValidationBatch
from arbs_jax.errors import ConfigError
from arbs_jax.executables import compiled
from arbs_jax.layers import COLLECTION, MEMORY, TernaryConfig
from arbs_jax.models.family import Family, family_of
from arbs_jax.rules import make_rule
from arbs_jax.state import flatten_specs, validate_tree
from arbs_jax.training.layerwise import Sweep
from arbs_jax.training.step import TrainState, fresh_state, jit_step, make_step
from arbs_kernels.backends import default_device

GROUP_GRADIENT_BYTES = 2**27
"""Gradients, in the activations' dtype, of the layers that move together on a GPU, whatever the batch. Moving small
layers takes some four times that for temporaries (`byte-50m`, with remat: 384 MB for 101), large ones, whose matrices
move one after another, once and a quarter (`byte-1b`: 1,412 MB for 1,130). With several micro-batches sums of votes are
held as well, as many bytes in int16."""
MOST_GROUP_GRADIENT_BYTES = 5 * 2**28
"""The same of a large batch, within what backward keeps of it anyway. `byte-1b` takes 285 ms a step of 16 x 1024 bytes
one layer at a time and 252 with 1,130 MB of them; more has not been tried (experiments/2026_11_28_float8)."""

_DATA = "data"
"""Axis of the devices that share the micro-batches of a step."""


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
    def family(self) -> Family:
        """The model, whichever it is."""
        return family_of(self.config.model, self.ternary)

    @property
    def model(self) -> Any:
        """The Linen model."""
        return self.family.module

    @property
    def specs(self) -> Any:
        """Logical shapes of every matrix."""
        return self.family.specs

    def variables(self, seed: jax.Array) -> Any:
        """All collections of a fresh model, from an integer seed (); pure."""
        return self.family.variables(seed)

    @cached_property
    def abstract_variables(self) -> Any:
        """Shapes and dtypes of `variables`; nothing is allocated."""
        return jax.eval_shape(self.variables, jax.ShapeDtypeStruct((), jnp.uint32))

    @cached_property
    def account(self) -> Audit:
        """What persists, by part and leaf; nothing is allocated."""
        state = self.abstract_state
        return audit(self.abstract_variables, self.specs, extra=[state.step, state.halted], parts=self.family.parts)

    @property
    def devices(self) -> list[jax.Device]:
        """Those that share a step.

        Raises:
            ConfigError: this process has fewer.
        """
        count, here = self.config.train.devices, jax.local_devices()
        if count > len(here):
            raise ConfigError(f"--devices must be at most those of this process, which has {len(here)}, got {count}")
        return [default_device()] if count == 1 else here[:count]

    @cached_property
    def mesh(self) -> Mesh | None:
        """`devices` in a row; None for one."""
        if len(self.devices) == 1:
            return None
        return jax.make_mesh((len(self.devices),), (_DATA,), axis_types=(AxisType.Auto,), devices=self.devices)

    @property
    def placed(self) -> NamedSharding | None:
        """Where state lies: whole on each of the devices that share a step; None for one."""
        return None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec())

    def _jit(self, function: Any) -> Any:
        """On every device that holds the state, all doing the same."""
        if self.placed is None:
            return jax.jit(function)
        return jax.jit(function, in_shardings=self.placed, out_shardings=self.placed)

    @cached_property
    def _init(self) -> Any:
        return self._jit(lambda seed: _fresh(self.variables(seed)))

    def init_state(self) -> TrainState:
        """Fresh state on the device, from the configured seed."""
        return self.compile_init()(self._seed)

    def compile_init(self) -> Any:
        """`init_state` compiled ahead of time, as a function of a seed uint32 (); once."""
        return self._compiled_init

    @cached_property
    def _compiled_init(self) -> Any:
        return self._compiled("init", self._init, self._seed)

    @property
    def _seed(self) -> np.uint32:
        return np.uint32(self.config.train.seed)

    @cached_property
    def abstract_state(self) -> TrainState:
        """Shapes and dtypes of the persistent state."""
        return jax.eval_shape(_fresh, self.abstract_variables)

    def check(self, ternary: Any) -> None:
        """Validates dtypes, shapes and ranges of every leaf; raises StateError naming the first that is wrong."""
        validate_tree(ternary, self.specs)

    @cached_property
    def step(self) -> Any:
        """The jitted, donated training step on tokens uint8 (accum, batch, context + 1); repeats bit for bit."""
        train = self.config.train
        options = step_options(self.family.takes_cudnn(train.batch, train.context), self.family.in_one_graph)
        return jit_step(make_step(self.sweep, train.seed), options, self.mesh)

    @cached_property
    def sweep(self) -> Sweep:
        """Forward, backward and update, before it becomes a step."""
        config = self.config
        return Sweep(
            family_of(config.model, replace(self.ternary, float8=config.train.float8)).stages,
            self.ternary.rule,
            self.specs,
            remat=config.model.remat,
            layers_at_once=self.layers_at_once,
            dtype=config.model.dtype,
            axis_name=None if self.mesh is None else _DATA,
        )

    @property
    def layers_at_once(self) -> dict[str, int]:
        """Layers that move together, of each stack: as configured (or what divides the stack below that), or on a GPU,
        which launches of small operations keep waiting, as many as have at most `GROUP_GRADIENT_BYTES` of gradients, or
        as many bytes as the inputs of all layers, up to `MOST_GROUP_GRADIENT_BYTES`. The rule is the same; sums may
        round differently."""
        config = self.config
        train, itemsize = config.train, jnp.dtype(config.model.dtype).itemsize
        inputs = train.accum // train.devices * train.batch * train.context * config.model.width * itemsize
        wanted = 1 if jax.default_backend() == "cpu" else None
        wanted = train.layers_at_once or wanted

        def together(stack: str) -> int:
            layers = jax.tree.leaves(self.abstract_state.ternary[stack])[0].shape[0]
            if wanted is not None:
                return group_within(layers, 1, wanted)
            weights = sum(spec.weights for spec in flatten_specs(self.specs[stack]).values())
            most = max(GROUP_GRADIENT_BYTES, min(layers * inputs, MOST_GROUP_GRADIENT_BYTES))
            return group_within(layers, weights * itemsize, most)

        return {stack: together(stack) for stack in self.family.stacks}

    def compile_step(self) -> Any:
        """The step compiled ahead of time for this configuration's exact shapes."""
        train = self.config.train
        tokens = jax.ShapeDtypeStruct((train.accum, train.batch, train.context + 1), jnp.uint8)
        return self._compiled("step", self.step, self.abstract_state, tokens)

    def _compiled(self, name: str, function: Any, *arguments: Any) -> Any:
        """`function` for these arguments; everything in the configuration decides it but data and looks."""
        settings = {key: value for key, value in self.config.to_json().items() if key not in ("data", "log")}
        return compiled(name, function, *arguments, settings=settings, devices=self.devices)

    @cached_property
    def _nats(self) -> Any:
        def nats(ternary: Any, memory: Any, tokens: jax.Array, valid: jax.Array) -> jax.Array:
            losses = self.family.nats({COLLECTION: ternary, MEMORY: memory}, tokens)
            return jnp.sum(jnp.where(valid[:, None], losses, 0.0))

        return self._jit(nats)

    def compile_evaluation(self) -> Any:
        """Compiles one validation batch ahead of time: `(ternary, memory, windows uint8 (B, T+1), valid bool (B,))` to
        nats summed over the valid windows, float32 ()."""
        return self._compiled_nats(self.config.validation_batch, self.config.train.context + 1)

    def _compiled_nats(self, batch: int, window: int) -> Any:
        if (batch, window) not in self._evaluations:
            tokens, valid = jax.ShapeDtypeStruct((batch, window), jnp.uint8), jax.ShapeDtypeStruct((batch,), jnp.bool_)
            arguments = self.abstract_state.ternary, self.abstract_state.memory, tokens, valid
            self._evaluations[batch, window] = self._compiled("evaluation", self._nats, *arguments)
        return self._evaluations[batch, window]

    @cached_property
    def _evaluations(self) -> dict[tuple[int, int], Any]:
        return {}

    def evaluate(self, state: TrainState, batches: list[ValidationBatch]) -> float:
        """Mean nats per predicted byte over all valid windows."""
        totals = [
            self._compiled_nats(*batch.windows.shape)(state.ternary, state.memory, batch.windows, batch.valid)
            for batch in batches
        ]
        count = sum(int(batch.valid.sum()) * self.family.predicted(batch.windows.shape[1] - 1) for batch in batches)
        return float(np.sum([np.float64(total) for total in totals]) / count)


def _fresh(variables: Any) -> TrainState:
    """State before the first step, from the collections of a fresh model."""
    return fresh_state(variables[COLLECTION], variables.get(MEMORY))


def group_within(layers: int, layer_bytes: int, most: int) -> int:
    """The largest divisor of `layers` so many of which have at most `most` bytes together; at least one."""
    return max(n for n in range(1, layers + 1) if layers % n == 0 and (n == 1 or n * layer_bytes <= most))
