"""Sampling as the commands use it, and bytes made fit for a terminal."""

import codecs
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from arbs_jax.layers import COLLECTION, DENSE, MEMORY
from arbs_jax.models.decoders import decoder_of
from arbs_jax.sampling import Generator, SamplingConfig
from arbs_jax.training.program import Program
from arbs_jax.training.step import TrainState
from arbs_jax.votes import decode_tree, scale_tree


def inference_variables(program: Program, state: TrainState, *, packed: bool = False) -> Any:
    """Collections for sampling: the packed state and bookkeeping, and what is made of it once: the weights (`N*K`
    activations of memory each), or if `packed` the scales alone. The model reads of both what is there."""
    dtype, once = jnp.dtype(program.config.model.dtype), scale_tree if packed else decode_tree
    make = jax.jit(lambda tree: once(tree, program.specs, program.ternary.rule, dtype))
    return {COLLECTION: state.ternary, MEMORY: state.memory, DENSE: make(state.ternary)}


def sample_bytes(
    program: Program,
    state: TrainState,
    prompt: bytes,
    count: int,
    sampling: SamplingConfig | None = None,
    *,
    packed: bool = False,
) -> Iterator[int]:
    """Yields `count` bytes after `prompt`."""
    least = decoder_of(program.model).least
    length = min(program.config.model.context, max(len(prompt), least) + max(count, 1))
    generator = Generator(
        program.model,
        inference_variables(program, state, packed=packed),
        sampling or SamplingConfig(seed=program.config.train.seed),
        length,
    )
    return generator(prompt, count)


def printable(text: bytes) -> str:
    """UTF-8 where it is, replacement characters where it is not; control characters but newline and tab become dots."""
    decoded = text.decode("utf-8", errors="replace")
    return "".join(char if char.isprintable() or char in "\n\t" else "·" for char in decoded)


class StreamDecoder:
    """Turns bytes that arrive one by one into text for the terminal, whole characters at a time."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def __call__(self, byte: int) -> str:
        """Text that this byte completes, possibly empty."""
        return printable(self._decoder.decode(bytes([byte])).encode())

    def end(self) -> str:
        """Text for a character that was never completed, possibly empty."""
        return printable(self._decoder.decode(b"", final=True).encode())
