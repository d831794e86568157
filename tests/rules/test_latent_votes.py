"""Votes of the latent rules: the normalised gradient in integers, sums of them, the scale as their exact integral."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from latent_matrices import (
    KEY,
    PLAIN,
    RULES,
    SPEC,
    every_rule,
    fresh,
    gradient,
    trained,
    trits,
    types,
    updater,
    vote_on,
    voter,
)
from support import assert_trees_equal, int64

from arbs_jax import Integral
from arbs_jax.rules import Schedule

CANARY = 2**40


def add(*votes):
    return jax.tree.map(lambda *leaves: sum(leaves[1:], leaves[0]), *votes)


def test_a_vote_is_integers():
    votes = vote_on(fresh(PLAIN), gradient())
    rows, columns = SPEC.shape
    shapes = {"sample": SPEC.shape, "rows": (rows,), "columns": (columns,), "score": (rows, SPEC.groups), "count": ()}
    assert types(votes) == {name: (jnp.int32, shape) for name, shape in shapes.items()}
    assert int(votes["count"]) == 1
    assert np.abs(votes["sample"]).max() <= 124
    assert np.abs(votes["score"]).max() <= 4 * 256


def test_a_vote_is_the_normalised_gradient():
    """Against float64: 1/31 steps without bias, sixteenths of an octave, 1/256 of the scores' RMS."""
    matrix, g32 = fresh(PLAIN), gradient()
    g = np.asarray(g32, np.float64)
    rows, columns = (np.mean(g**2, axis=axis) for axis in (1, 0))
    u = np.clip(g / np.sqrt(rows[:, None] * columns[None] / rows.mean()), -4, 4)
    samples = jax.vmap(lambda seed: voter()(matrix, g32, jax.random.key(seed))["sample"])(jnp.arange(400))
    samples = np.asarray(samples, np.float64)
    assert np.abs(samples - 31 * u).max() < 1 + 1e-3
    fraction = 31 * u % 1
    assert (np.abs(samples.mean(axis=0) - 31 * u) < 5.5 * np.sqrt(fraction * (1 - fraction) / 400) + 1e-2).all()
    votes = vote_on(matrix, g32)
    # Rounded once; float32 sums of 83 terms and logarithms near 320 differ from float64's by less than 1e-3.
    for name, moments in (("rows", rows), ("columns", columns)):
        assert np.abs(np.asarray(votes[name]) - 16 * np.log2(moments)).max() < 0.5 + 1e-3
    padded = np.pad(g * trits(matrix), ((0, 0), (0, SPEC.groups * 32 - SPEC.in_features)))
    agreement = padded.reshape(SPEC.out_features, SPEC.groups, 32).sum(axis=-1)
    score = np.clip(agreement / np.sqrt(np.mean(agreement**2)), -4, 4) * 256
    assert np.abs(np.asarray(votes["score"]) - score).max() < 0.5 + 1e-2


@pytest.mark.parametrize("power", [-40, -8, 12, 40])
def test_the_size_of_the_gradient_does_not_matter(power):
    """Only the logs of the moments know it: other bits of the vote are the same up to near-ties of rounding."""
    matrix, g = fresh(PLAIN), gradient(scale=1.0)
    one, scaled = vote_on(matrix, g), vote_on(matrix, g * 2.0**power)
    for name in ("sample", "score"):
        difference = np.abs(np.asarray(one[name]) - np.asarray(scaled[name]))
        assert difference.max() <= 1
        assert (difference > 0).mean() < 1e-2
    for name in ("rows", "columns"):
        np.testing.assert_array_equal(np.asarray(scaled[name]) - np.asarray(one[name]), 2 * 16 * power)


@every_rule
@pytest.mark.parametrize("bad", ["zero", "nan", "inf", "overflow"])
def test_a_gradient_that_says_nothing_is_no_vote(name, bad):
    rule, g = RULES[name], gradient()
    matrix = trained(rule, 2)
    poison = {"nan": g.at[3, 4].set(jnp.nan), "inf": g.at[3, 4].set(-jnp.inf), "overflow": g.at[3, 4].set(1e30)}
    useless = vote_on(matrix, poison.get(bad, jnp.zeros_like(g)))
    assert all(leaf.dtype == jnp.int32 and not np.asarray(leaf).any() for leaf in useless.values())
    assert_trees_equal(updater(rule)(matrix, useless, jnp.int32(2)), matrix)
    # Beside a good vote it is as if it were not there.
    good = vote_on(matrix, g)
    assert_trees_equal(add(useless, good), good)


def test_rows_and_columns_without_gradient_have_no_sample():
    g = gradient().at[5].set(0.0).at[:, 7].set(0.0)
    sample = np.asarray(vote_on(fresh(PLAIN), g)["sample"])
    assert not sample[5].any()
    assert not sample[:, 7].any()
    assert (np.delete(np.delete(sample, 5, 0), 7, 1) != 0).mean() > 0.9


