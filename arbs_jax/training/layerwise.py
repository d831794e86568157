"""Backward and update in one sweep, a layer at a time: no vote or gradient outlives the layer it belongs to.

A model is a chain of stages (`arbs_jax.models.stages`). Forward keeps what each stage needs to be differentiated;
backward walks the chain from the loss, and as soon as the votes of a layer are known its integer state is replaced in
place. Repeated blocks are one stage whose state is stacked over layers. Micro-batches are an axis *inside* each stage,
through which they go one after another: a layer takes the votes of all of them before it moves, so accumulation costs
the votes of the layers that move together, not the model's.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from arbs_jax import tables
from arbs_jax.errors import ConfigError
from arbs_jax.layers import COLLECTION, PROBES
from arbs_jax.models.stages import EVENTS, Carry, Events, Stage, Subtrees
from arbs_jax.rules import Rule
from arbs_jax.rules.base import Report, add_reports, empty_report
from arbs_jax.state import MatrixSpec, flatten_specs, map_matrices
from arbs_jax.training import shards, table_votes
from arbs_jax.training.bookkeeping import observed, with_memory
from arbs_jax.training.kept import Kept
from arbs_jax.training.matrices import MOST_TOGETHER, by_turns, keys_of, layer_key, together, vote_key
from arbs_jax.training.micro_batches import carry_micro, map_micro
from arbs_jax.training.table_votes import RowVotes
from arbs_jax.votes import dense_gradients, each_expert, make_probes, matrix_vote


class Swept(NamedTuple):
    """What one step gives."""

    ternary: Subtrees
    """The integer state."""
    loss: jax.Array
    """Mean over micro-batches (and shards), float32 ()."""
    moved: jax.Array
    """Whether the state moved, bool ()."""
    report: Report
    """The rule's report summed over all matrices; of sparse tables over the rows that the step touched."""
    memory: Subtrees
    """The bookkeeping memory."""
    terms: dict[str, jax.Array]
    """Means of the last stage's terms, float32 ()."""


