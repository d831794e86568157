"""A model as a chain of stages, the form in which it is trained layer by layer (`arbs_jax.training.layerwise`)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from arbs_jax.errors import ConfigError
from arbs_jax.layers import COLLECTION, PROBES

Carry = Any
Subtrees = dict[str, Any]
Events = Any
"""Integer pytree: what happened in a micro-batch, for bookkeeping."""
EVENTS = "events"
"""Among the variables of a stage: its own events, where it runs again."""
Observe = Callable[[Subtrees, Subtrees, Events, jax.Array, jax.Array], tuple[Subtrees, Subtrees]]


@dataclass(frozen=True)
class Stage:
    """One link of the chain.

    `apply(variables, carry, batch) -> carry` with `variables["ternary"]` (and "probes") holding the subtrees named by
    `keys`; a stacked stage sees one layer of its only subtree at a time. The first stage gets the carry None; the last
    returns the mean loss of its micro-batch, float32 (), or `(loss, terms)` with float32 () by name: terms are shown as
    metrics, only the loss is differentiated.

    Raises:
        ConfigError: a stacked stage that observes.
    """

    keys: tuple[str, ...]
    """Top-level subtrees of the state that the stage reads; one read by several moves once all of them have voted."""
    apply: Callable[[dict[str, Subtrees], Carry, Any], Carry]
    """The stage as a pure function."""
    stacked: bool = False
    """Whether the subtree has a leading layer axis, over which the stage is repeated."""
    lookups: Callable[[Any], dict[str, int]] | None = None
    """From a micro-batch (or its shapes) to the rows that the stage looks up in each of its sparse tables, by path."""
    uses: Callable[[Any], dict[str, tuple[int, int]]] | None = None
    """From a micro-batch (or its shapes) to how often the stage uses each of its sets of experts, by path, and with how
    many rows each time: with few, backward keeps these in place of all experts' gradients."""
    memory: tuple[str, ...] = ()
    """Parts of the bookkeeping memory that the stage reads, as `variables["memory"][name]`, and may observe."""
    observe: Observe | None = None
    """`(subtrees, memory, events, step, key) -> (subtrees, memory)`, integers in and out. With it `apply` returns
    `(carry, events)`; once a step, after all matrices have moved, it sees the events of all micro-batches, stacked in
    their global order. It may replace rows of the stage's tables. Nothing of it is differentiated, and it does not run
    where the step is blocked. `key` is of the run and stage, `step` int32 () the updates before this one."""
    recalls: bool = False
    """Whether `apply`, where backward runs it again, takes `variables["events"]`, its events of this micro-batch: what
    was found once need not be searched for again."""

    def __post_init__(self) -> None:
        if self.stacked and self.observe is not None:
            raise ConfigError(
                f"a stacked stage cannot observe, got stacked=True with keys={self.keys}; observe in another"
            )


def weights_of(variables: dict[str, Subtrees], name: str | None = None) -> dict[str, Any]:
    """State and probes among the variables of a stage; of one subtree alone, as a module of its own takes them."""
    found = {kind: variables[kind] for kind in (COLLECTION, PROBES) if kind in variables}
    return found if name is None else {kind: subtrees[name] for kind, subtrees in found.items()}
