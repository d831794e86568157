"""The ARB model's configuration: flat, so that a flag or a preset names one number, and the parts' own made from it."""

from dataclasses import dataclass
from functools import cached_property

from arbs_jax.errors import ConfigError
from arbs_jax.models.arb.attention import AttentionConfig
from arbs_jax.models.arb.edges import EdgeConfig
from arbs_jax.models.arb.experts import ExpertsConfig
from arbs_jax.models.arb.graph import GraphConfig
from arbs_jax.models.arb.head import HeadConfig, RouterConfig, TalkerConfig, VideoConfig
from arbs_jax.models.arb.ledger import LedgerConfig
from arbs_jax.models.arb.loop import LoopConfig
from arbs_jax.models.arb.memgram import MemGramConfig
from arbs_jax.models.arb.sequencer import SequencerConfig
from arbs_jax.models.arb.vq import VQConfig
from arbs_jax.models.checks import require_dtype, require_positive


@dataclass(frozen=True)
class ArbConfig:
    """Shape of an ARB model, which of its parts it has, and what each term of its loss weighs."""

    width: int = 128
    """Channels of the residual stream."""
    dtype: str = "float32"
    """Activations: "float32" or "bfloat16"."""
    remat: bool = True
    """Recompute every stage in backward in place of keeping its activations."""
    context: int = 1024
    """Longest sequence the model is meant for, in bytes."""
    embedding: int = 64
    """Channels of one byte."""
    sequencer_hidden: int = 320
    """Channels of the sequencer's gated layer."""
    vq: bool = True
    """Whether positions get motifs from the shared codebook."""
    vq_rows: int = 4096
    """Rows of the shared codebook: how many motifs there are."""
    vq_dim: int = 64
    """Channels of the codebooks' rows."""
    kg_rows: int = 4096
    """Rows of the codebook of composite motifs; 0 leaves composites out."""
    kg_hidden: int = 64
    """Channels of the network that proposes composites."""
    memgram: bool = False
    """Whether n-grams of motifs are remembered."""
    memgram_rows: int = 65_536
    """Rows of the n-gram table."""
    attention: bool = True
    """Whether there are context blocks and a ledger."""
    layers: int = 2
    """Context blocks."""
    heads: int = 4
    """Attention heads."""
    head_dim: int = 32
    """Channels of a head."""
    rope_dim: int = 16
    """Rotary channels among them."""
    latent: int = 64
    """Channels of the latent from which keys and values are made."""
    query_latent: int = 0
    """Channels of a latent from which queries are made; 0 makes them from the stream."""
    hidden: int = 320
    """Channels of a context block's gated layer."""
    ledger_stride: int = 16
    """Positions that one slot of the ledger stands for."""
    ledger_slots: int = 256
    """Slots of the ledger."""
    graph: bool = True
    """Whether motifs send messages over edges."""
    edge_buckets: int = 1 << 16
    """Buckets of edges, by destination."""
    lookback: int = 64
    """Positions back from which messages come."""
    moe: bool = True
    """Whether there are experts."""
    experts: int = 8
    """Experts of the loop."""
    expert_hidden: int = 128
    """Channels of an expert's gated layer."""
    top_k: int = 2
    """Experts that a position reaches."""
    router_hidden: int = 0
    """Channels in which positions are compared with experts' centroids; 0 compares them in the stream's."""
    max_moe_iters: int = 4
    """Iterations of the loop, at most."""
    head_layers: int = 1
    """Gated layers of the byte head."""
    head_hidden: int = 320
    """Channels of each."""
    modality_hidden: int = 0
    """Channels of the gated layer of the video and talker heads; 0 leaves them and the output router out."""
    weight_commitment: float = 1.0
    """Of the losses that bring inputs and rows of the codebooks together."""
    weight_spread: float = 1.0
    """Of how far the codebooks' inputs are from filling their space."""
    weight_halting: float = 0.0003
    """Of the expected number of iterations; ten times as much has positions halt after the first."""
    weight_balance: float = 0.01
    """Of the experts' uneven load."""
    weight_graph: float = 0.1
    """Of predicting the next position's motif from the loop's output."""
    shield: tuple[str, ...] = ("commitment",)
    """Terms that do not reach past their own part, into the stream: of `SHIELDABLE`."""

    def __post_init__(self) -> None:
        require_dtype("model", self)
        require_positive("model", self, "width", "context", "layers", "vq_rows", "vq_dim", "max_moe_iters")
        for name in ("kg_rows", "modality_hidden", "router_hidden"):
            if getattr(self, name) < 0:
                raise ConfigError(f"model.{name} must be at least 0, got {getattr(self, name)}")
        for name in TERMS:
            if not (weight := getattr(self, f"weight_{name}")) >= 0:
                raise ConfigError(f"model.weight_{name} must be at least 0, got {weight}")
        if not self.vq and (self.graph or self.memgram):
            needs = "--disable-graph as well" if self.graph else "--enable-memory left out"
            raise ConfigError(f"graph and n-gram memory are made of motifs: --disable-vq needs {needs}")
        unknown = sorted(set(self.shield) - set(SHIELDABLE))
        if unknown:
            raise ConfigError(f"model.shield must name terms of {', '.join(SHIELDABLE)}, got {', '.join(unknown)}")
        # Lists, as they come from JSON, would make the configuration unhashable.
        object.__setattr__(self, "shield", tuple(self.shield))
        if self.attention:
            self.ledger_part.check_context(self.context)
        for part in ("sequencer_part", "vq_part", "kg_part", "attention_part", "loop_part", "head_part"):
            getattr(self, part)  # each refuses what it cannot be

    @cached_property
    def sequencer_part(self) -> SequencerConfig:
        """Of the text sequencer."""
        return SequencerConfig(self.embedding, self.sequencer_hidden, self.width, self.dtype)

    @cached_property
    def vq_part(self) -> VQConfig | None:
        """Of the shared codebook."""
        return self._book(self.vq_rows) if self.vq else None

    @cached_property
    def kg_part(self) -> VQConfig | None:
        """Of the composites' codebook."""
        return self._book(self.kg_rows) if self.vq and self.kg_rows else None

    @cached_property
    def memgram_part(self) -> MemGramConfig | None:
        """Of the n-gram memory."""
        if not self.memgram:
            return None
        return MemGramConfig(rows=self.memgram_rows, dim=self.vq_dim, width=self.width, dtype=self.dtype)

    @cached_property
    def attention_part(self) -> AttentionConfig | None:
        """Of the context blocks."""
        if not self.attention:
            return None
        return AttentionConfig(
            width=self.width,
            layers=self.layers,
            heads=self.heads,
            head_dim=self.head_dim,
            rope_dim=self.rope_dim,
            latent=self.latent,
            query_latent=self.query_latent,
            hidden=self.hidden,
            context=self.context,
            dtype=self.dtype,
            remat=self.remat,
        )

    @cached_property
    def ledger_part(self) -> LedgerConfig:
        """Of the ledger."""
        return LedgerConfig(latent=self.latent, stride=self.ledger_stride, capacity=self.ledger_slots)

    @cached_property
    def loop_part(self) -> LoopConfig | None:
        """Of the graph and the experts."""
        if not self.graph and not self.moe:
            return None
        edges = EdgeConfig(motifs=self.vq_rows, buckets=self.edge_buckets)
        return LoopConfig(
            graph=GraphConfig(edges, lookback=self.lookback) if self.graph else None,
            experts=self._experts if self.moe else None,
            max_iters=self.max_moe_iters,
            shielded="halting" in self.shield,
            remat=self.remat,
        )

    @property
    def _experts(self) -> ExpertsConfig:
        return ExpertsConfig(
            self.experts,
            self.expert_hidden,
            self.top_k,
            router_hidden=self.router_hidden,
            shielded="balance" in self.shield,
        )

    @cached_property
    def head_part(self) -> HeadConfig:
        """Of the byte head."""
        return HeadConfig(self.width, self.head_hidden, self.head_layers, self.dtype)

    @cached_property
    def modality_part(self) -> tuple[HeadConfig, VideoConfig, TalkerConfig, RouterConfig] | None:
        """Of the heads for other modalities and the router between heads."""
        if not self.modality_hidden:
            return None
        trunk = HeadConfig(self.width, self.modality_hidden, 1, self.dtype)
        return trunk, VideoConfig(), TalkerConfig(), RouterConfig()

    def _book(self, rows: int) -> VQConfig:
        shielded = "commitment" in self.shield
        return VQConfig(rows=rows, width=self.width, dim=self.vq_dim, shielded=shielded, dtype=self.dtype)


TERMS = ("commitment", "spread", "halting", "balance", "graph")
"""Terms of the loss beside the prediction; each is weighed by `ArbConfig.weight_<name>`."""

SHIELDABLE = ("commitment", "halting", "balance", "graph")
"""Terms that `ArbConfig.shield` may keep from the stream; commitment and spread go together."""
