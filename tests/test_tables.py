"""Sparse tables through votes and updates: the dense table's step on the rows that were touched, and no other row."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import assert_trees_equal

from arbs_jax import (
    TernaryConfig,
    TernaryEmbed,
    TernaryExperts,
    TernaryTable,
    add_votes,
    make_probes,
    matrix_specs,
    update,
    value_and_votes,
)
from arbs_jax.errors import ConfigError, StateError
from arbs_jax.rules import RULES, RuleConfig, make_rule
from arbs_jax.state import MatrixSpec, validate_tree
from arbs_jax.votes import decode_tree

ROWS, WIDTH, LOOKUPS = 40, 12, 10
RNG = np.random.default_rng(0)
IDS = jnp.asarray(RNG.integers(0, ROWS // 2, (2, LOOKUPS)), jnp.int32)
GY = jnp.asarray(RNG.integers(-3, 4, (2, LOOKUPS, WIDTH)), jnp.float32)
UNTOUCHED = np.iinfo(np.int16).min


def rule_of(name):
    return make_rule(RuleConfig(name, warmup=0), steps=10, votes_per_step=1)


def layer(name, kind=TernaryTable, **changes):
    config = TernaryConfig(rule=rule_of(name), group_size=8)
    return kind(num_embeddings=ROWS, features=WIDTH, config=config, **changes)


@cache
class Case:
    """One rule's table: its state, votes of either micro-batch, and the state after two of them; compiled once."""

    def __init__(self, name, kind=TernaryTable):
        module, self.rule = layer(name, kind), rule_of(name)
        self.specs = matrix_specs(module, IDS[0])
        self.ternary = jax.jit(layer(name).init)(jax.random.key(0), IDS[0])["ternary"]
        loss = lambda variables, ids, gy: jnp.sum(module.apply(variables, ids) * gy)  # noqa: E731
        self.voted = jax.jit(value_and_votes(loss, self.rule, self.specs, {"": LOOKUPS}))
        self.moved = jax.jit(lambda *votes: update(self.rule, self.specs, self.ternary, self.added(*votes), 3))

    def votes(self, at, ids=None):
        return self.voted(self.ternary, IDS[at] if ids is None else ids, GY[at], key=jax.random.key(at))[1]

    def added(self, *votes):
        return add_votes(self.rule, self.specs, *votes)


def rows_that_differ(rule, one, two):
    found = {}
    for name in rule.row_leaves:
        if name in one:
            axis = max(one[name].ndim - 2, 0)
            differ = np.moveaxis(np.asarray(one[name] != two[name]), axis, 0)
            found[name] = set(np.flatnonzero(differ.reshape(ROWS, -1).any(axis=1)).tolist())
    return found


@pytest.mark.parametrize("name", [pytest.param("bigint", marks=pytest.mark.slow), "integral"])
def test_a_step_is_that_of_the_dense_table(name):
    sparse, dense = Case(name), Case(name, TernaryEmbed)
    assert_trees_equal(sparse.moved(sparse.votes(0), sparse.votes(1)), dense.moved(dense.votes(0), dense.votes(1)))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in ("integral", "latent10"))) for name in RULES]
)
def test_only_touched_rows_move_in_any_order(name):
    case = Case(name)
    votes = case.votes(0), case.votes(1)
    after = case.moved(*votes)
    assert_trees_equal(after, case.moved(*votes[::-1]))
    used = set(np.asarray(IDS).reshape(-1).tolist())
    moved = rows_that_differ(case.rule, after, case.ternary)
    assert all(rows <= used for rows in moved.values())
    assert len(moved["corr"]) > len(used) / 2
    assert int(after["votes"]) == 2
    assert ("left" in after, "momentum" in after) == (False, name == "latent18")


def test_moments_of_a_row_are_of_the_votes_that_touched_it():
    """A row's first touch takes its moment as it is; where one micro-batch of two touched it, that one's alone."""
    case = Case("latent10")
    assert (np.asarray(case.ternary["row_moment"]) == UNTOUCHED).all()
    after = case.moved(case.votes(0), case.votes(1))
    moments = np.asarray(after["row_moment"])
    rows = [np.zeros((ROWS, WIDTH)), np.zeros((ROWS, WIDTH))]
    for at in range(2):
        np.add.at(rows[at], np.asarray(IDS[at]), np.asarray(GY[at]))
    logs = np.stack([np.log2((own**2).mean(axis=1) + 1e-30) for own in rows])
    touched = np.stack([np.isin(np.arange(ROWS), np.asarray(IDS[at])) for at in range(2)])
    taken = touched.sum(axis=0)
    assert set(taken.tolist()) == {0, 1, 2}
    assert (moments[taken == 0] == UNTOUCHED).all()
    expected = 16 * (logs * touched).sum(axis=0)[taken > 0] / taken[taken > 0]
    # Votes round to the nearest sixteenth, the stored code to one of its neighbours.
    assert np.abs(moments[taken > 0] - expected).max() <= 1.5


