"""Edges between motifs: integers that count who follows whom, and to what avail.

A motif's messages reach the motifs that come after it (`graph.MessagePassing`). Whether they should is no weight and
has no gradient; it is counted. Two motifs *meet* where one follows the other at 1 to `window` positions. Each meeting
brings an *agreement*, +1, 0 or -1: whether the earlier one's message pointed the later one's way. An edge has a sign
and a score; meetings that agree with its sign raise the score, others lower it, its rivals' meetings wear it down, and
only edges that score enough carry messages. Graphs of up to `dense_motifs` motifs keep a score for every pair, its sign
being the edge's; larger ones keep the edges that matter in a fixed number of slots, in buckets by a hash of the
destination:

    source       int32 (buckets, degree)   motif that sends, -1 in an empty slot
    destination  int32 (buckets, degree)   motif that receives, -1 in an empty slot
    sign         int8  (buckets, degree)   +1 or -1, 0 in an empty slot
    score        int8  (buckets, degree)   `evict` to 127, 0 in an empty slot

Ten bytes a slot, integers in and integers out. This module holds the state and reads it; `edge_updates` counts.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from arbs_jax.errors import ConfigError
from arbs_kernels.noise import mix

Edges = dict[str, jax.Array]


@dataclass(frozen=True)
class EdgeConfig:
    """Size of an edge state, and how edges come and go."""

    motifs: int
    """Motif ids are in `[0, motifs)`; positions with another id have no motif: they neither send nor receive."""
    buckets: int = 1 << 16
    """Groups of slots; motifs share them by hash."""
    degree: int = 8
    """Slots of a bucket: the most edges that lead to one motif."""
    window: int = 4
    """Positions that lie at most this far apart meet."""
    gain: int = 8
    """The most by which an edge's score rises or falls in one step, however many meetings there were."""
    threshold: int = 4
    """Edges that score less carry no message."""
    admit: int = 2
    """A new edge takes the weakest slot of its bucket if that one's score is at most this (an empty one has 0)."""
    evict: int = 1
    """Edges whose score falls below this give up their slot."""
    toll: int = 16
    """An edge loses 1 for every so many meetings in its bucket: it must earn that share of them to stay."""
    dense_motifs: int = 512
    """Graphs of up to this many motifs keep a score for every pair, and no slots."""

    def __post_init__(self) -> None:
        for name in ("motifs", "buckets", "degree", "window", "toll"):
            if not 1 <= getattr(self, name) < 2**31:
                raise ConfigError(f"edges.{name} must be in [1, 2^31), got {getattr(self, name)}")
        for name, low in (("gain", 1), ("threshold", 1), ("admit", 0), ("evict", 1)):
            if not low <= getattr(self, name) <= 127:
                raise ConfigError(
                    f"edges.{name} must be in [{low}, 127], as scores are int8, got {getattr(self, name)}"
                )
        if self.evict > self.gain:
            raise ConfigError(
                f"edges.evict must be at most edges.gain, got {self.evict} and {self.gain}: no edge could be admitted; "
                f"raise gain or lower evict"
            )

    @property
    def dense(self) -> bool:
        """Whether every pair has a score."""
        return self.motifs <= self.dense_motifs


def empty_edges(config: EdgeConfig) -> Edges:
    """A graph without edges; see the module for the leaves (a dense one has `score` int8 (motifs, motifs) alone, by
    destination and source)."""
    if config.dense:
        return {"score": jnp.zeros((config.motifs, config.motifs), jnp.int8)}
    slots = (config.buckets, config.degree)
    return {
        "source": jnp.full(slots, -1, jnp.int32),
        "destination": jnp.full(slots, -1, jnp.int32),
        "sign": jnp.zeros(slots, jnp.int8),
        "score": jnp.zeros(slots, jnp.int8),
    }


def incoming(config: EdgeConfig, edges: Edges, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The edges that lead to each of some motifs.

    Args:
        config: of the edges.
        edges: integer state.
        ids: motifs, int32 (...).

    Returns:
        `(sources int32 (..., degree), weight int8 (..., degree))`: the weight is the edge's sign, 0 where the score is
        below `threshold` or the slot is another motif's. A dense graph has `degree = motifs`.
    """
    known = (ids >= 0) & (ids < config.motifs)
    if config.dense:
        score = edges["score"].at[ids].get(mode="fill", fill_value=0, wrap_negative_indices=False)
        strong = jnp.abs(score.astype(jnp.int32)) >= config.threshold
        sources = jnp.broadcast_to(jnp.arange(config.motifs, dtype=jnp.int32), score.shape)
        return sources, jnp.where(strong, jnp.sign(score), jnp.int8(0))
    bucket = jnp.where(known, bucket_of(config, ids), 0)
    counts = (edges["destination"][bucket] == ids[..., None]) & (edges["score"][bucket] >= config.threshold)
    return edges["source"][bucket], jnp.where(counts & known[..., None], edges["sign"][bucket], jnp.int8(0))


def pair_weights(config: EdgeConfig, edges: Edges, to: jax.Array, senders: jax.Array) -> jax.Array:
    """Weight of the edge from every sender to every receiver, as in `incoming`; 0 where there is none.

    Args:
        config: of the edges.
        edges: integer state.
        to: motifs that receive, int32 (..., Q).
        senders: motifs that send, int32 (..., K), with the same leading axes.

    Returns:
        int8 (..., Q, K).
    """
    if config.dense:
        at = (to[..., :, None], senders[..., None, :])
        score = edges["score"].at[at].get(mode="fill", fill_value=0, wrap_negative_indices=False)
        return jnp.where(jnp.abs(score.astype(jnp.int32)) >= config.threshold, jnp.sign(score), jnp.int8(0))
    sources, weight = incoming(config, edges, to)
    same = sources[..., :, None, :] == senders[..., None, :, None]
    # At most one edge leads from one motif to another, so a sum picks it.
    return jnp.sum(jnp.where(same, weight[..., :, None, :], jnp.int8(0)), axis=-1, dtype=jnp.int8)


def bucket_of(config: EdgeConfig, ids: jax.Array) -> jax.Array:
    """The bucket of each destination, int32 of the shape of `ids`: a hash, so that frequent motifs spread."""
    return (mix(ids.astype(jnp.uint32)) % jnp.uint32(config.buckets)).astype(jnp.int32)
