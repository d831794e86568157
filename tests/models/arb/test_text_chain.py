"""Sequencer, context blocks, ledger and byte head as a chain of stages: the sweep trains them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fresh import fresh

from arbs_jax import Integral, TernaryConfig
from arbs_jax.models.arb.attention import AttentionConfig, ContextBlock, context_blocks
from arbs_jax.models.arb.head import ByteHead, HeadConfig
from arbs_jax.models.arb.ledger import LedgerConfig
from arbs_jax.models.arb.reader import LedgerReader
from arbs_jax.models.arb.sequencer import SequencerConfig, TextSequencer, trigram_cross_entropy
from arbs_jax.models.stages import Stage
from arbs_jax.rules import Schedule
from arbs_jax.training.layerwise import Sweep

STEPS = 80
RULE = Integral(learning_rate=0.15, schedule=Schedule(steps=STEPS, warmup=2), votes_per_step=2)
TERNARY = TernaryConfig(rule=RULE, group_size=8)
ATTENTION = AttentionConfig(width=32, layers=1, heads=2, head_dim=16, rope_dim=8, latent=16, hidden=48)
PARTS = {
    "sequencer": TextSequencer(SequencerConfig(embedding=16, hidden=48, width=32), TERNARY),
    "blocks": context_blocks(ATTENTION, TERNARY),
    "reader": LedgerReader(ATTENTION, LedgerConfig(latent=16, stride=4, capacity=8), TERNARY),
    "head": ByteHead(HeadConfig(width=32, hidden=48, layers=1), TERNARY),
}
LENGTH = 26


def texts(step: int) -> np.ndarray:
    """Two micro-batches of four texts, int32 (2, 4, T): seven bytes over and over, others in every text."""
    rng = np.random.default_rng(step)
    return np.tile(rng.integers(0, 8, (2, 4, 7)), 4)[..., :LENGTH].astype(np.int32)


def of(variables, name):
    return {collection: tree[name] for collection, tree in variables.items()}


def sequencer(variables, carry, tokens):
    return PARTS["sequencer"].apply(of(variables, "sequencer"), tokens)


def block(variables, x, tokens):
    return ContextBlock(ATTENTION, TERNARY).apply(of(variables, "blocks"), x)[0]


def head(variables, x, tokens):
    context, _ = PARTS["reader"].apply(of(variables, "reader"), x)
    logits = PARTS["head"].apply(of(variables, "head"), x, context)
    return trigram_cross_entropy(logits, tokens).mean()


@pytest.mark.slow
def test_the_sweep_trains_the_parts():
    x = jnp.zeros((4, LENGTH - 2, 32), jnp.float32)
    inputs = {"sequencer": (texts(0)[0],), "blocks": (x, None, 0), "reader": (x,), "head": (x, x)}
    made = {name: fresh(part, *inputs[name]) for name, part in PARTS.items()}
    ternary = {name: variables["ternary"] for name, (variables, _) in made.items()}
    specs = {name: own for name, (_, own) in made.items()}
    stages = (
        Stage(("sequencer",), sequencer),
        Stage(("blocks",), block, stacked=True),
        Stage(("reader", "head"), head),
    )
    sweep = Sweep(stages, RULE, specs)
    step = jax.jit(lambda *given: sweep(*given), donate_argnums=0)
    losses = []
    for at in range(STEPS):
        ternary, loss, moved, _ = step(ternary, texts(at), jnp.int32(at), jax.random.key(1), jnp.bool_(False))
        assert moved
        losses.append(float(loss))
    assert losses[0] == pytest.approx(np.log(288), rel=0.2)
    # That only eight bytes occur is learnt first: log 8 is 0.37 of log 288.
    assert np.mean(losses[-5:]) < losses[0] / 2
