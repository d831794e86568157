"""The training step as a pure function: integer state and a batch in, integer state and metrics out."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from arbs_jax.rules.base import shares
from arbs_jax.rules.noise import run_key
from arbs_jax.training.layerwise import Sweep


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that persists between steps; integers only."""

    ternary: dict[str, Any]
    """Integer leaves of every matrix."""
    step: jax.Array
    """int32 (), updates taken."""
    halted: jax.Array
    """int32 (), 1 after a loss that was not finite; the state then stays as it was before that step."""


Metrics = dict[str, jax.Array]
StepFunction = Callable[[TrainState, jax.Array], tuple[TrainState, Metrics]]


def fresh_state(ternary: dict[str, Any]) -> TrainState:
    """State before the first step."""
    return TrainState(ternary=dict(ternary), step=jnp.zeros((), jnp.int32), halted=jnp.zeros((), jnp.int32))


def make_step(sweep: Sweep, seed: int) -> StepFunction:
    """The pure step `(state, tokens uint8 (A, B, T+1)) -> (state, metrics)`; not yet jitted.

    Metrics: `loss`, float32 () nats per byte, mean over the A micro-batches; `halted`, int32 (); `flip_rate`,
    `zero_share`, `saturation` and `scale_drift` (`arbs_jax.rules.base.shares`). A step whose loss is
    not finite leaves every leaf as it was and halts: later steps change nothing, so a host that fetches metrics late
    loses nothing.
    """

    def step(state: TrainState, tokens: jax.Array) -> tuple[TrainState, Metrics]:
        ternary, loss, moved, report = sweep(state.ternary, tokens, state.step, run_key(seed), state.halted > 0)
        taken = moved.astype(jnp.int32)
        after = TrainState(ternary=ternary, step=state.step + taken, halted=1 - taken)
        return after, {"loss": loss, "halted": after.halted, **shares(report)}

    return step


def jit_step(step: StepFunction, compiler_options: dict[str, bool] | None = None) -> Any:
    """The step compiled once, its state donated so that the update is in place."""
    return jax.jit(step, donate_argnums=0, compiler_options=compiler_options)
