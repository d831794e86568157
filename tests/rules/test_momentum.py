"""Momentum in integers: int8 to the exact formula and without bias, low-rank factors that follow what they can hold."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arbs_jax.rules.momentum import Int8Momentum, LowRankMomentum, NoMomentum
from arbs_jax.rules.noise import white

SALT = jnp.uint32(99)
UNIT = 4 / 127
BETA = 0.95
SHAPE = (48, 80)


def advance(momentum, beta=BETA):
    return jax.jit(lambda leaves, u, step: momentum.advance(leaves, u, beta, 0.0, SALT, step))


def random_u(seed=0, shape=SHAPE):
    return jnp.asarray(np.clip(np.random.default_rng(seed).standard_normal(shape), -4, 4), jnp.float32)


def test_no_momentum_is_the_sample_and_keeps_nothing():
    u = random_u()
    assert NoMomentum().init(jax.random.key(0), SHAPE) == {}
    m, kept = NoMomentum().advance({}, u, BETA, 0.0, SALT, jnp.int32(0))
    np.testing.assert_array_equal(m, u)
    assert kept == {}


def test_int8_is_the_formula():
    leaves = {"momentum": jnp.asarray(np.random.default_rng(1).integers(-127, 128, SHAPE), jnp.int8)}
    u, step = random_u(), jnp.int32(5)
    m, kept = advance(Int8Momentum())(leaves, u, step)
    exact = BETA * UNIT * np.asarray(leaves["momentum"], np.float64) + (1 - BETA) * np.asarray(u, np.float64)
    np.testing.assert_allclose(m, exact, atol=4 * 4 * 2.0**-24)
    assert {name: (leaf.dtype, leaf.shape) for name, leaf in kept.items()} == {"momentum": (jnp.int8, SHAPE)}
    # Up to the roundings in `m`, less than a ten-thousandth of a unit.
    before_floor = np.asarray(exact) / UNIT + np.asarray(white(SALT, 1, step, SHAPE), np.float64)
    clear = np.abs(before_floor - np.round(before_floor)) > 1e-4
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(np.asarray(kept["momentum"])[clear], np.floor(before_floor)[clear])


def test_int8_rounds_without_bias():
    """Over many steps from one momentum the mean of what is stored is what was to be stored."""
    leaves = {"momentum": jnp.asarray(np.random.default_rng(2).integers(-100, 101, SHAPE), jnp.int8)}
    u, steps = random_u(3), 2000

    @jax.jit
    def mean(leaves):
        def one(total, step):
            return total + Int8Momentum().advance(leaves, u, BETA, 0.0, SALT, step)[1]["momentum"], None

        zero = jnp.zeros(SHAPE, jnp.int32)
        return jax.lax.scan(one, zero, jnp.arange(steps, dtype=jnp.int32))[0] / steps

    m, _ = advance(Int8Momentum())(leaves, u, jnp.int32(0))
    fraction = np.asarray(m, np.float64) / UNIT % 1
    five_sigma = 5.5 * np.sqrt(fraction * (1 - fraction) / steps) + 1e-4
    assert (np.abs(np.asarray(mean(leaves)) - np.asarray(m, np.float64) / UNIT) < five_sigma).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_int8_saturates_at_the_clip_of_the_sample(sign):
    """Samples at the end of their range bring the momentum to the end of its own, and never past it."""
    leaves, step = Int8Momentum().init(jax.random.key(0), SHAPE), advance(Int8Momentum(), 0.5)
    assert not np.asarray(leaves["momentum"]).any()
    u = jnp.full(SHAPE, 4.0 * sign, jnp.float32)
    for at in range(12):
        _, leaves = step(leaves, u, jnp.int32(at))
    codes = np.asarray(leaves["momentum"]).astype(int)
    assert (codes * sign >= 126).all()
    assert np.abs(codes).max() == 127


def product(leaves) -> np.ndarray:
    """`P Q^T`, from the leaves by their documentation: codes / 127 times a power of two a column."""
    factors = []
    for name in ("left", "right"):
        scale = np.exp2(np.asarray(leaves[f"{name}_scale"], np.float64) / 16)
        factors.append(np.asarray(leaves[name], np.float64) / 127 * scale)
    return factors[0] @ factors[1].T


@pytest.mark.parametrize("shape", [(48, 80), (80, 48), (5, 7)])
def test_factors_are_integers_of_the_stated_rank(shape):
    momentum = LowRankMomentum(16)
    rank = max(1, min(shape) // 16)
    expected = {
        "left": (jnp.int8, (shape[0], rank)),
        "right": (jnp.int8, (shape[1], rank)),
        "left_scale": (jnp.int16, (rank,)),
        "right_scale": (jnp.int16, (rank,)),
    }
    leaves = momentum.init(jax.random.key(0), shape)
    types = lambda: {name: (leaf.dtype, leaf.shape) for name, leaf in leaves.items()}  # noqa: E731
    assert momentum.rank(shape) == rank
    assert types() == expected
    np.testing.assert_array_equal(product(leaves), np.zeros(shape))
    step = advance(momentum)
    for at in range(3):
        m, leaves = step(leaves, random_u(at, shape), jnp.int32(at))
        assert types() == expected
        assert (m.dtype, m.shape) == (jnp.float32, shape)
        assert min(int(leaves[name].min()) for name in ("left", "right")) >= -127


def test_the_first_step_takes_the_sample_alone():
    u = random_u()
    momentum = LowRankMomentum(16)
    m, _ = advance(momentum)(momentum.init(jax.random.key(0), SHAPE), u, jnp.int32(0))
    np.testing.assert_allclose(m, (1 - BETA) * np.asarray(u), rtol=2**-20)


def test_a_momentum_of_that_rank_is_held_to_within_int8():
    """Samples that share a space of rank r: the factors follow their running mean.

    Rounding a column to int8 by chance has a variance of at most a quarter of a squared step, a step being the column's
    largest entry, about 3 RMS, over 127: 1.2% of the column. Two factors and a decaying sum of independent errors
    (1/sqrt(1 - beta^2) = 3.2 times one) make at most 5.4% of the momentum.
    """
    rng = np.random.default_rng(4)
    rank = SHAPE[0] // 16
    left, right = rng.standard_normal((SHAPE[0], rank)), rng.standard_normal((SHAPE[1], rank))
    momentum = LowRankMomentum(16)
    leaves, step, exact = momentum.init(jax.random.key(0), SHAPE), advance(momentum), np.zeros(SHAPE)
    worst = 0.0
    for at in range(80):
        u = left * (0.5 + 0.5 * rng.random(rank)) @ right.T / math.sqrt(rank)
        exact = BETA * exact + (1 - BETA) * u
        m, leaves = step(leaves, jnp.asarray(u, jnp.float32), jnp.int32(at))
        worst = max(worst, *(np.linalg.norm(got - exact) / np.linalg.norm(exact) for got in (m, product(leaves))))
    assert worst < 0.054


def test_the_leading_directions_of_any_momentum_are_followed():
    """Of a momentum of full rank the factors keep nearly as much as the best factors of that rank could."""
    rng = np.random.default_rng(5)
    left, right = (np.linalg.qr(rng.standard_normal((size, SHAPE[0])))[0] for size in SHAPE)
    values = np.concatenate([[8.0, 6.0, 4.0], np.geomspace(1, 0.05, SHAPE[0] - 3)])
    u = (left * values) @ right.T
    momentum = LowRankMomentum(16)
    leaves, step = momentum.init(jax.random.key(1), SHAPE), advance(momentum)
    for at in range(80):
        _, leaves = step(leaves, jnp.asarray(u, jnp.float32), jnp.int32(at))
    best = np.linalg.norm(values[3:])
    kept = product(leaves)
    # The kept directions have the sample's size; the others never add up to more than one sample's share.
    assert np.linalg.norm(u - kept) < 1.15 * best
    overlap = np.linalg.svd(left[:, :3].T @ np.linalg.qr(kept)[0][:, :3], compute_uv=False)
    assert overlap.min() > 0.95


def test_directions_that_were_lost_are_found_again():
    """After samples of rank one the factors hold one direction; the noise of their rounding seeds the others."""
    rng = np.random.default_rng(6)
    left, right = rng.standard_normal((SHAPE[0], 3)), rng.standard_normal((SHAPE[1], 3))
    momentum = LowRankMomentum(16)
    leaves, step = momentum.init(jax.random.key(0), SHAPE), advance(momentum)
    for at in range(20):
        _, leaves = step(leaves, jnp.asarray(left[:, :1] @ right[:, :1].T, jnp.float32), jnp.int32(at))
    for at in range(20, 100):
        m, leaves = step(leaves, jnp.asarray(left @ right.T, jnp.float32), jnp.int32(at))
    assert np.linalg.norm(product(leaves) - m) < 0.054 * np.linalg.norm(m)


def test_rounding_of_the_factors_is_random_and_repeatable():
    momentum = LowRankMomentum(16)
    leaves, step = momentum.init(jax.random.key(0), SHAPE), advance(momentum)
    one, again, other = (step(leaves, random_u(), jnp.int32(at))[1] for at in (3, 3, 4))
    for name in one:
        np.testing.assert_array_equal(one[name], again[name])
    assert (np.asarray(one["left"]) != np.asarray(other["left"])).any()
    assert np.abs(np.asarray(one["left"]).astype(int) - np.asarray(other["left"])).max() <= 1
