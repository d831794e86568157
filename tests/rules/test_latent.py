"""Rules that move the trits: integers in and out, against the gradient, the same bits whoever computes them."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from latent_matrices import (
    KEY,
    PLAIN,
    RULES,
    SPEC,
    TABLE,
    every_rule,
    fresh,
    gradient,
    latents,
    trained,
    trits,
    types,
    updater,
    vote_on,
)
from support import assert_trees_equal

from arbs_jax import TernaryConfig, TernaryDense, matrix_specs, update, value_and_votes
from arbs_jax.errors import ConfigError
from arbs_jax.rules import Latent, RuleConfig, Schedule, latent, make_rule, planes
from arbs_jax.rules.base import base_report, shares
from arbs_jax.rules.registry import LATENT_RULES
from arbs_jax.state import validate_matrix
from arbs_kernels.codec import padding_is_zero, valid_codes
from arbs_kernels.latents import half_range, zero_half_range

SILENT = Schedule(steps=1, warmup=0, final=0.0)
"""Multiplier 0 from step 1 on."""
FAST = {name: replace(rule, learning_rate=1.0) for name, rule in RULES.items()}
"""Ten or twenty times the usual rate."""


@every_rule
def test_leaves_are_the_documented_integers_before_and_after_a_donated_step(name):
    rule = RULES[name]
    rows, columns = SPEC.shape
    rank = max(1, rows // rule.rank_divisor)
    packed, count = SPEC.packed, rule.planes
    expected = dict(SPEC.leaf_types()) | {"residual": (np.uint8, (count - 1, rows, packed))}
    if rule.momentum == "int8":
        expected["momentum"] = (np.int8, SPEC.shape)
    else:
        expected |= {"left": (np.int8, (rows, rank)), "right": (np.int8, (columns, rank))}
        expected |= dict.fromkeys(("left_scale", "right_scale"), (np.int16, (rank,)))
    if rule.moment_decay:
        expected |= {"row_moment": (np.int16, (rows,)), "column_moment": (np.int16, (columns,))}
    matrix = fresh(rule)
    assert types(matrix) == expected
    votes = vote_on(matrix, gradient())
    donating = jax.jit(
        lambda matrix, votes, step: rule.update(matrix, votes, SPEC, step, KEY)[0], donate_argnums=0, keep_unused=True
    )
    given_away = jax.tree.map(jnp.copy, matrix)
    after = donating(given_away, votes, jnp.int32(0))
    assert types(after) == expected
    assert all(leaf.is_deleted() for leaf in given_away.values())
    assert_trees_equal(after, updater(rule)(matrix, votes, jnp.int32(0)))
    validate_matrix("m", after, SPEC)
    assert int(after["votes"]) == 1


@every_rule
def test_the_same_inputs_give_the_same_bits(name):
    rule = RULES[name]
    assert_trees_equal(trained(rule), trained(rule))
    matrix = trained(rule)
    votes = vote_on(matrix, gradient(5))
    # In another program, with what comes before and after it.
    twice = jax.jit(lambda m, v, s: rule.update(rule.update(m, v, SPEC, s, KEY)[0], v, SPEC, s + 1, KEY)[0])
    apart = matrix
    for step in (5, 6):
        apart = updater(rule)(apart, votes, jnp.int32(step))
    assert_trees_equal(twice(matrix, votes, jnp.int32(5)), apart)


@every_rule
def test_keys_and_steps_choose_the_rounding(name):
    rule = RULES[name]
    matrix = trained(rule, 2)
    votes = vote_on(matrix, gradient(2))
    here = latents(rule, updater(rule)(matrix, votes, jnp.int32(2)))
    for step, key in ((2, jax.random.key(1)), (3, KEY)):
        elsewhere = updater(rule)(matrix, votes, jnp.int32(step), key)
        difference = np.abs(latents(rule, elsewhere) - here)
        assert (difference > 0).mean() > 0
        assert difference.max() <= 1


@every_rule
@pytest.mark.parametrize("spec", [SPEC, TABLE], ids=["matrix", "table"])
def test_latents_stay_in_range_and_trits_are_their_leading_digits(name, spec):
    """At many times the usual rate, always pushed the same way."""
    rule = FAST[name]
    matrix, g = fresh(rule, spec), gradient(spec=spec)
    for step in range(12):
        matrix = updater(rule, spec)(matrix, vote_on(matrix, g, step, spec), jnp.int32(step))
    half = half_range(rule.planes)
    v = latents(rule, matrix, spec)
    assert np.abs(v).max() == half
    assert (np.abs(v) == half).mean() > 0.2
    np.testing.assert_array_equal(trits(matrix), np.sign(v) * (np.abs(v) > zero_half_range(rule.planes)))
    validate_matrix("m", matrix, spec)
    for plane in matrix["residual"]:
        assert valid_codes(np.asarray(plane)).all()
        assert padding_is_zero(np.asarray(plane), spec.in_features)
    assert (v * np.sign(np.asarray(g)) < 0).mean() > 0.6


def moves(rule, matrix, votes, spec=SPEC, step=0) -> np.ndarray:
    """What one update adds to the latents, where it did not clip them."""
    before, after = (
        latents(rule, matrix, spec),
        latents(rule, updater(rule, spec)(matrix, votes, jnp.int32(step)), spec),
    )
    return np.ma.masked_array(after - before, np.abs(after) == half_range(rule.planes))


def test_a_step_of_the_sample_alone_never_goes_with_the_gradient():
    """A table's step is the sample: entry by entry, a latent moves against its sample or not at all, and on average by
    `rate * sigma * u`."""
    rule = replace(PLAIN, table_rate=2.0, learning_rate=0.1)
    matrix = fresh(rule, TABLE)
    votes = vote_on(matrix, gradient(spec=TABLE), spec=TABLE)
    u = np.asarray(votes["sample"]) / 31
    expected = -0.1 * 2.0 * planes.spread(3) * u
    taken = moves(rule, matrix, votes, TABLE)
    assert (taken * u <= 0).all()
    assert np.abs(taken - expected).max() < 1 + 1e-3
    total = np.mean([moves(rule, matrix, votes, TABLE, step) for step in range(144)], axis=0)
    # 144 = F(12) steps of dither: no entry is off by more than two units in all.
    assert np.abs(total - expected)[~np.ma.getmaskarray(taken)].max() < 2 / 144 + 1e-3


@every_rule
def test_latents_move_against_the_gradient(name):
    rule = RULES[name]
    matrix = fresh(rule)
    g = gradient(3)
    taken = moves(rule, matrix, vote_on(matrix, g))
    u = np.asarray(vote_on(matrix, g)["sample"])
    assert np.ma.sum(taken * u) < 0
    # Of the entries that move, far more than half move against their own gradient.
    moved = taken != 0
    assert (np.ma.sum((taken * u < 0) & moved)) > 0.7 * np.ma.sum(moved)


@every_rule
def test_the_table_rate_is_for_tables_alone(name):
    """To the program of any other matrix it makes no difference at all."""
    one, three = (replace(RULES[name], table_rate=rate) for rate in (1.0, 3.0))
    votes = vote_on(fresh(one), gradient())

    def program(rule, spec):
        return str(jax.make_jaxpr(lambda m, v, s: rule.update(m, v, spec, s, KEY))(fresh(rule), votes, jnp.int32(0)))

    assert program(one, SPEC) == program(three, SPEC)
    assert program(one, TABLE) != program(three, TABLE)


def test_the_table_rate_multiplies_the_step():
    one, three = (replace(PLAIN, table_rate=rate, learning_rate=0.05) for rate in (1.0, 3.0))
    matrix = fresh(PLAIN, TABLE)
    votes = vote_on(matrix, gradient(spec=TABLE), spec=TABLE)
    slow, fast = (
        sum(np.ma.sum(np.abs(moves(rule, matrix, votes, TABLE, step))) for step in range(8)) for rule in (one, three)
    )
    assert 2.7 < fast / slow < 3.1


def test_tables_are_not_orthogonalised(monkeypatch):
    called = []
    monkeypatch.setattr(latent, "newton_schulz", lambda d: called.append(d.dtype) or d)
    matrix = fresh(PLAIN)
    votes = vote_on(matrix, gradient())
    PLAIN.update(matrix, votes, TABLE, jnp.int32(0), KEY)
    assert called == []
    PLAIN.update(matrix, votes, SPEC, jnp.int32(0), KEY)
    replace(PLAIN, dtype="bfloat16").update(matrix, votes, SPEC, jnp.int32(0), KEY)
    assert called == [jnp.float32, jnp.bfloat16]


@every_rule
def test_at_multiplier_zero_only_the_memories_move(name):
    rule = replace(RULES[name], schedule=SILENT)
    matrix = trained(RULES[name], 2)
    after = updater(rule)(matrix, vote_on(matrix, gradient(7)), jnp.int32(1))
    for leaf in ("trits", "residual", "exponent", "corr"):
        np.testing.assert_array_equal(after[leaf], matrix[leaf])
    assert int(after["votes"]) == int(matrix["votes"]) + 1
    memory = "momentum" if rule.momentum == "int8" else "left"
    assert (np.asarray(after[memory]) != np.asarray(matrix[memory])).any()


def test_the_schedule_scales_both_rates():
    """At half the multiplier the scale moves half as far, and so do the latents on average."""
    half = replace(PLAIN, schedule=Schedule(steps=100, warmup=2), learning_rate=0.2)
    matrix = fresh(half)
    votes = vote_on(matrix, gradient())
    first, second = (updater(half)(matrix, votes, jnp.int32(step)) for step in (0, 1))
    pulls = [np.asarray(after["corr"]) for after in (first, second)]
    assert np.abs(pulls[1] - 2 * pulls[0]).max() <= 1
    sizes = [np.ma.sum(np.abs(moves(half, matrix, votes, step=step))) for step in (0, 1)]
    assert 1.8 < sizes[1] / sizes[0] < 2.2


@pytest.mark.parametrize("momentum", ["low-rank", "int8", "none"])
def test_a_cautious_step_never_goes_with_the_fresh_sample(momentum):
    """The momentum comes from another gradient than the sample, so half of its entries disagree."""
    careful = replace(PLAIN, momentum=momentum, cautious=True, learning_rate=0.2)
    careless = replace(careful, cautious=False)
    matrix = trained(careful, 4)
    votes = vote_on(matrix, gradient(50))
    sample = np.asarray(votes["sample"])
    taken = moves(careful, matrix, votes, step=4)
    assert not np.ma.any(taken * sample > 0)
    assert not np.ma.any(taken[sample == 0] != 0)
    assert np.ma.sum(taken * sample < 0) > 200
    if momentum == "int8":
        assert np.ma.sum(moves(careless, matrix, votes, step=4) * sample > 0) > 100


@every_rule
def test_the_report_counts(name):
    rule = FAST[name]
    before = trained(rule, 3)
    votes = vote_on(before, gradient(3))
    after, report = jax.jit(lambda matrix, votes: rule.update(matrix, votes, SPEC, jnp.int32(3), KEY))(before, votes)
    size = SPEC.out_features * SPEC.in_features
    v = latents(rule, after)
    shift = np.log2(np.asarray(rule.scale(after, 32), np.float64)) - np.asarray(after["exponent"])
    assert {name: (value.dtype, value.shape) for name, value in report.items()} == dict.fromkeys(
        ("weights", "groups", "flips", "zeros", "drift", "saturated"), (jnp.float32, ())
    )
    assert int(report["weights"]) == size
    assert int(report["groups"]) == 48 * 3
    assert int(report["flips"]) == (trits(before) != trits(after)).sum() > 0
    assert int(report["zeros"]) == (trits(after) == 0).sum() > 0
    assert int(report["saturated"]) == (np.abs(v) == half_range(rule.planes)).sum() > 0
    np.testing.assert_allclose(report["drift"], np.abs(shift).sum(), rtol=1e-4)
    watched = shares(jax.tree.map(lambda one: one + one, report))
    expected = {"flip_rate": "flips", "zero_share": "zeros", "saturation": "saturated"}
    assert {share: float(watched[share]) for share in expected} == pytest.approx(
        {share: int(report[count]) / size for share, count in expected.items()}
    )
    assert float(watched["scale_drift"]) == pytest.approx(np.abs(shift).mean(), rel=1e-4)
    # What the rule counts while it moves the latents is what there is to count afterwards.
    counted = base_report(rule, before, after, votes, SPEC)
    assert {name: int(counted[name]) for name in ("flips", "zeros", "weights", "groups")} == {
        name: int(report[name]) for name in ("flips", "zeros", "weights", "groups")
    }
    assert int(base_report(rule, before, before, votes, SPEC)["flips"]) == 0


def test_moments_start_from_the_first_vote_and_follow_slowly():
    rule = replace(PLAIN, moment_decay=0.9)
    matrix, g = fresh(rule), gradient()
    first = updater(rule)(matrix, vote_on(matrix, g), jnp.int32(0))
    votes = vote_on(matrix, g)
    for moment, now in (("row_moment", "rows"), ("column_moment", "columns")):
        np.testing.assert_array_equal(first[moment], votes[now])
    # Sixteen times the gradient once: the mean of squares grows by 0.9 + 0.1 * 256, rounded by chance to a sixteenth.
    louder = updater(rule)(first, vote_on(matrix, 16 * g), jnp.int32(1))
    for moment in ("row_moment", "column_moment"):
        grown = np.asarray(louder[moment]) - np.asarray(first[moment])
        assert np.abs(grown - 16 * np.log2(0.9 + 0.1 * 256)).max() < 1 + 1e-2
    # A gradient that is louder than its stored moments makes a larger step, clipped at 4.
    table = replace(rule, learning_rate=0.05)
    stored = trained(table, 1, TABLE)
    usual, loud = (np.ma.sum(np.abs(moves(table, stored, vote_on(stored, size * g), TABLE, 1))) for size in (1.0, 2.0))
    assert 1.4 * usual < loud < 2 * usual


def problem(rule):
    """A linear map that must be learnt: (compiled run of some steps to the losses)."""
    model = TernaryDense(features=24, config=TernaryConfig(rule=rule, group_size=32))
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((256, 32)), jnp.float32)
    y = x @ jnp.asarray(rng.standard_normal((32, 24)) / np.sqrt(32), jnp.float32)
    specs = matrix_specs(model, x)
    voted = value_and_votes(lambda v, x: jnp.mean((model.apply(v, x) - y) ** 2), rule, specs)

    def step(state, at):
        loss, votes = voted(state, x, key=jax.random.fold_in(KEY, at))
        return update(rule, specs, state, votes, at, KEY), loss

    @jax.jit
    def run():
        state = model.init(jax.random.key(0), x)["ternary"]
        return jax.lax.scan(step, state, jnp.arange(300, dtype=jnp.int32))[1]

    return np.asarray(run())


@cache
def loss_of(name):
    losses = problem(make_rule(RuleConfig(name, warmup=10), steps=300, votes_per_step=1))
    return losses[0], losses[-20:].mean()


@every_rule
def test_learning_beats_scales_alone(name):
    """A random linear map, y of variance 1, in 300 steps: frozen trits can hardly express it, moving ones can."""
    start, end = loss_of(name)
    assert start > 0.9
    assert end < 0.5 * loss_of("integral")[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"planes": 0}, r"planes must be in \[1, 5\], got 0"),
        ({"planes": 6}, "got 6"),
        ({"momentum": "adam"}, "momentum must be .* got 'adam'"),
        ({"learning_rate": 0}, r"learning_rate must be in \(0, 4\] spreads a step, got 0"),
        ({"learning_rate": float("nan")}, "got nan"),
        ({"beta": 1.5}, r"beta must be in \[0, 1\], got 1.5"),
        ({"mix": -0.1}, r"mix must be in \[0, 1\], got -0.1"),
        ({"moment_decay": 2}, r"moment_decay must be in \[0, 1\], got 2"),
    ],
)
def test_configuration_out_of_range(arguments, message):
    with pytest.raises(ConfigError, match=message):
        Latent(**arguments)


def test_make_rule_takes_the_settings_of_the_name():
    for name, rule in LATENT_RULES.items():
        made = make_rule(RuleConfig(name), steps=50, votes_per_step=3, dtype="bfloat16")
        assert made == replace(rule, schedule=Schedule(steps=50, warmup=10, final=0.0), dtype="bfloat16")
        assert make_rule(RuleConfig(name, learning_rate=0.5), steps=50, votes_per_step=1).learning_rate == 0.5
