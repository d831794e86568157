"""The n-gram memory: hashed, causal, bounded, and indifferent to the order of a batch."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import assert_trees_equal

from arbs_jax import Integral, TernaryConfig
from arbs_jax.errors import ConfigError
from arbs_jax.models.arb.memgram import (
    MemGram,
    MemGramConfig,
    conversational_strength,
    empty_memgram,
    observe_memgram,
)
from arbs_jax.models.arb.memgram import ngram_hashes as hashes_of
from arbs_jax.rules.noise import run_key

CONFIG = MemGramConfig(rows=1000, dim=8, width=6, orders=(2, 3), conversational_rows=512, gain=16, decay=3)
IDS = jnp.asarray([[4, 9, 4, 9, 4], [1, 4, 9, 4, 7]], jnp.int32)
observe = jax.jit(observe_memgram, static_argnums=2)
ngram_hashes = jax.jit(hashes_of, static_argnums=1)


@partial(jax.jit, static_argnums=2)
def read(memory, ids, orders=(1,)):
    return conversational_strength(memory, hashes_of(ids, orders)[0])


def strengths(memory):
    return np.asarray(read(memory, IDS, CONFIG.orders))


def test_equal_ngrams_hash_alike_wherever_they_are():
    hashes, whole = ngram_hashes(IDS, (2, 3))
    np.testing.assert_array_equal(np.asarray(whole[0]), [[False] * 2, [True, False], *[[True] * 2] * 3])
    assert hashes.dtype == jnp.uint32
    assert hashes[0, 1, 0] == hashes[0, 3, 0] == hashes[1, 2, 0]
    assert hashes[0, 2, 1] == hashes[0, 4, 1] == hashes[1, 3, 1]
    # 4 9 | 9 4 | 4 7 | 1 4 by twos and 4 9 4 | 9 4 9 | 1 4 9 | 9 4 7 by threes.
    assert len(np.unique(np.asarray(hashes)[np.asarray(whole)])) == 8


def test_a_history_continues_a_segment():
    whole = ngram_hashes(IDS, (2, 3))
    part = ngram_hashes(IDS[:, 3:], (2, 3), IDS[:, 1:3])
    assert_trees_equal(part, jax.tree.map(lambda leaf: leaf[:, 3:], whole))
    with pytest.raises(ConfigError, match=r"the 2 ids before, \(2, 2\), got \(2, 1\)"):
        ngram_hashes(IDS, (2, 3), IDS[:, :1])


def test_strength_grows_with_use_decays_without_and_ends():
    memory = observe(empty_memgram(CONFIG), IDS, CONFIG)
    found = strengths(memory)
    assert {leaf.dtype.name for leaf in memory.values()} == {"int32", "int8"}
    assert found[0, 1, 0] == 16  # first seen: one gain, however often
    twice = strengths(observe(memory, IDS, CONFIG))
    assert twice[0, 1, 0] == 16 - 2 + 3 * 16
    many = memory
    for _ in range(6):
        many = observe(many, IDS, CONFIG)
    assert strengths(many)[0, 1, 0] == 127
    elsewhere = jnp.asarray([[100, 101]], jnp.int32)
    for _ in range(60):
        many = observe(many, elsewhere, CONFIG)
    assert strengths(many)[0, 1, 0] == 0


def test_a_strong_slot_is_kept_and_a_weak_one_replaced():
    config = MemGramConfig(rows=10, dim=8, width=6, orders=(1,), conversational_rows=1, gain=16, decay=3)
    one, two = jnp.asarray([[5]], jnp.int32), jnp.asarray([[6]], jnp.int32)
    strong = empty_memgram(config)
    for _ in range(3):
        strong = observe(strong, one, config)
    kept = observe(strong, two, config)
    assert read(kept, one) > 16
    assert read(kept, two) == 0
    weak = observe(observe(empty_memgram(config), one, config), two, config)
    assert (read(weak, one), read(weak, two)) == (0, 16)


def test_the_order_of_the_batch_does_not_matter():
    config = MemGramConfig(rows=10, dim=8, width=6, conversational_rows=3)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 9, (6, 7)), jnp.int32)
    memory = observe(observe(empty_memgram(config), ids, config), ids[:3], config)
    assert_trees_equal(observe(memory, ids, config), observe(memory, ids[::-1], config))


def test_reading_is_causal_and_gated():
    model = MemGram(CONFIG, TernaryConfig(rule=Integral(), group_size=8))
    fresh = empty_memgram(CONFIG)
    state = jax.jit(model.init)(run_key(0), IDS, fresh)
    assert set(state["ternary"]) == {"structural", "out"}
    apply = jax.jit(model.apply)
    out = np.asarray(apply(state, IDS, fresh))
    assert out.shape == (2, 5, 6)
    assert not out[:, 0].any()
    later = np.asarray(apply(state, IDS.at[:, 3:].set(2), fresh))
    np.testing.assert_array_equal(later[:, :3], out[:, :3])
    assert (later[:, 3:] != out[:, 3:]).any()
    np.testing.assert_array_equal(out[0, 4], out[0, 2])
    familiar = np.asarray(apply(state, IDS, observe(fresh, IDS, CONFIG)))
    assert (familiar[:, 1:] != out[:, 1:]).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 2**24}, r"rows must be in \[1, 2\^24\), got 16777216"),
        ({"orders": (3, 2)}, r"orders must be ascending lengths from 1, got \(3, 2\)"),
        ({"gain": 200}, "gain must be in .* got 200"),
        ({"decay": 8}, r"decay must be in \[0, 7\], got 8"),
        ({"dtype": "int8"}, "'float32' or 'bfloat16', got 'int8'"),
    ],
)
def test_configurations_that_cannot_be(change, message):
    with pytest.raises(ConfigError, match=message):
        MemGramConfig(**change)
