"""Bookkeeping of a step: stages read their parts of a memory of integers and observe, once, what the step did."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import jax

from arbs_jax.errors import ConfigError
from arbs_jax.layers import MEMORY
from arbs_jax.models.stages import Events, Observe, Stage, Subtrees


def with_memory(stage: Stage, memory: Subtrees) -> Stage:
    """The stage with its parts of the memory among the variables.

    Raises:
        ConfigError: it names memory that there is not.
    """
    missing = [name for name in stage.memory if name not in memory]
    if missing:
        raise ConfigError(
            f"stage {stage.keys} reads memory {missing}, and there is {sorted(memory)}; make it at the start"
        )
    if not stage.memory:
        return stage
    parts = {MEMORY: {name: memory[name] for name in stage.memory}}
    return replace(stage, apply=lambda variables, carry, batch: stage.apply(variables | parts, carry, batch))


def observed(
    stages: Sequence[Stage],
    events: Sequence[Events],
    ternary: Subtrees,
    memory: Subtrees,
    step: jax.Array,
    key: jax.Array,
    moves: jax.Array,
) -> tuple[Subtrees, Subtrees]:
    """State and memory after every stage, in order, has observed what happened; as they were where `moves` is false.

    `events` are those of each stage, stacked over all micro-batches in their global order. In place where state and
    memory are donated: the barrier keeps reads of the state before the `cond`, or the compiler would copy it.
    """
    for position, stage in enumerate(stages):
        if stage.observe is None:
            continue
        # Apart from the keys of votes and those of layers.
        own = jax.random.fold_in(key, 2**31 + 2**30 + position)
        observe = partial(_observe, stage.observe, events[position], step, own)
        parts = {name: ternary[name] for name in stage.keys}, {name: memory[name] for name in stage.memory}
        subtrees, kept = jax.lax.cond(moves, observe, lambda *parts: parts, *jax.lax.optimization_barrier(parts))
        ternary, memory = ternary | subtrees, memory | kept
    return ternary, memory


def _observe(
    observe: Observe, events: Events, step: jax.Array, key: jax.Array, subtrees: Subtrees, memory: Subtrees
) -> tuple[Subtrees, Subtrees]:
    return observe(subtrees, memory, events, step, key)
