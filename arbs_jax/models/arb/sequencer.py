"""Bytes to trigram vectors, and the loss that belongs to them.

Three neighbouring bytes make one position: T bytes give S = T - 2 positions, of which position `i` covers bytes i,
i + 1 and i + 2 and predicts byte i + 3. A position is made of its own three bytes and of nothing else, so causality is
exact.
Arrays are suffixed by their axes: B batch, T bytes, S positions, E embedding channels, D width, V vocabulary.
"""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from arbs_jax.errors import ConfigError
from arbs_jax.layers import TernaryConfig, TernaryEmbed, TernaryRMSNorm
from arbs_jax.models.byte_lm import MLP, VOCABULARY, cross_entropy
from arbs_jax.models.checks import require_dtype, require_positive

TRIGRAM = 3


@dataclass(frozen=True)
class SequencerConfig:
    """Shape of the text sequencer."""

    embedding: int = 64
    """`E`, channels of one byte."""
    hidden: int = 320
    """Channels of the gated layer between a trigram and the model."""
    width: int = 128
    """`D`, channels of the model."""
    dtype: str = "float32"
    """Activations: "float32" or "bfloat16"."""

    def __post_init__(self) -> None:
        require_positive("sequencer", self, "embedding", "hidden", "width")
        require_dtype("sequencer", self)


class TextSequencer(nn.Module):
    """Tokens, integer `(B, T)`, to `(B, T - 2, D)`; after `history (B, 2)`, the two bytes before them, `(B, T, D)`."""

    config: SequencerConfig
    ternary: TernaryConfig

    @nn.compact
    def __call__(self, tokens_BxT: jax.Array, history_Bx2: jax.Array | None = None) -> jax.Array:
        """See the class.

        Raises:
            ConfigError: fewer than three bytes with the history, or a history that is not two bytes a row.
        """
        config = self.config
        tokens_BxT = tokens_BxT.astype(jnp.int32)
        if history_Bx2 is not None:
            if history_Bx2.shape != (tokens_BxT.shape[0], TRIGRAM - 1):
                raise ConfigError(
                    f"the history must be the two bytes before each row, ({tokens_BxT.shape[0]}, 2), "
                    f"got {history_Bx2.shape}"
                )
            tokens_BxT = jnp.concatenate([history_Bx2.astype(jnp.int32), tokens_BxT], axis=1)
        length = tokens_BxT.shape[1]
        if length < TRIGRAM:
            raise ConfigError(
                f"the sequencer needs at least {TRIGRAM} bytes to make a position, got a sequence of {length}; "
                "pass the two bytes before it as its history"
            )
        bytes_BxTxE = TernaryEmbed(
            num_embeddings=VOCABULARY,
            features=config.embedding,
            dtype=jnp.dtype(config.dtype),
            config=self.ternary,
            name="embed",
        )(tokens_BxT)
        positions = length - TRIGRAM + 1
        trigrams_BxSx3E = jnp.concatenate([bytes_BxTxE[:, at : at + positions] for at in range(TRIGRAM)], axis=-1)
        x_BxSxD = MLP(config.width, config.hidden, self.ternary, name="mlp")(TernaryRMSNorm()(trigrams_BxSx3E))
        # Nothing bypasses the gated layer, whose fresh output is small: without this the residual stream would start
        # smaller than what the first block adds to it.
        return TernaryRMSNorm()(x_BxSxD)


def targets(tokens_BxT: jax.Array) -> jax.Array:
    """What positions 0 to T - 4 predict: bytes 3 and on, `(B, T - 3)`.

    Raises:
        ConfigError: fewer than four bytes.
    """
    length = tokens_BxT.shape[1]
    if length <= TRIGRAM:
        raise ConfigError(f"a trigram and the byte after it take {TRIGRAM + 1} bytes, got a sequence of {length}")
    return tokens_BxT[:, TRIGRAM:]


def trigram_cross_entropy(logits_BxSxV: jax.Array, tokens_BxT: jax.Array) -> jax.Array:
    """Nats per predicted byte, float32 `(B, T - 3)`; the last position's prediction lies past the tokens.

    Args:
        logits_BxSxV: of all S = T - 2 positions of the tokens.
        tokens_BxT: the tokens that were read.

    Raises:
        ConfigError: fewer than four bytes, or logits of another number of positions.
    """
    next_BxT = targets(tokens_BxT)
    expected = tokens_BxT.shape[1] - TRIGRAM + 1
    if logits_BxSxV.shape[1] != expected:
        raise ConfigError(
            f"{tokens_BxT.shape[1]} bytes make {expected} trigram positions, got logits of {logits_BxSxV.shape[1]}"
        )
    return cross_entropy(logits_BxSxV[:, :-1].astype(jnp.float32), next_BxT)
