"""`integral` is an exact integrator in 64 bits, whatever carries the state."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import assert_trees_equal, int64

from arbs_jax.errors import ConfigError
from arbs_jax.rules import Integral, Schedule
from arbs_jax.state import MatrixSpec

CANARY = 2**40
SPEC = MatrixSpec(2, 10, 8)
CONSTANT = Schedule(steps=1, warmup=0, final=1.0)
RULE = Integral(schedule=CONSTANT)


def matrix(corr=CANARY, votes=CANARY):
    return {
        "trits": jnp.zeros((2, 2), jnp.uint8),
        "exponent": jnp.zeros((2, 2), jnp.int8),
        "corr": int64(np.full((2, 2), corr)),
        "votes": int64(votes),
    }


def cast(score, count=1):
    return {"score": jnp.asarray(score, jnp.int32), "count": jnp.asarray(count, jnp.int32)}


def moved(state, votes, step=0, rule=RULE):
    return rule.update(state, votes, SPEC, jnp.asarray(step, jnp.int32), jax.random.key(0))[0]


rates = jax.jit(lambda rule, steps: rule.integer_rate(steps, 32), static_argnums=0)


@given(
    scores=st.lists(st.integers(-(2**20), 2**20), min_size=4, max_size=4),
    start=st.integers(-(2**61), 2**61),
    step=st.integers(0, 2000),
)
@settings(max_examples=40, deadline=None)
def test_update_is_exact(scores, start, step):
    rule = Integral()
    state = matrix() | {"corr": int64(np.full((2, 2), start))}
    after = jit_moved(rule, state, cast(np.reshape(scores, (2, 2)), 5), jnp.int32(step))
    rate = int(jit_rate(rule, jnp.int32(step)))
    assert np.asarray(after["corr"]).reshape(-1).tolist() == [start - rate * score for score in scores]
    assert after["corr"].dtype == jnp.int64
    assert int(after["votes"]) == CANARY + 5
    assert_trees_equal([after["trits"], after["exponent"]], [state["trits"], state["exponent"]])


jit_moved = jax.jit(lambda rule, state, votes, step: moved(state, votes, step, rule), static_argnums=0)
jit_rate = jax.jit(lambda rule, step: rule.integer_rate(step, SPEC.group_size), static_argnums=0)


@pytest.mark.parametrize("fraction_bits", [8, 16, 24, 32, 40])
@pytest.mark.parametrize("learning_rate", [0.01, 0.3, 8.0])
def test_the_peak_rate_is_the_rounded_formula(fraction_bits, learning_rate):
    for group_size, votes in ((4, 1), (32, 1), (96, 3), (256, 64)):
        rule = Integral(learning_rate, CONSTANT, votes, fraction_bits)
        peak = round(learning_rate * 2**fraction_bits / (math.sqrt(group_size) * votes))
        if peak == 0:
            with pytest.raises(ConfigError, match=f"{learning_rate} rounds to 0 at fraction_bits {fraction_bits}"):
                rule.integer_rate(jnp.int32(0), group_size)
            continue
        rate = rule.integer_rate(jnp.int32(0), group_size)
        assert rate.dtype == jnp.int64
        assert int(rate) == peak


def test_the_rate_follows_the_schedule():
    rule = Integral(learning_rate=1.0, schedule=Schedule(steps=50, warmup=10))
    steps = jnp.arange(60, dtype=jnp.int32)
    multiplier = np.asarray(rule.schedule.multiplier(steps)).astype(object)
    peak = round(2**24 / math.sqrt(32))
    assert np.asarray(rates(rule, steps)).tolist() == [int(m) * peak // 2**16 for m in multiplier]


def test_the_scale_is_the_integral():
    rng = np.random.default_rng(0)
    exponent, corr = rng.integers(-8, 1, (9, 5)), rng.integers(-(2**27), 2**27, (9, 5))
    leaves = {"exponent": jnp.asarray(exponent, jnp.int8), "corr": int64(corr)}
    scale = Integral().scale(leaves, 32)
    assert scale.dtype == jnp.float32
    shift = corr / 2.0**24
    # The accumulator and the sum with the exponent rounded to float32 (both below 16), and the exponential itself.
    bound = np.log(2) * (np.abs(shift) + np.abs(exponent + shift)) * 2**-24 + 4 * 2**-24
    np.testing.assert_array_less(np.abs(np.asarray(scale) / 2.0 ** (exponent + shift) - 1), bound)


@pytest.mark.parametrize("bits", [8, 24, 40])
def test_a_unit_of_the_accumulator_is_the_stated_fraction_of_an_octave(bits):
    rule = Integral(fraction_bits=bits)
    scale = rule.scale(matrix(2**bits) | {"exponent": jnp.full((2, 2), -3, jnp.int8)}, 8)
    np.testing.assert_array_equal(scale, np.full((2, 2), 0.25, np.float32), strict=True)
    half = rule.scale(matrix(2 ** (bits - 1)), 8)
    np.testing.assert_allclose(half, math.sqrt(2), rtol=2**-22)


def test_one_step_moves_the_scale_by_the_learning_rate():
    """A score of sqrt(G) moves log2 of the scale by the peak rate, against the gradient."""
    rule = Integral(learning_rate=0.5, schedule=CONSTANT)
    spec = MatrixSpec(1, 64, 64)
    state = {name: leaf[:1, :1] if leaf.ndim else leaf for name, leaf in matrix(0, 0).items()}
    after, _ = rule.update(state, cast([[8]]), spec, jnp.int32(0), jax.random.key(0))
    np.testing.assert_allclose(np.log2(rule.scale(after, 64)), -0.5, rtol=2**-20)


def test_votes_share_the_rate():
    """Four micro-batches that agree move the state as one would, to within a unit each."""
    one, four = (Integral(schedule=CONSTANT, votes_per_step=count) for count in (1, 4))
    alone = moved(matrix(0), cast(np.full((2, 2), 3)), rule=one)["corr"]
    together = moved(matrix(0), cast(np.full((2, 2), 12), 4), rule=four)["corr"]
    assert np.abs(np.asarray(alone) - np.asarray(together)).max() <= 12


def test_the_canary_survives_jit_donation_scan_and_accumulation():
    """2^40 is more than 32 bits hold; every way that a state travels must keep it, to the last unit."""
    rng = np.random.default_rng(1)
    scores = rng.integers(-32, 33, (6, 2, 2)).astype(np.int32)
    rate = int(RULE.integer_rate(jnp.int32(0), 8))
    expected = CANARY - rate * scores.sum(axis=0, dtype=np.int64)

    looped = matrix()
    for score in scores:
        looped = moved(looped, cast(score))
    step = jax.jit(moved, donate_argnums=0)
    donated = matrix()
    for score in scores:
        donated = step(donated, cast(score))

    @jax.jit
    def scanned(state, scores):
        return jax.lax.scan(lambda state, score: (moved(state, cast(score)), None), state, scores)[0]

    accumulated = moved(matrix(), cast(scores.sum(axis=0), 6))
    for after in (looped, donated, scanned(matrix(), jnp.asarray(scores)), accumulated):
        np.testing.assert_array_equal(np.asarray(after["corr"]), expected, strict=True)
        assert int(after["votes"]) == CANARY + 6
        assert after["votes"].dtype == jnp.int64


def test_stacked_leaves_move_layer_by_layer():
    layers = [matrix(CANARY), matrix(-CANARY)]
    votes = [cast([[1, 2], [3, 4]]), cast([[-1, 0], [5, 6]], 2)]
    stack = lambda trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)  # noqa: E731
    together = moved(stack(layers), stack(votes))
    assert_trees_equal(together, stack([moved(layer, vote) for layer, vote in zip(layers, votes, strict=True)]))
    np.testing.assert_array_equal(RULE.scale(together, 8)[1], RULE.scale(moved(layers[1], votes[1]), 8))


def test_init_adds_nothing():
    state = matrix()
    assert_trees_equal(RULE.init(jax.random.key(0), state, SPEC), state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learning_rate": 0}, "learning_rate must be in .* got 0"),
        ({"learning_rate": 8.5}, "got 8.5"),
        ({"learning_rate": float("nan")}, "got nan"),
        ({"votes_per_step": 0}, "votes_per_step must be at least 1, got 0"),
        ({"fraction_bits": 7}, r"fraction_bits must be in \[8, 40\], got 7"),
        ({"fraction_bits": 41}, "got 41"),
    ],
)
def test_configuration_out_of_range(arguments, message):
    with pytest.raises(ConfigError, match=message):
        Integral(**arguments)
