"""Corpora: bytes come back as they lie on disk, splits share nothing, and every mistake is named."""

import math
import os
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arbs_jax.data import corpus as corpus_module
from arbs_jax.data.corpus import Corpus, MemorySegment, memory_corpus, open_corpus, split, unigram_entropy
from arbs_jax.errors import ConfigError, DataError

ALL_BYTES = bytes(range(256))


def in_pieces(pieces: list[bytes]) -> Corpus:
    segments = tuple(MemorySegment(str(i), piece) for i, piece in enumerate(pieces))
    return Corpus("pieces", segments, 0, sum(len(piece) for piece in pieces))


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def contents(corpus: Corpus) -> bytes:
    return corpus.read(0, len(corpus)).tobytes()


@given(st.data())
def test_read_and_gather_equal_the_concatenation(data):
    pieces = data.draw(st.lists(st.binary(min_size=1, max_size=9), min_size=1, max_size=8))
    whole = b"".join(pieces)
    begin = data.draw(st.integers(0, len(whole) - 1))
    end = data.draw(st.integers(begin + 1, len(whole)))
    view = in_pieces(pieces).slice(begin, end)
    expected = whole[begin:end]
    start = data.draw(st.integers(0, len(view)))
    stop = data.draw(st.integers(start, len(view)))
    assert view.read(start, stop - start).tobytes() == expected[start:stop]
    length = data.draw(st.integers(1, len(view)))
    offsets = data.draw(st.lists(st.integers(0, len(view) - length), max_size=12))
    rows = view.gather(np.array(offsets, dtype=np.int64), length)
    assert rows.shape == (len(offsets), length)
    assert rows.dtype == np.uint8
    assert [row.tobytes() for row in rows] == [expected[offset : offset + length] for offset in offsets]


@pytest.mark.parametrize(("start", "length"), [(-1, 2), (0, 11), (10, 1), (3, -1)])
def test_reading_outside_raises(start, length):
    with pytest.raises(IndexError, match="outside the 10 bytes"):
        memory_corpus("ten", bytes(10)).read(start, length)


@pytest.mark.parametrize("offset", [-1, 8])
def test_gathering_outside_a_view_raises_although_its_segment_goes_on(offset):
    view = memory_corpus("twenty", bytes(20)).slice(5, 15)
    with pytest.raises(IndexError, match="outside the 10 bytes"):
        view.gather(np.array([0, offset]), 3)


def test_slicing_outside_raises():
    with pytest.raises(IndexError, match=r"\[4, 11\).*10 bytes"):
        memory_corpus("ten", bytes(10)).slice(4, 11)


def test_default_is_pythons_own_text():
    corpus = open_corpus(None)
    assert contents(corpus) == "".join(topics[key] for key in sorted(topics)).encode()
    assert len(corpus) > 100_000


def test_a_file_keeps_bytes_that_are_not_utf8(tmp_path):
    path = write(tmp_path / "raw.bin", ALL_BYTES + b"\xff\xfe\r\n\x00")
    corpus = open_corpus(path)
    assert contents(corpus) == path.read_bytes()
    assert corpus.read(250, 4).dtype == np.uint8


def test_what_is_read_is_a_copy(tmp_path):
    corpus = open_corpus(write(tmp_path / "a", b"abcdef"))
    corpus.read(0, 6)[:] = 0
    corpus.gather(np.array([0]), 6)[:] = 0
    assert contents(corpus) == b"abcdef"


def test_a_folder_is_all_its_visible_files_in_order(tmp_path):
    write(tmp_path / "b" / "two.txt", b"2")
    write(tmp_path / "a" / "one.txt", b"1")
    write(tmp_path / "c.bin", b"3")
    write(tmp_path / "empty", b"")
    write(tmp_path / ".hidden", b"x")
    write(tmp_path / ".git" / "config", b"x")
    write(tmp_path / "b" / ".cache" / "x", b"x")
    corpus = open_corpus(str(tmp_path))
    assert contents(corpus) == b"123"
    assert [segment.name for segment in corpus.segments] == ["a/one.txt", "b/two.txt", "c.bin"]


