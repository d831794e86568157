"""A decoder-only byte language model with ternary matrices throughout.

Today's standard block (as in Qwen3, whose weights it could hold matrix for matrix): pre-RMSNorm, rotary positions,
RMS-normalised queries and keys, grouped-query attention, a SiLU-gated MLP; norms carry the identity weight. Arrays are
suffixed by their axes: B batch, T positions, S cached positions, D width, H heads, K key/value heads, C head channels.
"""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from arbs_jax.errors import ConfigError
from arbs_jax.layers import (
    COLLECTION,
    DENSE,
    PROBES,
    SPECS,
    TernaryConfig,
    TernaryDense,
    TernaryEmbed,
    TernaryRMSNorm,
    projections,
    silu_gated,
    written_out,
)
from arbs_jax.models.attention import IMPLEMENTATIONS, causal_attention
from arbs_jax.models.checks import require_dtype, require_positive

VOCABULARY = 288
"""256 bytes and 32 specials."""

Cache = dict[str, jax.Array]


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a byte model."""

    width: int = 128
    """Channels of the residual stream."""
    layers: int = 2
    """Blocks."""
    heads: int = 4
    """Query heads."""
    kv_heads: int = 2
    """Key/value heads; divides `heads`."""
    head_dim: int = 32
    """Channels of a head, even."""
    hidden: int = 320
    """Channels of the gated MLP."""
    context: int = 1024
    """Longest sequence the model is meant for, in bytes."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    tied: bool = False
    """Whether the output head is the embedding table."""
    dtype: str = "float32"
    """Activations: "float32" or "bfloat16"."""
    remat: bool = True
    """Recompute each block in backward in place of keeping its activations."""
    attention: str = "auto"
    """Implementation of attention over whole sequences (`arbs_jax.models.attention`): "auto", "xla" or "cudnn"."""

    def __post_init__(self) -> None:
        require_positive("model", self, "width", "layers", "heads", "kv_heads", "head_dim", "hidden", "context")
        if self.heads % self.kv_heads:
            raise ConfigError(f"model.kv_heads must divide model.heads, got {self.kv_heads} and {self.heads}")
        if self.head_dim % 2:
            raise ConfigError(f"model.head_dim must be even for rotary positions, got {self.head_dim}")
        require_dtype("model", self)
        if self.attention not in IMPLEMENTATIONS:
            raise ConfigError(f"model.attention must be one of {', '.join(IMPLEMENTATIONS)}, got {self.attention!r}")


