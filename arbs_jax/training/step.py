"""The training step as a pure function: integer state and a batch in, integer state and metrics out."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from arbs_jax.errors import StateError
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
    memory: dict[str, Any] = field(default_factory=dict)
    """Bookkeeping that is no weight (usage counts, edges, a ledger): integer pytrees by name."""

    def persistent(self) -> dict[str, Any]:
        """The fields by name, as a checkpoint holds them; no memory where there is none."""
        fields = {"ternary": self.ternary, "step": self.step, "halted": self.halted}
        return fields | {"memory": self.memory} if self.memory else fields


Metrics = dict[str, jax.Array]
StepFunction = Callable[[TrainState, jax.Array], tuple[TrainState, Metrics]]


def fresh_state(ternary: dict[str, Any], memory: dict[str, Any] | None = None) -> TrainState:
    """State before the first step.

    Raises:
        StateError: memory holds something else than integers.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(memory or {}):
        if not jnp.issubdtype(leaf.dtype, jnp.integer):
            raise StateError(
                f"memory{jax.tree_util.keystr(path)} must be an integer array, got {leaf.dtype}: persistent state "
                "holds no floats"
            )
    zero = jnp.zeros((), jnp.int32)
    return TrainState(ternary=dict(ternary), step=zero, halted=jnp.zeros_like(zero), memory=dict(memory or {}))


def make_step(sweep: Sweep, seed: int) -> StepFunction:
    """The pure step `(state, tokens uint8 (A, B, T+1)) -> (state, metrics)`; not yet jitted.

    Metrics: `loss`, float32 () nats per byte, mean over the A micro-batches (where the loss has terms and one of them
    is `prediction`, that one; the whole is then `loss/total`); `halted`, int32 (); `flip_rate`, `zero_share`,
    `saturation` and `scale_drift` (`arbs_jax.rules.base.shares`; of sparse tables they count the rows that the step
    touched), and `loss/<name>` for every term of the loss. A step whose loss is not finite leaves every leaf as it was
    and halts: later steps change nothing, so a host that fetches metrics late loses nothing.
    """

    def step(state: TrainState, tokens: jax.Array) -> tuple[TrainState, Metrics]:
        swept = sweep(state.ternary, tokens, state.step, run_key(seed), state.halted > 0, state.memory)
        taken = swept.moved.astype(jnp.int32)
        after = TrainState(ternary=swept.ternary, step=state.step + taken, halted=1 - taken, memory=swept.memory)
        terms = {f"loss/{name}": term for name, term in swept.terms.items()}
        if "prediction" in swept.terms:
            terms["loss/total"] = swept.loss
        loss = swept.terms.get("prediction", swept.loss)
        return after, {"loss": loss, "halted": after.halted, **shares(swept.report), **terms}

    return step


def jit_step(
    step: StepFunction, compiler_options: dict[str, bool | str] | None = None, mesh: jax.sharding.Mesh | None = None
) -> Any:
    """The step compiled once, its state donated so that the update is in place.

    The devices of a `mesh` of one axis share the micro-batches, and each holds state and metrics whole; the step is
    then of a `Sweep` with the axis' name.
    """
    if mesh is None:
        return jax.jit(step, donate_argnums=0, compiler_options=compiler_options)
    (axis,) = mesh.axis_names
    whole, split = PartitionSpec(), PartitionSpec(axis)
    shared = jax.shard_map(step, mesh=mesh, in_specs=(whole, split), out_specs=whole, check_vma=False)
    return jax.jit(
        shared,
        donate_argnums=0,
        compiler_options=compiler_options,
        in_shardings=(NamedSharding(mesh, whole), NamedSharding(mesh, split)),
        out_shardings=NamedSharding(mesh, whole),
    )
