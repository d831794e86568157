"""A model as a chain of stages, the form in which it is trained layer by layer (`arbs_jax.training.layerwise`)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Carry = Any
Subtrees = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """One link of the chain.

    `apply(variables, carry, batch) -> carry` with `variables["ternary"]` (and "probes") holding the subtrees named by
    `keys`; a stacked stage sees one layer of its only subtree at a time. The first stage gets the carry None; the last
    returns the mean loss of its micro-batch, float32 ().
    """

    keys: tuple[str, ...]
    """Top-level subtrees of the state that the stage reads; one read by several moves once all of them have voted."""
    apply: Callable[[dict[str, Subtrees], Carry, Any], Carry]
    """The stage as a pure function."""
    stacked: bool = False
    """Whether the subtree has a leading layer axis, over which the stage is repeated."""
