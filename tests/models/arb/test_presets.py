"""Presets against counts by hand, without allocating anything; and how a wide and deep fresh model behaves."""

import math
from collections import Counter
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arb_modules import TERNARY
from fresh import packed_bytes

from arbs_jax.audit import Audit, audit, require_integers
from arbs_jax.errors import ConfigError
from arbs_jax.layers import MEMORY, TernaryConfig
from arbs_jax.models import VOCABULARY, preset
from arbs_jax.models.arb.config import ArbConfig
from arbs_jax.models.arb.model import ArbLM, empty_memory
from arbs_jax.models.arb.presets import ARB_PRESETS, PARTS
from arbs_jax.models.byte_lm import cross_entropy
from arbs_jax.rules import RuleConfig, default_group_size, make_rule
from arbs_jax.votes import matrix_specs


@cache
def account(config: ArbConfig, rule: str) -> Audit:
    ternary = TernaryConfig(make_rule(RuleConfig(rule), steps=10, votes_per_step=1), default_group_size(rule))
    model, tokens = ArbLM(config, ternary), jax.ShapeDtypeStruct((1, 8), jnp.int32)
    variables = jax.eval_shape(lambda tokens: model.init(jax.random.key(0), tokens), tokens)
    memory = jax.eval_shape(lambda: empty_memory(config))
    return audit({**variables, MEMORY: memory}, matrix_specs(model, tokens, whole=True), parts=PARTS)


def matrices(c: ArbConfig) -> dict[str, list[tuple[int, ...]]]:
    """Shapes by part, from the parts' descriptions; the last two axes are those of a matrix."""
    heads, still = c.heads * c.head_dim, c.heads * (c.head_dim - c.rope_dim)

    def gated(hidden: int, width: int, *axes: int) -> list[tuple[int, ...]]:
        return [(*axes, hidden, width), (*axes, hidden, width), (*axes, c.width, hidden)]

    down = [(c.latent + c.rope_dim, c.width), (still, c.latent), (heads, c.latent)]
    block = [(heads, c.width), *down, (c.width, heads), *gated(c.hidden, c.width)]
    reader = [(c.latent, c.width), (c.width, 2 * c.width), (heads, c.width), (heads, c.latent), (heads, c.latent)]
    compared = c.router_hidden or c.width
    router = 2 * [(c.experts, compared), *([(c.router_hidden, c.width)] if c.router_hidden else [])]
    parts = {
        "embedding and sequencer": [(VOCABULARY, c.embedding), *gated(c.sequencer_hidden, 3 * c.embedding)],
        "VQ bridge": [(c.vq_dim, c.width), (c.width, c.vq_dim), (c.vq_dim, c.width)],
        "shared table": [(c.vq_rows, c.vq_dim)],
        "composite proposals": [(c.kg_hidden, 2 * c.width), (c.vq_dim, c.kg_hidden), (c.width, c.vq_dim)],
        "KG table": [(c.kg_rows, c.vq_dim)],
        "attention": [*((c.layers, *shape) for shape in block), *reader, (c.width, heads)],
        "MoE graph": [*(3 * [(c.width, c.width)]), *gated(c.expert_hidden, c.width, c.experts), (1, c.width)],
        "router": router,
        "byte head": [
            (c.width, c.width),
            *gated(c.head_hidden, c.width, c.head_layers),
            (VOCABULARY, c.width),
        ],
    }
    if c.modality_hidden:
        trunk = [(c.width, c.width), *gated(c.modality_hidden, c.width)]
        parts["heads for other modalities"] = [*trunk, (256, c.width), *trunk, (8192, c.width)]
        parts["router"] = [*router, (3, c.width)]
    return parts


