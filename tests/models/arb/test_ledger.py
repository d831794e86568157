"""The ledger: the same however a text is cut, exact against plain integers, differentiable in a window."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arb_modules import normal
from support import assert_trees_equal, is_float

from arbs_jax.errors import ConfigError
from arbs_jax.models.arb.ledger import LedgerConfig, append, empty_ledger, read, window_slots

CONFIG = LedgerConfig(latent=5, stride=4, capacity=3)
LENGTH = 14
# Values over ten octaves; one position past what the fixed point holds, one of zeros, one stride of zeros.
LATENTS = normal(0, 2, LENGTH, 5) * np.exp2(np.random.default_rng(1).uniform(-8, 2, (2, LENGTH, 1))).astype(np.float32)
LATENTS[0, 1, 0], LATENTS[1, 2] = 1e6, 0
LATENTS[0, 4:8] = 0
compiled = jax.jit(partial(append, CONFIG))


def add(ledger, latents, start, count=None):
    """`append` from positions that are not static, compiled once for every length."""
    count = latents.shape[1] if count is None else count
    return compiled(ledger, latents, jnp.int32(start), jnp.int32(count))


def by_hand(latents: np.ndarray, stride: int) -> list[tuple[list[int], int, int]]:
    """(values, exponent, last position) of every complete stride of one text, in Python's integers."""
    slots = []
    for end in range(stride, len(latents) + 1, stride):
        units = np.clip(np.round(latents[end - stride : end].astype(np.float64) * 1024), -32767, 32767)
        sums = [int(value) for value in units.sum(axis=0)]
        shift = 0
        while max((abs(value) + (1 << shift >> 1)) >> shift for value in sums) > 127:
            shift += 1
        values = [(1 if value > 0 else -1) * ((abs(value) + (1 << shift >> 1)) >> shift) for value in sums]
        slots.append((values, shift - 10 - stride.bit_length() + 1, end - 1))
    return slots


def in_pieces(latents: np.ndarray, cuts: list[int]):
    ledger = empty_ledger(CONFIG, latents.shape[0])
    for begin, end in zip([0, *cuts], [*cuts, latents.shape[1]], strict=True):
        ledger = add(ledger, latents[:, begin:end], begin)
    return ledger


@pytest.fixture(scope="module")
def whole():
    return in_pieces(LATENTS, [])


def test_slots_are_the_means_of_strides(whole):
    for row in range(2):
        expected = by_hand(LATENTS[row], CONFIG.stride)
        np.testing.assert_array_equal(whole["latents"][row], [values for values, _, _ in expected])
        np.testing.assert_array_equal(whole["exponents"][row], [exponent for _, exponent, _ in expected])
        np.testing.assert_array_equal(whole["positions"][row], [position for _, _, position in expected])
    assert {name: str(leaf.dtype) for name, leaf in whole.items()} == {
        "latents": "int8",
        "exponents": "int8",
        "positions": "int32",
        "partial": "int32",
    }
    # Half a unit of the largest channel's seven bits, and half a fixed-point unit before.
    mean = np.clip(LATENTS, -32, 32)[:, :12].reshape(2, 3, 4, 5).mean(axis=2)
    error = np.abs(np.asarray(read(whole, jnp.float32).latents) - mean)
    assert (error <= np.abs(mean).max(axis=-1, keepdims=True) / 127 + 2.0**-11).all()


@pytest.mark.parametrize("cuts", [[7], [1, 2, 3, 4, 5, 6, 7], [4, 5, 12, 13], [7, 8, 9, 13]], ids=str)
def test_any_segments_make_the_same_ledger(whole, cuts):
    assert_trees_equal(in_pieces(LATENTS, cuts), whole)


def rows(first, second):
    """The first text of one ledger, the second of another."""
    return jax.tree.map(lambda one, other: np.stack([one[0], other[1]]), first, second)


