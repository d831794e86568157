"""Run by test_shards with two host devices: the state of two shards is that of two micro-batches, bit for bit."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import table_chain
import toy_chain
from support import assert_trees_equal

from arbs_jax.training import shards
from arbs_jax.training.layerwise import Sweep
from arbs_jax.training.step import fresh_state, jit_step, make_step

AXIS = "data"


def step_of(rule, axis_name=None):
    return make_step(Sweep(toy_chain.stages(rule), rule, toy_chain.specs(), axis_name=axis_name), seed=3)


def on_both(step):
    """A step whose micro-batches two devices share."""
    return jit_step(step, mesh=jax.make_mesh((2,), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,)))


def sharded(rule):
    return on_both(step_of(rule, AXIS))


def run_steps(step, batches, rule=toy_chain.RULE):
    state = fresh_state(toy_chain.state(rule=rule))
    losses = []
    for batch in batches:
        state, metrics = step(state, batch)
        losses.append(np.asarray(metrics["loss"]))
    return state, losses


def assert_replicated(tree):
    """Every device holds the same bits."""
    for leaf in jax.tree.leaves(tree):
        copies = [np.asarray(shard.data) for shard in leaf.addressable_shards]
        assert len(copies) == 2
        np.testing.assert_array_equal(*copies)


def main():
    assert jax.device_count() == 2
    batches = [toy_chain.batches(2, seed=seed) for seed in range(3)]
    one_device = {rule: jax.jit(step_of(rule)) for rule in (toy_chain.RULE, toy_chain.sampling())}
    expected, losses = run_steps(one_device[toy_chain.RULE], batches)
    assert int(expected.step) == 3

    two_shards = sharded(toy_chain.RULE)
    got, sharded_losses = run_steps(two_shards, batches)
    assert_trees_equal(got, expected)
    assert_replicated(got)
    np.testing.assert_allclose(sharded_losses, losses, rtol=1e-6)
    print("shard_map")

    pmapped = jax.pmap(step_of(toy_chain.RULE, AXIS), axis_name=AXIS, in_axes=(None, 0), out_axes=None)
    halves = [jax.tree.map(lambda leaf: leaf[:, None], batch) for batch in batches]
    assert_trees_equal(run_steps(pmapped, halves)[0], expected)
    print("pmap")

    # Random bits depend neither on the number of shards nor on the shard: no two devices drift apart.
    expected_sampled, _ = run_steps(one_device[toy_chain.sampling()], batches)
    got, _ = run_steps(sharded(toy_chain.sampling()), batches)
    assert_replicated(got)
    assert_trees_equal(got, expected_sampled)
    print("sampling")

    # A rule that computes with floats between votes and state: equal votes make equal states, in any program. Of four
    # micro-batches each shard has two, whose votes are summed there before they are exchanged.
    rule = toy_chain.latent()
    for name, micro, steps in (("latent", 2, 8), ("four", 4, 4)):
        more = [toy_chain.batches(micro, seed=seed) for seed in range(steps)]
        expected_latent, _ = run_steps(jax.jit(step_of(rule)), more, rule)
        got, _ = run_steps(sharded(rule), more, rule)
        assert_replicated(got)
        assert_trees_equal(got, expected_latent)
        print(name)

    check_exchange()
    print("exchange")

    # A loss that is not finite on one shard halts both.
    poisoned = batches[0] | {"x": batches[0]["x"].at[1].set(jnp.inf)}
    got, _ = run_steps(two_shards, [batches[1], poisoned, batches[2]])
    clean, _ = run_steps(two_shards, [batches[1]])
    assert int(got.halted) == 1
    assert int(got.step) == 1
    assert_trees_equal(got.ternary, clean.ternary)
    assert_replicated(got)
    print("poison")

    check_tables()
    print("tables")


def check_exchange():
    """Votes travel as float16 where it holds their sums, and as they are where it does not; exactly in either."""
    mesh = jax.make_mesh((2,), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,))
    whole, split = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec(AXIS)
    cases = ((1024, 2047, "f16"), (2**15 - 1, 2**16 - 3, "i32"), (None, 2**20 + 1, "i32"), (None, 2**40 + 1, "i64"))
    for largest, total, kind in cases:

        def exchange(part, largest=largest):
            votes = shards.narrowed({"matrix": {"sample": part[0]}}, 1, {"sample": largest}.get)
            assert votes["matrix"]["sample"].dtype == (jnp.int16 if largest else part.dtype)
            return shards.summed(votes, 1, {"sample": largest}.get, AXIS)["matrix"]["sample"]

        run = jax.jit(jax.shard_map(exchange, mesh=mesh, in_specs=split, out_specs=whole, check_vma=False))
        dtype = jnp.int64 if kind == "i64" else jnp.int32
        parts = jnp.asarray([[total // 2] * 5, [total - total // 2] * 5], dtype)
        np.testing.assert_array_equal(run(parts), [total] * 5)
        (reduced,) = re.findall(r"all_reduce.*?-> tensor<5x(\w+)>", run.lower(parts).as_text(), re.DOTALL)
        assert reduced == kind


def check_tables():
    """Rows and events gathered over shards: those of as many micro-batches, in their order."""
    rule = table_chain.latent()

    def step(axis_name=None):
        return make_step(Sweep(table_chain.stages(rule), rule, table_chain.specs(), axis_name=axis_name), seed=3)

    def run(step):
        state = fresh_state(table_chain.state(rule), table_chain.memory())
        for seed in range(2):
            state, metrics = step(state, table_chain.batches(seed=seed))
        return state, metrics

    (expected, metrics), (got, sharded_metrics) = run(jax.jit(step())), run(on_both(step(AXIS)))
    assert_trees_equal(got, expected)
    assert_replicated(got)
    assert int(got.ternary["front"]["book"]["votes"]) == 4
    np.testing.assert_allclose(sharded_metrics["loss/square"], metrics["loss/square"], rtol=1e-6)


if __name__ == "__main__":
    main()
