"""Windows: every row lies in the data, a step's batch depends on its number alone, validation rows share no byte."""

import json

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from arbs_jax.data.corpus import Corpus, MemorySegment, memory_corpus, split
from arbs_jax.data.windows import train_windows, validation_windows, window_offsets
from arbs_jax.errors import ConfigError, DataError

GEOMETRY = {"context": 7, "batch": 3, "accum": 2, "seed": 5}


@pytest.fixture
def corpus():
    return memory_corpus("random", np.random.default_rng(0).bytes(5000))


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


@pytest.mark.parametrize("pieces", [1, 50])
def test_every_window_is_a_stretch_of_the_data(corpus, pieces):
    data = corpus.read(0, len(corpus)).tobytes()
    size = len(data) // pieces
    segments = tuple(MemorySegment(str(i), data[i * size : (i + 1) * size]) for i in range(pieces))
    windows = train_windows(Corpus("pieces", segments, 0, len(data)), **GEOMETRY)
    for step, got in enumerate(take(windows, 20)):
        assert got.shape == (2, 3, 8)
        assert got.dtype == np.uint8
        expected = [data[offset : offset + 8] for offset in window_offsets(5, step, 6, len(data) - 7)]
        assert [row.tobytes() for row in got.reshape(6, 8)] == expected
    windows.close()


@pytest.mark.parametrize("prefetch", [0, 1, 4])
def test_resuming_gives_exactly_the_uninterrupted_run(corpus, prefetch):
    expected = take(train_windows(corpus, **GEOMETRY, prefetch=0), 40)
    first = train_windows(corpus, **GEOMETRY, prefetch=prefetch)
    np.testing.assert_array_equal(take(first, 17), expected[:17])
    state = json.loads(json.dumps(first.get_state()))
    # What the first iterator goes on to do must not matter.
    np.testing.assert_array_equal(take(first, 5), expected[17:22])

    second = train_windows(corpus, **GEOMETRY, prefetch=prefetch)
    take(second, 3)
    second.set_state(state)
    assert second.step == 17
    np.testing.assert_array_equal(take(second, 23), expected[17:])

    third = train_windows(corpus, **GEOMETRY, prefetch=prefetch, start_step=17)
    assert third.get_state() == state
    np.testing.assert_array_equal(take(third, 23), expected[17:])
    for iterator in (first, second, third):
        iterator.close()


def test_a_state_can_be_set_backwards(corpus):
    windows = train_windows(corpus, **GEOMETRY)
    start = windows.get_state()
    once = take(windows, 6)
    windows.set_state(start)
    np.testing.assert_array_equal(take(windows, 6), once)
    windows.close()


def test_reading_elsewhere_at_the_same_time_does_not_disturb_it(corpus):
    a = train_windows(corpus, **GEOMETRY, prefetch=2)
    b = train_windows(corpus, **GEOMETRY, prefetch=0)
    for _ in range(20):
        validation_windows(corpus, context=7, batch=2, max_windows=5)
        np.testing.assert_array_equal(next(a), next(b))
    a.close()


def test_seeds_and_steps_give_other_windows(corpus):
    by_seed = [train_windows(corpus, **{**GEOMETRY, "seed": seed}, prefetch=0) for seed in (0, 1, 2**32, 2**64 - 1)]
    batches = [batch.tobytes() for windows in by_seed for batch in take(windows, 10)]
    assert len(set(batches)) == 40


def test_the_stream_is_this_one():
    """Pins the generator: saved runs resume on other batches if this ever changes."""
    assert window_offsets(3, 1, 3, 1_000_003).tolist() == [
        word % 1_000_003 for word in (16240888890765706997, 4220772825708211640, 14515312761715986604)
    ]


def test_all_offsets_are_equally_likely():
    corpus = memory_corpus("ten", bytes(range(10)))
    windows = train_windows(corpus, context=3, batch=700, accum=10, seed=0, prefetch=0)
    starts, counts = np.unique(next(windows)[..., 0], return_counts=True)
    assert starts.tolist() == list(range(7))
    # 7000 draws over 7 offsets: standard deviation of a count is sqrt(7000 * 1/7 * 6/7) = 29.3; five of them.
    assert np.abs(counts - 1000).max() < 147


def test_training_never_sees_validation():
    train, validation = split(memory_corpus("halves", bytes([1] * 900 + [2] * 100)), 0.1)
    windows = train_windows(train, context=31, batch=64, accum=4, seed=1, prefetch=0)
    assert {int(byte) for batch in take(windows, 20) for byte in np.unique(batch)} == {1}
    rows = validation_windows(validation, context=31, batch=3, max_windows=3)
    assert {int(byte) for batch in rows for byte in np.unique(batch.windows)} == {2}