@dataclass(frozen=True, eq=False)
class Sweep:
    """A forward/backward/update pass over stages; holds what is static."""

    stages: tuple[Stage, ...]
    rule: Rule
    specs: Any
    """Specs nested like the state."""
    remat: bool = True
    """Keep only each layer's input between forward and backward, and run the layer again there."""
    layers_at_once: int | Mapping[str, int] = 1
    """Layers of a stack that move together, once the votes of all of them are known: fewer, larger operations, for
    that many layers' temporaries. One number, or one for each stack by the name of its subtree."""
    dtype: str = "float32"
    """Of the gradients that rules sample: that of the activations wastes nothing, sums are float32 all the same."""
    axis_name: str | None = None
    """Mapped axis over which votes are summed and the loss averaged, under `shard_map` or `pmap`."""

    def __call__(
        self,
        ternary: Subtrees,
        batch: Any,
        step: jax.Array,
        key: jax.Array,
        blocked: jax.Array,
        memory: Subtrees | None = None,
    ) -> Swept:
        """One step.

        Args:
            ternary: integer state, a dict of subtrees.
            batch: pytree whose leaves have a leading micro-batch axis A.
            step: int32 (), updates taken before this one.
            key: seeds the rules that sample and round; of this run, the same on every step and shard.
            blocked: bool (); when true state and memory are returned unchanged.
            memory: bookkeeping, integer pytrees by name.

        Returns:
            See `Swept`. A loss that is not finite blocks the update.

        Raises:
            ConfigError: `layers_at_once` does not divide the layers of a stack, a stacked stage has a sparse table, or
                a stage names memory that there is not.
        """
        memory = memory or {}
        for stage in self.stages:
            table_votes.check(stage, self.specs)
        bound = replace(self, stages=tuple(with_memory(stage, memory) for stage in self.stages))
        saved, loss, events, terms = bound._forward(ternary, batch)
        if self.axis_name is not None:
            loss, terms = jax.lax.pmean((loss, terms), self.axis_name)
        moves = jnp.isfinite(loss) & ~blocked
        ternary, report = bound._backward(ternary, saved, batch, step, key, moves)
        seen = [shards.gathered(own, self.axis_name) for own in events]
        ternary, memory = observed(self.stages, seen, ternary, memory, step, key, moves)
        return Swept(ternary, loss, moves, report, memory, terms)

    def _forward(self, ternary: Subtrees, batch: Any) -> tuple[list[Any], jax.Array, list[Events], dict[str, Any]]:
        """(what backward needs of every stage, the loss, the events of every stage stacked over A, the terms)."""
        carry: Carry = None
        saved, events, terms = [], [], {}
        for stage in self.stages:
            subtrees = {name: ternary[name] for name in stage.keys}
            if stage.stacked:
                carry, kept = self._stacked_forward(stage, ternary[stage.keys[0]], carry, batch)
                events.append({})
            else:
                carry, (kept, seen, terms) = self._micro_forward(stage, subtrees, carry, batch)
                events.append(seen)
            saved.append(kept)
        return saved, jnp.mean(carry), events, jax.tree.map(jnp.mean, terms)

    def _stacked_forward(
        self, stage: Stage, stack: Any, carry: Carry, batch: Any
    ) -> tuple[Carry, Callable[[jax.Array, jax.Array], Any]]:
        """(the carry after all layers, a function from a layer and a micro-batch, by number, to what their backward
        needs)."""
        (name,) = stage.keys
        layers, micro = jax.tree.leaves(stack)[0].shape[0], jax.tree.leaves(batch)[0].shape[0]
        memory = Kept(layers, micro)

        def layer(carry: Carry, own: Any, index: jax.Array) -> tuple[Carry, Any]:
            subtree = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), stack)
            carry, (kept, _, _) = self._forward_of(stage, {name: subtree}, carry, own)
            return carry, kept

        def through(room: list[jax.Array], entry: tuple[jax.Array, Carry, Any]) -> tuple[list[jax.Array], Carry]:
            """One micro-batch through all layers."""
            number, carry, own = entry

            def put(state: tuple[jax.Array, Carry, list[jax.Array]]) -> tuple[jax.Array, Carry, list[jax.Array]]:
                index, carry, room = state
                carry, kept = layer(carry, own, index)
                return index + 1, carry, memory.put(room, kept, index, number)

            start = (jnp.int32(0), carry, room)
            _, carry, room = jax.lax.while_loop(lambda state: state[0] < layers, put, start)
            return room, carry

        first = jax.tree.map(lambda leaf: leaf[0], (carry, batch))
        room = memory.room(lambda *arguments: layer(*arguments)[1], *first, jnp.int32(0))
        room, carry = carry_micro(through, room, (jnp.arange(micro, dtype=jnp.int32), carry, batch))
        return carry, partial(memory.get, room)

    def _backward(
        self, ternary: Subtrees, saved: list[Any], batch: Any, step: jax.Array, key: jax.Array, moves: jax.Array
    ) -> tuple[Subtrees, Report]:
        ternary = dict(ternary)
        report = empty_report()
        micro = jax.tree.leaves(batch)[0].shape[0]
        cotangent: Carry = jnp.ones((micro,), jnp.float32)
        pending: dict[str, Any] = {}
        waiting: RowVotes = {}
        for position in reversed(range(len(self.stages))):
            stage = self.stages[position]
            if stage.stacked:
                (name,) = stage.keys
                cotangent, ternary[name], report = self._stacked_backward(
                    stage, ternary[name], saved[position], cotangent, batch, step, key, moves, report
                )
                continue
            subtrees = {name: ternary[name] for name in stage.keys}
            # A matrix that two stages read votes in each, with random bits of its own.
            stage_key = jax.random.fold_in(key, 2**31 + position)
            # A vote that is added to no other is cast where its matrix moves, so that it is held for one at a time.
            shared = any(len(set(stage.keys) & set(other.keys)) for other in self.stages if other is not stage)
            sole = not shared and micro == 1
            cotangent, votes, rows = self._micro_backward(
                stage, subtrees, saved[position], cotangent, batch, step, stage_key, cast=not sole
            )
            waiting |= {path: tables.beside(self.rule, waiting.get(path, {}), vote) for path, vote in rows.items()}
            for name in stage.keys:
                total = jax.tree.map(jnp.add, pending.pop(name), votes[name]) if name in pending else votes[name]
                if any(name in earlier.keys for earlier in self.stages[:position]):
                    pending[name] = total
                else:
                    before, found = jax.tree.map(lambda leaf: leaf[None], (ternary[name], total))
                    casting = stage_key[None] if sole else None
                    moved, own = self._moved(name, before, found, step, key[None], moves, casting)
                    moved = jax.tree.map(lambda leaf: leaf[0], moved)
                    ternary[name], touched = table_votes.move(
                        self.rule, self._specs(name), name, moved, waiting, step, key, moves
                    )
                    report = add_reports(report, own, *touched)
        return ternary, report

    def _stacked_backward(
        self,
        stage: Stage,
        stack: Any,
        kept_by: Callable[[jax.Array, jax.Array], Any],
        cotangent: Carry,
        batch: Any,
        step: jax.Array,
        key: jax.Array,
        moves: jax.Array,
        report: Report,
    ) -> tuple[Carry, Any, Report]:
        (name,) = stage.keys
        count = self.layers_at_once if isinstance(self.layers_at_once, int) else self.layers_at_once[name]
        layers, micro = jax.tree.leaves(stack)[0].shape[0], jax.tree.leaves(batch)[0].shape[0]
        first = shards.first_of(micro, self.axis_name)
        sole = micro == 1  # A vote that is added to no other is cast where the layers move.
        if layers % count:
            raise ConfigError(f"layers_at_once must divide the {layers} layers of {name!r}, got {count}")

        # The stack is carried, not scanned over: a loop updates its carry in place, where scanned inputs and outputs
        # would be two copies of the state.
        def group(carry: tuple[Carry, Any, Report], indices: jax.Array) -> tuple[Any, None]:
            cotangent, stack, report = carry
            part = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, indices[0], count), stack)
            # The layers are copied out whole: were their slices read from the stack again after they have moved, the
            # compiler would have to keep a second stack.
            part = jax.lax.optimization_barrier(part)
            keys = jax.vmap(partial(layer_key, key))(indices)

            def through(entry: tuple[jax.Array, Carry, Any]) -> tuple[Carry, Any]:
                """One micro-batch back through the layers, which vote together."""
                number, cotangent, own = entry

                def layer(cotangent: Carry, entry: tuple[jax.Array, Any]) -> tuple[Carry, Any]:
                    index, subtree = entry
                    kept = kept_by(index, number)
                    cotangent, collected = self._backward_of(stage, {name: subtree}, kept, cotangent, own)
                    return cotangent, collected[name]

                cotangent, collected = jax.lax.scan(layer, cotangent, (indices, part), reverse=True)
                if sole:
                    return cotangent, collected
                votes = self._votes(name, part, collected, step, keys, first + number)
                return cotangent, shards.narrowed(votes, micro, self.rule.largest_vote)

            numbers = jnp.arange(micro, dtype=jnp.int32)
            cotangent, votes = map_micro(through, (numbers, cotangent, batch), summed=True)
            if not sole:
                votes = shards.summed(votes, micro, self.rule.largest_vote, self.axis_name)
            moved, own = self._moved(name, part, votes, step, keys, moves, keys if sole else None)
            stack = jax.tree.map(
                lambda leaf, new: jax.lax.dynamic_update_slice_in_dim(leaf, new, indices[0], 0), stack, moved
            )
            return (cotangent, stack, add_reports(report, own)), None

        indices = jnp.arange(layers, dtype=jnp.int32).reshape(-1, count)
        return jax.lax.scan(group, (cotangent, stack, report), indices, reverse=True)[0]

    def _micro_forward(self, stage: Stage, subtrees: Subtrees, carry: Carry, batch: Any) -> tuple[Carry, Any]:
        """The stage over every micro-batch: (carries stacked over A, (what backward needs, events, terms) stacked)."""
        return map_micro(lambda entry: self._forward_of(stage, subtrees, *entry), (carry, batch))

    def _forward_of(self, stage: Stage, subtrees: Subtrees, carry: Carry, batch: Any) -> tuple[Carry, Any]:
        """The stage over one micro-batch: (its carry, (what backward needs, events, terms))."""
        if self.remat:
            after, (seen, terms) = self._run(stage, {COLLECTION: subtrees}, carry, batch)
            return after, ((carry, seen if stage.recalls else {}), seen, terms)
        after, pull, extra = self._vjp(stage, subtrees, carry, batch)
        return after, (pull, *extra)

    def _backward_of(
        self, stage: Stage, subtrees: Subtrees, kept: Any, cotangent: Carry, batch: Any
    ) -> tuple[Carry, Subtrees]:
        """One micro-batch back: (cotangent of the carry, what the matrices collected)."""
        pull = self._vjp(stage, subtrees, kept[0], batch, kept[1])[1] if self.remat else kept
        _, collected, cotangent = pull.replace(args_res=[subtrees, *pull.args_res[1:]])(cotangent)
        return cotangent, collected

    def _micro_backward(
        self,
        stage: Stage,
        subtrees: Subtrees,
        saved: Any,
        cotangent: Carry,
        batch: Any,
        step: jax.Array,
        key: jax.Array,
        cast: bool = True,
    ) -> tuple[Carry, Subtrees, RowVotes]:
        """(cotangents of the carry stacked over A, votes summed over A and over the mapped axis, those on sparse tables
        side by side); without `cast` what this shard's one micro-batch collected, in place of summed votes."""
        micro = jax.tree.leaves(batch)[0].shape[0]
        first = shards.first_of(micro, self.axis_name)

        def one(entry: tuple[Any, Carry, Any, jax.Array]) -> tuple[tuple[Carry, RowVotes], Subtrees]:
            kept, cotangent, batch, number = entry
            cotangent, collected = self._backward_of(stage, subtrees, kept, cotangent, batch)
            rows = table_votes.cast(self.rule, self.specs, subtrees, collected, vote_key(key, step, first + number))
            if not cast:
                return (cotangent, rows), collected
            votes = {}
            for name in subtrees:
                subtree, found = jax.tree.map(lambda leaf: leaf[None], (subtrees[name], collected[name]))
                cast_alone = self._votes(name, subtree, found, step, key[None], first + number)
                votes[name] = jax.tree.map(lambda leaf: leaf[0], cast_alone)
            return (cotangent, rows), votes

        numbers = jnp.arange(micro, dtype=jnp.int32)
        (cotangent, rows), votes = map_micro(one, (saved, cotangent, batch, numbers), summed=True)
        if cast:
            votes = shards.summed(votes, micro, self.rule.largest_vote, self.axis_name)
        rows = {path: tables.stacked(self.rule, vote) for path, vote in shards.gathered(rows, self.axis_name).items()}
        return cotangent, votes, rows

    def _vjp(
        self, stage: Stage, subtrees: Subtrees, carry: Carry, batch: Any, seen: Events | None = None
    ) -> tuple[Carry, Any, Any]:
        """(the stage's carry, its pullback without the state, its events and terms): backward finds the state where it
        is, so that no copy of it waits beside the activations. `seen`: what a stage that recalls found before."""
        specs = {name: self.specs[name] for name in stage.keys}
        lookups = stage.lookups(batch) if stage.lookups else None
        uses = stage.uses(batch) if stage.uses else None
        probes = make_probes(subtrees, specs, self.rule, jnp.dtype(self.dtype), lookups, uses)

        recalled = {EVENTS: seen} if seen else {}

        def run(subtrees: Subtrees, probes: Any, carry: Carry) -> tuple[Carry, Any]:
            return self._run(stage, {COLLECTION: subtrees, PROBES: probes, **recalled}, carry, batch)

        return jax.vjp(run, subtrees, probes, carry, has_aux=True, saveable_args=(False, True, True))

    def _run(self, stage: Stage, variables: dict[str, Subtrees], carry: Carry, batch: Any) -> tuple[Carry, Any]:
        """(the stage's carry, (its events, its terms)); the latter two are not differentiated."""
        out: Any = stage.apply(variables, carry, batch)
        out, events = out if stage.observe is not None else (out, {})
        last = stage is self.stages[-1] and isinstance(out, tuple)
        out, terms = out if last else (out, {})
        return out, (events, terms)

    def _votes(
        self, name: str, subtrees: Any, collected: Any, step: jax.Array, keys: jax.Array, number: jax.Array
    ) -> Any:
        """Those of a micro-batch, numbered over all shards, on layers, stacked."""
        passing = self._passing(name, subtrees, step, keys, number)
        return together(self._vote, self._specs(name), name, subtrees, collected, passing)

    def _passing(self, name: str, subtrees: Any, step: jax.Array, keys: jax.Array, number: jax.Array | int) -> Any:
        """Keys of those."""
        return jax.vmap(lambda key: keys_of(name, subtrees, vote_key(key, step, number)))(keys)

    def _vote(self, spec: MatrixSpec, matrix: Any, collected: Any, key: jax.Array) -> Any:
        # Votes on the rows of sparse tables are not summed: they go another way.
        return {} if spec.sparse else matrix_vote(self.rule, spec, matrix, collected, key)

    def _moved(
        self,
        name: str,
        subtrees: Any,
        votes: Any,
        step: jax.Array,
        keys: jax.Array,
        moves: jax.Array,
        casting: jax.Array | None = None,
    ) -> tuple[Any, Report]:
        """The state of several layers, stacked, after their votes (none where `moves` is false), and the report over
        their matrices. With keys for `casting`, `votes` are what this shard's one micro-batch collected."""

        def one(spec: MatrixSpec, keys: Any, matrix: Any, found: Any) -> tuple[Any, Report]:
            own, passing = keys
            if casting is not None:
                found = self._vote(spec, matrix, found, passing)
                found = shards.summed(found, 1, self.rule.largest_vote, self.axis_name)
            counted = shards.widened(found)
            counted["count"] = jnp.where(moves, counted["count"], 0)
            return self.rule.update(dict(matrix), counted, spec, step, own)

        def each(spec: MatrixSpec, matrix: Any, found: Any, own: jax.Array, passing: jax.Array) -> tuple[Any, Report]:
            if spec.sparse:  # Its rows move by themselves.
                return matrix, empty_report()
            if spec.experts and spec.weights > MOST_TOGETHER:
                return by_turns(one, spec, (own, passing), matrix, found)
            return each_expert(one, spec, (own, passing), matrix, dense_gradients(spec, found))

        lasting = jax.vmap(lambda key: keys_of(name, subtrees, key))(keys)
        first = shards.first_of(1, self.axis_name)
        passing = self._passing(name, subtrees, step, keys if casting is None else casting, first)
        pairs = together(each, self._specs(name), name, subtrees, votes, lasting, passing)
        reports: list[Report] = []

        def split(path: str, matrix: Any, pair: tuple[Any, Report]) -> Any:
            reports.append(jax.tree.map(jnp.sum, pair[1]))
            return pair[0]

        return map_matrices(split, subtrees, pairs, prefix=name), add_reports(*reports)

    def _specs(self, name: str) -> dict[str, MatrixSpec]:
        return flatten_specs(self.specs[name], name)
