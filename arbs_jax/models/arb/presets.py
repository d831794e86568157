"""Named shapes of the ARB model."""

from arbs_jax.models.arb.config import ArbConfig

ARB_PRESETS: dict[str, ArbConfig] = {
    "arb-tiny": ArbConfig(
        width=64, hidden=160, sequencer_hidden=128, embedding=32, head_hidden=128, heads=2, vq_rows=512, kg_rows=512,
        vq_dim=32, kg_hidden=32, experts=4, expert_hidden=64, latent=32, layers=1, lookback=16, edge_buckets=256,
    ),
}  # fmt: skip
