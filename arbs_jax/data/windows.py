"""Training batches at random offsets with exact resume, and fixed validation batches.

The batch of a step is a pure function of the data, the geometry, the seed and the step number, so a position in the
stream is one integer, and prefetching cannot disturb it. Offsets come straight from Philox's raw words, which NumPy
keeps stable across versions (the methods of `np.random.Generator` make no such promise).
"""

from typing import Any, NamedTuple, Protocol, Self

import grain
import numpy as np

from arbs_jax.data.corpus import Corpus
from arbs_jax.errors import ConfigError, DataError

# More steps than any run: the dataset behind the iterator has to have a length.
_STEPS = 1 << 40


class BatchIterator(Protocol):
    """An endless stream of training batches, uint8 (accum, batch, context + 1), that can be put back where it was."""

    def __iter__(self) -> Self: ...

    def __next__(self) -> np.ndarray: ...

    def get_state(self) -> dict[str, Any]:
        """The position after the last batch returned; plain JSON values."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues at a position that `get_state` gave. Raises DataError if it belongs to other data or settings."""
        ...

    def close(self) -> None:
        """Stops the prefetching thread; the iterator is of no use afterwards."""
        ...


class ValidationBatch(NamedTuple):
    """One validation batch.

    Attributes:
        windows: uint8 (batch, context + 1); rows past the valid ones are zero.
        valid: bool (batch,), True for the rows that hold data; these come first.
    """

    windows: np.ndarray
    valid: np.ndarray


class TrainWindows:
    """Endless iterator over random windows of a corpus; made by `train_windows`."""

    def __init__(self, dataset: grain.MapDataset, identity: dict[str, Any], *, start_step: int, prefetch: int):
        # One thread: assembling a batch is copying, and more threads would only contend for the interpreter.
        options = grain.ReadOptions(num_threads=min(prefetch, 1), prefetch_buffer_size=prefetch)
        self._identity = identity
        self._iterator = iter(dataset.to_iter_dataset(options))
        self._iterator.set_state({"next_index": start_step})

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> np.ndarray:
        return next(self._iterator)

    @property
    def step(self) -> int:
        """The number of the step whose batch comes next."""
        return self._iterator.get_state()["next_index"]

    def get_state(self) -> dict[str, Any]:
        """The position after the last batch returned, and what it is a position in; plain JSON values."""
        return {**self._identity, "step": self.step}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues at a position from `get_state`. Raises DataError if data, geometry or seed differ."""
        check_identity(self._identity, state)
        self._iterator.set_state({"next_index": int(state["step"])})

    def close(self) -> None:
        """Stops the prefetching thread; the iterator is of no use afterwards."""
        self._iterator.close()


def train_windows(
    corpus: Corpus, *, context: int, batch: int, accum: int, seed: int, start_step: int = 0, prefetch: int = 2
) -> TrainWindows:
    """Batches of windows at uniformly random byte offsets, drawn with replacement.

    Args:
        corpus: the training split.
        context: tokens a model sees; a window has one byte more, the last target.
        batch: windows a micro-batch.
        accum: micro-batches a step.
        seed: 0 <= seed < 2**64; keys the generator of offsets.
        start_step: step whose batch comes first; the stream continues as if it had run from step 0.
        prefetch: batches assembled ahead by a thread; 0 assembles each when it is asked for.

    Returns:
        An iterator of uint8 (accum, batch, context + 1) arrays that never ends.

    Raises:
        ConfigError: an argument is out of range.
        DataError: the corpus is shorter than one window.
    """
    check_positive(context=context, batch=batch, accum=accum)
    check_seed(seed)
    if not 0 <= start_step < _STEPS:
        raise ConfigError(f"start_step={start_step} is outside [0, {_STEPS}): give the number of a step")
    if prefetch < 0:
        raise ConfigError(f"prefetch={prefetch} is below 0: give a number of batches, or 0 for none")
    check_length(corpus, context)

    def assemble(step: int) -> np.ndarray:
        offsets = window_offsets(seed, step, accum * batch, len(corpus) - context)
        return corpus.gather(offsets, context + 1).reshape(accum, batch, context + 1)

    identity = {"fingerprint": corpus.fingerprint, "seed": seed, "shape": [accum, batch, context + 1]}
    return TrainWindows(
        grain.MapDataset.range(_STEPS).map(assemble), identity, start_step=start_step, prefetch=prefetch
    )


def window_offsets(seed: int, step: int, count: int, positions: int) -> np.ndarray:
    """The window offsets of one step: Philox-4x64, key the seed, top counter word the step, modulo `positions`.

    The modulo's bias is below positions / 2**64, far under what any corpus could show.

    Args:
        seed: 0 <= seed < 2**64.
        step: 0 <= step < 2**64.
        count: number of offsets.
        positions: number of possible offsets, at least 1.

    Returns:
        int64 (count,), each in [0, positions).
    """
    words = np.random.Philox(key=seed, counter=step << 192).random_raw(count)
    return (words % np.uint64(positions)).astype(np.int64)


def validation_windows(corpus: Corpus, *, context: int, batch: int, max_windows: int) -> list[ValidationBatch]:
    """Evenly spread windows that share no byte, the same on every call, in batches of one static shape.

    Args:
        corpus: the validation split.
        context: tokens a model sees; a window has one byte more.
        batch: rows a batch.
        max_windows: most windows in all; fewer where the corpus does not hold as many.

    Returns:
        Batches of uint8 (batch, context + 1) windows with a bool (batch,) mask; only the last may have padding rows.

    Raises:
        ConfigError: an argument is out of range.
        DataError: the corpus is shorter than one window.
    """
    check_positive(context=context, batch=batch, max_windows=max_windows)
    check_length(corpus, context)
    length = context + 1
    count = min(max_windows, len(corpus) // length)
    # The gap between neighbours is at least room // (count - 1) >= length, because count * length <= len(corpus).
    room = len(corpus) - length
    offsets = [i * room // (count - 1) for i in range(count)] if count > 1 else [room // 2]
    batches = []
    for start in range(0, count, batch):
        rows = corpus.gather(np.array(offsets[start : start + batch], dtype=np.int64), length)
        windows = np.zeros((batch, length), dtype=np.uint8)
        windows[: len(rows)] = rows
        batches.append(ValidationBatch(windows, np.arange(batch) < len(rows)))
    return batches


def check_positive(**values: int) -> None:
    """Raises ConfigError for the first named value below 1."""
    for name, value in values.items():
        if value < 1:
            raise ConfigError(f"{name}={value} is below 1: give a positive whole number")


def check_seed(seed: int) -> None:
    """Raises ConfigError unless the seed fits an unsigned 64-bit word."""
    if not 0 <= seed < 1 << 64:
        raise ConfigError(f"seed={seed} is outside [0, 2**64): give a whole number in that range")


def check_length(corpus: Corpus, context: int) -> None:
    """Raises DataError if the corpus does not hold one window of context + 1 bytes."""
    if len(corpus) < context + 1:
        raise DataError(
            f"{corpus.name!r} has {len(corpus)} bytes, but one window needs {context + 1} (context={context}, plus 1): "
            "give more data or a smaller context"
        )


def check_identity(expected: dict[str, Any], state: dict[str, Any]) -> None:
    """Raises DataError if a saved position belongs to other data, another geometry or another seed."""
    for name, value in expected.items():
        if state.get(name) != value:
            raise DataError(
                f"the saved data position has {name}={state.get(name)!r}, this run has {value!r}: "
                "resume with the data and settings that it was saved with"
            )
