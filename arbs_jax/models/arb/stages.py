"""The ARB model as a chain of stages for layer-by-layer training, with its losses.

What stages hand on is a dict: `x` and, once the reader has run, `context`, activations `(B, S, D)`; `ids` float32
(B, S), motifs as numbers that are exact (below 2^24) and that a pullback can carry; `latent` float32 (B, S, K), what
was looked up, which the position before is to foresee; `terms`, the losses so far by name, float32 ().
"""

from typing import Any

import jax
import jax.numpy as jnp

from arbs_jax.layers import MEMORY, TernaryConfig
from arbs_jax.models.arb.attention import ContextBlock
from arbs_jax.models.arb.config import TERMS, ArbConfig
from arbs_jax.models.arb.edge_updates import observe_edges
from arbs_jax.models.arb.head import HeadLayer
from arbs_jax.models.arb.memgram import observe_memgram
from arbs_jax.models.arb.model import ArbLM
from arbs_jax.models.arb.sequencer import TRIGRAM, targets
from arbs_jax.models.arb.usage import observe_vq
from arbs_jax.models.arb.vq import vq_events
from arbs_jax.models.byte_lm import cross_entropy
from arbs_jax.models.stages import EVENTS, Stage, Subtrees, weights_of

Variables = dict[str, Subtrees]


def arb_stages(config: ArbConfig, ternary: TernaryConfig) -> tuple[Stage, ...]:
    """A stage for each part that there is; the batch is tokens, integer (B, T+1), of which T are read."""
    parts = _Parts(config, ternary)
    stages = [Stage(("sequencer",), parts.sequence)]
    if config.vq_part is not None:
        there = {"vq": config.vq_part, "kg": config.kg_part, "memgram": config.memgram_part}
        keys = tuple(name for name, part in there.items() if part is not None)
        own = {"lookups": parts.lookups, "memory": keys, "observe": parts.count, "recalls": True}
        stages.append(Stage(keys, parts.motifs, **own))
    if config.attention_part is not None:
        stages += [Stage(("blocks",), parts.block, stacked=True), Stage(("reader",), parts.remember)]
    if config.loop_part is not None:
        graph = config.loop_part.graph is not None
        memory, observe = (("edges",), parts.meet) if graph else ((), None)
        stages.append(Stage(("loop",), parts.reason, uses=parts.uses, memory=memory, observe=observe))
    entry = {"head_entry": config.attention_part, "foresight": config.vq_part}
    if keys := tuple(name for name, part in entry.items() if part is not None):
        stages.append(Stage(keys, parts.enter_head))
    if config.head_layers:
        stages.append(Stage(("head_layers",), parts.head_layer, stacked=True))
    return (*stages, Stage(("head_logits",), parts.answer))


