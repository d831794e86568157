"""Text from a trained byte model, one position per new byte through a key/value cache."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from arbs_jax.errors import ConfigError
from arbs_jax.models.byte_lm import ByteLM, empty_cache

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

    When the cache is full, its last half of bytes is fed again from position 0, and so on: texts may be longer than
    the context, which then slides.
    """

    model: ByteLM
    variables: Any
    """Collections for `model.apply`: "ternary", or "dense" decoded once."""
    config: SamplingConfig
    length: int
    """Positions in the cache."""

    @cached_property
    def _feed(self) -> Any:
        def feed(variables: Any, cache: Any, tokens: jax.Array, numbers: jax.Array, key: jax.Array):
            """Feeds some tokens, padded to (1, T), and draws the byte after them.

            `numbers` int32 (3,): how many tokens count, the position of the first, and which draw of `key` this is.
            """
            count, start, index = numbers
            logits, cache = self.model.apply(variables, tokens, cache, start)
            return choose(logits[0, count - 1], jax.random.fold_in(key, index), self.config), cache

        return jax.jit(feed, donate_argnums=1)

    def __call__(self, prompt: bytes, count: int) -> Iterator[int]:
        """Yields `count` bytes that follow `prompt`.

        Raises:
            ConfigError: the prompt is empty.
        """
        if not prompt:
            raise ConfigError("--prompt is empty; give at least one byte to go on from")
        history = list(prompt)
        cache = empty_cache(self.model.config, 1, self.length)
        pending, start, key = self._window(history), 0, jax.random.key(self.config.seed)
        for index in range(count):
            if start + len(pending) > self.length:
                pending, start = self._window(history), 0
            numbers = np.asarray([len(pending), start, index], np.int32)
            byte, cache = self._feed(self.variables, cache, self._padded(pending), numbers, key)
            start += len(pending)
            history.append(int(byte))
            pending = history[-1:]
            yield history[-1]

    def _window(self, history: list[int]) -> list[int]:
        """What to feed from position 0: everything, or as much as fills half the cache where that does not fit."""
        return history if len(history) <= self.length else history[-max(self.length // 2, 1) :]

    def _padded(self, tokens: list[int]) -> np.ndarray:
        """Tokens (1, T) with T a power of two, so that few shapes are compiled.

        The padding's cache entries lie past the last real position: they are overwritten before they become visible.
        """
        width = 1 if len(tokens) == 1 else min(1 << (len(tokens) - 1).bit_length(), self.length)
        return np.asarray([tokens + [0] * (width - len(tokens))], np.int32)