def test_one_window_is_enough():
    corpus = memory_corpus("exact", b"abcdefgh")
    windows = train_windows(corpus, context=7, batch=2, accum=1, seed=0, prefetch=0)
    assert next(windows).tobytes() == b"abcdefgh" * 2
    (only,) = validation_windows(corpus, context=7, batch=2, max_windows=9)
    assert only.windows[0].tobytes() == b"abcdefgh"
    assert only.valid.tolist() == [True, False]


def test_data_shorter_than_a_window_are_named_with_both_numbers():
    train, validation = split(memory_corpus("short", bytes(100)), 0.2)
    with pytest.raises(DataError, match=r"short \(train\).* 80 bytes.* needs 81 "):
        train_windows(train, context=80, batch=1, accum=1, seed=0)
    with pytest.raises(DataError, match=r"short \(validation\).* 20 bytes.* needs 21 "):
        validation_windows(validation, context=20, batch=1, max_windows=1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("context", 0),
        ("batch", 0),
        ("accum", -1),
        ("seed", -1),
        ("seed", 2**64),
        ("start_step", -1),
        ("start_step", 2**40),
        ("prefetch", -1),
    ],
)
def test_arguments_out_of_range_are_named(corpus, name, value):
    with pytest.raises(ConfigError, match=f"{name}={value} "):
        train_windows(corpus, **{**GEOMETRY, name: value})


def test_validation_arguments_out_of_range_are_named(corpus):
    with pytest.raises(ConfigError, match="max_windows=0 "):
        validation_windows(corpus, context=7, batch=2, max_windows=0)


@pytest.mark.parametrize(
    ("change", "name"),
    [({"seed": 6}, "seed"), ({"batch": 4}, "shape"), ({"context": 8}, "shape"), ({"accum": 3}, "shape")],
)
def test_a_position_of_other_settings_is_refused(corpus, change, name):
    state = train_windows(corpus, **GEOMETRY, prefetch=0).get_state()
    with pytest.raises(DataError, match=f"has {name}="):
        train_windows(corpus, **{**GEOMETRY, **change}, prefetch=0).set_state(state)


def test_a_position_of_other_data_is_refused(corpus):
    state = train_windows(corpus, **GEOMETRY, prefetch=0).get_state()
    other = memory_corpus("random", np.random.default_rng(1).bytes(5000))
    with pytest.raises(DataError, match="fingerprint"):
        train_windows(other, **GEOMETRY, prefetch=0).set_state(state)


@settings(max_examples=60)
@given(
    size=st.integers(4, 3000),
    context=st.integers(3, 60),
    batch=st.integers(1, 9),
    max_windows=st.integers(1, 80),
)
def test_validation_windows_are_spread_disjoint_and_of_one_shape(size, context, batch, max_windows):
    length = context + 1
    assume(size >= length)
    data = np.random.default_rng(size).bytes(size)
    batches = validation_windows(memory_corpus("v", data), context=context, batch=batch, max_windows=max_windows)
    count = min(max_windows, size // length)
    assert len(batches) == -(-count // batch)
    assert all(b.windows.shape == (batch, length) and b.windows.dtype == np.uint8 for b in batches)
    assert all(b.valid.shape == (batch,) and b.valid.dtype == np.bool_ for b in batches)
    valid = np.concatenate([b.valid for b in batches])
    assert valid.tolist() == [True] * count + [False] * (len(valid) - count)
    rows = np.concatenate([b.windows for b in batches])
    assert not rows[count:].any()
    # Four random bytes and more: each row is found at its own place, in order, past the end of the one before.
    end, starts = 0, []
    for row in rows[:count]:
        starts.append(data.index(row.tobytes(), end))
        end = starts[-1] + length
    if count > 1:
        assert (starts[0], end) == (0, size)
        gaps = np.diff(starts)
        assert gaps.max() - gaps.min() <= 1


def test_validation_windows_do_not_change_between_calls(corpus):
    one, two = (validation_windows(corpus, context=9, batch=4, max_windows=10) for _ in range(2))
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a.windows, b.windows)
        np.testing.assert_array_equal(a.valid, b.valid)


class CountingSegment(MemorySegment):
    """Counts how often it is asked for its bytes."""

    def array(self):
        asked[self.name] = asked.get(self.name, 0) + 1
        return super().array()


asked: dict[str, int] = {}


def test_a_batch_is_gathered_in_one_go_per_segment():
    """A Python call a window would cost 25 microseconds for 64 windows of 129 bytes, a gather costs 4."""
    segments = (CountingSegment("a", bytes(10_000)), CountingSegment("b", bytes(10_000)))
    windows = train_windows(Corpus("two", segments, 0, 20_000), context=1, batch=4096, accum=1, seed=0, prefetch=0)
    asked.clear()
    offsets = window_offsets(0, 0, 4096, 19_999)
    across = int(np.sum(offsets == 9_999))
    next(windows)
    assert asked == {"a": 1 + across, "b": 1 + across}