class _Parts:
    """The stages' functions; pure, they hold what is static."""

    def __init__(self, config: ArbConfig, ternary: TernaryConfig):
        self.config = config
        self.ternary = ternary
        # Linen types `apply` as a union with what mutable collections return; none is mutable here.
        self.model: Any = ArbLM(config, ternary)
        self.graph = None if config.loop_part is None else config.loop_part.graph
        self.one_head_layer: Any = HeadLayer(config.head_part, ternary)
        self.one_block: Any = None if config.attention_part is None else ContextBlock(config.attention_part, ternary)

    def run(self, method: Any, variables: Variables, *args: Any) -> Any:
        """A method of the model on the subtrees that a stage was given."""
        return self.model.apply(weights_of(variables), *args, method=method)

    def sequence(self, variables: Variables, carry: None, tokens: jax.Array) -> dict[str, Any]:
        return {"x": self.run(ArbLM.sequence, variables, tokens[:, :-1]), "terms": {}}

    def lookups(self, tokens: Any) -> dict[str, int]:
        """Rows that one micro-batch looks up in each sparse table."""
        config, positions = self.config, tokens.shape[0] * (tokens.shape[1] - TRIGRAM)
        found = {"vq/codebook": positions}
        if config.kg_part is not None:
            found["kg/book/codebook"] = positions
        if config.memgram_part is not None:
            found["memgram/structural"] = positions * len(config.memgram_part.orders)
        return found

    def uses(self, tokens: Any) -> dict[str, tuple[int, int]]:
        """(iterations, rows) of the experts' matrices."""
        config = self.config
        if not config.moe:
            return {}
        rows = config.top_k * tokens.shape[0] * (tokens.shape[1] - TRIGRAM)
        names = ("gate_proj", "up_proj", "down_proj")
        return {f"loop/loop/experts/{name}": (config.max_moe_iters, rows) for name in names}

    def motifs(self, variables: Variables, carry: dict[str, Any], tokens: jax.Array) -> tuple[dict[str, Any], Any]:
        seen, positions = variables.get(EVENTS, {}), carry["x"].shape[:2]
        known = {name: seen[name]["ids"].reshape(positions) for name in ("vq", "kg") if name in seen}
        x, found, composite = self.run(ArbLM.motifs, variables, carry["x"], variables[MEMORY], None, None, known)
        books = [part for part in (found, composite) if part is not None]
        terms = {
            "commitment": jnp.mean(sum(part.commitment_BxS + part.codebook_BxS for part in books)),
            "spread": sum(part.spread for part in books),
        }
        events = {"vq": vq_events(found)}
        if composite is not None:
            events["kg"] = vq_events(composite)
        if self.config.memgram_part is not None:
            events["memgram"] = {"ids": found.ids_BxS}
        ids = found.ids_BxS.astype(jnp.float32)
        return {"x": x, "ids": ids, "latent": found.latent_BxSxK, "terms": carry["terms"] | terms}, events

    def count(
        self, subtrees: Subtrees, memory: Subtrees, events: Any, step: jax.Array, key: jax.Array
    ) -> tuple[Subtrees, Subtrees]:
        """Usage of the codebooks, with dead rows redrawn, and the n-grams of this step."""
        config, subtrees, memory = self.config, dict(subtrees), dict(memory)
        for number, (name, part) in enumerate((("vq", config.vq_part), ("kg", config.kg_part))):
            if part is None:
                continue
            book = subtrees[name] if name == "vq" else subtrees[name]["book"]
            own = jax.random.fold_in(key, number)
            leaves, usage = observe_vq(
                dict(book["codebook"]), memory[name], events[name], step, own, part, self.ternary
            )
            book = {**book, "codebook": leaves}
            subtrees[name] = book if name == "vq" else {**subtrees[name], "book": book}
            memory[name] = usage
        if config.memgram_part is not None:
            ids = events["memgram"]["ids"]
            memory["memgram"] = observe_memgram(memory["memgram"], ids.reshape(-1, ids.shape[-1]), config.memgram_part)
        return subtrees, memory

    def block(self, variables: Variables, carry: dict[str, Any], tokens: jax.Array) -> dict[str, Any]:
        return {**carry, "x": self.one_block.apply(weights_of(variables, "blocks"), carry["x"])[0]}

    def remember(self, variables: Variables, carry: dict[str, Any], tokens: jax.Array) -> dict[str, Any]:
        context, _ = self.run(ArbLM.remember, variables, carry["x"])
        return {**carry, "context": context}

    def reason(self, variables: Variables, carry: dict[str, Any], tokens: jax.Array) -> Any:
        ids = carry["ids"].astype(jnp.int32) if "ids" in carry else jnp.full(carry["x"].shape[:2], -1, jnp.int32)
        memory = variables.get(MEMORY, {})
        thought = self.run(ArbLM.reason, variables, carry["x"], carry.get("context"), ids, memory)
        terms = {"halting": thought.halting_cost}
        if self.config.moe:
            terms |= {"balance": thought.balance, "largest_load": jax.lax.stop_gradient(jnp.max(thought.load_X))}
        after = {**carry, "x": thought.x_BxSxD, "terms": carry["terms"] | terms}
        if self.graph is None:
            return after
        return after, {"ids": ids, "agreement": thought.agreement_BxSxW}

    def meet(
        self, subtrees: Subtrees, memory: Subtrees, events: Any, step: jax.Array, key: jax.Array
    ) -> tuple[Subtrees, Subtrees]:
        """Edges after the meetings of this step."""
        assert self.graph is not None
        edges = observe_edges(self.graph.edges, memory["edges"], events["ids"], events["agreement"], step)
        return subtrees, {"edges": edges}

    def enter_head(self, variables: Variables, carry: dict[str, Any], tokens: jax.Array) -> dict[str, Any]:
        config, x, terms = self.config, carry["x"], carry["terms"]
        if config.vq_part is not None:
            read = jax.lax.stop_gradient(x) if "graph" in config.shield else x
            foreseen = self.run(ArbLM.foresee, variables, read)
            away = jnp.square(foreseen[:, :-1] - jax.lax.stop_gradient(carry["latent"][:, 1:]))
            terms = {**terms, "graph": jnp.mean(away)}
        return {"x": self.run(ArbLM.enter_head, variables, x, carry.get("context")), "terms": terms}

    def head_layer(self, variables: Variables, carry: dict[str, Any], tokens: jax.Array) -> dict[str, Any]:
        return {**carry, "x": self.one_head_layer.apply(weights_of(variables, "head_layers"), carry["x"])[0]}

    def answer(self, variables: Variables, carry: dict[str, Any], tokens: jax.Array) -> tuple[jax.Array, Any]:
        """(the weighted loss, the terms by name)."""
        config = self.config
        logits = self.run(ArbLM.leave_head, variables, carry["x"])
        terms = {"prediction": cross_entropy(logits, targets(tokens)).mean(), **carry["terms"]}
        weights = {name: getattr(config, f"weight_{name}") for name in TERMS}
        loss = terms["prediction"] + sum(weight * terms[name] for name, weight in weights.items() if name in terms)
        return loss, terms
