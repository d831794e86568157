"""Sparse tables, experts, memory and terms in the sweep: equal to votes and updates one by one, in place, and exact."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import table_chain
from support import assert_trees_equal, int64
from table_chain import LOOPS, MARK, MARKED, ROWS, RULE

from arbs_jax import add_votes, update, value_and_votes
from arbs_jax.audit import audit, require_integers
from arbs_jax.errors import ConfigError, StateError
from arbs_jax.models.stages import EVENTS, Stage
from arbs_jax.rules import RuleConfig, make_rule
from arbs_jax.run.checkpoints import Checkpointer
from arbs_jax.run.limbs import to_device
from arbs_jax.state import validate_tree
from arbs_jax.training.layerwise import Sweep
from arbs_jax.training.step import TrainState, fresh_state, jit_step, make_step

STEP = jnp.int32(3)
KEY = jax.random.key(0)
CANARY = 2**40


def canaries(ternary):
    """The state with accumulators that 32 bits do not hold."""
    book = ternary["front"]["book"]
    corr = book["corr"] + int64(CANARY)
    return ternary | {
        "front": ternary["front"] | {"book": book | {"corr": corr, "exponent": book["exponent"] - jnp.int8(1)}}
    }


@pytest.fixture(scope="module")
def ternary():
    return canaries(jax.jit(table_chain.state)())


@pytest.fixture(scope="module")
def swept(ternary):
    """The sweep, compiled once: of a batch, with what else changes."""
    sweep = Sweep(table_chain.stages(), RULE, table_chain.specs())
    run = jax.jit(lambda batch, blocked: sweep(ternary, batch, STEP, KEY, blocked, table_chain.memory()))
    return lambda batch, blocked=False: run(batch, jnp.asarray(blocked))


def whole_loss(variables, batch):
    front, loop, last = table_chain.stages()
    variables = variables | {"memory": table_chain.memory()}
    return last.apply(variables, loop.apply(variables, front.apply(variables, None, batch)[0], batch), batch)[0]


def micro(batch, index):
    return jax.tree.map(lambda leaf: leaf[index], batch)


@pytest.mark.slow
def test_equals_votes_and_update_of_the_whole_model(ternary, swept):
    batch, specs = table_chain.batches(), table_chain.specs()
    voted = jax.jit(value_and_votes(whole_loss, RULE, specs, {"front/book": 6}))
    (one, first), (two, second) = (voted(ternary, micro(batch, index)) for index in range(2))
    expected = jax.jit(lambda *votes: update(RULE, specs, ternary, add_votes(RULE, specs, *votes), STEP))(first, second)
    got = swept(batch)
    assert bool(got.moved)
    assert float(got.loss) == pytest.approx((float(one) + float(two)) / 2, rel=1e-6)
    # Observing wrote into rows after all had moved.
    rows = slice(int(STEP), int(STEP) + MARKED)
    assert (np.asarray(got.ternary["front"]["book"]["exponent"])[rows] == MARK).all()
    expected["front"]["book"]["exponent"] = expected["front"]["book"]["exponent"].at[rows].set(MARK)
    assert_trees_equal(got.ternary, expected)
    validate_tree(got.ternary, specs)


@pytest.mark.slow
def test_only_what_was_used_moves_and_every_use_votes(ternary, swept):
    batch = table_chain.batches()
    after = swept(batch).ternary
    moved = (np.asarray(after["front"]["book"]["corr"]) != np.asarray(ternary["front"]["book"]["corr"])).any(axis=1)
    used = np.isin(np.arange(ROWS), np.asarray(batch["ids"]))
    assert moved.any()
    assert not (moved & ~used).any()
    # Of numbers beyond 32 bits, what moved is small: no unit was lost.
    drift = np.asarray(after["front"]["book"]["corr"]) - CANARY
    assert np.abs(drift).max() < CANARY
    assert int(after["front"]["book"]["votes"]) == 2
    experts = after["front"]["experts"]
    assert np.asarray(experts["votes"]).tolist() == [2, 0, 2]
    assert (np.asarray(experts["corr"][1]) == np.asarray(ternary["front"]["experts"]["corr"][1])).all()
    assert np.asarray(experts["corr"][::2]).any()
    assert int(after["loop"]["votes"]) == 2 * LOOPS


@pytest.mark.slow
def test_the_order_of_micro_batches_does_not_matter_to_the_state(swept):
    batch = table_chain.batches()
    flipped = jax.tree.map(lambda leaf: leaf[::-1], batch)
    one, two = swept(batch), swept(flipped)
    assert_trees_equal(one.ternary, two.ternary)
    # Events come in the order of the micro-batches.
    assert np.asarray(one.memory["usage"]["first"]).tolist() == np.asarray(batch["ids"])[:, 0].tolist()
    assert np.asarray(two.memory["usage"]["first"]).tolist() == np.asarray(batch["ids"])[::-1, 0].tolist()


@pytest.mark.slow
def test_memory_observes_and_terms_are_means(swept):
    batch = table_chain.batches()
    got = swept(batch)
    uses = np.bincount(np.asarray(batch["ids"]).reshape(-1), minlength=ROWS)
    np.testing.assert_array_equal(got.memory["usage"]["uses"], uses.astype(np.int16), strict=True)
    assert set(got.terms) == {"square", "root"}
    assert float(got.terms["square"]) == pytest.approx(float(got.loss), rel=1e-6)
    assert got.terms["square"].shape == ()


@pytest.mark.slow
@pytest.mark.parametrize("blocked", [True, False])
def test_blocked_or_not_finite_leaves_every_bit(ternary, swept, blocked):
    batch = table_chain.batches()
    poisoned = batch if blocked else batch | {"y": batch["y"].at[1, 0, 0].set(jnp.nan)}
    got = swept(poisoned, blocked)
    assert not bool(got.moved)
    assert_trees_equal(got.ternary, ternary)
    assert_trees_equal(got.memory, table_chain.memory())


@pytest.mark.slow
def test_keeping_activations_changes_nothing(ternary, swept):
    sweep = Sweep(table_chain.stages(), RULE, table_chain.specs(), remat=False)
    batch = table_chain.batches()
    got = jax.jit(lambda batch: sweep(ternary, batch, STEP, KEY, jnp.asarray(False), table_chain.memory()))(batch)
    assert_trees_equal((got.ternary, got.memory), (swept(batch).ternary, swept(batch).memory))


@pytest.mark.slow
def test_reports_count_touched_rows_alone(swept):
    batch = table_chain.batches()
    touched = len(np.unique(np.asarray(batch["ids"])))
    width = table_chain.WIDTH
    assert float(swept(batch).report["weights"]) == touched * width + (2 + table_chain.EXPERTS) * width**2


@pytest.mark.slow
def test_a_step_has_metrics_of_its_terms_and_survives_a_checkpoint(ternary, tmp_path):
    step = jit_step(make_step(Sweep(table_chain.stages(), RULE, table_chain.specs()), seed=1))
    begin = lambda: fresh_state(jax.tree.map(jnp.copy, ternary), table_chain.memory())  # noqa: E731
    batches = [table_chain.batches(seed=seed) for seed in range(2)]
    half, metrics = step(begin(), batches[0])
    assert {"loss/square", "loss/root"} <= set(metrics)
    account = audit({"ternary": half.ternary, "memory": half.memory}, table_chain.specs(), (half.step, half.halted))
    require_integers(account)
    assert account.bytes_by_leaf["memory"] == 2 * ROWS + 8 * 2
    assert account.bytes_by_leaf["other"] == 8
    assert account.logical_ternary_weights == ROWS * 8 + (2 + table_chain.EXPERTS) * 64
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, half.persistent(), {})
        saved, _ = checkpointer.restore()
    resumed = TrainState(**to_device(saved))
    assert_trees_equal(resumed, half)
    assert np.abs(np.asarray(resumed.ternary["front"]["book"]["corr"]) - CANARY).max() < CANARY
    assert_trees_equal(step(resumed, batches[1])[0], step(step(begin(), batches[0])[0], batches[1])[0])


def recalling(again):
    """The chain, whose first stage gives what is not a number where it is told other events than it would give, and
    notes in `again` whether it was told any."""
    front, *others = table_chain.stages()

    def apply(variables, carry, batch):
        carry, events = front.apply({key: variables[key] for key in variables if key != EVENTS}, carry, batch)
        again.append(EVENTS in variables)
        told = variables.get(EVENTS, events)
        return jnp.where(jnp.all(told["ids"] == events["ids"]), carry, jnp.nan), events

    return replace(front, apply=apply, recalls=True), *others


@pytest.mark.parametrize("remat", [True, False])
def test_a_stage_that_recalls_is_told_its_events_where_it_runs_again(ternary, remat):
    again = []
    sweep = Sweep(recalling(again), RULE, table_chain.specs(), remat=remat)
    state, memory = jax.eval_shape(lambda: (ternary, table_chain.memory()))
    jax.eval_shape(sweep, state, table_chain.batches(), STEP, KEY, jnp.asarray(False), memory)
    assert sorted(set(again)) == [False, True][: 1 + remat]


@pytest.mark.slow
def test_what_is_recalled_is_of_the_same_micro_batch(ternary, swept):
    sweep = jax.jit(Sweep(recalling([]), RULE, table_chain.specs()))
    got = sweep(ternary, table_chain.batches(), STEP, KEY, jnp.asarray(False), table_chain.memory())
    assert_trees_equal(got, swept(table_chain.batches()))


def test_a_state_without_memory_is_saved_without():
    assert set(fresh_state({}).persistent()) == {"ternary", "step", "halted"}
    with pytest.raises(StateError, match=r"memory\['uses'\] must be an integer array, got float32"):
        fresh_state({}, {"uses": jnp.zeros((2,), jnp.float32)})


def test_stages_that_do_not_fit_are_refused(ternary):
    def trace(stages, memory=None, specs=None, state=ternary):
        sweep = Sweep(stages, RULE, specs or table_chain.specs())
        batch = table_chain.batches()
        jax.eval_shape(lambda: sweep(state, batch, STEP, KEY, jnp.asarray(False), memory))

    with pytest.raises(ConfigError, match=r"'book' has a probe for 5 lookups and makes 6; say 6 in Stage.lookups"):
        trace(table_chain.stages(told=5), table_chain.memory())
    with pytest.raises(ConfigError, match=r"\('front',\) reads memory \['usage'\], and there is \['other'\]"):
        trace(table_chain.stages(), {"other": {}})
    with pytest.raises(ConfigError, match="a stacked stage cannot observe"):
        Stage(("front",), lambda *_: None, stacked=True, observe=table_chain.observe)
    front = Stage(("front",), lambda variables, carry, batch: jnp.float32(0), stacked=True)
    with pytest.raises(ConfigError, match=r"a stacked stage cannot have a sparse table, got \['front/book'\]"):
        trace((front,), state={"front": jax.tree.map(lambda leaf: leaf[None], ternary["front"])})


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["integral", "latent10", "latent18"])
def test_a_step_on_a_table_of_a_million_rows_is_in_place(rule):
    """A thousand lookups: temporaries are of their rows, though observing writes into the table as well."""
    rows, width, rule = 2**20, 64, make_rule(RuleConfig(rule), steps=20, votes_per_step=1)
    specs = table_chain.specs(rows, width)
    step = jit_step(make_step(Sweep(table_chain.stages(rule, rows, width), rule, specs), seed=0))
    state = jax.eval_shape(lambda: fresh_state(table_chain.state(rule, rows, width), table_chain.memory(rows, micro=1)))
    batch = jax.eval_shape(lambda: table_chain.batches(micro=1, rows=1000, width=width, table=rows))
    memory = step.lower(state, batch).compile().memory_analysis()
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert memory.alias_size_in_bytes >= size
    smallest = rows * width // 5  # the packed trits
    assert memory.temp_size_in_bytes < smallest / 2