@pytest.mark.slow
def test_padding_changes_no_step():
    """The same rows looked up once each, or twice with half the gradient and many slots left over."""
    case = Case("latent10")
    ids, gy = jnp.arange(LOOKUPS, dtype=jnp.int32) // 2, jnp.repeat(GY[0, ::2], 2, axis=0)
    padded = case.voted(case.ternary, ids, gy, key=jax.random.key(0))[1]
    module = layer("latent10")
    loss = lambda variables, ids, gy: jnp.sum(module.apply(variables, ids) * gy)  # noqa: E731
    short = value_and_votes(loss, case.rule, case.specs, {"": LOOKUPS // 2})
    tight = short(case.ternary, ids[::2], 2 * gy[::2], key=jax.random.key(0))[1]
    assert (np.asarray(padded["touched"]).sum(), np.asarray(tight["touched"]).sum()) == (5, 5)
    for name in case.rule.row_votes:
        assert not np.asarray(padded[name])[5:].any()
        # Means over padded arrays round differently.
        assert np.abs(np.asarray(padded[name])[:5] - np.asarray(tight[name])).max() <= 1
    one, two = case.moved(padded), case.moved(tight)
    assert (np.asarray(one["residual"]) != np.asarray(two["residual"])).mean() < 0.01


@pytest.mark.slow
def test_ids_outside_the_table_vote_for_nothing():
    case = Case("latent10")
    nothing = case.votes(0, jnp.full((LOOKUPS,), -1, jnp.int32))
    assert_trees_equal(case.moved(nothing, nothing), case.ternary)
    module, variables = layer("integral"), {"ternary": Case("integral").ternary}
    with pytest.raises(ConfigError, match=r"ids must be in \[0, 40\), got 0 to 40"):
        module.apply(variables, jnp.asarray([0, ROWS], jnp.int32))
    with pytest.raises(ConfigError, match=r"ids must be in \[0, 40\), got -1 to 3"):
        module.apply(variables, jnp.asarray([3, -1], jnp.int32), method="peek")


def test_a_table_is_looked_up_once_and_peeked_at_as_often_as_one_likes():
    module = layer("integral", dtype=jnp.bfloat16)
    ternary = Case("integral").ternary
    probes = make_probes(ternary, matrix_specs(module, IDS[0]), rule_of("integral"), lookups={"": LOOKUPS})

    def run(probes, times):
        def use(module, ids):
            return sum(module(ids) + module.peek(ids) + module.peek(ids[:1]) for _ in range(times))

        return jnp.sum(module.apply({"ternary": ternary, "probes": probes}, IDS[0], method=use).astype(jnp.float32))

    found = jax.jit(jax.grad(run), static_argnums=1)(probes, 1)
    assert float(found["count"]) == 1
    assert (np.asarray(found["rows"]) == 1).all()
    looked, peeked = jax.jit(
        lambda ids: [module.apply({"ternary": ternary}, ids, method=name) for name in ("__call__", "peek")]
    )(IDS[0])
    np.testing.assert_array_equal(looked, peeked)
    with pytest.raises(ConfigError, match="is looked up twice in one pass"):
        jax.eval_shape(lambda probes: run(probes, 2), probes)


def test_specs_that_cannot_be_are_refused():
    MatrixSpec(2**24, 4, 4, sparse=True)
    with pytest.raises(ConfigError, match=f"at most {2**24} rows .*, got {2**24 + 1}"):
        MatrixSpec(2**24 + 1, 4, 4, sparse=True)
    with pytest.raises(ConfigError, match="got 2 with sparse=True"):
        MatrixSpec(8, 4, 4, sparse=True, experts=2)
    with pytest.raises(ConfigError, match="experts must be at least 1, got 0"):
        TernaryExperts(features=3).init(jax.random.key(0), jnp.ones((2, 4)), jnp.ones((1,), jnp.int32))


@pytest.mark.parametrize("name", ["integral", pytest.param("latent10", marks=pytest.mark.slow)])
def test_experts_vote_and_move_one_by_one(name):
    rule = rule_of(name)
    module = TernaryExperts(experts=3, features=5, config=TernaryConfig(rule=rule, group_size=4))
    x = jnp.asarray(RNG.standard_normal((7, 12)), jnp.float32)
    sizes = jnp.asarray([4, 0, 3], jnp.int32)
    ternary, specs = jax.jit(module.init)(jax.random.key(0), x, sizes)["ternary"], matrix_specs(module, x, sizes)
    assert specs == MatrixSpec(5, 12, 4, experts=3)
    validate_tree(ternary, specs)
    assert (ternary["trits"][0] != ternary["trits"][1]).any()
    loss = lambda variables, x: jnp.sum(module.apply(variables, x, sizes) ** 2)  # noqa: E731
    votes = jax.jit(value_and_votes(loss, rule, specs))(ternary, x)[1]
    after = jax.jit(lambda t, v: update(rule, specs, t, v, 3))(ternary, votes)
    validate_tree(after, specs)
    for leaf, new in ternary.items():
        np.testing.assert_array_equal(ternary[leaf][1], after[leaf][1], leaf)
        assert new.dtype == after[leaf].dtype
    assert np.asarray(after["votes"]).tolist() == [1, 0, 1]
    assert all((ternary["corr"][at] != after["corr"][at]).any() for at in (0, 2))
    assert decode_tree({"a": ternary}, {"a": specs}, rule, jnp.float32) == {"a": {}}
    with pytest.raises(StateError, match=r"trits must have shape \(3, 5, 3\)"):
        validate_tree({"a": jax.tree.map(lambda leaf: leaf[:2], ternary)}, {"a": specs})


@pytest.mark.parametrize("name", ["integral", pytest.param("latent10", marks=pytest.mark.slow)])
def test_a_table_of_a_million_rows_is_born_packed(name):
    """Temporaries are those of a block of 2^20 weights, random bits and what becomes of them, whatever the height."""
    width, config = 64, TernaryConfig(rule=rule_of(name), group_size=64)

    def memory(rows):
        module = TernaryTable(num_embeddings=rows, features=width, config=config)
        init = jax.jit(lambda: module.init(jax.random.key(0), jnp.zeros((1,), jnp.int32)))
        return init.lower().compile().memory_analysis()

    million = memory(2**20 - 1)  # its last block is short
    assert million.output_size_in_bytes > 2**20 * width / 5
    assert million.temp_size_in_bytes < 40 * 2**20
    if name != "integral":
        assert memory(2**22).temp_size_in_bytes <= million.temp_size_in_bytes + 2**10