def test_globs_recurse_only_with_two_stars(tmp_path):
    write(tmp_path / "x.txt", b"x")
    write(tmp_path / "deep" / "er" / "y.txt", b"y")
    write(tmp_path / "z.md", b"z")
    assert contents(open_corpus(f"{tmp_path}/*.txt")) == b"x"
    assert contents(open_corpus(tmp_path / "**" / "*.txt")) == b"yx"


def test_an_existing_name_with_brackets_is_a_file(tmp_path):
    assert contents(open_corpus(write(tmp_path / "a[1].txt", b"literal"))) == b"literal"


def test_more_files_than_maps_stay_readable(tmp_path):
    descriptors = Path("/proc/self/fd")
    if not descriptors.exists():
        pytest.skip("counting open files needs /proc")
    count = 2 * corpus_module._OPEN_MAPS
    for i in range(count):
        write(tmp_path / f"{i:04}", i.to_bytes(2))
    before = len(os.listdir(descriptors))
    assert contents(open_corpus(tmp_path)) == b"".join(i.to_bytes(2) for i in range(count))
    assert len(os.listdir(descriptors)) - before <= corpus_module._OPEN_MAPS


def test_missing_path(tmp_path):
    with pytest.raises(DataError, match=r"nowhere.*does not exist"):
        open_corpus(tmp_path / "nowhere")


def test_empty_string_is_no_path():
    with pytest.raises(DataError, match="source='' does not exist"):
        open_corpus("")


def test_hub_sources_are_sent_elsewhere():
    with pytest.raises(DataError, match=r"hf:some/data.*arbs_jax\.data\.hub"):
        open_corpus("hf:some/data")


def test_glob_without_a_match(tmp_path):
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(DataError, match=r"\*\.txt.*matches no files"):
        open_corpus(tmp_path / "*.txt")


def test_no_bytes_at_all(tmp_path):
    with pytest.raises(DataError, match="0 bytes in 0 files"):
        open_corpus(tmp_path)
    path = write(tmp_path / "empty", b"")
    for source in (path, tmp_path, tmp_path / "*"):
        with pytest.raises(DataError, match="0 bytes in 1 files"):
            open_corpus(source)
    with pytest.raises(DataError, match="0 bytes"):
        memory_corpus("none", b"")


def test_special_files_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match=r"pipe.*neither a regular file nor a folder"):
        open_corpus(tmp_path / "pipe")


def test_unreadable_file(tmp_path, monkeypatch):
    # Permissions do not bind the superuser, whom tests may run as; so the check itself is made to say no.
    write(tmp_path / "secret", b"x")
    monkeypatch.setattr(corpus_module.os, "access", lambda path, mode: False)
    with pytest.raises(DataError, match=r"secret.*unreadable"):
        open_corpus(tmp_path)


def test_unlistable_folder(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(corpus_module.os, "scandir", refuse)
    with pytest.raises(DataError, match=r"cannot list.*Permission denied"):
        open_corpus(tmp_path)


def test_files_are_opened_when_read_and_say_so_if_gone(tmp_path):
    path = write(tmp_path / "a", b"abc")
    corpus = open_corpus(path)
    path.unlink()
    with pytest.raises(DataError, match=r"unreadable.*No such file"):
        corpus.read(0, 1)


def test_a_file_that_shrank_is_named_with_both_sizes(tmp_path):
    path = write(tmp_path / "a", b"abcdef")
    corpus = open_corpus(path)
    path.write_bytes(b"abc")
    with pytest.raises(DataError, match="had 6 bytes when opened and has 3 now"):
        corpus.read(0, 1)


@given(
    size=st.integers(2, 10_000),
    fraction=st.floats(0.0, 1.0, exclude_min=True, exclude_max=True),
    minimum=st.integers(1, 200),
)
def test_split_covers_everything_once(size, fraction, minimum):
    data = np.random.default_rng(size).bytes(size)
    corpus = memory_corpus("data", data)
    if size < 2 * minimum:
        with pytest.raises(DataError, match=rf"{size} bytes, .* need {minimum} each"):
            split(corpus, fraction, minimum)
        return
    train, validation = split(corpus, fraction, minimum)
    assert contents(train) + contents(validation) == data
    assert (train.start, train.stop, validation.stop) == (0, validation.start, size)
    assert min(len(train), len(validation)) >= minimum
    if int(size * fraction) >= minimum and size - int(size * fraction) >= minimum:
        assert len(validation) == int(size * fraction)


def test_split_of_a_split_keeps_to_its_part():
    corpus = memory_corpus("data", ALL_BYTES)
    train, _ = split(corpus, 0.5)
    inner, held_out = split(train, 0.25)
    assert contents(inner) == ALL_BYTES[:96]
    assert contents(held_out) == ALL_BYTES[96:128]


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, math.nan])
def test_split_refuses_fractions_outside_the_open_interval(fraction):
    with pytest.raises(ConfigError, match=f"validation_fraction={fraction}"):
        split(memory_corpus("data", ALL_BYTES), fraction)


