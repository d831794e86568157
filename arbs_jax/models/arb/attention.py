"""Causal multi-head latent attention and the block around it.

Keys and values are made from one low-rank latent a position, and one rotary key that all heads share tells positions
(DeepSeek-V2, arXiv:2405.04434, section 2.1). A head's channels are [no-position | rotary]: the first part of a key
comes from the latent, the second is the shared one; values fill all channels of a head, so that fused kernels, which
want queries, keys and values of one size, take them. Queries and keys are RMS-normalised part by part, so that neither
part can drown the other and the logits stay within `sqrt(head_dim)`.

Decoding keeps a latent and a rotary key for each position and makes keys and values again from them at every call. The
up-projection of keys cannot be absorbed into the query, as it is where keys are not normalised: the norm lies between
the two. What is gained is that decoding runs the very operations of training. It costs less than
`4 * cached * latent * heads * head_dim` operations a layer and call, shared by the new positions of the call.

Arrays are suffixed by their axes: B batch, S positions, C cached positions, D width, L latent, H heads, K channels of a
head, R rotary channels.
"""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from arbs_jax.errors import ConfigError
from arbs_jax.layers import COLLECTION, DENSE, PROBES, SPECS, TernaryConfig, TernaryDense, TernaryRMSNorm, projections
from arbs_jax.models.attention import causal_attention
from arbs_jax.models.byte_lm import MLP, Cache, rotate, rotation
from arbs_jax.models.checks import require_dtype, require_positive