@every_rule
def test_votes_add_up_in_any_order(name):
    rule = RULES[name]
    matrix = trained(rule, 2)
    votes = [vote_on(matrix, gradient(seed), seed) for seed in range(3)]
    expected = updater(rule)(matrix, add(*votes), jnp.int32(2))
    for order in ((2, 0, 1), (1, 2, 0)):
        assert_trees_equal(updater(rule)(matrix, add(*(votes[i] for i in order)), jnp.int32(2)), expected)
    assert int(expected["votes"]) == int(matrix["votes"]) + 3
    # A vote's random bits are its own.
    again, other = (vote_on(matrix, gradient(0), seed)["sample"] for seed in (0, 1))
    np.testing.assert_array_equal(again, votes[0]["sample"])
    assert (np.asarray(other) != np.asarray(again)).mean() > 0.2


@every_rule
def test_votes_are_averaged(name):
    """Three votes that agree move the latents as one does: the sum is divided by their number."""
    rule = RULES[name]
    matrix = trained(rule, 2)
    vote = vote_on(matrix, gradient(9))
    one = updater(rule)(matrix, vote, jnp.int32(2))
    three = updater(rule)(matrix, add(vote, vote, vote), jnp.int32(2))
    assert int(three.pop("votes")) == int(one.pop("votes")) + 2
    # Quotients by 3 * 31 and by 31 may differ in the last bit, and then a near-tie in rounding.
    for leaf in one:
        difference = np.abs(np.asarray(one[leaf]).astype(int) - np.asarray(three[leaf]))
        assert (difference > 0).mean() < 0.01, leaf


def corr_after(rule, corr, votes, step):
    """The documented integer rule, in Python integers."""
    rate = int(rule.schedule.multiplier(jnp.int32(step))) * round(rule.scale_rate * 2**24) >> 16
    pull = [int(rate) * int(score) // (256 * int(votes["count"])) for score in np.asarray(votes["score"]).reshape(-1)]
    return (np.asarray(corr).reshape(-1) - np.array(pull, np.int64)).reshape(np.asarray(corr).shape)


@given(
    start=st.integers(-(2**61), 2**61),
    count=st.integers(1, 64),
    step=st.integers(0, 2000),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=25, deadline=None)
def test_the_scale_is_integrated_exactly(start, count, step, seed):
    rule = replace(PLAIN, schedule=Schedule(steps=1000, warmup=100))
    matrix = fresh(rule) | {"corr": int64(np.full((48, 3), start)), "votes": int64(CANARY)}
    scores = np.random.default_rng(seed).integers(-1024 * count, 1024 * count + 1, (48, 3))
    votes = vote_on(matrix, gradient()) | {"score": jnp.asarray(scores, jnp.int32), "count": jnp.int32(count)}
    after = updater(rule)(matrix, votes, jnp.int32(step))
    np.testing.assert_array_equal(np.asarray(after["corr"]), corr_after(rule, matrix["corr"], votes, step), strict=True)
    assert int(after["votes"]) == CANARY + count
    np.testing.assert_array_equal(after["exponent"], matrix["exponent"])


def test_a_score_of_one_rms_moves_the_scale_by_the_rate():
    matrix = fresh(PLAIN)
    votes = vote_on(matrix, gradient()) | {"score": jnp.full((48, 3), 256, jnp.int32)}
    ratio = PLAIN.scale(updater(PLAIN)(matrix, votes, jnp.int32(0)), 32) / PLAIN.scale(matrix, 32)
    np.testing.assert_allclose(np.log2(ratio), -PLAIN.scale_rate, rtol=1e-4)


@every_rule
def test_the_canary_survives_scan_and_donation(name):
    rule = RULES[name]
    matrix = fresh(rule) | {"corr": int64(np.full((48, 3), CANARY)), "votes": int64(CANARY)}
    votes = [vote_on(matrix, gradient(seed), seed) for seed in range(3)]
    expected = np.full((48, 3), CANARY, np.int64)
    for step, vote in enumerate(votes):
        expected = corr_after(rule, expected, vote, step)

    def body(matrix, entry):
        return rule.update(matrix, entry[0], SPEC, entry[1], KEY)[0], None

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *votes)
    scanned = jax.jit(lambda m, v: jax.lax.scan(body, m, (v, jnp.arange(3, dtype=jnp.int32)))[0], donate_argnums=0)
    looped = matrix
    for step, vote in enumerate(votes):
        looped = updater(rule)(looped, vote, jnp.int32(step))
    after = scanned(jax.tree.map(jnp.copy, matrix), stacked)
    assert_trees_equal(after, looped)
    np.testing.assert_array_equal(np.asarray(after["corr"]), expected, strict=True)
    assert (int(after["votes"]), after["votes"].dtype) == (CANARY + 3, jnp.int64)


def test_the_scale_is_the_integral():
    rng = np.random.default_rng(0)
    exponent, corr = rng.integers(-8, 1, (9, 5)), rng.integers(-(2**27), 2**27, (9, 5))
    leaves = {"exponent": jnp.asarray(exponent, jnp.int8), "corr": int64(corr)}
    assert_trees_equal(PLAIN.scale(leaves, 32), Integral(fraction_bits=24).scale(leaves, 32))
