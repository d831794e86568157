"""Heads that turn the model's output into bytes, video latents or codec tokens, and the router between them.

Every head has the same trunk: context added in, residual gated layers, a last norm. Only the byte head is trained with
text, and its layers are stacked, so that a large head moves a layer at a time; the others are whole modules with the
shapes that a decoder of their kind takes.
Arrays are suffixed by their axes: B batch, S positions, D width, V vocabulary, X registered heads.
"""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from arbs_jax.errors import ConfigError
from arbs_jax.layers import COLLECTION, DENSE, PROBES, SPECS, TernaryConfig, TernaryDense, TernaryRMSNorm
from arbs_jax.models.byte_lm import MLP, output_head
from arbs_jax.models.checks import require_dtype, require_positive


@dataclass(frozen=True)
class HeadConfig:
    """Shape of a head's trunk."""

    width: int = 128
    """`D`, channels of the model."""
    hidden: int = 320
    """Channels of the gated layers."""
    layers: int = 2
    """Residual gated layers; 0 leaves the norm and the projection."""
    dtype: str = "float32"
    """Activations: "float32" or "bfloat16"."""

    def __post_init__(self) -> None:
        require_positive("head", self, "width", "hidden")
        if self.layers < 0:
            raise ConfigError(f"head.layers must be at least 0, got {self.layers}")
        require_dtype("head", self)


@dataclass(frozen=True)
class VideoConfig:
    """What one position says about video: some patches of an autoencoder's latent frame."""

    patches: int = 16
    """Patches a position."""
    channels: int = 16
    """Latent channels of a patch."""

    def __post_init__(self) -> None:
        require_positive("video", self, "patches", "channels")


@dataclass(frozen=True)
class TalkerConfig:
    """What one position says about speech: one frame of a residual-quantising audio codec."""

    codebooks: int = 8
    """Codec tokens of a frame."""
    codes: int = 1024
    """Rows of each codebook."""

    def __post_init__(self) -> None:
        require_positive("talker", self, "codebooks", "codes")


@dataclass(frozen=True)
class RouterConfig:
    """Heads that the output router chooses among."""

    heads: tuple[str, ...] = ("byte", "video", "talker")
    """Names of the registered heads; text belongs to the first."""

    def __post_init__(self) -> None:
        if not self.heads or len(set(self.heads)) != len(self.heads):
            raise ConfigError(f"router.heads must be different names, at least one, got {self.heads}")


class HeadEntry(nn.Module):
    """`(B, S, D)` with the ledger's context of the same shape, if there is one, projected and added."""

    config: HeadConfig
    ternary: TernaryConfig

    @nn.compact
    def __call__(self, x_BxSxD: jax.Array, context_BxSxD: jax.Array | None = None) -> jax.Array:
        config = self.config
        x_BxSxD = x_BxSxD.astype(config.dtype)
        if context_BxSxD is None:
            return x_BxSxD
        given = TernaryRMSNorm()(context_BxSxD.astype(config.dtype))
        return x_BxSxD + TernaryDense(features=config.width, config=self.ternary, name="context_proj")(given)


class HeadLayer(nn.Module):
    """A residual gated layer: `x (B, S, D)` to `(x, None)`, as a scan over a stack wants it."""

    config: HeadConfig
    ternary: TernaryConfig

    @nn.compact
    def __call__(self, x_BxSxD: jax.Array) -> tuple[jax.Array, None]:
        mlp = MLP(self.config.width, self.config.hidden, self.ternary, name="mlp")
        return x_BxSxD + mlp(TernaryRMSNorm()(x_BxSxD)), None


class HeadTrunk(nn.Module):
    """`(B, S, D)` and the ledger's context of the same shape, if there is one, to a normalised `(B, S, D)`."""

    config: HeadConfig
    ternary: TernaryConfig

    @nn.compact
    def __call__(self, x_BxSxD: jax.Array, context_BxSxD: jax.Array | None = None) -> jax.Array:
        x_BxSxD = HeadEntry(self.config, self.ternary, name="entry")(x_BxSxD, context_BxSxD)
        for index in range(self.config.layers):
            x_BxSxD, _ = HeadLayer(self.config, self.ternary, name=f"layer_{index}")(x_BxSxD)
        return TernaryRMSNorm()(x_BxSxD)


