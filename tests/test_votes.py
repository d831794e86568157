"""From a loss to integer votes and to the next state, through Linen and back."""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import assert_trees_equal, int64, score_by_hand

from arbs_jax import BigInt, Integral, TernaryConfig, TernaryDense, make_probes, matrix_specs, update, value_and_votes
from arbs_jax.rules import Schedule
from arbs_jax.state import MatrixSpec, iter_matrices
from arbs_jax.votes import decode_tree, matrix_key
from arbs_kernels.codec import unpack_rows

RULE = Integral(schedule=Schedule(steps=10, warmup=0))
CONFIG = TernaryConfig(rule=RULE, group_size=8)


class Pair(nn.Module):
    """Two matrices, the first inside a submodule; linear, so that integers stay integers."""

    @nn.compact
    def __call__(self, x):
        return TernaryDense(features=7, config=CONFIG, name="second")(Inner(name="inner")(x))


class Inner(nn.Module):
    @nn.compact
    def __call__(self, x):
        return TernaryDense(features=12, config=CONFIG, name="first")(x)


MODEL = Pair()


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    x = rng.integers(-2, 3, (4, 10)).astype(np.float32)
    gy = rng.integers(-2, 3, (4, 7)).astype(np.float32)
    ternary = MODEL.init(jax.random.key(0), x)["ternary"]
    return x, gy, ternary, matrix_specs(MODEL, x)


@pytest.fixture(scope="module")
def voted(problem):
    run = jax.jit(value_and_votes(loss, RULE, problem[3]))
    return lambda ternary, x, gy: run(ternary, x, gy)


def loss(variables, x, gy):
    return jnp.sum(MODEL.apply(variables, x) * gy)


def test_specs_are_nested_like_the_state(problem):
    expected = {"inner": {"first": MatrixSpec(12, 10, 8)}, "second": MatrixSpec(7, 12, 8)}
    assert problem[3] == expected
    assert matrix_specs(MODEL, jax.ShapeDtypeStruct((3, 10), jnp.bfloat16)) == expected


def test_specs_of_a_huge_model_cost_nothing():
    table = TernaryDense(features=2**24, config=CONFIG)
    assert matrix_specs(table, jax.ShapeDtypeStruct((1, 2**14), jnp.float32)) == MatrixSpec(2**24, 2**14, 8)


def test_probes_are_zeros_shaped_by_the_rule(problem):
    _, _, ternary, specs = problem
    probes = make_probes(ternary, specs, RULE)
    assert jax.tree.map(jnp.shape, probes) == {
        "inner": {"first": {"score": (12, 2), "count": ()}},
        "second": {"score": (7, 2), "count": ()},
    }
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), ternary)
    assert jax.tree.map(jnp.shape, make_probes(stacked, specs, RULE))["second"] == {"score": (3, 7, 2), "count": (3,)}
    assert all(leaf.dtype == jnp.float32 and not leaf.any() for leaf in jax.tree.leaves(probes))


def test_votes_equal_numpy(problem, voted):
    x, gy, ternary, _ = problem
    value, votes = voted(ternary, x, gy)
    one, two = (
        np.asarray(unpack_rows(m["trits"], k)) for (_, m), k in zip(iter_matrices(ternary), (10, 12), strict=True)
    )
    scales = {path: 2.0 ** np.asarray(m["exponent"]).astype(float) for path, m in iter_matrices(ternary)}
    first = one * np.repeat(scales["inner/first"], 8, axis=1)[:, :10]
    second = two * np.repeat(scales["second"], 8, axis=1)[:, :12]
    hidden = x @ first.T
    assert value == np.sum((hidden @ second.T) * gy)
    np.testing.assert_array_equal(votes["second"]["score"], score_by_hand(gy.T @ hidden, two, 8))
    np.testing.assert_array_equal(votes["inner"]["first"]["score"], score_by_hand((gy @ second).T @ x, one, 8))
    assert {leaf.dtype for leaf in jax.tree.leaves(votes)} == {jnp.dtype(jnp.int32)}
    assert votes["second"]["count"] == votes["inner"]["first"]["count"] == 1


def test_summed_votes_make_one_update(problem, voted):
    x, gy, ternary, specs = problem
    ternary = jax.tree.map(lambda leaf: leaf + int64(2**40) if leaf.dtype == jnp.int64 else leaf, ternary)
    shards = [voted(ternary, x[i : i + 1], gy[i : i + 1])[1] for i in range(4)]
    orders = []
    for order in ((0, 1, 2, 3), (3, 1, 0, 2)):
        total = jax.tree.map(lambda *leaves: sum(leaves), *(shards[i] for i in order))
        orders.append(update(RULE, specs, ternary, total, 3))
    assert_trees_equal(*orders)
    rate = int(RULE.integer_rate(jnp.int32(3), 8))
    for (path, after), (_, before) in zip(iter_matrices(orders[0]), iter_matrices(ternary), strict=True):
        shares = [dict(iter_votes(shard))[path] for shard in shards]
        expected = np.full(before["corr"].shape, 2**40, np.int64) - rate * sum(np.int64(s["score"]) for s in shares)
        np.testing.assert_array_equal(np.asarray(after["corr"]), expected, strict=True)
        assert int(after["votes"]) == 2**40 + 4
        assert_trees_equal([after["trits"], after["exponent"]], [before["trits"], before["exponent"]])


