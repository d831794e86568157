"""Message passing between the motifs of a window, over the edges that are strong enough (see `edges`).

Position `i` receives from earlier positions alone: for every edge that leads to its motif, from the most recent earlier
position, at most `lookback` away, that holds the edge's source. Which positions those are depends on ids and edges
only, so it is worked out once for all iterations of the loop, as a band of signs, and messages are summed by a product
with it: no scatter, the same bits on every run. Axes: B batch, S positions, D width, W offsets at which positions meet;
blocks of the band: N blocks of L = `lookback` positions, which see Q = 2L positions, the block before and their own.
"""

from dataclasses import dataclass
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from arbs_jax.errors import ConfigError
from arbs_jax.layers import TernaryConfig, TernaryDense, TernaryRMSNorm
from arbs_jax.models.arb.edges import EdgeConfig, Edges, pair_weights

MESSAGE_SCALE = 0.25
"""Of what messages add to a position. Edges come and go while a model learns, so what arrives changes: at full size the
graph cost 0.01 nats a byte, so it gives 0.01 (two seeds, experiments/2026_11_21_arb_learning)."""


@dataclass(frozen=True)
class GraphConfig:
    """Shape of the message passing; its width is that of what it is applied to."""

    edges: EdgeConfig
    """Size of the edge state, and how edges come and go."""
    lookback: int = 64
    """Positions from at most this far back are heard."""

    def __post_init__(self) -> None:
        if self.lookback < 1:
            raise ConfigError(f"graph.lookback must be at least 1, got {self.lookback}")


def message_band(config: GraphConfig, edges: Edges, ids_BxS: jax.Array) -> jax.Array:
    """Which positions hear which, and with what sign; integers, so nothing is differentiated.

    Args:
        config: of the graph.
        edges: integer state.
        ids_BxS: motifs, int32; other ids than those of motifs neither send nor receive.

    Returns:
        int8 (B, N, L, 2L) with `L = min(lookback, S)`: entry `(b, n, l, q)` is the weight with which position
        `n L + l` hears position `(n - 1) L + q`.
    """
    length = ids_BxS.shape[1]
    block = min(config.lookback, length)
    ids_BxNxL = _blocks(ids_BxS.astype(jnp.int32), block, fill=-1)
    count = ids_BxNxL.shape[1]
    # A sender is the most recent of its motif for all receivers up to, and including, the motif's next position.
    until_BxNxL = _blocks(_next_same(ids_BxS.astype(jnp.int32)), block, fill=-1)
    sender_Q = jnp.arange(2 * block, dtype=jnp.int32) - block
    receiver_Lx1 = jnp.arange(block, dtype=jnp.int32)[:, None]
    reach_LxQ = (sender_Q < receiver_Lx1) & (receiver_Lx1 - sender_Q <= block)
    receiver_NxLx1 = receiver_Lx1 + jnp.arange(count, dtype=jnp.int32)[:, None, None] * block
    heard_BxNxLxQ = reach_LxQ & (_with_previous(until_BxNxL, fill=-1)[:, :, None, :] >= receiver_NxLx1)
    weight_BxNxLxQ = pair_weights(config.edges, edges, ids_BxNxL, _with_previous(ids_BxNxL, fill=-1))
    return jnp.where(heard_BxNxLxQ, weight_BxNxLxQ, jnp.int8(0))


def gather_messages(band_BxNxLxQ: jax.Array, messages_BxSxD: jax.Array) -> jax.Array:
    """Signed sum of the messages that each position hears, (B, S, D), summed in float32, in the dtype of `messages`."""
    batch, length, width = messages_BxSxD.shape
    blocks_BxNxLxD = _blocks(messages_BxSxD, band_BxNxLxQ.shape[2], fill=0)
    heard_BxNxLxD = jnp.einsum(
        "bnlq,bnqd->bnld",
        band_BxNxLxQ.astype(messages_BxSxD.dtype),
        _with_previous(blocks_BxNxLxD, fill=0),
        preferred_element_type=jnp.float32,
    )
    return heard_BxNxLxD.reshape(batch, -1, width)[:, :length].astype(messages_BxSxD.dtype)


