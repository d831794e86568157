"""Training batches streamed from a Hugging Face dataset: an extra, `pip install arbs-jax[hub]`.

A source is written `hf:NAME[:CONFIG][@SPLIT][#FIELD]`, for example `hf:roneneldan/TinyStories`,
`hf:wikimedia/wikipedia:20231101.en@train#text` or `hf:stories.jsonl#story`. NAME is a dataset on the hub, a folder that
`datasets` understands, or a JSON, text or Parquet file; it may not contain `:`, `@` or `#`. SPLIT defaults to
`train`, FIELD to `text`.

The documents' UTF-8 bytes, a newline after each, form one stream, in the dataset's own order. Its first bytes are held
out for validation and are left out of training in every epoch; the rest is cut into windows that lie end to end. The
shuffle buffer of `datasets` loses its contents on resume, so it is not used: instead windows are permuted within blocks
of some batches, and a resumed run reads its block again.
"""

import base64
import copy
import re
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from arbs_jax.data.corpus import Corpus, memory_corpus
from arbs_jax.data.windows import check_identity, check_positive, check_seed
from arbs_jax.errors import ConfigError, DataError

SEPARATOR = b"\n"

_GRAMMAR = re.compile(r"hf:(?P<name>[^:@#]+)(:(?P<config>[^:@#]+))?(@(?P<split>[^@#]+))?(#(?P<field>.+))?")
_BUILDERS = {".json": "json", ".jsonl": "json", ".txt": "text", ".parquet": "parquet"}


@dataclass(frozen=True)
class HubSource:
    """A parsed source string.

    Attributes:
        name: dataset on the hub, or a local file or folder.
        config: the dataset's configuration, or None for its default.
        split: the split to stream.
        field: the column that holds the text.
    """

    name: str
    config: str | None = None
    split: str = "train"
    field: str = "text"

    @classmethod
    def parse(cls, source: str) -> Self:
        """Reads `hf:NAME[:CONFIG][@SPLIT][#FIELD]`. Raises DataError if the string is not of that form."""
        match = _GRAMMAR.fullmatch(source)
        if match is None:
            raise DataError(f"source={source!r} is not of the form hf:NAME[:CONFIG][@SPLIT][#FIELD]: correct it")
        return cls(**{key: value for key, value in match.groupdict().items() if value is not None})

    def __str__(self) -> str:
        return f"hf:{self.name}" + (f":{self.config}" if self.config else "") + f"@{self.split}#{self.field}"


def is_hub_source(source: object) -> bool:
    """True for strings that name a streamed dataset (`hf:...`), which `open_corpus` does not take."""
    return isinstance(source, str) and source.startswith("hf:")


def hub_validation(source: str, *, validation_bytes: int) -> Corpus:
    """The first bytes of the stream, which `hub_windows` with the same `validation_bytes` never yields.

    Returns:
        An in-memory corpus of exactly `validation_bytes` bytes.

    Raises:
        ConfigError: `validation_bytes` is below 1.
        DataError: the dataset cannot be read, `datasets` is missing, or the stream is shorter.
    """
    check_positive(validation_bytes=validation_bytes)
    parsed = HubSource.parse(source)
    data = bytearray()
    for document in _documents(_load(parsed), parsed):
        data += document
        if len(data) >= validation_bytes:
            return memory_corpus(f"{source} (validation)", bytes(data[:validation_bytes]))
    raise DataError(f"{source!r} has {len(data)} bytes, but validation_bytes={validation_bytes}: ask for fewer")


