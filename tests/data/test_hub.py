"""Streams of documents: the held-out bytes stay out, nothing is lost or repeated, and resuming is exact."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

# Before the first import of datasets: these tests use local files only.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from arbs_jax.data import hub
from arbs_jax.data.corpus import unigram_entropy
from arbs_jax.data.hub import HubSource, hub_validation, hub_windows, is_hub_source
from arbs_jax.data.windows import validation_windows
from arbs_jax.errors import ConfigError, DataError

datasets = pytest.importorskip("datasets")

GEOMETRY = {"context": 15, "batch": 2, "accum": 2, "seed": 3, "validation_bytes": 100, "shuffle_batches": 4}
DOCUMENTS = [f"document {i}: " + "é" * (i % 23) for i in range(200)]
STREAM = b"".join(text.encode() + b"\n" for text in DOCUMENTS)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Keeps the dataset library's lock files out of the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def source(tmp_path):
    return f"hf:{write_rows(tmp_path / 'data.jsonl', [{'text': text, 'n': 1} for text in DOCUMENTS])}"


@pytest.fixture
def opened(request):
    """Opens streams and closes them, with their threads, at the end of the test."""

    def open_(source, **change):
        windows = hub_windows(source, **{**GEOMETRY, **change})
        request.addfinalizer(windows.close)
        return windows

    return open_


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


WORD = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1)


@given(name=WORD, config=st.none() | WORD, split=WORD, field=WORD)
def test_source_strings_come_back(name, config, split, field):
    source = HubSource(name, config, split, field)
    assert HubSource.parse(str(source)) == source


def test_source_defaults():
    assert HubSource.parse("hf:owner/name") == HubSource("owner/name", None, "train", "text")
    assert HubSource.parse("hf:owner/name:20231101.en#body") == HubSource("owner/name", "20231101.en", "train", "body")
    assert HubSource.parse("hf:owner/name@validation") == HubSource("owner/name", None, "validation", "text")


@pytest.mark.parametrize("source", ["hf:", "hf:#text", "hf:a:", "hf:a@", "hf:a#", "hf:a@b@c", "file.txt"])
def test_malformed_sources(source):
    with pytest.raises(DataError, match=r"hf:NAME\[:CONFIG\]\[@SPLIT\]\[#FIELD\]"):
        HubSource.parse(source)


def test_only_the_prefix_makes_a_hub_source(tmp_path):
    assert is_hub_source("hf:x")
    assert not any(is_hub_source(other) for other in (None, tmp_path, "x", "HF:x"))


def test_validation_is_the_first_bytes_of_the_stream(source):
    corpus = hub_validation(source, validation_bytes=1000)
    assert corpus.read(0, len(corpus)).tobytes() == STREAM[:1000]
    assert 0 < unigram_entropy(corpus) < np.log(256)
    (batch,) = validation_windows(corpus, context=99, batch=16, max_windows=16)
    assert batch.valid.sum() == 10


@pytest.mark.parametrize("validation_bytes", [0, 1, 100])
def test_blocks_are_permutations_of_the_stream_after_the_held_out_bytes(source, opened, validation_bytes):
    windows = opened(source, validation_bytes=validation_bytes)
    # Two epochs and more, so that the stream's seam is crossed: held-out bytes stay out every time.
    expected = STREAM[validation_bytes:] * 3
    block_bytes = 4 * 2 * 2 * 16
    for start in range(0, 2 * len(STREAM) + block_bytes, block_bytes):
        batches = take(windows, 4)
        assert all(batch.shape == (2, 2, 16) and batch.dtype == np.uint8 for batch in batches)
        rows = [row.tobytes() for row in np.concatenate(batches).reshape(-1, 16)]
        want = [expected[i : i + 16] for i in range(start, start + block_bytes, 16)]
        assert sorted(rows) == sorted(want)
        assert rows != want


def test_the_order_is_the_seeds(source, opened):
    a, b, c = opened(source), opened(source), opened(source, seed=4)
    first = take(a, 10)
    np.testing.assert_array_equal(first, take(b, 10))
    assert not np.array_equal(first, take(c, 10))


# 0: before anything; 4: a block just used up; 5: inside the next; an epoch is 110.6 batches.
@pytest.mark.parametrize("stop", [0, 1, 4, 5, 8, 39, 108, 110, 111, 113, 240])
def test_resuming_gives_exactly_the_uninterrupted_run(source, opened, stop):
    expected = take(opened(source), 260)
    assert 110 * 64 < len(STREAM) - 100 < 111 * 64
    first = opened(source)
    np.testing.assert_array_equal(take(first, stop), expected[:stop])
    state = json.loads(json.dumps(first.get_state()))
    take(first, 3)

    second = opened(source)
    take(second, 2)
    second.set_state(state)
    assert second.get_state() == state
    np.testing.assert_array_equal(take(second, 1), expected[stop : stop + 1])

    # A run that was resumed can be resumed again at once, from within the block that it was resumed in.
    third = opened(source)
    third.set_state(second.get_state())
    np.testing.assert_array_equal(take(third, 259 - stop), expected[stop + 1 :])
    np.testing.assert_array_equal(take(second, 259 - stop), expected[stop + 1 :])


def test_resuming_twice_from_one_state(source, opened):
    windows = opened(source)
    take(windows, 6)
    state = windows.get_state()
    frozen = json.dumps(state)
    once = take(windows, 50)
    windows.set_state(state)
    np.testing.assert_array_equal(take(windows, 50), once)
    assert json.dumps(state) == frozen


@pytest.mark.parametrize("kind", ["shards", "text", "parquet"])
def test_every_kind_of_file_streams_and_resumes(tmp_path, opened, kind):
    rows = [{"text": text} for text in DOCUMENTS]
    if kind == "shards":
        for i in range(4):
            write_rows(tmp_path / "folder" / f"part-{i}.jsonl", rows[50 * i : 50 * (i + 1)])
        source = f"hf:{tmp_path / 'folder'}"
    elif kind == "text":
        (tmp_path / "data.txt").write_bytes(STREAM)
        source = f"hf:{tmp_path / 'data.txt'}"
    else:
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / "data.parquet", batch_size=30)
        source = f"hf:{tmp_path / 'data.parquet'}"
    corpus = hub_validation(source, validation_bytes=len(STREAM))
    assert corpus.read(0, len(corpus)).tobytes() == STREAM
    expected = take(opened(source), 130)
    for stop in (10, 50, 95, 120):
        first = opened(source)
        take(first, stop)
        second = opened(source)
        second.set_state(first.get_state())
        np.testing.assert_array_equal(take(second, 130 - stop), expected[stop:])


def test_another_field_and_rows_without_text(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"body": "one"}, {"body": None}, {"body": "two"}])
    assert hub_validation(f"hf:{path}#body", validation_bytes=9).read(0, 9).tobytes() == b"one\n\ntwo\n"


def test_a_returned_batch_may_be_written_to(source, opened):
    a, b = opened(source), opened(source)
    for _ in range(6):
        batch = next(a)
        np.testing.assert_array_equal(batch, next(b))
        batch[:] = 0


def test_datasets_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"arbs-jax\[hub\]"):
        hub_validation("hf:owner/name", validation_bytes=10)


def test_unknown_field_lists_those_there_are(source):
    with pytest.raises(DataError, match="no field 'story', only text, n"):
        hub_validation(f"{source}#story", validation_bytes=10)


def test_fields_that_are_not_text(source):
    with pytest.raises(DataError, match="int values, not text"):
        hub_validation(f"{source}#n", validation_bytes=10)


def test_unknown_split(source):
    with pytest.raises(DataError, match="cannot be read"):
        hub_validation(f"{source}@nosuch", validation_bytes=10)


def test_unknown_kind_of_file(tmp_path):
    (tmp_path / "data.xyz").write_bytes(b"x")
    with pytest.raises(DataError, match="unknown kind"):
        hub_validation(f"hf:{tmp_path / 'data.xyz'}", validation_bytes=10)


def test_a_damaged_file(tmp_path):
    (tmp_path / "data.parquet").write_bytes(b"this is no parquet")
    with pytest.raises(DataError, match=r"data\.parquet.*cannot be read"):
        hub_validation(f"hf:{tmp_path / 'data.parquet'}", validation_bytes=10)


def test_failures_while_reading_ahead_reach_the_caller(source, opened, monkeypatch):
    windows = opened(source)
    good = take(opened(source), 5)

    def fail(self, count):
        raise DataError("the network is gone")

    monkeypatch.setattr(hub._ByteStream, "take", fail)
    # The first block, of four batches, is there already; the second is asked for with the first batch.
    np.testing.assert_array_equal(take(windows, 4), good[:4])
    for _ in range(2):
        with pytest.raises(DataError, match="gone"):
            next(windows)
    monkeypatch.undo()
    windows.set_state(windows.get_state())
    np.testing.assert_array_equal(next(windows), good[4])


def test_too_few_bytes_are_named_with_both_numbers(source):
    with pytest.raises(DataError, match=rf"has {len(STREAM)} bytes, but validation_bytes={len(STREAM) + 1}"):
        hub_validation(source, validation_bytes=len(STREAM) + 1)
    with pytest.raises(DataError, match=r"has 15 bytes for training .* needs 16"):
        hub_windows(source, **{**GEOMETRY, "validation_bytes": len(STREAM) - 15})
    with pytest.raises(DataError, match=r"has 0 bytes for training"):
        hub_windows(source, **{**GEOMETRY, "validation_bytes": len(STREAM) + 1})


@pytest.mark.parametrize(
    ("name", "value"),
    [("context", 0), ("batch", 0), ("accum", 0), ("seed", -1), ("validation_bytes", -1), ("shuffle_batches", 0)],
)
def test_arguments_out_of_range_are_named(source, name, value):
    with pytest.raises(ConfigError, match=f"{name}={value} "):
        hub_windows(source, **{**GEOMETRY, name: value})


@pytest.mark.parametrize(
    ("change", "name"),
    [({"seed": 4}, "seed"), ({"batch": 3}, "shape"), ({"validation_bytes": 0}, "validation_bytes")],
)
def test_a_position_of_other_settings_is_refused(source, opened, change, name):
    state = opened(source).get_state()
    with pytest.raises(DataError, match=f"has {name}="):
        opened(source, **change).set_state(state)