def agreements(messages_BxPxD: jax.Array, x_BxSxD: jax.Array, window: int) -> jax.Array:
    """Whether the message of the position `1 + w` before points the way of a position's own vector.

    `messages` may begin earlier than `x`: the last S of P positions are those of `x`.

    Returns:
        int8 (B, S, window) for `observe_edges`, the sign of the inner product; 0 where there is no such position. Not
        differentiated.
    """
    length, earlier = x_BxSxD.shape[1], messages_BxPxD.shape[1] - x_BxSxD.shape[1]
    messages = jax.lax.stop_gradient(messages_BxPxD).astype(jnp.float32)
    own = jax.lax.stop_gradient(x_BxSxD).astype(jnp.float32)
    padded = jnp.pad(messages, ((0, 0), (window, 0), (0, 0)))[:, earlier:]
    inner = [jnp.sum(padded[:, window - offset :][:, :length] * own, axis=-1) for offset in range(1, window + 1)]
    return jnp.sign(jnp.stack(inner, axis=-1)).astype(jnp.int8)


class Heard(NamedTuple):
    """What message passing makes of positions."""

    update_BxSxD: jax.Array
    """In the dtype of the input."""
    agreement_BxSxW: jax.Array
    """int8, see `agreements`."""
    messages_BxLxD: jax.Array
    """Messages of the last `lookback` positions (or of all, if fewer), which those after them may hear."""


class MessagePassing(nn.Module):
    """Normalised positions to `Heard`.

    A message is a projection of its sender. What a position hears is summed over its edges with their signs,
    normalised, joined by a projection of its context, projected, and scaled by `MESSAGE_SCALE`. With `earlier`
    messages, those of positions before the first, the band is that of all positions.
    """

    config: GraphConfig
    ternary: TernaryConfig

    @nn.compact
    def __call__(
        self,
        x_BxSxD: jax.Array,
        band_BxNxLxQ: jax.Array,
        context_BxSxD: jax.Array | None = None,
        earlier_BxLxD: jax.Array | None = None,
    ) -> Heard:
        length, width = x_BxSxD.shape[1:]

        def project(name: str, source: jax.Array) -> jax.Array:
            return TernaryDense(features=width, config=self.ternary, name=name)(source)

        messages = project("message_proj", x_BxSxD)
        if earlier_BxLxD is not None:
            messages = jnp.concatenate([earlier_BxLxD.astype(messages.dtype), messages], axis=1)
        heard_BxSxD = TernaryRMSNorm()(gather_messages(band_BxNxLxQ, messages)[:, -length:])
        if context_BxSxD is not None:
            heard_BxSxD = heard_BxSxD + project("context_proj", TernaryRMSNorm()(context_BxSxD))
        return Heard(
            MESSAGE_SCALE * project("o_proj", heard_BxSxD),
            agreements(messages, x_BxSxD, self.config.edges.window),
            messages[:, -self.config.lookback :],
        )


def _next_same(ids_BxS: jax.Array) -> jax.Array:
    """int32 (B, S): the next position of each position's motif, S where there is none."""
    length = ids_BxS.shape[1]
    positions = jax.lax.broadcasted_iota(jnp.int32, ids_BxS.shape, 1)
    ids, at = jax.lax.sort((ids_BxS, positions), dimension=1, num_keys=2)
    following = jnp.where(ids[:, 1:] == ids[:, :-1], at[:, 1:], length)
    following = jnp.pad(following, ((0, 0), (0, 1)), constant_values=length)
    return jax.lax.sort((at, following), dimension=1, num_keys=1)[1]


def _blocks(values_BxS: jax.Array, block: int, fill: int) -> jax.Array:
    """`(B, S, ...)` cut into `(B, N, block, ...)`, the last block filled up."""
    batch, length = values_BxS.shape[:2]
    rest = [(0, 0)] * (values_BxS.ndim - 2)
    padded = jnp.pad(values_BxS, ((0, 0), (0, -length % block), *rest), constant_values=fill)
    return padded.reshape(batch, -1, block, *values_BxS.shape[2:])


def _with_previous(blocks_BxNxL: jax.Array, fill: int) -> jax.Array:
    """Each block behind the one before it: `(B, N, L, ...)` to `(B, N, 2L, ...)`."""
    rest = [(0, 0)] * (blocks_BxNxL.ndim - 2)
    previous = jnp.pad(blocks_BxNxL, ((0, 0), (1, 0), *rest), constant_values=fill)[:, :-1]
    return jnp.concatenate([previous, blocks_BxNxL], axis=2)
