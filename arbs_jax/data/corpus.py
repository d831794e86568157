"""Byte corpora: files, folders, globs or memory, read as one long sequence of uint8.

Nothing here decodes text. A `Corpus` is a range of bytes over one or more segments laid end to end with nothing between
them, so a read may begin in one file and finish in the next.
"""

import functools
import glob
import hashlib
import os
import stat
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from arbs_jax.errors import ConfigError, DataError

DEFAULT_NAME = "python-topics"

# Memory maps held open at once. Each costs a file descriptor, and a folder may hold more files than a process may open.
_OPEN_MAPS = 256
# Up to this many bytes a fingerprint covers every byte; above it, evenly spread blocks.
_FINGERPRINT_WHOLE = 1 << 20
_FINGERPRINT_BLOCKS = 64
_FINGERPRINT_BLOCK = 4096
# bincount widens its input to int64: a chunk of 1 MiB takes 8 MiB while it is counted.
_COUNT_CHUNK = 1 << 20


@dataclass(frozen=True)
class FileSegment:
    """A regular file, memory-mapped when it is first read.

    Attributes:
        name: path relative to the source that it was found under.
        path: where the file is.
        size: its length in bytes when the corpus was opened.
        mtime_ns: its modification time then, so that a rewritten file is never served from a cached map.
    """

    name: str
    path: str
    size: int
    mtime_ns: int

    def array(self) -> np.ndarray:
        """The file's bytes: uint8 (size,), read-only. Raises DataError if it is unreadable or its size changed."""
        return _map_file(self.path, self.size, self.mtime_ns)


@dataclass(frozen=True)
class MemorySegment:
    """Bytes held in memory.

    Attributes:
        name: name that enters the fingerprint.
        data: the bytes.
    """

    name: str
    data: bytes

    @property
    def size(self) -> int:
        """Bytes in the segment."""
        return len(self.data)

    def array(self) -> np.ndarray:
        """The bytes without a copy: uint8 (size,), read-only."""
        return np.frombuffer(self.data, dtype=np.uint8)