class ByteHead(nn.Module):
    """`(B, S, D)`, and a context of the same shape, to float32 logits `(B, S, 288)`.

    State tree: `head_entry`, `head_layers` (every leaf stacked over layers) and `head_logits`. The three steps are
    methods of their own, so that training can go through them one by one.
    """

    config: HeadConfig
    ternary: TernaryConfig

    def setup(self) -> None:
        self.head_entry = HeadEntry(self.config, self.ternary)
        self.head_logits = output_head(self.ternary)
        self.head_norm = TernaryRMSNorm()
        if self.config.layers:
            self.head_layers = nn.scan(
                HeadLayer,
                variable_axes={COLLECTION: 0, PROBES: 0, DENSE: 0, SPECS: 0},
                split_rngs={"params": True},
                length=self.config.layers,
            )(self.config, self.ternary)

    def __call__(self, x_BxSxD: jax.Array, context_BxSxD: jax.Array | None = None) -> jax.Array:
        x_BxSxD = self.enter(x_BxSxD, context_BxSxD)
        return self.logits(self.head_layers(x_BxSxD)[0] if self.config.layers else x_BxSxD)

    def enter(self, x_BxSxD: jax.Array, context_BxSxD: jax.Array | None = None) -> jax.Array:
        """What the first layer reads."""
        return self.head_entry(x_BxSxD, context_BxSxD)

    def logits(self, x_BxSxD: jax.Array) -> jax.Array:
        """Of what the last layer gives."""
        return self.head_logits(self.head_norm(x_BxSxD)).astype(jnp.float32)


class VideoHead(nn.Module):
    """`(B, S, D)`, and a context of the same shape, to float32 latent patches `(B, S, patches, channels)`."""

    config: HeadConfig
    video: VideoConfig
    ternary: TernaryConfig

    @nn.compact
    def __call__(self, x_BxSxD: jax.Array, context_BxSxD: jax.Array | None = None) -> jax.Array:
        video = self.video
        x_BxSxD = HeadTrunk(self.config, self.ternary, name="trunk")(x_BxSxD, context_BxSxD)
        flat = TernaryDense(features=video.patches * video.channels, config=self.ternary, name="patches")(x_BxSxD)
        return flat.astype(jnp.float32).reshape(*flat.shape[:2], video.patches, video.channels)


class TalkerHead(nn.Module):
    """`(B, S, D)`, and a context of the same shape, to float32 codec logits `(B, S, codebooks, codes)`."""

    config: HeadConfig
    talker: TalkerConfig
    ternary: TernaryConfig

    @nn.compact
    def __call__(self, x_BxSxD: jax.Array, context_BxSxD: jax.Array | None = None) -> jax.Array:
        talker = self.talker
        x_BxSxD = HeadTrunk(self.config, self.ternary, name="trunk")(x_BxSxD, context_BxSxD)
        features = talker.codebooks * talker.codes
        flat = TernaryDense(features=features, table=True, config=self.ternary, name="logits")(x_BxSxD)
        return flat.astype(jnp.float32).reshape(*flat.shape[:2], talker.codebooks, talker.codes)


class OutputRouter(nn.Module):
    """Chooses the head that answers a segment: `(logits float32 (B, X), choice int32 (B,))`, ties to the first.

    The context is averaged over the whole segment, so the choice belongs to what follows the segment. Under a text
    target there is nothing to choose and the router is off: logits are zero, every choice is the first head, no matrix
    is read.
    """

    config: RouterConfig
    ternary: TernaryConfig

    @nn.compact
    def __call__(self, context_BxSxD: jax.Array, *, text: bool = False) -> tuple[jax.Array, jax.Array]:
        """See the class; `text` is static."""
        if text:
            batch = context_BxSxD.shape[0]
            return jnp.zeros((batch, len(self.config.heads)), jnp.float32), jnp.zeros((batch,), jnp.int32)
        pooled_BxD = jnp.mean(TernaryRMSNorm()(context_BxSxD.astype(jnp.float32)), axis=1)
        head = TernaryDense(features=len(self.config.heads), table=True, config=self.ternary, name="choice")
        logits_BxX = head(TernaryRMSNorm()(pooled_BxD))
        return logits_BxX, jax.lax.argmax(logits_BxX, 1, jnp.int32)