@pytest.mark.parametrize("name", ARB_PRESETS)
def test_every_preset_adds_up_by_part(name: str):
    found, by_part = account(ARB_PRESETS[name], "bigint"), matrices(ARB_PRESETS[name])
    assert found.weights_by_part == {part: sum(map(math.prod, shapes)) for part, shapes in by_part.items()}
    everything = [shape for shapes in by_part.values() for shape in shapes]
    leaves: Counter[str] = Counter()
    for *stack, rows, columns in everything:
        groups = math.prod((*stack, rows, -(-columns // 32)))
        leaves.update(trits=math.prod((*stack, rows, packed_bytes(columns))), exponent=groups, corr=8 * groups)
        leaves["votes"] += 8 * math.prod(stack)
    assert {leaf: size for leaf, size in found.bytes_by_leaf.items() if leaf != MEMORY} == dict(leaves)
    require_integers(found)


def test_the_largest_has_the_shares_that_were_asked_for():
    found = account(ARB_PRESETS["arb-3b"], "bigint")
    assert found.logical_ternary_weights == pytest.approx(3.12e9, rel=0.01)
    assert found.weights_by_part["shared table"] == 10_000_000 * 64
    assert found.weights_by_part["KG table"] == 5_000_000 * 64
    near = {"embedding and sequencer": 33.5, "MoE graph": 429, "composite proposals": 9, "router": 13, "byte head": 627}
    near |= {"heads for other modalities": 112}
    for part, millions in near.items():
        assert found.weights_by_part[part] == pytest.approx(millions * 1e6, rel=0.04), part
    assert 827e6 <= found.weights_by_part["attention"] < 1e9
    assert found.state_bytes <= 1_600e6


def test_the_default_rule_keeps_the_largest_within_its_bytes():
    assert account(ARB_PRESETS["arb-3b"], "latent10").state_bytes <= 3_750e6


@pytest.mark.slow
def test_presets_grow_and_the_tiny_one_is_tiny():
    sizes = {name: account(config, "bigint").logical_ternary_weights for name, config in ARB_PRESETS.items()}
    assert list(sizes.values()) == sorted(sizes.values())
    assert sizes["arb-tiny"] < 1e6
    assert sizes["arb-300m"] == pytest.approx(300e6, rel=0.05)


@pytest.mark.slow
def test_weights_that_a_position_reads():
    """Of `arb-25m`, tables and experts that it does not reach left out."""
    config = ARB_PRESETS["arb-25m"]
    by_part = account(config, "bigint").weights_by_part
    unread = (config.experts - config.top_k) * 3 * config.expert_hidden * config.width
    read = sum(by_part.values()) - by_part["shared table"] - by_part["KG table"] - unread
    assert read == pytest.approx(25e6, rel=0.05)


def test_a_preset_by_name():
    assert preset("arb-tiny", context=512) == replace(ARB_PRESETS["arb-tiny"], context=512)
    with pytest.raises(ConfigError, match=r"no preset 'arb-7b'; pass one of byte-0\.4m, .*arb-tiny, arb-25m"):
        preset("arb-7b")


@pytest.mark.slow
def test_a_fresh_deep_model_is_sane():
    """As deep as the largest, as narrow as can be, in bfloat16: finite, and not surer of a byte than it can be."""
    deep = ARB_PRESETS["arb-3b"]
    config = replace(
        ARB_PRESETS["arb-tiny"],
        dtype="bfloat16",
        layers=deep.layers,
        head_layers=deep.head_layers,
        max_moe_iters=deep.max_moe_iters,
        vq_rows=64,
        kg_rows=64,
    )
    model = ArbLM(config, TERNARY)
    tokens = np.random.default_rng(0).integers(0, 256, (2, 24))
    variables = jax.jit(model.init)(jax.random.key(0), tokens)
    logits = np.asarray(jax.jit(model.apply)(variables, tokens))
    assert np.isfinite(logits).all()
    loss = float(jnp.mean(cross_entropy(logits[:, :-1], tokens[:, 3:])))
    assert abs(loss - math.log(VOCABULARY)) < 1