def iter_votes(votes, prefix=""):
    if "count" in votes:
        yield prefix, votes
        return
    for name in votes:
        yield from iter_votes(votes[name], f"{prefix}/{name}" if prefix else name)


def test_update_counts_the_step_from_an_array_or_a_number(problem, voted):
    x, gy, ternary, specs = problem
    votes = voted(ternary, x, gy)[1]
    assert_trees_equal(
        update(RULE, specs, ternary, votes, 5), jax.jit(lambda t, v, s: update(RULE, specs, t, v, s))(ternary, votes, 5)
    )


def test_a_model_that_is_one_matrix():
    model = TernaryDense(features=3, config=CONFIG)
    x = jnp.ones((2, 9), jnp.float32)
    ternary, specs = model.init(jax.random.key(0), x)["ternary"], matrix_specs(model, x)
    value, votes = value_and_votes(lambda v, x: jnp.sum(model.apply(v, x)), RULE, specs)(ternary, x)
    assert value == jnp.sum(model.apply({"ternary": ternary}, x))
    assert votes["score"].shape == (3, 2)
    assert update(RULE, specs, ternary, votes, 0)["votes"] == 1


def test_training_reduces_a_loss():
    """Five lines of a user's own loop; only group scales move, towards a target that they can express."""
    model = TernaryDense(features=8, config=CONFIG)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((64, 16)), jnp.float32)
    ternary, specs = model.init(jax.random.key(0), x)["ternary"], matrix_specs(model, x)
    target = 1.5 * model.apply({"ternary": ternary}, x)
    voted = jax.jit(value_and_votes(lambda v, x: jnp.mean((model.apply(v, x) - target) ** 2), RULE, specs))
    losses = []
    for step in range(40):
        value, votes = voted(ternary, x)
        ternary = update(RULE, specs, ternary, votes, step % 5)
        losses.append(float(value))
    assert losses[-1] < 0.1 * losses[0]


@dataclass(frozen=True)
class Noisy(Integral):
    """Votes with random bits, as rules that round stochastically cast them."""

    def vote(self, collected, matrix, spec, key):
        noise = jax.random.randint(key, (50,), 0, 1000, jnp.int32)
        return super().vote(collected, matrix, spec, key) | {"noise": noise}


def test_rules_that_sample_get_other_bits_for_every_matrix_and_key(problem):
    x, gy, ternary, specs = problem
    voted = value_and_votes(loss, Noisy(), specs)

    def noise(key):
        votes = voted(ternary, x, gy, key=key)[1]
        return [np.asarray(votes["second"]["noise"]), np.asarray(votes["inner"]["first"]["noise"])]

    first, again, other = noise(jax.random.key(0)), noise(jax.random.key(0)), noise(jax.random.key(1))
    np.testing.assert_array_equal(first, again)
    for one, two in ((first[0], first[1]), (first[0], other[0]), (first[1], other[1])):
        assert (one != two).mean() > 0.9


def test_keys_come_from_names():
    key = jax.random.key(0)
    paths = ["embed", "head", "blocks/mlp/up_proj", "blocks/mlp/down_proj", ""]
    data = [tuple(jax.random.key_data(matrix_key(key, path)).tolist()) for path in paths]
    assert len(set(data)) == len(paths)
    assert data == [tuple(jax.random.key_data(matrix_key(key, path)).tolist()) for path in paths]
    other = jax.random.key_data(matrix_key(jax.random.key(1), "embed")).tolist()
    assert tuple(other) != data[0]


@pytest.mark.parametrize("rule", [RULE, BigInt()])
def test_decoded_weights_are_the_effective_ones(problem, rule):
    _, _, ternary, specs = problem
    ternary = {
        "second": ternary["second"] | {"corr": int64(np.arange(14).reshape(7, 2) * 2**20), "votes": int64(2**20)}
    }
    model = TernaryDense(features=7, config=TernaryConfig(rule=rule, group_size=8))
    weight = decode_tree(ternary, specs, rule, jnp.float32)["second"]["weight"]
    assert weight.dtype == jnp.float32
    transposed = model.apply({"ternary": ternary["second"]}, jnp.eye(12, dtype=jnp.float32))
    np.testing.assert_array_equal(weight, transposed.T)
    assert decode_tree(ternary, specs, rule, jnp.bfloat16)["second"]["weight"].dtype == jnp.bfloat16
