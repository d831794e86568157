"""The step is a pure function of integers; it halts on a loss that is not finite and then changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_chain
from support import assert_trees_equal, is_float

from arbs_jax.training.layerwise import Sweep
from arbs_jax.training.loop import WATCHED
from arbs_jax.training.step import TrainState, fresh_state, jit_step, make_step

SWEEP = Sweep(toy_chain.stages(), toy_chain.RULE, toy_chain.specs())


@pytest.fixture(scope="module")
def step():
    """Compiled once, donating its state."""
    return jit_step(make_step(SWEEP, seed=0))


def fresh():
    return fresh_state(toy_chain.state())


def test_a_fresh_state_is_integers():
    state = fresh()
    assert not [leaf for leaf in jax.tree.leaves(state) if is_float(leaf)]
    assert (state.step.dtype, state.halted.dtype) == (jnp.int32, jnp.int32)
    assert (int(state.step), int(state.halted)) == (0, 0)


def test_a_step_keeps_structure_dtypes_and_shapes(step):
    before = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), fresh())
    after, metrics = step(fresh(), toy_chain.batches(1))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), after) == before
    assert isinstance(after, TrainState)
    assert {name: (leaf.shape, leaf.dtype) for name, leaf in metrics.items()} == {
        "loss": ((), jnp.float32),
        "halted": ((), jnp.int32),
        **dict.fromkeys(WATCHED, ((), jnp.float32)),
    }
    assert (int(after.step), int(after.halted)) == (1, 0)


def test_the_state_is_donated(step):
    state = fresh()
    after, _ = step(state, toy_chain.batches(1))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.ternary))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(after))


def test_donation_and_compilation_change_no_bit(step):
    pure = make_step(SWEEP, seed=0)
    undonated = jax.jit(pure)
    one = two = fresh()
    one = fresh()
    for seed in range(3):
        batch = toy_chain.batches(1, seed=seed)
        one, _ = step(one, batch)
        two, _ = undonated(two, batch)
    assert_trees_equal(one, two)
    assert int(one.step) == 3


def test_the_step_scans(step):
    """Many steps in one program, the canary of 2^40 in every accumulator included."""
    batches = [toy_chain.batches(1, seed=seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)
    scanned, metrics = jax.jit(lambda s, b: jax.lax.scan(make_step(SWEEP, seed=0), s, b))(fresh(), stacked)
    state = fresh()
    for batch in batches:
        state, _ = step(state, batch)
    assert_trees_equal(scanned, state)
    assert metrics["loss"].shape == (3,)
    moved = np.asarray(scanned.ternary["first"]["corr"]) - toy_chain.CANARY
    assert moved.any()
    assert np.abs(moved).max() < toy_chain.CANARY


def test_the_step_number_drives_the_schedule(step):
    """The same batch from the same state moves twice as far at the second step of a warm-up over two steps."""
    batch = toy_chain.batches(1)
    first, _ = step(fresh(), batch)
    later, _ = step(TrainState(toy_chain.state(), jnp.int32(1), jnp.int32(0)), batch)
    start = np.asarray(toy_chain.state()["last"]["corr"])
    one, two = (np.asarray(s.ternary["last"]["corr"]) - start for s in (first, later))
    assert one.any()
    # Each rate is rounded down once and multiplied by a score of at most 8.
    assert np.abs(two - 2 * one).max() <= 8
    assert int(later.step) == 2


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_loss_that_is_not_finite_halts_for_good(step, bad):
    good, poisoned = toy_chain.batches(1), toy_chain.batches(1)
    poisoned["y"] = poisoned["y"].at[0, 1, 2].set(bad)
    before, _ = step(fresh(), good)
    expected = jax.tree.map(np.asarray, before)
    halted, metrics = step(before, poisoned)
    assert not np.isfinite(metrics["loss"])
    assert int(metrics["halted"]) == 1
    kept = jax.tree.map(np.asarray, halted)
    assert_trees_equal(kept.ternary, expected.ternary)
    assert (int(kept.step), int(kept.halted)) == (1, 1)
    # A host that looks late has run on: nothing moves, though the batches are good again.
    for _ in range(2):
        halted, metrics = step(halted, good)
        assert int(metrics["halted"]) == 1
        assert np.isfinite(metrics["loss"])
    assert_trees_equal(jax.tree.map(np.asarray, halted), kept)


def test_training_reduces_the_loss(step):
    """Fifteen steps on one batch; the learning is real, not noise: the loss falls by a tenth and more."""
    state, batch, losses = fresh(), toy_chain.batches(1, rows=4), []
    for _ in range(15):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.9 * losses[0]


def test_seeds_and_step_numbers_change_the_bits_of_a_rule_that_samples():
    batch, rule = toy_chain.batches(1), toy_chain.sampling()
    sweep = Sweep(toy_chain.stages(rule), rule, toy_chain.specs())

    def after(seed, number):
        start = TrainState(toy_chain.state(), jnp.int32(number), jnp.int32(0))
        # Steps past the schedule's end share one rate: what differs between them is chance.
        return np.asarray(steps[seed](start, batch)[0].ternary["first"]["corr"])

    steps = [jax.jit(make_step(sweep, seed)) for seed in (0, 1)]
    np.testing.assert_array_equal(after(0, 50), after(0, 50))
    assert (after(0, 50) != after(1, 50)).mean() > 0.9
    assert (after(0, 50) != after(0, 51)).mean() > 0.9