def hub_windows(
    source: str,
    *,
    context: int,
    batch: int,
    accum: int,
    seed: int,
    validation_bytes: int = 0,
    shuffle_batches: int = 64,
) -> "HubWindows":
    """Endless batches from a streamed dataset; reads the first block at once, later ones ahead in a thread.

    Args:
        source: `hf:NAME[:CONFIG][@SPLIT][#FIELD]`.
        context: tokens a model sees; a window has one byte more, the last target.
        batch: windows a micro-batch.
        accum: micro-batches a step.
        seed: 0 <= seed < 2**64; keys the permutations within blocks.
        validation_bytes: bytes at the start of the stream to leave out, every epoch.
        shuffle_batches: batches a block; windows are permuted within it. Two blocks at a time are held in memory.

    Returns:
        An iterator of uint8 (accum, batch, context + 1) arrays that never ends: epoch follows epoch.

    Raises:
        ConfigError: an argument is out of range.
        DataError: the dataset cannot be read, `datasets` is missing, or less than one window is left for training.
    """
    check_positive(context=context, batch=batch, accum=accum, shuffle_batches=shuffle_batches)
    check_seed(seed)
    if validation_bytes < 0:
        raise ConfigError(f"validation_bytes={validation_bytes} is below 0: give a number of bytes, or 0 for none")
    stream = _ByteStream(HubSource.parse(source), held_out=validation_bytes, window=context + 1)
    return HubWindows(stream, seed=seed, shape=(shuffle_batches, accum, batch, context + 1))


