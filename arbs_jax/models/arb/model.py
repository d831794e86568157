"""The ARB model for text: bytes to trigrams, motifs, context, the graph's loop, bytes again.

    sequence    bytes to positions                                    sequencer
    motifs      each position's motif and composite, added to it      vq, kg, memgram
    blocks      causal latent attention and gated layers              blocks
    remember    what the ledger holds of the past: the context        reader
    reason      graph and experts, as often as a position needs       loop
    foresee     the next position's motif                             foresight
    answer      logits                                                head_entry, head_layers, head_logits

One method a stage, each on what the one before gave, so that training can go through them one by one
(`arbs_jax.models.arb.stages`) and the state tree has a subtree for each part. Arrays are suffixed by their axes: B
batch, T bytes, S positions (T - 2), D width, K channels of a codebook's row, V vocabulary.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from arbs_jax.layers import TernaryConfig, TernaryDense, TernaryRMSNorm
from arbs_jax.models.arb.attention import context_blocks
from arbs_jax.models.arb.config import ArbConfig
from arbs_jax.models.arb.decoding import Past, past_after
from arbs_jax.models.arb.edges import empty_edges
from arbs_jax.models.arb.head import ByteHead, OutputRouter, TalkerHead, VideoHead
from arbs_jax.models.arb.kg import CompositeCodebook
from arbs_jax.models.arb.ledger import Ledger
from arbs_jax.models.arb.loop import History, MoEGraph
from arbs_jax.models.arb.memgram import MemGram, empty_memgram
from arbs_jax.models.arb.reader import LedgerReader
from arbs_jax.models.arb.sequencer import TextSequencer
from arbs_jax.models.arb.usage import empty_usage
from arbs_jax.models.arb.vq import SharedVQ, VQOutput
from arbs_jax.models.byte_lm import Cache

Memory = dict[str, Any]

MOTIF_SCALE = 0.25
"""Of motifs' vectors beside what a position says itself. They say it once more, in words that change while codebooks
learn: at full size they cost 0.02 nats a byte (experiments/2026_11_21_arb_learning)."""


def empty_memory(config: ArbConfig) -> Memory:
    """The bookkeeping of a fresh model: usage counts `vq` and `kg`, `memgram`, `edges`, where there are such parts."""
    made: Memory = {}
    if config.vq_part is not None:
        made["vq"] = empty_usage(config.vq_part)
    if config.kg_part is not None:
        made["kg"] = empty_usage(config.kg_part)
    if config.memgram_part is not None:
        made["memgram"] = empty_memgram(config.memgram_part)
    if config.loop_part is not None and config.loop_part.graph is not None:
        made["edges"] = empty_edges(config.loop_part.graph.edges)
    return made


class ArbLM(nn.Module):
    """Tokens, integer `(B, T)`, to float32 logits `(B, T - 2, 288)`; after a past `(B, T, 288)`. See the module."""

    config: ArbConfig
    ternary: TernaryConfig

    def setup(self) -> None:
        config, ternary = self.config, self.ternary
        self.norm = TernaryRMSNorm()
        self.sequencer = TextSequencer(config.sequencer_part, ternary)
        if config.vq_part is not None:
            self.vq = SharedVQ(config.vq_part, ternary)
        if config.kg_part is not None:
            self.kg = CompositeCodebook(config.kg_part, ternary, hidden=config.kg_hidden)
        if config.memgram_part is not None:
            self.memgram = MemGram(config.memgram_part, ternary)
        if config.attention_part is not None:
            self.blocks = context_blocks(config.attention_part, ternary)
            self.reader = LedgerReader(config.attention_part, config.ledger_part, ternary)
        if config.loop_part is not None:
            self.loop = MoEGraph(config.loop_part, ternary)
        self.head = ByteHead(config.head_part, ternary)
        nn.share_scope(self, self.head)  # Its parts are stages, which are subtrees of the model.
        if config.vq_part is not None:
            self.foresight = TernaryDense(features=config.vq_dim, config=ternary)
        if config.modality_part is not None:
            trunk, video, talker, router = config.modality_part
            self.video = VideoHead(trunk, video, ternary)
            self.talker = TalkerHead(trunk, talker, ternary)
            self.router = OutputRouter(router, ternary)

    def __call__(
        self,
        tokens_BxT: jax.Array,
        memory: Memory | None = None,
        whole: bool = False,
        past: Past | None = None,
        start: jax.Array | int = 0,
    ):
        """Logits at every position: position i has read bytes up to i + 2 and predicts byte i + 3.

        Args:
            tokens_BxT: at least three bytes a row, those of the past included.
            memory: bookkeeping (`empty_memory`), None for a fresh one.
            whole: run what logits do not need, too, so that every matrix is met (`arbs_jax.votes.matrix_specs`).
            past: of the positions before these (`arbs_jax.models.arb.decoding`); the past after them is then returned
                beside the logits. None for a whole text.
            start: how many positions came before.

        Raises:
            ConfigError: fewer than three bytes.
        """
        memory = empty_memory(self.config) if memory is None else memory
        before = Past() if past is None else past
        x_BxSxD = self.sequence(tokens_BxT, before.tail_Bx2)
        x_BxSxD, found, _ = self.motifs(x_BxSxD, memory, before.motif_BxD, before.ids_BxH)
        x_BxSxD, cache = self.attend(x_BxSxD, before.cache, start)
        context_BxSxD, ledger = self.remember(x_BxSxD, before.ledger, start)
        reasoned_BxSxD, heard = x_BxSxD, None
        if self.config.loop_part is not None:
            ids_BxS = jnp.full(x_BxSxD.shape[:2], -1, jnp.int32) if found is None else found.ids_BxS
            thought = self.reason(x_BxSxD, context_BxSxD, ids_BxS, memory, before.heard)
            thought, heard = (thought, None) if before.heard is None else thought
            reasoned_BxSxD = thought.x_BxSxD
        logits_BxSxV = self.answer(reasoned_BxSxD, context_BxSxD)
        if whole or self.is_initializing():
            self._rest(x_BxSxD, context_BxSxD)
        if past is None:
            return logits_BxSxV
        return logits_BxSxV, past_after(past, tokens_BxT, found, cache, ledger, heard)

    def sequence(self, tokens_BxT: jax.Array, tail_Bx2: jax.Array | None = None) -> jax.Array:
        """Positions `(B, S, D)`; with the two bytes before the tokens, one for each token."""
        return self.sequencer(tokens_BxT, tail_Bx2)

    def motifs(
        self,
        x_BxSxD: jax.Array,
        memory: Memory,
        motif_BxD: jax.Array | None = None,
        ids_BxH: jax.Array | None = None,
        known: Mapping[str, jax.Array] | None = None,
    ) -> tuple[jax.Array, VQOutput | None, VQOutput | None]:
        """(positions with their motifs, the lookups in the shared codebook and in that of composites).

        Of the positions before, `motif_BxD` is the last motif's vector and `ids_BxH` what n-grams reach back to.
        `known` are ids int32 (B, S) that were found before in the codebooks `vq` and `kg`.
        """
        known = known or {}
        if self.config.vq_part is None:
            return x_BxSxD, None, None
        found, composite = self.vq(x_BxSxD, known.get("vq")), None
        made_BxSxD = x_BxSxD + MOTIF_SCALE * found.output_BxSxD
        if self.config.kg_part is not None:
            composite = self.kg(found.output_BxSxD, motif_BxD, known.get("kg"))
            made_BxSxD = made_BxSxD + MOTIF_SCALE * composite.output_BxSxD
        if self.config.memgram_part is not None:
            made_BxSxD = made_BxSxD + self.memgram(found.ids_BxS, memory["memgram"], ids_BxH)
        return made_BxSxD, found, composite

    def attend(
        self, x_BxSxD: jax.Array, cache: Cache | None = None, start: jax.Array | int = 0
    ) -> tuple[jax.Array, Cache | None]:
        """(positions after the context blocks, the cache with them)."""
        return (x_BxSxD, None) if self.config.attention_part is None else self.blocks(x_BxSxD, cache, start)

    def remember(
        self, x_BxSxD: jax.Array, ledger: Ledger | None = None, start: jax.Array | int = 0
    ) -> tuple[jax.Array | None, Ledger | None]:
        """(what the ledger adds to the positions as context, the ledger after them)."""
        return (None, None) if self.config.attention_part is None else self.reader(x_BxSxD, ledger, start)

    def reason(
        self,
        x_BxSxD: jax.Array,
        context_BxSxD: jax.Array | None,
        ids_BxS: jax.Array,
        memory: Memory,
        heard: History | None = None,
    ) -> Any:
        """What the loop makes of the positions and their motifs, int32, -1 for none: a `LoopOutput`; with what was
        heard before, that and what may be heard after."""
        return self.loop(x_BxSxD, ids_BxS, memory.get("edges"), context_BxSxD, heard)

    def answer(self, x_BxSxD: jax.Array, context_BxSxD: jax.Array | None) -> jax.Array:
        """Logits float32 `(B, S, V)`."""
        return self.head(x_BxSxD, context_BxSxD)

    def enter_head(self, x_BxSxD: jax.Array, context_BxSxD: jax.Array | None) -> jax.Array:
        """What the byte head's first layer reads."""
        return self.head.enter(x_BxSxD, context_BxSxD)

    def leave_head(self, x_BxSxD: jax.Array) -> jax.Array:
        """Logits float32 `(B, S, V)` of what the byte head's last layer gives."""
        return self.head.logits(x_BxSxD)

    def foresee(self, x_BxSxD: jax.Array) -> jax.Array:
        """The next position's motif, as a float32 direction `(B, S, K)` of root mean square 1."""
        return self.norm(self.foresight(self.norm(x_BxSxD)).astype(jnp.float32))

    def _rest(self, x_BxSxD: jax.Array, context_BxSxD: jax.Array | None) -> None:
        """Meets what only training uses, and the heads that text does not use but that persist with the rest."""
        if self.config.vq_part is not None:
            self.foresee(x_BxSxD)
        if self.config.modality_part is not None:
            self.video(x_BxSxD, context_BxSxD)
            self.talker(x_BxSxD, context_BxSxD)
            self.router(x_BxSxD)
