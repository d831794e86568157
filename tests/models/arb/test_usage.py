"""Usage of a codebook, and revival of the rows that have none."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import assert_trees_equal

from arbs_jax import Integral, TernaryConfig
from arbs_jax.models.arb.search import candidate_rows, plant
from arbs_jax.models.arb.usage import MOST_USES, dead, empty_usage, observe_usage, observe_vq
from arbs_jax.models.arb.vq import VQConfig
from arbs_jax.rules.noise import run_key
from arbs_jax.rules.registry import LATENT_RULES
from arbs_jax.state import MatrixSpec, init_matrix
from arbs_kernels import latents
from arbs_kernels.codec import unpack_rows

CONFIG = VQConfig(rows=64, width=8, dim=8, exact_rows=1, blocks=2, block_rows=8, revive_after=10)
TERNARY = TernaryConfig(rule=Integral(), group_size=8)
SPEC = MatrixSpec(64, 8, 8, fan_in=1, table=True, sparse=True)
ALL = jnp.arange(64, dtype=jnp.int32)
KEY = run_key(3)
INPUTS = np.random.default_rng(1).integers(-70, 71, (6, 8)).astype(np.int8)
INPUTS[3] = INPUTS[1]
INPUTS[4] = 0


def at(step):
    return jnp.asarray(step, jnp.int32)


def ids(*values):
    """64 ids: these, and such as are outside the book."""
    return jnp.asarray(np.concatenate([np.asarray(values), np.full(64 - len(values), -1)]), jnp.int32)


def alive(usage, step):
    return set(np.flatnonzero(~np.asarray(is_dead(usage, ALL, at(step), CONFIG))))


is_dead = jax.jit(dead, static_argnums=3)
observe = jax.jit(observe_usage, static_argnums=3)
step_on = jax.jit(observe_vq, static_argnums=(5, 6))


def again(leaves, usage, step, config=CONFIG, ternary=TERNARY, used=None):
    """A step that uses some rows and may redraw others at `INPUTS`."""
    used = ids() if used is None else used
    events = {"ids": used.reshape(2, 32), "inputs": jnp.asarray(INPUTS).reshape(2, 3, 8)}
    return step_on(leaves, usage, events, at(step), KEY, config, ternary)


@functools.cache
def book(ternary=TERNARY):
    def born(key):
        return plant(ternary.rule.init(key, init_matrix(key, SPEC), SPEC), CONFIG.runs, 8)

    return jax.jit(born)(run_key(0))


def test_four_bytes_a_row():
    usage = empty_usage(CONFIG)
    assert (usage.nbytes, usage.dtype) == (4 * 64, jnp.int16)


def test_counts_halve_with_every_epoch_and_die():
    usage = empty_usage(CONFIG)
    assert alive(usage, 9) == set(range(64))
    assert alive(usage, 10) == set()
    usage = observe(usage, ids(7, 7, 7, 7, 9, 7), at(10), CONFIG)
    assert usage[7, 0] == 5
    assert [alive(usage, step) for step in (19, 20, 39, 40)] == [{7, 9}, {7}, {7}, set()]
    usage = observe(usage, ids(7, 0), at(25), CONFIG)
    assert usage[7, 0] == 3
    assert alive(usage, 25) == {0, 7}


def test_counts_saturate():
    usage = empty_usage(CONFIG)
    usage = usage.at[5, 0].set(MOST_USES - 1)
    usage = observe(usage, ids(5, 5, 5), at(1), CONFIG)
    assert usage[5, 0] == MOST_USES
    assert usage.dtype == jnp.int16


def test_epochs_outlast_their_16_bits():
    usage = observe(empty_usage(CONFIG), ids(3), at(327_690), CONFIG)
    assert usage[3, 1] == -32767
    assert alive(usage, 327_699) == {3}
    assert alive(usage, 327_700) == set()


def test_the_order_of_ids_does_not_matter_and_strangers_count_nothing():
    several = np.random.default_rng(0).integers(0, 64, 40).astype(np.int32)
    usage = observe(empty_usage(CONFIG), ids(*several, 64), at(2), CONFIG)
    assert_trees_equal(usage, observe(empty_usage(CONFIG), ids(-1, 64, *several[::-1]), at(2), CONFIG))
    np.testing.assert_array_equal(usage[:, 0], 1 + np.bincount(several, minlength=64))


@pytest.mark.parametrize("exact_rows", [1, pytest.param(64, marks=pytest.mark.slow)])
def test_only_dead_rows_that_were_looked_at_are_redrawn(exact_rows):
    config = replace(CONFIG, exact_rows=exact_rows)
    usage = observe(empty_usage(CONFIG), ids(*range(0, 64, 2)), at(10), CONFIG)
    leaves = book()
    after, used = again(leaves, usage, 15, config)
    before = np.asarray(unpack_rows(leaves["trits"], 8))
    trits = np.asarray(unpack_rows(after["trits"], 8))
    redrawn = set(np.flatnonzero(np.asarray(usage[:, 1] != used[:, 1])))
    assert redrawn
    assert all(row % 2 == 1 for row in redrawn)
    np.testing.assert_array_equal(np.delete(trits, list(redrawn), 0), np.delete(before, list(redrawn), 0))
    # Each is the ternary form of one input, and no input has two.
    forms = [tuple(np.sign(row) * (np.abs(row) > 15)) for row in INPUTS.astype(int)]
    taken = [forms.index(tuple(trits[row])) for row in redrawn]
    assert len(set(taken)) == len(taken)
    assert not {3, 4} & set(taken)
    if exact_rows == 1:
        look = jax.jit(lambda x: candidate_rows(x, config.runs, config.blocks))
        looked_at = np.asarray(look(jnp.asarray(INPUTS, jnp.float32)))
        assert all(row in looked_at[place] for row, place in zip(redrawn, taken, strict=True))
    assert {int(used[row, 0]) for row in redrawn} == {1}
    # Everything is alive right after it was used: nothing is redrawn.
    assert_trees_equal(again(leaves, usage, 15, config, used=ALL), (leaves, observe(usage, ALL, at(15), CONFIG)))


@pytest.mark.slow
def test_a_step_on_a_million_rows_works_in_place():
    config, ternary = VQConfig(rows=2**20, width=8), TernaryConfig(rule=LATENT_RULES["latent10"], group_size=32)
    spec = MatrixSpec(2**20, 64, 32, fan_in=1, table=True, sparse=True)
    leaves = jax.eval_shape(lambda: ternary.rule.init(KEY, init_matrix(KEY, spec), spec))
    usage = jax.eval_shape(lambda: empty_usage(config))
    events = {
        "ids": jax.ShapeDtypeStruct((1000,), jnp.int32),
        "inputs": jax.ShapeDtypeStruct((16, 64), jnp.int8),
    }
    run = jax.jit(lambda *args: observe_vq(*args, KEY, config, ternary), donate_argnums=(0, 1))
    memory = run.lower(leaves, usage, events, at(0)).compile().memory_analysis()
    assert memory.alias_size_in_bytes > 80 * 2**20
    # A byte a row would be 2^20.
    assert memory.temp_size_in_bytes < 2**20


@pytest.mark.slow
def test_latents_of_a_redrawn_row_are_its_input():
    ternary = TernaryConfig(rule=LATENT_RULES["latent18"], group_size=8)
    leaves = dict(book(ternary))
    leaves["momentum"] = jnp.full_like(leaves["momentum"], 5)
    leaves["row_moment"] = jnp.full_like(leaves["row_moment"], -7)
    leaves["votes"] = jnp.asarray(9, jnp.int64)
    usage = observe(empty_usage(CONFIG), ids(0), at(20), CONFIG)
    after, used = again(leaves, usage, 25, ternary=ternary)
    assert {name: leaf.dtype for name, leaf in after.items()} == {name: leaf.dtype for name, leaf in leaves.items()}
    assert after["votes"] == 9
    redrawn = np.flatnonzero(np.asarray(used[:, 1] != usage[:, 1]))
    assert redrawn.size
    v = np.asarray(latents.decode(after["trits"], after["residual"], 8))
    expected = np.clip(np.floor(INPUTS.astype(float) * 81 / 31 + 0.5), -121, 121)
    for row in redrawn:
        assert (v[row] == expected).all(axis=1).any()
        assert not np.asarray(after["momentum"][row]).any()
        assert after["row_moment"][row] == -32768  # as if no vote had touched it
    assert np.asarray(after["momentum"][0] == 5).all()
    assert after["row_moment"][0] == -7