def test_split_refuses_a_minimum_below_one():
    with pytest.raises(ConfigError, match="minimum=0"):
        split(memory_corpus("data", ALL_BYTES), minimum=0)


def test_fingerprint_belongs_to_the_data_not_to_its_place(tmp_path):
    for root in ("here", "there"):
        write(tmp_path / root / "a.txt", b"aaa")
        write(tmp_path / root / "sub" / "b.txt", b"bbb")
    here, there = (open_corpus(tmp_path / root).fingerprint for root in ("here", "there"))
    assert here == there
    by_glob = [open_corpus(tmp_path / root / "**" / "*.txt").fingerprint for root in ("here", "there")]
    assert by_glob == [here, here]


@pytest.mark.parametrize(
    ("path", "data"),
    [("b", b"bbc"), ("b", b"bbbb"), ("c", b"c"), ("a", b"aa")],
    ids=["content", "longer", "another file", "shorter"],
)
def test_fingerprint_changes_with_the_data(tmp_path, path, data):
    write(tmp_path / "a", b"aaa")
    write(tmp_path / "b", b"bbb")
    before = open_corpus(tmp_path).fingerprint
    write(tmp_path / path, data)
    os.utime(tmp_path / path, ns=(1, 1))
    assert open_corpus(tmp_path).fingerprint != before


def test_fingerprint_changes_with_a_name_and_with_the_range(tmp_path):
    path = write(tmp_path / "a", b"aaaa")
    corpus = open_corpus(tmp_path)
    halves = [corpus.slice(0, 2).fingerprint, corpus.slice(2, 4).fingerprint]
    before = corpus.fingerprint
    path.rename(tmp_path / "b")
    assert len({before, open_corpus(tmp_path).fingerprint, *halves}) == 4


@pytest.mark.parametrize("position", [0, 100, 3_000_000 - 1])
def test_fingerprint_of_large_data_samples_both_ends(position):
    data = bytearray(3_000_000)
    before = memory_corpus("large", bytes(data)).fingerprint
    data[position] = 1
    assert memory_corpus("large", bytes(data)).fingerprint != before


def test_entropy_of_known_distributions():
    assert unigram_entropy(memory_corpus("constant", b"a" * 1000)) == 0.0
    assert unigram_entropy(memory_corpus("uniform", ALL_BYTES * 3)) == pytest.approx(math.log(256), rel=1e-12)
    expected = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert unigram_entropy(memory_corpus("coin", b"aaab")) == pytest.approx(expected, rel=1e-12)


def test_entropy_is_of_the_view_and_does_not_depend_on_chunks(monkeypatch):
    corpus = memory_corpus("mixed", b"a" * 100 + ALL_BYTES)
    assert unigram_entropy(corpus.slice(0, 100)) == 0.0
    whole = unigram_entropy(corpus)
    monkeypatch.setattr(corpus_module, "_COUNT_CHUNK", 7)
    assert unigram_entropy(corpus) == whole


def test_entropy_of_nothing():
    with pytest.raises(DataError, match="0 bytes"):
        unigram_entropy(memory_corpus("some", b"abc").slice(1, 1))
