"""Latents as planes of trits: exact for every value, led by the trit, and fresh ones follow the normal law."""

import math
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import is_float, values_of

from arbs_jax import state as state_module
from arbs_jax.rules import Latent, planes
from arbs_jax.state import MatrixSpec, init_matrix
from arbs_kernels import latents
from arbs_kernels.codec import padding_is_zero, unpack_rows, valid_codes

EVERY = range(1, 6)


encode = jax.jit(latents.encode, static_argnums=1)
decode = jax.jit(latents.decode, static_argnums=2)
unpack = jax.jit(unpack_rows, static_argnums=1)


def digits_of(v: np.ndarray, count: int) -> list[np.ndarray]:
    """Balanced-ternary digits, most significant first, by carries from the lowest digit up."""
    digits, rest = [], v.astype(np.int64)
    for _ in range(count):
        digit = (rest + 1) % 3 - 1
        digits.append(digit)
        rest = (rest - digit) // 3
    assert not rest.any()
    return digits[::-1]


def all_latents(count: int, columns: int) -> np.ndarray:
    """Every latent of `count` planes, as rows of `columns`; the last row is filled up with the first ones."""
    half = (3**count - 1) // 2
    every = np.arange(-half, half + 1)
    rows = -(-every.size // columns)
    return np.resize(every, (rows, columns))


@pytest.mark.parametrize("columns", [1, 4, 5, 6, 33])
@pytest.mark.parametrize("count", EVERY)
def test_every_latent_survives_and_its_digits_are_the_leaves(count, columns):
    v = all_latents(count, columns)
    leaves = encode(jnp.asarray(v, jnp.int16), count)
    packed = -(-columns // 5)
    assert {name: (leaf.dtype, leaf.shape) for name, leaf in leaves.items()} == {
        "trits": (jnp.uint8, (v.shape[0], packed)),
        **({"residual": (jnp.uint8, (count - 1, v.shape[0], packed))} if count > 1 else {}),
    }
    back = decode(leaves["trits"], leaves.get("residual"), columns)
    np.testing.assert_array_equal(np.asarray(back), v.astype(np.int16), strict=True)
    lower = list(leaves["residual"]) if count > 1 else []
    for plane, digit in zip([leaves["trits"], *lower], digits_of(v, count), strict=True):
        np.testing.assert_array_equal(unpack(plane, columns), digit)
        assert valid_codes(np.asarray(plane)).all()
        assert padding_is_zero(np.asarray(plane), columns)


@pytest.mark.parametrize("count", EVERY)
def test_the_middle_third_reads_as_zero(count):
    v = all_latents(count, 3**count)[0]
    trits = np.asarray(latents.leading(jnp.asarray(v, jnp.int16), count))
    assert trits.dtype == np.int8
    third = 3 ** (count - 1)
    np.testing.assert_array_equal(trits, np.repeat([-1, 0, 1], third))
    assert latents.half_range(count) == v[-1]
    assert latents.zero_half_range(count) == (third - 1) // 2


@pytest.mark.parametrize("count", EVERY)
def test_fresh_latents_are_a_rounded_clipped_normal(count):
    spec = MatrixSpec(300, 400)
    leaves = planes.init(jax.random.key(3), spec, count)
    v = np.asarray(latents.decode(leaves["trits"], leaves.get("residual"), 400)).astype(np.int64)
    half, normal = latents.half_range(count), NormalDist(0, planes.spread(count))
    below = [0.0, *(normal.cdf(edge + 0.5) for edge in range(-half, half)), 1.0]
    expected = np.diff(below) * v.size
    found = np.bincount(v.reshape(-1) + half, minlength=2 * half + 1)
    # Edges are rounded to 16 bits of probability.
    slack = v.size * 2**-16
    assert (np.abs(found - expected) < 5 * np.sqrt(expected) + slack).all()
    # All levels together: the mean of chi-square is the degrees of freedom, its variance twice that.
    excess = np.maximum(np.abs(found - expected) - slack, 0) ** 2 / expected
    assert excess.sum() < 2 * half + 6 * math.sqrt(4 * half)
    # The zero trit is as frequent as in fresh matrices of rules without latents: P(|w| <= 1/2).
    share = 2 * NormalDist().cdf(0.5) - 1
    zeros = np.asarray(unpack_rows(leaves["trits"], 400)) == 0
    assert abs(zeros.mean() - share) < 5 * math.sqrt(share * (1 - share) / v.size) + 2**-15
    assert np.abs(v.sum(axis=1)).max() < 6 * v.std() * math.sqrt(400)
    assert np.abs(v.sum(axis=0)).max() < 6 * v.std() * math.sqrt(300)


def test_a_key_determines_fresh_latents_and_blocks_of_rows_differ(monkeypatch):
    monkeypatch.setattr(state_module, "_DRAWN_AT_ONCE", 8 * 40)
    spec = MatrixSpec(21, 40)
    one, again, other = (planes.init(jax.random.key(seed), spec, 3) for seed in (0, 0, 1))
    assert (one["trits"].shape, one["residual"].shape) == ((21, 8), (2, 21, 8))
    for name in one:
        np.testing.assert_array_equal(one[name], again[name])
        assert (np.asarray(one[name]) != np.asarray(other[name])).mean() > 0.9
    for plane in [one["trits"], *one["residual"]]:
        assert len({row.tobytes() for row in np.asarray(plane)}) == 21


@pytest.mark.parametrize("count", EVERY)
def test_a_large_table_of_latents_is_born_packed(count, monkeypatch):
    monkeypatch.setattr(state_module, "_DRAWN_AT_ONCE", 64 * 60)
    spec = MatrixSpec(1000, 60, 32, fan_in=1, table=True)
    rule = Latent(planes=count, rank_divisor=20)

    def fresh(key):
        return rule.init(key, init_matrix(key, spec), spec)

    made = list(values_of(jax.make_jaxpr(fresh)(jax.random.key(0))))
    assert max(value.size for value in made) < spec.out_features * spec.in_features
    assert not [value for value in made if value.shape and is_float(value)]
    # The walk saw the inside of the loop.
    assert sum(value.size == 64 * 60 for value in made) > 3
