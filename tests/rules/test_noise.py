"""Rounding noise: uniform, the same bits for the same position whatever surrounds it, dither that cancels."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arbs_jax.rules.noise import dither_seed, run_key, salt_of, white
from arbs_kernels import noise

SALT = jnp.uint32(0x12345678)


def dither(salt, stream, step, shape):
    return noise.dither(*dither_seed(salt, stream, step), shape)


KINDS = [white, dither]
SHAPE = (256, 320)


def uniform(kind, salt=SALT, stream=0, step=7, shape=SHAPE) -> np.ndarray:
    return np.asarray(kind(salt, stream, jnp.int32(step), shape))


def by_hand(kind, salt: int, stream: int, step: int, shape: tuple[int, int]) -> np.ndarray:
    """The documented hash, in NumPy."""

    def mix(bits: np.ndarray) -> np.ndarray:
        bits = (bits ^ (bits >> np.uint32(16))) * np.uint32(0x7FEB352D)
        bits = (bits ^ (bits >> np.uint32(15))) * np.uint32(0x846CA68B)
        return bits ^ (bits >> np.uint32(16))

    u32 = lambda value: np.array([[value % 2**32]], np.uint32)  # noqa: E731
    rows, columns = np.arange(shape[0], dtype=np.uint32)[:, None], np.arange(shape[1], dtype=np.uint32)[None]
    at = u32(salt + stream * 2654435769)
    at = mix(at ^ mix(u32(step))) if kind is white else mix(at)
    bits = mix(mix(rows ^ at) + columns * np.uint32(0x9E3779B1))
    if kind is dither:
        bits = bits + u32(step * 2654435769)
    return (bits >> np.uint32(8)).astype(np.float32) / np.float32(2**24)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("stream", "step"), [(0, 0), (6, 1), (3, 2**31 - 1)])
def test_the_bits_are_the_documented_ones_jitted_or_not_in_every_mode(kind, stream, step):
    expected = by_hand(kind, int(SALT), stream, step, (9, 70))
    jitted = jax.jit(partial(kind, shape=(9, 70)), static_argnums=1)
    for wide in (False, True):
        with jax.enable_x64(wide):
            plain = kind(SALT, stream, jnp.int32(step), (9, 70))
            np.testing.assert_array_equal(np.asarray(plain), expected, strict=True)
            np.testing.assert_array_equal(np.asarray(jitted(SALT, stream, jnp.int32(step))), expected, strict=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [0, 1, 12345])
def test_uniform(kind, step):
    draws = uniform(kind, step=step)
    assert draws.dtype == np.float32
    assert 0 <= draws.min() < 1e-3
    assert 1 - 1e-3 < draws.max() < 1
    size = draws.size
    assert abs(draws.mean() - 0.5) < 5 / math.sqrt(12 * size)
    # Chi-square over bins of the value, and of pairs of neighbours in rows, in columns: its mean is the degrees of
    # freedom, its variance twice that; too even would be as wrong as too uneven.
    bins = (draws * 16).astype(int)
    for counted in (
        np.bincount((draws * 256).astype(int).reshape(-1), minlength=256),
        np.bincount((bins[:, :-1:2] * 16 + bins[:, 1::2]).reshape(-1), minlength=256),
        np.bincount((bins[:-1:2] * 16 + bins[1::2]).reshape(-1), minlength=256),
    ):
        expected = counted.sum() / 256
        chi_square = np.sum((counted - expected) ** 2) / expected
        assert abs(chi_square - 255) < 6 * math.sqrt(2 * 255)
    # No row and no column is special.
    for axis, length in ((0, SHAPE[0]), (1, SHAPE[1])):
        assert np.abs(draws.mean(axis=axis) - 0.5).max() < 6 / math.sqrt(12 * length)


@pytest.mark.parametrize("kind", KINDS)
def test_a_position_has_its_bits_whatever_surrounds_it(kind):
    large = uniform(kind)
    for rows, columns in ((1, 1), (5, 320), (256, 7), (100, 33)):
        np.testing.assert_array_equal(uniform(kind, shape=(rows, columns)), large[:rows, :columns])


def independent(one: np.ndarray, two: np.ndarray) -> bool:
    """Whether two arrays of uniforms differ nearly everywhere and do not correlate."""
    correlation = np.mean((one - 0.5) * (two - 0.5)) * 12
    return (one != two).mean() > 0.99 and abs(correlation) < 5 / math.sqrt(one.size)


@pytest.mark.parametrize("kind", KINDS)
def test_salts_and_streams_are_independent(kind):
    base = uniform(kind)
    others = [uniform(kind, salt=jnp.uint32(0x12345679)), uniform(kind, stream=1), uniform(kind, stream=6)]
    assert all(independent(base, other) for other in others)
    assert independent(uniform(white, stream=2), uniform(dither, stream=2))
    # Shifted by a row or a column the pattern does not come again.
    assert independent(base[1:], base[:-1])
    assert independent(base[:, 1:], base[:, :-1])


def test_white_steps_are_independent():
    base = uniform(white, step=7)
    assert all(independent(base, uniform(white, step=step)) for step in (0, 6, 8, 7 + 2**16))


def test_keys_make_salts():
    salts = {int(salt_of(jax.random.key(seed))) for seed in range(20)}
    assert len(salts) == 20
    assert salt_of(jax.random.key(0)).dtype == jnp.uint32


def test_run_keys_are_keys():
    """Whatever JAX derives from a key it derives from these, to the same bits in every mode and in any program."""

    def derived(key):
        folded = jax.random.fold_in(key, 12345)
        return {
            "bits": jax.random.bits(folded, (300,), jnp.uint32),
            "bytes": jax.random.bits(folded, (4000,), jnp.uint8),
            "words": jax.random.bits(folded, (4000,), jnp.uint16),
            "integers": jax.random.randint(folded, (4000,), -127, 128, jnp.int8),
            "uniform": jax.random.uniform(folded, (4000,), jnp.float32),
            "salts": jax.vmap(salt_of)(jax.random.split(folded, 300)),
        }

    plain = jax.tree.map(np.asarray, derived(run_key(7)))
    again = jax.tree.map(np.asarray, jax.jit(lambda: derived(run_key(jnp.uint32(7))))())
    with jax.enable_x64(True):
        wide = jax.tree.map(np.asarray, derived(run_key(7)))
    for name, drawn in plain.items():
        np.testing.assert_array_equal(again[name], drawn, strict=True)
        np.testing.assert_array_equal(wide[name], drawn, strict=True)
    assert len(np.unique(plain["bits"])) == len(np.unique(plain["salts"])) == 300
    counts = np.bincount(plain["bytes"], minlength=256)
    assert abs(np.sum((counts - 4000 / 256) ** 2) / (4000 / 256) - 255) < 6 * math.sqrt(2 * 255)
    assert abs(plain["words"].mean() / 2**16 - 0.5) < 5 / math.sqrt(12 * 4000)
    assert abs(plain["uniform"].mean() - 0.5) < 5 / math.sqrt(12 * 4000)
    assert abs(plain["integers"].mean()) < 5 * 255 / math.sqrt(12 * 4000)


def test_run_keys_of_neighbours_have_nothing_in_common():
    """Seeds, folded numbers and the order of folding: thousands of keys whose salts differ and fill their range."""
    fold = jax.random.fold_in
    seeds = jax.vmap(run_key)(jnp.arange(1000, dtype=jnp.uint32))
    many = {
        "seeds": jax.vmap(salt_of)(seeds),
        "folded": jax.vmap(lambda i: salt_of(fold(run_key(0), i)))(jnp.arange(1000, dtype=jnp.uint32)),
        "twice": jax.vmap(lambda i: salt_of(fold(fold(run_key(0), i), 1)))(jnp.arange(1000, dtype=jnp.uint32)),
        "other order": jax.vmap(lambda i: salt_of(fold(fold(run_key(0), 1), i)))(jnp.arange(1000, dtype=jnp.uint32)),
    }
    together = np.concatenate([np.asarray(salts) for salts in many.values()])
    # Of 4000 draws from 2^32 two agree with a probability of 0.2%; `fold(fold(k, 1), 1)` is in two of the lists.
    assert len(np.unique(together)) >= 3999
    for salts in many.values():
        ones = np.unpackbits(np.asarray(salts).view(np.uint8)).reshape(1000, 32).mean(axis=0)
        assert np.abs(ones - 0.5).max() < 5.5 / math.sqrt(4 * 1000)
        flips = np.unpackbits((np.asarray(salts)[1:] ^ np.asarray(salts)[:-1]).view(np.uint8)).mean()
        assert abs(flips - 0.5) < 5 / math.sqrt(4 * 32 * 999)


def zeckendorf(n: int) -> int:
    """How many Fibonacci numbers, taken greedily, add up to `n`."""
    fibonacci, terms = [1, 2], 0
    while fibonacci[-1] < n:
        fibonacci.append(fibonacci[-1] + fibonacci[-2])
    for number in reversed(fibonacci):
        if number <= n:
            n, terms = n - number, terms + 1
    return terms


STEPS = 1000


@pytest.mark.parametrize("push", [0.1, 0.37, -0.25, 1.5])
def test_dither_loses_almost_nothing_of_a_constant_push(push):
    """Over n steps every position moves `n * push` to within twice the Fibonacci terms of n (Denjoy-Koksma: an
    indicator of an arc has variation 2, and each run of F steps of the golden rotation, F a Fibonacci number, misses
    its mean by at most the variation). Independent draws would miss by a random walk."""

    @jax.jit
    def totals(kind_of: jax.Array):
        def step(total, at):
            noise = jnp.where(kind_of == 0, dither(SALT, 6, at, (32, 40)), white(SALT, 6, at, (32, 40)))
            total = total + jnp.floor(push + noise).astype(jnp.int32)
            return total, total

        return jax.lax.scan(step, jnp.zeros((32, 40), jnp.int32), jnp.arange(STEPS, dtype=jnp.int32))[1]

    dithered, independent_draws = (np.asarray(totals(kind)) for kind in (0, 1))
    taken = np.arange(1, STEPS + 1)
    misses = np.abs(dithered - taken[:, None, None] * push)
    bound = 2.0 * np.array([zeckendorf(n) for n in taken])
    assert (misses.max(axis=(1, 2)) <= bound + 1e-3).all()
    # The bound means something: at 987 = F(16) steps it is 2, where a random walk has gone several times as far.
    share = push % 1
    random_walk = math.sqrt(987 * share * (1 - share))
    assert misses[986].max() <= 2 < random_walk / 3
    walked = independent_draws[986] - 987 * push
    assert 0.9 * random_walk < np.sqrt(np.mean(walked**2)) < 1.1 * random_walk
    # At any one step it is unbiased over positions, as white noise is.
    moved = np.diff(dithered, axis=0, prepend=0).mean(axis=(1, 2))
    assert np.abs(moved - push).max() < 6 * math.sqrt(share * (1 - share) / (32 * 40))


def test_dither_goes_on_where_it_was_resumed():
    """The step alone says where the sequence is: nothing is carried along."""
    advance = (uniform(dither, step=101) - uniform(dither, step=100)) % 1
    np.testing.assert_allclose(advance, 2654435769 / 2**32, atol=2**-23)
