"""Text from a trained model, one position per new byte: what was read before is kept (`arbs_jax.models.decoders`)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from arbs_jax.errors import ConfigError
from arbs_jax.models.decoders import Decoder, decoder_of

_BYTES = 256


@dataclass(frozen=True)
class SamplingConfig:
    """How the next byte is chosen."""

    temperature: float = 0.8
    """0 takes the likeliest byte."""
    top_k: int = 0
    """Keep the k likeliest bytes; 0 keeps all."""
    top_p: float = 1.0
    """Keep the likeliest bytes whose probabilities add up to p."""
    seed: int = 0
    """Seeds the draws."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"--temperature must be at least 0 and finite, got {self.temperature}")
        if not 0 <= self.top_k <= _BYTES:
            raise ConfigError(f"--top-k must be in [0, {_BYTES}], got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"--top-p must be in (0, 1], got {self.top_p}")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"--seed must be in [0, 2^32), got {self.seed}")


def choose(logits_V: jax.Array, key: jax.Array, config: SamplingConfig) -> jax.Array:
    """The next byte, int32 (), from logits over the vocabulary; specials are never drawn."""
    logits = logits_V[:_BYTES]
    if config.temperature == 0:
        return jnp.argmax(logits).astype(jnp.int32)
    ranked = jnp.sort(logits)[::-1]
    if config.top_k:
        logits = jnp.where(logits >= ranked[config.top_k - 1], logits, -jnp.inf)
    if config.top_p < 1:
        probabilities = jax.nn.softmax(ranked / config.temperature)
        # The first bytes whose mass *before* them is below p: at least the likeliest one stays.
        kept = jnp.sum(jnp.cumsum(probabilities) - probabilities < config.top_p)
        logits = jnp.where(logits >= ranked[kept - 1], logits, -jnp.inf)
    return jax.random.categorical(key, logits / config.temperature).astype(jnp.int32)


@dataclass(frozen=True)
class Generator:
    """Draws bytes from a model.

    When there is no more room, the last half of the bytes is read again from position 0, and so on: texts may be longer
    than the context, which then slides.
    """

    model: Any
    """Of a family that `decoder_of` knows."""
    variables: Any
    """What its decoder reads: the collections for `model.apply`, "ternary" or what of it was decoded once as "dense",
    and for a model that has bookkeeping "memory"."""
    config: SamplingConfig
    length: int
    """Bytes that there is room for."""

    @cached_property
    def decoder(self) -> Decoder:
        """How the model is read."""
        return decoder_of(self.model)

    @cached_property
    def _feed(self) -> Any:
        def feed(variables: Any, state: Any, tokens: jax.Array, numbers: jax.Array, key: jax.Array):
            """Feeds some tokens (1, T) and draws the byte after them.

            `numbers` int32 (2,): how many tokens count, the others being padding, and which draw of `key` this is.
            """
            count, index = numbers
            logits_V, state = self.decoder.feed(variables, state, tokens, count)
            return choose(logits_V, jax.random.fold_in(key, index), self.config), state

        return jax.jit(feed, donate_argnums=1)

    def __call__(self, prompt: bytes, count: int) -> Iterator[int]:
        """Yields `count` bytes that follow `prompt`; one shorter than what the model must begin with is read as if
        newlines came before it.

        Raises:
            ConfigError: the prompt is empty, or `length` is more than the model has room for.
        """
        if not prompt:
            raise ConfigError("--prompt is empty; give at least one byte to go on from")
        history = list(prompt.rjust(self.decoder.least, b"\n"))
        state, key = self.decoder.start(self.length), jax.random.key(self.config.seed)
        pending, read = self._window(history), 0
        for index in range(count):
            if read + len(pending) > self.length:
                state = self.decoder.start(self.length)
                pending, read = self._window(history), 0
            numbers = np.asarray([len(pending), index], np.int32)
            byte, state = self._feed(self.variables, state, self._tokens(pending), numbers, key)
            read += len(pending)
            history.append(int(byte))
            pending = history[-1:]
            yield history[-1]

    def _window(self, history: list[int]) -> list[int]:
        """What to feed from position 0: everything, or as much as fills half the room where that does not fit."""
        return history if len(history) <= self.length else history[-max(self.length // 2, self.decoder.least) :]

    def _tokens(self, tokens: list[int]) -> np.ndarray:
        """Tokens (1, T); where they may be padded, T is a power of two, so that few shapes are compiled."""
        width = len(tokens)
        if self.decoder.padded and width > 1:
            width = min(1 << (width - 1).bit_length(), self.length)
        return np.asarray([tokens + [0] * (width - len(tokens))], np.int32)
