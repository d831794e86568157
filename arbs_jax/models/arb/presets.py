"""ARB models by name, and what their parts are called in an account of them."""

from dataclasses import replace
from typing import Any

from arbs_jax.errors import ConfigError
from arbs_jax.models.arb.config import ArbConfig

ARB_PRESETS: dict[str, ArbConfig] = {
    "arb-tiny": ArbConfig(
        width=64,
        context=256,
        embedding=32,
        sequencer_hidden=128,
        vq_rows=1024,
        vq_dim=32,
        kg_rows=1024,
        kg_hidden=32,
        layers=1,
        heads=2,
        head_dim=32,
        rope_dim=16,
        latent=32,
        hidden=160,
        ledger_slots=64,
        edge_buckets=1 << 10,
        lookback=16,
        experts=4,
        expert_hidden=64,
        max_moe_iters=2,
        head_layers=1,
        head_hidden=128,
    ),
    "arb-25m": ArbConfig(
        width=512,
        context=2048,
        embedding=128,
        sequencer_hidden=768,
        vq_rows=1 << 16,
        kg_rows=1 << 16,
        kg_hidden=256,
        layers=6,
        heads=8,
        head_dim=64,
        rope_dim=32,
        latent=128,
        hidden=1152,
        experts=8,
        expert_hidden=512,
        head_layers=2,
        head_hidden=1376,
    ),
    "arb-300m": ArbConfig(
        width=1024,
        context=4096,
        embedding=256,
        sequencer_hidden=1536,
        vq_rows=1 << 20,
        kg_rows=1 << 19,
        kg_hidden=512,
        layers=8,
        heads=16,
        head_dim=64,
        rope_dim=32,
        latent=256,
        hidden=2816,
        ledger_slots=1024,
        edge_buckets=1 << 17,
        experts=16,
        expert_hidden=640,
        router_hidden=512,
        head_layers=10,
        head_hidden=2048,
    ),
    "arb-3b": ArbConfig(
        width=4096,
        context=4096,
        embedding=512,
        sequencer_hidden=4608,
        vq_rows=10_000_000,
        kg_rows=5_000_000,
        kg_hidden=1024,
        layers=10,
        heads=32,
        head_dim=128,
        rope_dim=64,
        latent=512,
        hidden=3840,
        ledger_slots=1024,
        edge_buckets=1 << 18,
        experts=24,
        expert_hidden=1280,
        router_hidden=1536,
        head_layers=12,
        head_hidden=4096,
        modality_hidden=1792,
    ),
}
"""`arb-tiny` is for tests and for trying things on a CPU. Of `arb-25m` a position reads some 25M weights beside its
rows of the tables, as of `byte-25m`. `arb-3b` has 3.12e9 weights: what was free to choose went to the context blocks.
Its head is many narrow layers, and its experts are many: what moves at once sets how much memory a step needs."""

PARTS: dict[str, str] = {
    "sequencer": "embedding and sequencer",
    "vq": "VQ bridge",
    "vq/codebook": "shared table",
    "kg": "composite proposals",
    "kg/book/codebook": "KG table",
    "memgram": "n-gram memory",
    "blocks": "attention",
    "reader": "attention",
    "loop": "MoE graph",
    "loop/loop/experts/router": "router",
    "head_entry": "byte head",
    "head_layers": "byte head",
    "head_logits": "byte head",
    "foresight": "VQ bridge",
    "video": "heads for other modalities",
    "talker": "heads for other modalities",
    "router": "router",
}
"""What the audit calls the parts of an ARB model, by the paths of their state (`arbs_jax.audit.audit`)."""


def arb_preset(name: str, **changes: Any) -> ArbConfig:
    """The preset of that name, with fields replaced.

    Raises:
        ConfigError: no such preset, or a field out of range.
    """
    if name not in ARB_PRESETS:
        raise ConfigError(f"no preset {name!r}; pass one of {', '.join(ARB_PRESETS)}")
    return replace(ARB_PRESETS[name], **changes)
