"""The ARB model for text: bytes to trigrams, motifs, context, the graph's loop, bytes again.

    sequence    bytes to positions                                    sequencer
    motifs      each position's motif and composite, added to it      vq, kg, memgram
    blocks      causal latent attention and gated layers              blocks
    remember    what the ledger holds of the past: the context        reader
    reason      graph and experts, as often as a position needs       loop
    answer      logits                                                head, foresight

One method a stage, each on what the one before gave, so that training can go through them one by one
(`arbs_jax.models.arb.stages`) and the state tree has a subtree for each part. Arrays are suffixed by their axes: B
batch, T bytes, S positions (T - 2), D width, K channels of a codebook's row, V vocabulary.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from arbs_jax.layers import TernaryConfig, TernaryDense, TernaryRMSNorm
from arbs_jax.models.arb.attention import context_blocks
from arbs_jax.models.arb.config import ArbConfig
from arbs_jax.models.arb.edges import empty_edges
from arbs_jax.models.arb.head import ByteHead, OutputRouter, TalkerHead, VideoHead
from arbs_jax.models.arb.kg import CompositeCodebook
from arbs_jax.models.arb.loop import MoEGraph
from arbs_jax.models.arb.memgram import MemGram, empty_memgram
from arbs_jax.models.arb.reader import LedgerReader
from arbs_jax.models.arb.sequencer import TextSequencer
from arbs_jax.models.arb.usage import empty_usage
from arbs_jax.models.arb.vq import SharedVQ, VQOutput

Memory = dict[str, Any]


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
    """Tokens, integer `(B, T)`, to float32 logits `(B, T - 2, 288)`; see the module."""

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
        if config.vq_part is not None:
            self.foresight = TernaryDense(features=config.vq_dim, config=ternary)
        if config.modality_part is not None:
            trunk, video, talker, router = config.modality_part
            self.video = VideoHead(trunk, video, ternary)
            self.talker = TalkerHead(trunk, talker, ternary)
            self.router = OutputRouter(router, ternary)

    def __call__(self, tokens_BxT: jax.Array, memory: Memory | None = None, whole: bool = False) -> jax.Array:
        """Logits at every position: position i has read bytes up to i + 2 and predicts byte i + 3.

        Args:
            tokens_BxT: at least three bytes a row.
            memory: bookkeeping (`empty_memory`), None for a fresh one.
            whole: run what logits do not need, too, so that every matrix is met (`arbs_jax.votes.matrix_specs`).

        Raises:
            ConfigError: fewer than three bytes.
        """
        memory = empty_memory(self.config) if memory is None else memory
        x_BxSxD, found, _ = self.motifs(self.sequence(tokens_BxT), memory)
        x_BxSxD, context_BxSxD = self.remember(self.attend(x_BxSxD))
        thought = None
        if self.config.loop_part is not None:
            none_BxS = jnp.full(x_BxSxD.shape[:2], -1, jnp.int32)
            thought = self.reason(x_BxSxD, context_BxSxD, none_BxS if found is None else found.ids_BxS, memory)
        logits_BxSxV = self.answer(x_BxSxD if thought is None else thought.x_BxSxD, context_BxSxD)
        if whole or self.is_initializing():
            self._rest(x_BxSxD, context_BxSxD)
        return logits_BxSxV

    def sequence(self, tokens_BxT: jax.Array) -> jax.Array:
        """Positions `(B, S, D)`."""
        return self.sequencer(tokens_BxT)

    def motifs(self, x_BxSxD: jax.Array, memory: Memory) -> tuple[jax.Array, VQOutput | None, VQOutput | None]:
        """(positions with their motifs, the lookups in the shared codebook and in that of composites)."""
        if self.config.vq_part is None:
            return x_BxSxD, None, None
        found, composite = self.vq(x_BxSxD), None
        made_BxSxD = x_BxSxD + found.output_BxSxD
        if self.config.kg_part is not None:
            composite = self.kg(found.output_BxSxD)
            made_BxSxD = made_BxSxD + composite.output_BxSxD
        if self.config.memgram_part is not None:
            made_BxSxD = made_BxSxD + self.memgram(found.ids_BxS, memory["memgram"])
        return made_BxSxD, found, composite

    def attend(self, x_BxSxD: jax.Array) -> jax.Array:
        """Positions after the context blocks."""
        return x_BxSxD if self.config.attention_part is None else self.blocks(x_BxSxD, None, 0)[0]

    def remember(self, x_BxSxD: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """(the positions, what the ledger adds to them as context)."""
        return x_BxSxD, None if self.config.attention_part is None else self.reader(x_BxSxD)[0]

    def reason(self, x_BxSxD: jax.Array, context_BxSxD: jax.Array | None, ids_BxS: jax.Array, memory: Memory) -> Any:
        """What the loop makes of the positions and their motifs, int32, -1 for none: a `LoopOutput`."""
        return self.loop(x_BxSxD, ids_BxS, memory.get("edges"), context_BxSxD)

    def answer(self, x_BxSxD: jax.Array, context_BxSxD: jax.Array | None) -> jax.Array:
        """Logits float32 `(B, S, V)`."""
        return self.head(x_BxSxD, context_BxSxD)

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