def test_texts_may_stand_at_positions_of_their_own(whole):
    # The second text is read a stride later than the first, in the same calls.
    shifted = LATENTS.copy()
    shifted[1] = np.roll(LATENTS[1], -4, axis=0)
    ledger = empty_ledger(CONFIG, 2)
    ahead = rows(ledger, add(ledger, LATENTS[:, :4], 0))
    ledger = add(ahead, shifted[:, :7], [0, 4])
    first = in_pieces(LATENTS[:, :7], [])
    second = in_pieces(LATENTS[:, :11], [4])
    assert_trees_equal(ledger, rows(first, second))


@pytest.mark.parametrize("count", [0, 1, 7])
def test_padding_leaves_no_trace(count):
    before = add(empty_ledger(CONFIG, 2), LATENTS[:, :7], 0)
    ledger = add(before, LATENTS[:, 7:], 7, count)
    assert_trees_equal(ledger, in_pieces(LATENTS[:, : 7 + count], [7]) if count else before)


def test_the_newest_strides_are_written_over_the_oldest(whole):
    ledger = add(whole, LATENTS[:, :7], LENGTH)
    np.testing.assert_array_equal(ledger["positions"], [[15, 19, 11]] * 2)
    np.testing.assert_array_equal(ledger["latents"][:, 2], whole["latents"][:, 2])
    joined = np.concatenate([LATENTS, LATENTS[:, :7]], axis=1)
    for row in range(2):
        np.testing.assert_array_equal(ledger["latents"][row, 0], by_hand(joined[row], CONFIG.stride)[3][0])


def test_reading_is_exact_in_short_floats(whole):
    slots, short = read(whole, jnp.float32), read(whole, jnp.bfloat16)
    assert short.latents.dtype == jnp.bfloat16
    np.testing.assert_array_equal(short.latents.astype(jnp.float32), slots.latents)
    units = np.exp2(np.asarray(whole["exponents"], np.float64))[..., None]
    np.testing.assert_array_equal(slots.latents, np.asarray(whole["latents"]) * units)
    assert slots.valid.all()
    fresh = read(empty_ledger(CONFIG, 2), jnp.float32)
    assert not fresh.valid.any()
    assert not fresh.latents.any()


def test_a_window_has_the_slots_that_the_ledger_will_have(whole):
    before = in_pieces(LATENTS[:, :7], [])
    slots = jax.jit(partial(window_slots, CONFIG))(LATENTS[:, 7:], jnp.int32(7), before["partial"])
    np.testing.assert_array_equal(slots.positions, [[7, 11]] * 2)
    assert slots.valid.all()
    np.testing.assert_array_equal(slots.latents, read(whole, jnp.float32).latents[:, 1:])


def test_gradients_are_those_of_the_mean():
    weights = normal(3, 2, 4, 5)
    total = jax.jit(jax.grad(lambda x: jnp.sum(window_slots(CONFIG, x, 1).latents[:, :3] * weights[:, :3])))
    gradient = np.asarray(total(LATENTS[:, :11]))
    # From position 1 on, the first stride has three positions in the window.
    expected = np.repeat(weights[:, :3] / np.float32(4), 4, axis=1)[:, 1:]
    np.testing.assert_array_equal(gradient, expected)


def test_the_ledger_is_integers_in_every_mode(whole):
    with jax.enable_x64(True):
        assert_trees_equal(add(empty_ledger(CONFIG, 2), LATENTS, 0), whole)
    assert not [leaf for leaf in jax.tree.leaves(whole) if is_float(leaf)]


def test_mistakes():
    # The incomplete last stride needs no slot.
    assert jax.eval_shape(lambda: append(CONFIG, empty_ledger(CONFIG, 1), jnp.zeros((1, 15, 5)), 0))
    for length, start in ((16, 0), (3, 13)):
        with pytest.raises(ConfigError, match="16 positions exceeds a ledger of 3 slots of 4 positions, 12 in all"):
            append(CONFIG, empty_ledger(CONFIG, 1), jnp.zeros((1, length, 5)), start)
    for stride in (3, 2**16):
        with pytest.raises(ConfigError, match=rf"ledger\.stride must be a power of two up to 32768, got {stride}"):
            LedgerConfig(stride=stride)
    with pytest.raises(ConfigError, match=r"ledger\.capacity must be at least 1, got 0"):
        LedgerConfig(capacity=0)