@dataclass(frozen=True)
class Corpus:
    """The bytes [start, stop) of segments laid end to end; every position a method takes counts from `start`.

    Attributes:
        name: name for messages.
        segments: the pieces in order, none of them empty.
        start: first byte of this view within the concatenated segments.
        stop: one past its last byte.
    """

    name: str
    segments: tuple[FileSegment | MemorySegment, ...]
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    @functools.cached_property
    def _segment_starts(self) -> np.ndarray:
        """int64 (segments,): where each segment begins in the concatenation."""
        sizes = np.array([0, *(segment.size for segment in self.segments[:-1])], dtype=np.int64)
        return np.cumsum(sizes)

    def slice(self, start: int, stop: int, *, name: str | None = None) -> "Corpus":
        """A view of the bytes [start, stop); copies nothing. Raises IndexError outside the corpus."""
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"slice [{start}, {stop}) is outside the {len(self)} bytes of {self.name!r}")
        return replace(self, name=name or self.name, start=self.start + start, stop=self.start + stop)

    def read(self, start: int, length: int) -> np.ndarray:
        """Copies `length` bytes from `start`, across segments where need be.

        Returns:
            uint8 (length,), a new writable array.

        Raises:
            IndexError: the range is not inside the corpus.
            DataError: a file is unreadable or changed its size.
        """
        if not (start >= 0 and length >= 0 and start + length <= len(self)):
            raise IndexError(f"read [{start}, {start + length}) is outside the {len(self)} bytes of {self.name!r}")
        out = np.empty(length, dtype=np.uint8)
        position = self.start + start
        index = int(np.searchsorted(self._segment_starts, position, side="right")) - 1
        done = 0
        while done < length:
            skip = position + done - int(self._segment_starts[index])
            piece = self.segments[index].array()[skip : skip + length - done]
            out[done : done + len(piece)] = piece
            done += len(piece)
            index += 1
        return out

    def gather(self, offsets: np.ndarray, length: int) -> np.ndarray:
        """Copies many windows at once: row i is `read(offsets[i], length)`, without a Python call a window.

        Args:
            offsets: integers (n,), each at least 0 and at most len(self) - length.
            length: bytes a window, at least 1.

        Returns:
            uint8 (n, length), a new array. Raises as `read` does.
        """
        offsets = np.asarray(offsets, dtype=np.int64)
        if offsets.size and (offsets.min() < 0 or offsets.max() + length > len(self)):
            raise IndexError(f"a window of {length} bytes is outside the {len(self)} bytes of {self.name!r}")
        positions = offsets + self.start
        if len(self.segments) == 1:
            return np.lib.stride_tricks.sliding_window_view(self.segments[0].array(), length)[positions]
        out = np.empty((len(offsets), length), dtype=np.uint8)
        first = np.searchsorted(self._segment_starts, positions, side="right") - 1
        last = np.searchsorted(self._segment_starts, positions + length - 1, side="right") - 1
        for row in np.flatnonzero(first != last):
            out[row] = self.read(int(offsets[row]), length)
        # Rows that lie within one segment, grouped by segment: one gather a group.
        inside = np.flatnonzero(first == last)
        inside = inside[np.argsort(first[inside], kind="stable")]
        for rows in np.split(inside, np.flatnonzero(np.diff(first[inside])) + 1):
            if len(rows):
                index = first[rows[0]]
                windows = np.lib.stride_tricks.sliding_window_view(self.segments[index].array(), length)
                out[rows] = windows[positions[rows] - self._segment_starts[index]]
        return out

    @functools.cached_property
    def fingerprint(self) -> str:
        """A cheap identity: SHA-256 (hexadecimal) of the view's range, its segments' names and sizes, and its bytes.

        Up to 1 MiB every byte counts; above that, 64 evenly spread blocks of 4 KiB, the first and the last included, so
        an edit that keeps every size and falls between the blocks goes unseen. Where the files lie does not count.
        """
        digest = hashlib.sha256(f"{self.start}:{self.stop}\n".encode())
        for segment in self.segments:
            digest.update(segment.name.encode("utf-8", "surrogateescape") + f"\0{segment.size}\n".encode())
        if len(self) <= _FINGERPRINT_WHOLE:
            digest.update(self.read(0, len(self)))
        else:
            room = len(self) - _FINGERPRINT_BLOCK
            for block in range(_FINGERPRINT_BLOCKS):
                digest.update(self.read(block * room // (_FINGERPRINT_BLOCKS - 1), _FINGERPRINT_BLOCK))
        return digest.hexdigest()


def open_corpus(source: str | Path | None = None) -> Corpus:
    """Opens a corpus; file contents are mapped later, when they are first read.

    Args:
        source: None for the text that every CPython carries (`pydoc_data.topics`, about 0.5 MB of English; it differs
            between Python versions). Otherwise a file, a folder (all regular files below it, sorted by path, those with
            a hidden component skipped) or a glob pattern (`**` recurses). Empty files add nothing.

    Raises:
        DataError: the path is missing or unreadable, a pattern matches no file, or there are no bytes at all.
    """
    if source is None:
        return memory_corpus(DEFAULT_NAME, _python_topics())
    text = str(source)
    if text.startswith("hf:"):
        raise DataError(f"source={text!r} is a streamed dataset, not files: open it with arbs_jax.data.hub")
    path = Path(source).expanduser()
    if text and path.is_dir():
        root, paths = path, _files_below(path)
    elif text and path.exists():
        root, paths = path.parent, [path]
        if not path.is_file():
            raise DataError(f"source={text!r} is neither a regular file nor a folder: give a file, folder or glob")
    elif glob.has_magic(text):
        root = _glob_root(path)
        paths = sorted(Path(found) for found in glob.glob(str(path), recursive=True) if Path(found).is_file())
        if not paths:
            raise DataError(f"source={text!r} matches no files: check the pattern (quote it, and use ** to recurse)")
    else:
        raise DataError(
            f"source={text!r} does not exist: give a file, a folder or a glob pattern, or none for the default"
        )
    segments = [_file_segment(found, root) for found in paths]
    corpus = _corpus(text, tuple(segment for segment in segments if segment.size))
    if not len(corpus):
        raise DataError(f"source={text!r} holds 0 bytes in {len(segments)} files: give at least one file with data")
    return corpus


def memory_corpus(name: str, data: bytes) -> Corpus:
    """A corpus over bytes in memory. Raises DataError if there are none."""
    if not data:
        raise DataError(f"corpus {name!r} holds 0 bytes: give at least one")
    return _corpus(name, (MemorySegment(name, data),))


def split(corpus: Corpus, validation_fraction: float = 0.05, minimum: int = 1) -> tuple[Corpus, Corpus]:
    """Cuts a corpus into (train, validation): two adjoining views with no byte in common, validation last.

    Args:
        corpus: what to cut.
        validation_fraction: share of the bytes, rounded down, for validation; strictly between 0 and 1.
        minimum: least bytes of either part (one window: context + 1). Validation takes more than its fraction if that
            is below the minimum.

    Raises:
        ConfigError: the fraction or the minimum is out of range.
        DataError: the corpus is too short for two parts of `minimum` bytes.
    """
    if not 0 < validation_fraction < 1:
        raise ConfigError(f"validation_fraction={validation_fraction} is outside (0, 1): give a share such as 0.05")
    if minimum < 1:
        raise ConfigError(f"minimum={minimum} is below 1: give the bytes of one window")
    if len(corpus) < 2 * minimum:
        raise DataError(
            f"{corpus.name!r} has {len(corpus)} bytes, but train and validation need {minimum} each: "
            "give more data or a smaller context"
        )
    held_out = max(int(len(corpus) * validation_fraction), minimum)
    cut = max(len(corpus) - held_out, minimum)
    train = corpus.slice(0, cut, name=f"{corpus.name} (train)")
    return train, corpus.slice(cut, len(corpus), name=f"{corpus.name} (validation)")


def unigram_entropy(corpus: Corpus) -> float:
    """Entropy of the byte frequencies, in nats per byte: the loss of the best model that ignores context.

    Reads the whole corpus in chunks, in bounded memory. Raises DataError if it holds no bytes.
    """
    if not len(corpus):
        raise DataError(f"{corpus.name!r} has 0 bytes, entropy needs at least 1: give more data")
    counts = np.zeros(256, dtype=np.int64)
    for start in range(0, len(corpus), _COUNT_CHUNK):
        chunk = corpus.read(start, min(_COUNT_CHUNK, len(corpus) - start))
        counts += np.bincount(chunk, minlength=256)
    present = counts[counts > 0].astype(np.float64)
    return float(np.sum(present / len(corpus) * np.log(len(corpus) / present)))


def _corpus(name: str, segments: tuple[FileSegment | MemorySegment, ...]) -> Corpus:
    return Corpus(name=name, segments=segments, start=0, stop=sum(segment.size for segment in segments))


def _python_topics() -> bytes:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError(
            "the default corpus (pydoc_data) is missing from this Python: give a source of your own"
        ) from error
    return "".join(topics[key] for key in sorted(topics)).encode("utf-8")


def _files_below(folder: Path) -> list[Path]:
    """All regular files below a folder, hidden files and folders left out, sorted by path."""

    def fail(error: OSError) -> None:
        raise DataError(
            f"source={str(folder)!r}: cannot list {error.filename!r} ({error.strerror}): check its permissions"
        )

    found = []
    for parent, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in names if not name.startswith(".")]
    return sorted(path for path in found if path.is_file())


def _glob_root(pattern: Path) -> Path:
    """The folder above the first component with a wildcard, so that names do not depend on where the data lie."""
    parts = pattern.parts
    fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    return Path(*parts[:fixed])


def _file_segment(path: Path, root: Path) -> FileSegment:
    if not os.access(path, os.R_OK):
        raise DataError(f"file {str(path)!r} is unreadable: check its permissions, or leave it out of the source")
    status = path.stat()
    return FileSegment(path.relative_to(root).as_posix(), str(path.absolute()), status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=_OPEN_MAPS)
def _map_file(path: str, size: int, mtime_ns: int) -> np.ndarray:
    """Maps a file read-only: uint8 (size,). `mtime_ns` only keeps versions of a file apart in the cache."""
    del mtime_ns
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode) or status.st_size != size:
            raise DataError(f"file {path!r} had {size} bytes when opened and has {status.st_size} now: open it again")
        # A plain view: np.memmap's subclass hooks would run on every slice.
        return np.memmap(path, dtype=np.uint8, mode="r", shape=(size,)).view(np.ndarray)
    except OSError as error:
        raise DataError(
            f"file {path!r} is unreadable ({error.strerror}): restore it, or open the source again"
        ) from error
