"""Which position hears which, against a plain Python oracle, and the sums that it hears."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arbs_jax.errors import ConfigError
from arbs_jax.models.arb.edges import EdgeConfig, bucket_of, empty_edges
from arbs_jax.models.arb.graph import GraphConfig, agreements, gather_messages, message_band

MOTIFS, LENGTH, WIDTH = 5, 11, 3
EDGES = {
    "dense": EdgeConfig(motifs=MOTIFS, window=2, threshold=2),
    "slots": EdgeConfig(motifs=MOTIFS, buckets=4, degree=5 * MOTIFS, window=2, threshold=2, dense_motifs=0),
}
RNG = np.random.default_rng(0)
# Some ids are no motif's.
IDS = RNG.integers(-1, MOTIFS + 1, (4, LENGTH)).astype(np.int32)
MESSAGES = RNG.integers(-9, 10, (4, LENGTH, WIDTH)).astype(np.float32)


band_of = jax.jit(message_band, static_argnums=0)


@pytest.fixture(scope="module", params=["dense", "slots"])
def known(request):
    """(config, edges, weights by destination and source) of a random graph."""
    config = EDGES[request.param]
    scores = np.random.default_rng(1).integers(-4, 5, (MOTIFS, MOTIFS)).astype(np.int8)
    weights = np.where(np.abs(scores) >= config.threshold, np.sign(scores), 0)
    assert set(np.unique(weights)) == {-1, 0, 1}
    if config.dense:
        return config, {"score": jnp.asarray(scores)}, weights
    slots = {name: np.array(leaf) for name, leaf in empty_edges(config).items()}
    for destination, bucket in enumerate(np.asarray(bucket_of(config, jnp.arange(MOTIFS, dtype=jnp.int32)))):
        for source in range(MOTIFS):
            slot = int(np.argmin(slots["score"][bucket]))
            assert slots["score"][bucket, slot] == 0
            edge = {"source": source, "destination": destination}
            edge |= {"sign": np.sign(scores[destination, source]), "score": abs(scores[destination, source])}
            for name, value in edge.items():
                slots[name][bucket, slot] = value
    return config, {name: jnp.asarray(leaf) for name, leaf in slots.items()}, weights


def heard_by_hand(weights, ids, lookback):
    """Signs (S, S) with which each position hears each."""
    signs = np.zeros((len(ids), len(ids)))
    for receiver, destination in enumerate(ids):
        seen = set()
        for sender in reversed(range(max(0, receiver - lookback), receiver)):
            source = ids[sender]
            if source not in seen and 0 <= source < MOTIFS and 0 <= destination < MOTIFS:
                signs[receiver, sender] = weights[destination, source]
            seen.add(source)
    return signs


@pytest.mark.parametrize("lookback", [4, 64])
def test_each_position_hears_the_latest_of_each_source(known, lookback):
    config, edges, weights = known
    band = band_of(GraphConfig(config, lookback), edges, jnp.asarray(IDS))
    assert band.dtype == jnp.int8
    heard = gather_messages(band, jnp.asarray(MESSAGES))
    signs = np.stack([heard_by_hand(weights, ids, lookback) for ids in IDS])
    assert np.abs(signs).any()
    # Sums of small integers are exact.
    np.testing.assert_array_equal(heard, signs @ MESSAGES)


def test_later_motifs_change_nothing_before_them(known):
    config, edges, _ = known
    graph, cut = GraphConfig(config, 4), 6
    changed = IDS.copy()
    changed[:, cut:] = np.random.default_rng(5).integers(0, MOTIFS, changed[:, cut:].shape)
    bands = [band_of(graph, edges, jnp.asarray(ids)) for ids in (IDS, changed)]
    one, two = (np.asarray(gather_messages(band, jnp.asarray(MESSAGES))) for band in bands)
    np.testing.assert_array_equal(one[:, :cut], two[:, :cut])
    assert (one[:, cut:] != two[:, cut:]).any()


def test_messages_have_the_gradient_of_a_sum(known):
    config, edges, weights = known
    band = band_of(GraphConfig(config, 4), edges, jnp.asarray(IDS))
    towards = np.random.default_rng(6).integers(-3, 4, MESSAGES.shape).astype(np.float32)
    gradient = jax.grad(lambda messages: jnp.sum(gather_messages(band, messages) * towards))(jnp.asarray(MESSAGES))
    signs = np.stack([heard_by_hand(weights, ids, 4) for ids in IDS])
    np.testing.assert_array_equal(gradient, signs.transpose(0, 2, 1) @ towards)


def test_agreement_is_the_sign_of_an_inner_product():
    own = np.random.default_rng(7).integers(-2, 3, MESSAGES.shape).astype(np.float32)
    found = agreements(jnp.asarray(MESSAGES), jnp.asarray(own), 3)
    expected = np.zeros((4, LENGTH, 3), np.int8)
    for offset in (1, 2, 3):
        expected[:, offset:, offset - 1] = np.sign((MESSAGES[:, :-offset] * own[:, offset:]).sum(-1))
    assert found.dtype == jnp.int8
    np.testing.assert_array_equal(found, expected)


def test_lookback_is_checked():
    with pytest.raises(ConfigError, match=r"graph\.lookback must be at least 1, got 0"):
        GraphConfig(EDGES["dense"], lookback=0)