@dataclass(frozen=True)
class AttentionConfig:
    """Shape of the context blocks, and of the heads that read the ledger."""

    width: int = 128
    """`D`, channels of the residual stream."""
    layers: int = 2
    """Blocks."""
    heads: int = 4
    """`H`, heads."""
    head_dim: int = 32
    """`K`, channels of a head in queries, keys and values; even."""
    rope_dim: int = 16
    """`R`, rotary channels among a head's: even, below `head_dim`."""
    latent: int = 64
    """`L`, channels of the latent from which keys and values are made."""
    query_latent: int = 0
    """Channels of a latent from which queries are made; 0 projects them from the residual stream."""
    hidden: int = 320
    """Channels of the gated MLP."""
    context: int = 1024
    """Longest sequence the blocks are meant for, in positions."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    dtype: str = "float32"
    """Activations and cache: "float32" or "bfloat16"."""
    remat: bool = True
    """Recompute each block in backward in place of keeping its activations."""

    def __post_init__(self) -> None:
        require_positive(
            "attention", self, "width", "layers", "heads", "head_dim", "rope_dim", "latent", "hidden", "context"
        )
        if self.query_latent < 0:
            raise ConfigError(f"attention.query_latent must be at least 0, got {self.query_latent}")
        for name in ("head_dim", "rope_dim"):
            if getattr(self, name) % 2:
                raise ConfigError(f"attention.{name} must be even for rotary positions, got {getattr(self, name)}")
        if self.rope_dim >= self.head_dim:
            raise ConfigError(
                f"attention.rope_dim must be below attention.head_dim, got {self.rope_dim} and {self.head_dim}: "
                "a head needs channels without position, too"
            )
        if self.rope_theta <= 1:
            raise ConfigError(f"attention.rope_theta must be above 1, got {self.rope_theta}")
        require_dtype("attention", self)


class LatentAttention(nn.Module):
    """Causal attention `(B, S, D)` to `(B, S, D)`; with a cache, new positions are written into it and attend to it."""

    config: AttentionConfig
    ternary: TernaryConfig

    @nn.compact
    def __call__(self, x_BxSxD: jax.Array, cache: Cache | None = None, start: jax.Array | int = 0):
        """`(attended, cache)`; a cache is `{"latent": (B, C, L), "rope": (B, C, R)}`, `start` the first position."""
        config = self.config
        positions_S = start + jnp.arange(x_BxSxD.shape[1], dtype=jnp.int32)
        angles = rotation(positions_S, config.rope_dim, config.rope_theta, x_BxSxD.dtype)
        q_BxSxHxK = self._queries(x_BxSxD, angles)
        down = self._dense("kv_down", config.latent + config.rope_dim)(x_BxSxD)
        latent_BxCxL = TernaryRMSNorm()(down[..., : config.latent])
        rope_BxCxR = rotate(TernaryRMSNorm()(down[..., None, config.latent :]), *angles)[..., 0, :]
        if cache is not None:
            zero = jnp.zeros((), jnp.int32)
            at = (zero, jnp.asarray(start, jnp.int32), zero)
            cache = {
                "latent": jax.lax.dynamic_update_slice(cache["latent"], latent_BxCxL.astype(config.dtype), at),
                "rope": jax.lax.dynamic_update_slice(cache["rope"], rope_BxCxR.astype(config.dtype), at),
            }
            latent_BxCxL, rope_BxCxR = (cache[name].astype(x_BxSxD.dtype) for name in ("latent", "rope"))
        k_BxCxHxK, v_BxCxHxK = self._keys_and_values(latent_BxCxL, rope_BxCxR)
        if cache is None:
            y_BxSxHxK = causal_attention(q_BxSxHxK, k_BxCxHxK, v_BxCxHxK)
        else:
            visible_SxC = jnp.arange(latent_BxCxL.shape[1], dtype=jnp.int32) <= positions_S[:, None]
            y_BxSxHxK = jax.nn.dot_product_attention(q_BxSxHxK, k_BxCxHxK, v_BxCxHxK, mask=visible_SxC[None, None])
        return self._dense("o_proj", config.width)(y_BxSxHxK.reshape(*x_BxSxD.shape[:2], -1)), cache

    def _queries(self, x_BxSxD: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
        """Normalised and rotated queries `(B, S, H, K)`."""
        config = self.config
        if config.query_latent:
            x_BxSxD = TernaryRMSNorm()(self._dense("q_down", config.query_latent)(x_BxSxD))
        q_BxSxHxK = self._heads(self._dense("q_proj", config.heads * config.head_dim)(x_BxSxD))
        still = config.head_dim - config.rope_dim
        turned = rotate(TernaryRMSNorm()(q_BxSxHxK[..., still:]), *angles)
        return jnp.concatenate([TernaryRMSNorm()(q_BxSxHxK[..., :still]), turned], axis=-1)

    def _keys_and_values(self, latent_BxCxL: jax.Array, rope_BxCxR: jax.Array) -> tuple[jax.Array, jax.Array]:
        """`(B, C, H, K)` each."""
        config = self.config
        still = config.head_dim - config.rope_dim
        layers = self._dense("k_up", config.heads * still), self._dense("v_up", config.heads * config.head_dim)
        k, v_BxCxHxK = (self._heads(flat) for flat in projections(latent_BxCxL, *layers))
        still_k = TernaryRMSNorm()(k)
        shared = jnp.broadcast_to(rope_BxCxR[:, :, None], (*still_k.shape[:-1], config.rope_dim))
        return jnp.concatenate([still_k, shared], axis=-1), v_BxCxHxK

    def _dense(self, name: str, features: int) -> TernaryDense:
        return TernaryDense(features=features, config=self.ternary, name=name)

    def _heads(self, flat: jax.Array) -> jax.Array:
        return flat.reshape(*flat.shape[:2], self.config.heads, -1)


class ContextBlock(nn.Module):
    """Pre-norm latent attention and gated MLP: `(x, cache, start) -> (x, cache)`; one layer of a stack, or a stage."""

    config: AttentionConfig
    ternary: TernaryConfig

    @nn.compact
    def __call__(self, x_BxSxD: jax.Array, cache: Cache | None = None, start: jax.Array | int = 0):
        config = self.config
        attention = LatentAttention(config, self.ternary, name="attention")
        attended, cache = attention(TernaryRMSNorm()(x_BxSxD), cache, start)
        x_BxSxD = x_BxSxD + attended
        mlp = MLP(config.width, config.hidden, self.ternary, name="mlp")
        return x_BxSxD + mlp(TernaryRMSNorm()(x_BxSxD)), cache


def context_blocks(
    config: AttentionConfig, ternary: TernaryConfig, *, cached: bool = False, name: str | None = None
) -> Any:
    """All blocks as one module, `(x, cache, start) -> (x, cache)`, every leaf and the cache stacked over layers.

    `cached` says that a cache will be passed: nothing is differentiated then, so nothing is rematerialised.
    """
    block = nn.remat(ContextBlock, prevent_cse=False) if config.remat and not cached else ContextBlock
    return nn.scan(
        block,
        variable_axes={COLLECTION: 0, PROBES: 0, DENSE: 0, SPECS: 0},
        split_rngs={"params": True},
        in_axes=(0, nn.broadcast),
        out_axes=0,
        length=config.layers,
    )(config, ternary, name=name)


def empty_cache(config: AttentionConfig, batch: int, length: int) -> Cache:
    """Cache for `length` positions: `latent (layers, B, length, L)` and `rope (layers, B, length, R)`.

    Raises:
        ConfigError: `length` is beyond the blocks' context.
    """
    if length > config.context:
        raise ConfigError(f"a cache of {length} positions exceeds the attention's context of {config.context}")
    channels = {"latent": config.latent, "rope": config.rope_dim}
    return {name: jnp.zeros((config.layers, batch, length, count), config.dtype) for name, count in channels.items()}
