"""Edges between motifs against a plain Python oracle, and what they promise beyond it."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import assert_trees_equal

from arbs_jax.errors import ConfigError
from arbs_jax.models.arb.edge_updates import observe_edges
from arbs_jax.models.arb.edges import EdgeConfig, bucket_of, empty_edges, incoming, pair_weights

SLOTS = EdgeConfig(motifs=40, buckets=7, degree=3, window=2, gain=3, threshold=2, admit=1, toll=9, dense_motifs=0)
DENSE = EdgeConfig(motifs=6, window=2, gain=50, threshold=2, toll=8)
BATCH, LENGTH = 3, 11
BUCKETS = np.asarray(bucket_of(SLOTS, jnp.arange(SLOTS.motifs, dtype=jnp.int32)))

observe = jax.jit(observe_edges, static_argnums=0)


def meetings(config, ids, agreement):
    """Totals by hand: {(destination, source): [count, evidence]}."""
    totals = {}
    for row, agreed in zip(ids.tolist(), agreement.tolist(), strict=True):
        for at, motif in enumerate(row):
            for offset in range(1, min(config.window, at) + 1):
                other = row[at - offset]
                if 0 <= motif < config.motifs and 0 <= other < config.motifs:
                    entry = totals.setdefault((motif, other), [0, 0])
                    entry[0] += 1
                    entry[1] += agreed[at][offset - 1]
    return totals


class Oracle:
    """Buckets as lists of slots `[source, destination, sign, score]`, a pair at a time."""

    def __init__(self, config):
        self.config = config
        self.buckets = [[[-1, -1, 0, 0] for _ in range(config.degree)] for _ in range(config.buckets)]
        self.events = {"admitted": 0, "refused": 0, "evicted": 0, "replaced": 0, "saturated": 0}

    def observe(self, ids, agreement, step):
        config, totals = self.config, meetings(self.config, ids, agreement)
        for bucket in {int(BUCKETS[destination]) for destination, _ in totals}:
            slots = self.buckets[bucket]
            pairs = {pair: total for pair, total in totals.items() if BUCKETS[pair[0]] == bucket}
            met = sum(count for count, _ in pairs.values())
            share = (met + (step + bucket) % config.toll) // config.toll
            for slot in slots:
                _, evidence = pairs.pop((slot[1], slot[0]), (0, 0))
                if slot[1] >= 0:
                    slot[3] += max(-config.gain, min(config.gain, slot[2] * evidence - share))
                self.events["saturated"] += slot[3] > 127
                slot[3] = min(slot[3], 127)
                if slot[3] < config.evict:
                    self.events["evicted"] += slot[1] >= 0
                    slot[:] = [-1, -1, 0, 0]
            free = sorted(range(config.degree), key=lambda at, slots=slots: (slots[at][3], at))
            for (destination, source), (_, evidence) in sorted(pairs.items(), key=lambda item: (-item[1][0], item[0])):
                strength = min(abs(evidence) - share, config.gain)
                if strength < config.evict:
                    continue
                if free and slots[free[0]][3] <= config.admit:
                    slot = slots[free.pop(0)]
                    self.events["replaced"] += slot[1] >= 0
                    self.events["admitted"] += 1
                    slot[:] = [source, destination, int(np.sign(evidence)), strength]
                else:
                    self.events["refused"] += 1

    def leaves(self):
        columns = np.asarray(self.buckets).transpose(2, 0, 1)
        dtypes = {"source": np.int32, "destination": np.int32, "sign": np.int8, "score": np.int8}
        return {name: column.astype(dtype) for (name, dtype), column in zip(dtypes.items(), columns, strict=True)}


def stream(rng, motifs, frequent, bias):
    """One step's ids, some of them no motif, a few motifs far more frequent; agreements are mostly the pair's own."""
    ids = np.where(rng.random((BATCH, LENGTH)) < 0.7, rng.integers(0, frequent, (BATCH, LENGTH)), 0)
    ids = np.where(rng.random(ids.shape) < 0.3, rng.integers(-2, motifs + 2, ids.shape), ids).astype(np.int32)
    own = 1 - 2 * (ids % 2)
    agreement = np.where(rng.random((*ids.shape, 2)) < bias, own[..., None], rng.integers(-1, 2, (*ids.shape, 2)))
    return ids, agreement.astype(np.int8)


def test_slots_follow_the_oracle_through_admission_eviction_and_saturation():
    rng, oracle, edges = np.random.default_rng(0), Oracle(SLOTS), empty_edges(SLOTS)
    for step in range(180):
        # Ninety steps of the same few motifs, then of all.
        ids, agreement = stream(rng, SLOTS.motifs, *((2, 1.0) if step < 90 else (SLOTS.motifs, 0.4)))
        oracle.observe(ids, agreement, step)
        edges = observe(SLOTS, edges, ids, agreement, jnp.int32(step))
        assert_trees_equal(edges, oracle.leaves())
    assert all(count > 0 for count in oracle.events.values()), oracle.events


def test_dense_scores_follow_the_oracle_to_both_ends():
    rng, edges = np.random.default_rng(1), empty_edges(DENSE)
    expected = np.zeros((6, 6), np.int64)
    for step in range(80):
        ids, agreement = stream(rng, 6, 4, 0.9)
        totals = meetings(DENSE, ids, agreement)
        for destination in {pair[0] for pair in totals}:
            met = sum(count for pair, (count, _) in totals.items() if pair[0] == destination)
            share = (met + (step + destination) % DENSE.toll) // DENSE.toll
            for source in range(6):
                score = int(expected[destination, source])
                aim = score + totals.get((destination, source), (0, 0))[1]
                aim = int(np.sign(aim)) * max(abs(aim) - share, 0)
                aim = score + max(-DENSE.gain, min(DENSE.gain, aim - score))
                expected[destination, source] = max(-127, min(127, aim))
        edges = observe(DENSE, edges, ids, agreement, jnp.int32(step))
        assert_trees_equal(edges, {"score": expected.astype(np.int8)})
    assert expected.max() == 127
    assert expected.min() == -127


@pytest.mark.parametrize("config", [SLOTS, DENSE], ids=["slots", "dense"])
def test_order_of_sequences_does_not_matter(config):
    rng = np.random.default_rng(2)
    edges = empty_edges(config)
    for step in range(4):
        ids, agreement = stream(rng, config.motifs, config.motifs, 0.5)
        order = rng.permutation(BATCH)
        one = observe(config, edges, ids, agreement, jnp.int32(step))
        assert_trees_equal(observe(config, edges, ids[order], agreement[order], jnp.int32(step)), one)
        edges = one


def read_by_hand(config, edges):
    """{(destination, source): weight} of all edges that carry messages."""
    leaves = {name: np.asarray(leaf) for name, leaf in edges.items()}
    if config.dense:
        strong = np.argwhere(np.abs(leaves["score"].astype(int)) >= config.threshold)
        return {(int(d), int(s)): int(np.sign(leaves["score"][d, s])) for d, s in strong}
    strong = np.argwhere(leaves["score"] >= config.threshold)
    return {
        (int(leaves["destination"][at]), int(leaves["source"][at])): int(leaves["sign"][at])
        for at in map(tuple, strong)
    }


@pytest.mark.parametrize("config", [SLOTS, DENSE], ids=["slots", "dense"])
def test_strong_edges_and_no_others_are_read(config):
    rng, edges = np.random.default_rng(3), empty_edges(config)
    for step in range(6):
        edges = observe(config, edges, *stream(rng, config.motifs, 5, 0.9), jnp.int32(step))
    weights = read_by_hand(config, edges)
    assert {-1, 1} <= set(weights.values())
    motifs = np.arange(-1, config.motifs + 1, dtype=np.int32)
    read = jax.jit(lambda edges, ids: (*incoming(config, edges, ids), pair_weights(config, edges, ids, ids)))
    sources, weight, pairs = (np.asarray(leaf) for leaf in read(edges, motifs))
    found = {
        (int(motifs[row]), int(sources[row, slot])): int(weight[row, slot]) for row, slot in np.argwhere(weight != 0)
    }
    assert found == weights
    assert pairs.dtype == np.int8
    assert {(int(motifs[d]), int(motifs[s])): int(pairs[d, s]) for d, s in np.argwhere(pairs != 0)} == weights


@pytest.mark.slow
def test_partners_are_found_among_noise():
    """Motifs from 20 on follow a partner of theirs, at one or two positions; seven times of ten it agrees."""
    config = replace(SLOTS, motifs=40, buckets=64, degree=4, gain=8, threshold=4, toll=16)
    partner = np.random.default_rng(4).permutation(20)
    rng, edges = np.random.default_rng(5), empty_edges(config)
    for step in range(60):
        ids = rng.integers(0, 20, (8, 30)).astype(np.int32)
        ids[:, 2::3] = 20 + np.argsort(partner)[np.where(rng.random((8, 10)) < 0.5, ids[:, 1::3], ids[:, 0::3])]
        agreement = np.where(rng.random((8, 30, 2)) < 0.5, np.int8(1), np.int8(-1))
        met = partner[ids[:, 2::3] - 20][..., None] == np.stack([ids[:, 1::3], ids[:, 0::3]], axis=-1)
        agreement[:, 2::3] = np.where(met & (rng.random(met.shape) < 0.4), np.int8(1), agreement[:, 2::3])
        edges = observe(config, edges, ids, agreement, jnp.int32(step))
    weights = read_by_hand(config, edges)
    wanted = {(20 + motif, int(source)): 1 for motif, source in enumerate(partner)}
    # Some share a bucket with so much traffic that their part of it is below the toll.
    assert len(weights.items() & wanted.items()) >= 16
    assert len(weights.keys() - wanted.keys()) <= 2


def test_a_step_makes_nothing_of_the_size_of_the_state():
    config = EdgeConfig(motifs=10**6, buckets=1 << 18, degree=8)
    edges = jax.eval_shape(partial(empty_edges, config))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in edges.values())
    assert size == 10 * config.buckets * config.degree
    ids = jax.ShapeDtypeStruct((2, 64), jnp.int32)
    agreement = jax.ShapeDtypeStruct((2, 64, config.window), jnp.int8)
    step = jax.ShapeDtypeStruct((), jnp.int32)
    donated = jax.jit(observe_edges, static_argnums=0, donate_argnums=1)
    memory = donated.lower(config, edges, ids, agreement, step).compile().memory_analysis()
    assert memory.alias_size_in_bytes == size
    assert memory.temp_size_in_bytes < size / 16


def test_mistakes_are_named():
    for change, message in [
        ({"motifs": 0}, r"edges.motifs must be in \[1, 2\^31\), got 0"),
        ({"threshold": 128}, r"edges.threshold must be in \[1, 127\].*got 128"),
        ({"evict": 4}, "edges.evict must be at most edges.gain, got 4 and 3"),
    ]:
        with pytest.raises(ConfigError, match=message):
            replace(SLOTS, **change)
    with pytest.raises(ConfigError, match=r"\(2, 5, 2\), got \(2, 5\)"):
        observe_edges(SLOTS, empty_edges(SLOTS), jnp.zeros((2, 5), jnp.int32), jnp.zeros((2, 5), jnp.int8), 0)