class HubWindows:
    """Endless iterator over windows of a streamed dataset; made by `hub_windows`."""

    def __init__(self, stream: "_ByteStream", *, seed: int, shape: tuple[int, int, int, int]):
        self._stream, self._seed, self._shape = stream, seed, shape
        self._identity = {**stream.identity, "seed": seed, "shape": list(shape)}
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="arbs-hub")
        self._start_at(stream.position(), block=0, index=0)
        if (error := self._pending.exception()) is not None:
            self.close()
            raise error

    def _start_at(self, position: dict[str, Any], *, block: int, index: int) -> None:
        self._index, self._current = index, _Block(block, position, None)
        self._pending: Future[_Block] = self._executor.submit(self._read_block, block)

    def _read_block(self, number: int) -> "_Block":
        """Reads and permutes one block; runs in the thread, which alone uses the stream meanwhile."""
        position = self._stream.position()
        steps, accum, batch, length = self._shape
        count = steps * accum * batch
        windows = np.frombuffer(self._stream.take(count * length), dtype=np.uint8).reshape(count, length)
        order = np.argsort(np.random.Philox(key=self._seed, counter=number << 192).random_raw(count), kind="stable")
        return _Block(number, position, windows[order].reshape(self._shape))

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> np.ndarray:
        """The next batch: uint8 (accum, batch, context + 1). Raises DataError if the dataset cannot be read."""
        while (batches := self._current.batches) is None or self._index == len(batches):
            following = self._pending.result()
            # An unread block keeps its index: a restored position may lie anywhere in it, its end included.
            if batches is not None:
                self._index = 0
            self._current = following
            self._pending = self._executor.submit(self._read_block, following.number + 1)
        self._index += 1
        return batches[self._index - 1]

    def get_state(self) -> dict[str, Any]:
        """The position after the last batch returned, plain JSON values: where the block began, and how far into it."""
        return {
            **self._identity,
            "block": self._current.number,
            "index": self._index,
            "position": self._current.position,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues at a position from `get_state`. Raises DataError if source, geometry or seed differ."""
        check_identity(self._identity, state)
        self._pending.cancel()
        wait([self._pending])
        self._stream.restore(state["position"])
        self._start_at(state["position"], block=int(state["block"]), index=int(state["index"]))

    def close(self) -> None:
        """Stops the reading thread; the iterator is of no use afterwards."""
        self._executor.shutdown(wait=True, cancel_futures=True)


@dataclass(frozen=True)
class _Block:
    """A block's number, the stream's position before it, and uint8 (steps, accum, batch, length), None while unread."""

    number: int
    position: dict[str, Any]
    batches: np.ndarray | None


class _ByteStream:
    """The training bytes of a dataset, epoch after epoch, with a position that can be saved and restored."""

    def __init__(self, source: HubSource, *, held_out: int, window: int):
        self.identity: dict[str, Any] = {"source": str(source), "validation_bytes": held_out}
        self._source, self._held_out, self._window = source, held_out, window
        self._dataset = _load(source)
        self._beginning = self._dataset.state_dict()
        self._rewind(self._beginning, seen=0)
        self._buffer = bytearray()

    def _rewind(self, state: dict[str, Any], *, seen: int) -> None:
        self._loaded: dict[str, Any] | None = state
        self._seen = seen
        # A copy, because the dataset may go on writing into what it is given.
        self._dataset.load_state_dict(copy.deepcopy(state))
        self._documents = _documents(self._dataset, self._source)

    def position(self) -> dict[str, Any]:
        """Plain JSON values: the dataset's state, the bytes of this epoch read so far, and those not yet taken."""
        # Until the first document after a load, the dataset's own state is still the one from before it.
        state = self._dataset.state_dict() if self._loaded is None else self._loaded
        leftover = base64.b64encode(self._buffer).decode("ascii")
        return {"dataset": state, "seen": self._seen, "leftover": leftover}

    def restore(self, position: dict[str, Any]) -> None:
        """Returns to a position from `position`."""
        self._rewind(position["dataset"], seen=int(position["seen"]))
        self._buffer = bytearray(base64.b64decode(position["leftover"]))

    def take(self, count: int) -> bytes:
        """The next `count` bytes. Raises DataError if an epoch holds less than one window."""
        while len(self._buffer) < count:
            document = next(self._documents, None)
            if document is None:
                self._check_epoch()
                self._rewind(self._beginning, seen=0)
                continue
            self._loaded = None
            self._buffer += document[max(self._held_out - self._seen, 0) :]
            self._seen += len(document)
        taken = bytes(self._buffer[:count])
        del self._buffer[:count]
        return taken

    def _check_epoch(self) -> None:
        left = max(self._seen - self._held_out, 0)
        if left < self._window:
            raise DataError(
                f"'{self._source}' has {left} bytes for training (validation_bytes={self._held_out}), one window needs "
                f"{self._window}: give more data, fewer validation bytes or a smaller context"
            )


def _load(source: HubSource) -> Any:
    """The `datasets.IterableDataset` of a source, reduced to its text column."""
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise DataError(f"'{source}' needs the package datasets: install the extra arbs-jax[hub]") from error
    name, files = source.name, None
    path = Path(source.name).expanduser()
    if path.is_file():
        builder = next((_BUILDERS[suffix] for suffix in path.suffixes if suffix in _BUILDERS), None)
        if builder is None:
            raise DataError(f"'{source}' is a file of unknown kind: give one of {', '.join(_BUILDERS)}")
        name, files = builder, str(path)
    elif path.is_dir():
        name = str(path)
    try:
        dataset = datasets.load_dataset(name, source.config, data_files=files, split=source.split, streaming=True)
        columns = dataset.column_names
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise _unreadable(source, error) from error
    if columns is None:
        return dataset
    if source.field not in columns:
        raise DataError(f"'{source}' has no field {source.field!r}, only {', '.join(columns)}: name one after #")
    # Other columns, images say, would be decoded only to be thrown away.
    return dataset.select_columns([source.field])


def _documents(dataset: Any, source: HubSource) -> Iterator[bytes]:
    """Each row's bytes and the separator, from the dataset's position on; a row without text is an empty document."""
    from datasets.exceptions import DatasetsError

    try:
        for row in dataset:
            value = row.get(source.field)
            if isinstance(value, str):
                value = value.encode("utf-8", "surrogatepass")
            if value is not None and not isinstance(value, bytes):
                raise DataError(f"'{source}' holds {type(value).__name__} values, not text: name another field after #")
            yield (value or b"") + SEPARATOR
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise _unreadable(source, error) from error


def _unreadable(source: HubSource, error: Exception) -> DataError:
    first_line = (str(error).splitlines() or [""])[0]
    return DataError(f"'{source}' cannot be read: {first_line} ({type(error).__name__}): check name, split and network")
