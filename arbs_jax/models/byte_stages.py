"""The byte model as a chain of stages for layer-by-layer training."""

from typing import Any

import jax
import jax.numpy as jnp

from arbs_jax.layers import TernaryConfig, TernaryRMSNorm
from arbs_jax.models.byte_lm import Block, ModelConfig, cross_entropy, embedding, output_head
from arbs_jax.models.stages import Stage, weights_of


def byte_stages(config: ModelConfig, ternary: TernaryConfig) -> tuple[Stage, ...]:
    """Embedding, stacked blocks, and the head with the loss; the batch is tokens, integer (B, T+1)."""
    # Linen types `apply` as a union with what mutable collections return; none is mutable here.
    embed: Any = embedding(config, ternary)
    block: Any = Block(config, ternary)
    norm: Any = TernaryRMSNorm()
    head: Any = output_head(ternary)

    def embed_stage(variables: dict, carry: None, tokens: jax.Array) -> jax.Array:
        return embed.apply(weights_of(variables, "embed"), tokens[:, :-1].astype(jnp.int32))

    def block_stage(variables: dict, x_BxTxD: jax.Array, tokens: jax.Array) -> jax.Array:
        return block.apply(weights_of(variables, "blocks"), x_BxTxD)[0]

    def head_stage(variables: dict, x_BxTxD: jax.Array, tokens: jax.Array) -> jax.Array:
        x_BxTxD = norm.apply({}, x_BxTxD)
        if config.tied:
            logits = embed.apply(weights_of(variables, "embed"), x_BxTxD, method="attend")
        else:
            logits = head.apply(weights_of(variables, "head"), x_BxTxD)
        return cross_entropy(logits.astype(jnp.float32), tokens[:, 1:]).mean()

    return (
        Stage(("embed",), embed_stage),
        Stage(("blocks",), block_stage, stacked=True),
        Stage(("embed",) if config.tied else ("head",), head_stage),
    )
