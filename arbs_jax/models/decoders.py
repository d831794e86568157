"""Models as a sampler sees them: bytes in, logits of the next byte out, whatever is kept between calls."""

from dataclasses import dataclass
from functools import singledispatch
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from arbs_jax.layers import MEMORY
from arbs_jax.models.arb.decoding import decode, empty_decoding
from arbs_jax.models.arb.model import ArbLM
from arbs_jax.models.arb.sequencer import TRIGRAM
from arbs_jax.models.byte_lm import ByteLM, empty_cache


class Decoder(Protocol):
    """Reads one text. Methods are pure; the state is a pytree that a caller may donate."""

    @property
    def least(self) -> int:
        """Bytes that the first call of `feed` must bring."""
        ...

    @property
    def padded(self) -> bool:
        """Whether tokens may be padded, so that few lengths are compiled."""
        ...

    def start(self, length: int) -> Any:
        """State of a text of which nothing was read, with room for `length` bytes.

        Raises:
            ConfigError: the model has no room for so many.
        """
        ...

    def feed(self, variables: Any, state: Any, tokens_1xT: jax.Array, count: jax.Array) -> tuple[jax.Array, Any]:
        """(logits float32 `(V,)` of the byte after the first `count`, the state after these).

        `count` is int32 (); it is T unless tokens may be padded.
        """
        ...


@singledispatch
def decoder_of(model: Any) -> Decoder:
    """How to sample from a Linen model.

    Raises:
        TypeError: a model of no known family.
    """
    raise TypeError(f"there is no decoder for {type(model).__name__}; register one with decoder_of.register")


@dataclass(frozen=True)
class ByteDecoder:
    """Of a byte model; the state is its key/value cache and the next position. Variables are its collections."""

    model: Any
    least: int = 1
    padded: bool = True

    def start(self, length: int) -> dict[str, Any]:
        """See `Decoder`."""
        return {"cache": empty_cache(self.model.config, 1, length), "start": jnp.zeros((), jnp.int32)}

    def feed(self, variables: Any, state: Any, tokens_1xT: jax.Array, count: jax.Array) -> tuple[jax.Array, Any]:
        """See `Decoder`."""
        # The padding's entries lie past the last real position: they are overwritten before they become visible.
        logits_1xTxV, cache = self.model.apply(variables, tokens_1xT, state["cache"], state["start"])
        return logits_1xTxV[0, count - 1], {"cache": cache, "start": state["start"] + count}


@dataclass(frozen=True)
class ArbDecoder:
    """Of an ARB model (`arbs_jax.models.arb.decoding`).

    Variables are the collections "ternary", "dense" beside it or not, and "memory", without which bookkeeping is fresh.
    """

    model: Any
    least: int = TRIGRAM
    padded: bool = False

    def start(self, length: int) -> Any:
        """See `Decoder`."""
        return empty_decoding(self.model.config, 1, length)

    def feed(self, variables: Any, state: Any, tokens_1xT: jax.Array, count: jax.Array) -> tuple[jax.Array, Any]:
        """See `Decoder`."""
        weights = {name: tree for name, tree in variables.items() if name != MEMORY}
        logits_1xSxV, state = decode(self.model, weights, variables.get(MEMORY), state, tokens_1xT)
        return logits_1xSxV[0, -1], state


@decoder_of.register
def _(model: ByteLM) -> Decoder:
    return ByteDecoder(model)


@decoder_of.register
def _(model: ArbLM) -> Decoder:
    return ArbDecoder(model)