def rotation(positions_T: jax.Array, channels: int, theta: float, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """(cosines, sines) `(T, 1, channels/2)` of the angles of rotary positions, made in float32."""
    half = channels // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle_Tx1xC = positions_T[:, None, None].astype(jnp.float32) * frequency
    return jnp.cos(angle_Tx1xC).astype(dtype), jnp.sin(angle_Tx1xC).astype(dtype)


def rotate(x_BxTxHxC: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary position embedding (Su et al., 2021) on the two halves of the channels."""
    half = x_BxTxHxC.shape[-1] // 2
    first, second = x_BxTxHxC[..., :half], x_BxTxHxC[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class Attention(nn.Module):
    """Causal grouped-query attention; with a cache, new positions attend to what it holds and are written into it."""

    config: ModelConfig
    ternary: TernaryConfig

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array, cache: Cache | None, start: jax.Array | int):
        config = self.config
        batch, length = x_BxTxD.shape[:2]

        counts = {"q_proj": config.heads, "k_proj": config.kv_heads, "v_proj": config.kv_heads}
        layers = (
            TernaryDense(features=count * config.head_dim, config=self.ternary, name=name)
            for name, count in counts.items()
        )
        q, k, v_BxTxKxC = (flat.reshape(batch, length, -1, config.head_dim) for flat in projections(x_BxTxD, *layers))
        positions_T = start + jnp.arange(length)
        angles = rotation(positions_T, config.head_dim, config.rope_theta, x_BxTxD.dtype)
        q_BxTxHxC = rotate(TernaryRMSNorm()(q), *angles)
        k_BxTxKxC = rotate(TernaryRMSNorm()(k), *angles)
        if cache is None:
            y_BxTxHxC = causal_attention(q_BxTxHxC, k_BxTxKxC, v_BxTxKxC, config.attention)
        else:
            zero = jnp.zeros((), jnp.int32)
            at = (zero, jnp.asarray(start, jnp.int32), zero, zero)
            cache = {
                "k": jax.lax.dynamic_update_slice(cache["k"], k_BxTxKxC.astype(cache["k"].dtype), at),
                "v": jax.lax.dynamic_update_slice(cache["v"], v_BxTxKxC.astype(cache["v"].dtype), at),
            }
            visible_TxS = jnp.arange(cache["k"].shape[1]) <= positions_T[:, None]
            y_BxTxHxC = jax.nn.dot_product_attention(q_BxTxHxC, cache["k"], cache["v"], mask=visible_TxS[None, None])
        flat = y_BxTxHxC.reshape(batch, length, config.heads * config.head_dim)
        return TernaryDense(features=config.width, config=self.ternary, name="o_proj")(flat), cache


class MLP(nn.Module):
    """SiLU-gated feed-forward, `(..., K)` to `(..., features)`."""

    features: int
    hidden: int
    ternary: TernaryConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        layers = (
            TernaryDense(features=self.hidden, config=self.ternary, name=name) for name in ("gate_proj", "up_proj")
        )
        gate, up = projections(x, *layers)
        if self.ternary.float8:  # Backward rounds three arrays that are made of these: in one pass then.
            gate, up = written_out((gate, up))
            hidden = nn.silu(gate) * up
        else:
            hidden = silu_gated(gate, up)
        return TernaryDense(features=self.features, config=self.ternary, name="down_proj")(hidden)


class Block(nn.Module):
    """One transformer block: `(x, cache, start) -> (x, cache)`."""

    config: ModelConfig
    ternary: TernaryConfig

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array, cache: Cache | None = None, start: jax.Array | int = 0):
        attended, cache = Attention(self.config, self.ternary, name="attention")(
            TernaryRMSNorm()(x_BxTxD), cache, start
        )
        x_BxTxD = x_BxTxD + attended
        mlp = MLP(self.config.width, self.config.hidden, self.ternary, name="mlp")
        return x_BxTxD + mlp(TernaryRMSNorm()(x_BxTxD)), cache


def embedding(config: ModelConfig, ternary: TernaryConfig, name: str | None = None) -> TernaryEmbed:
    """The byte table."""
    return TernaryEmbed(
        num_embeddings=VOCABULARY, features=config.width, dtype=jnp.dtype(config.dtype), config=ternary, name=name
    )


def output_head(ternary: TernaryConfig, name: str | None = None) -> TernaryDense:
    """The untied projection to logits."""
    return TernaryDense(features=VOCABULARY, table=True, config=ternary, name=name)


class ByteLM(nn.Module):
    """Tokens `(B, T)` to float32 logits `(B, T, 288)`; with a cache also returns the cache after these tokens.

    State tree: `embed`, `blocks` (every leaf stacked over layers), and `head` unless tied.
    """

    config: ModelConfig
    ternary: TernaryConfig

    @nn.compact
    def __call__(self, tokens_BxT: jax.Array, cache: Cache | None = None, start: jax.Array | int = 0):
        config = self.config
        embed = embedding(config, self.ternary, name="embed")
        block = nn.remat(Block, prevent_cse=False) if config.remat and cache is None else Block
        blocks = nn.scan(
            block,
            variable_axes={COLLECTION: 0, PROBES: 0, DENSE: 0, SPECS: 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            out_axes=0,
            length=config.layers,
        )(config, self.ternary, name="blocks")
        x_BxTxD, cache = blocks(embed(tokens_BxT), cache, start)
        x_BxTxD = TernaryRMSNorm()(x_BxTxD)
        logits = embed.attend(x_BxTxD) if config.tied else output_head(self.ternary, name="head")(x_BxTxD)
        logits_BxTxV = logits.astype(jnp.float32)
        return logits_BxTxV if cache is None else (logits_BxTxV, cache)


def empty_cache(config: ModelConfig, batch: int, length: int) -> Cache:
    """Key/value cache for `length` positions: `k` and `v` of shape (layers, batch, length, kv_heads, head_dim).

    Raises:
        ConfigError: `length` is beyond the model's context.
    """
    if length > config.context:
        raise ConfigError(f"a cache of {length} positions exceeds the model's context of {config.context}")
    shape = (config.layers, batch, length, config.kv_heads, config.head_dim)
    return {name: jnp.zeros(shape, config.dtype) for name in ("k", "v")}


def cross_entropy(logits_BxTxV: jax.Array, targets_BxT: jax.Array) -> jax.Array:
    """Nats per byte at every position, float32 (B, T)."""
    # A sum that skips the others, not a gather: its gradient would be a scatter, slow where sums must repeat exactly.
    is_target = jnp.arange(logits_BxTxV.shape[-1], dtype=jnp.int32) == targets_BxT[..., None]
    chosen = jnp.sum(jnp.where(is_target, logits_BxTxV, 0), axis=-1)
    return jax.nn.logsumexp(logits_BxTxV, axis=-1) - chosen
