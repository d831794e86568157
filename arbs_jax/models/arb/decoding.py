"""Reading a text a few bytes at a time: each call gives the logits that the whole text would.

What a position needs of those before it is small: two bytes, a motif and some of its ids, a latent a position for the
blocks, the ledger, and what the last `lookback` positions said in the loop. Bookkeeping (edges, n-grams) is read and
stays as it is. Arrays are suffixed by their axes: B batch, T bytes, S positions, D width, H ids, V vocabulary.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from arbs_jax.errors import ConfigError
from arbs_jax.models.arb.attention import empty_cache
from arbs_jax.models.arb.config import ArbConfig
from arbs_jax.models.arb.ledger import Ledger, empty_ledger
from arbs_jax.models.arb.loop import History, empty_history
from arbs_jax.models.arb.memgram import NOTHING
from arbs_jax.models.arb.sequencer import TRIGRAM
from arbs_jax.models.arb.vq import VQOutput
from arbs_jax.models.byte_lm import Cache


class Past(NamedTuple):
    """What the parts keep of the positions before; None where there is no such part, everywhere for a whole text."""

    tail_Bx2: jax.Array | None = None
    """int32, the last two bytes; None before the first."""
    motif_BxD: jax.Array | None = None
    """Vector of the last motif, of which the next composite is made; zeros before the first."""
    ids_BxH: jax.Array | None = None
    """int32, the last motifs that n-grams reach back to, `NOTHING` where there are none."""
    cache: Cache | None = None
    """Of the context blocks."""
    ledger: Ledger | None = None
    """Integers, of the reader."""
    heard: History | None = None
    """Motifs and messages that the loop may still hear."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Decoding:
    """A text that is being read; a pytree."""

    read: jax.Array
    """int32 (), bytes read so far."""
    past: Past
    """What is kept of them."""
    length: int = field(metadata={"static": True})
    """Bytes that there is room for."""


def empty_decoding(config: ArbConfig, batch: int, length: int) -> Decoding:
    """A text of which nothing was read, with room for `length` bytes.

    Raises:
        ConfigError: `length` is too short for a position, or beyond the model's context (which the ledger holds:
            `ArbConfig` sees to that).
    """
    if not TRIGRAM <= length <= config.context:
        raise ConfigError(
            f"decoding must have room for {TRIGRAM} bytes to {config.context}, the model's context; got {length}"
        )
    dtype = jnp.dtype(config.dtype)
    made: dict[str, Any] = {}
    if config.kg_part is not None:
        made["motif_BxD"] = jnp.zeros((batch, config.width), dtype)
    if config.memgram_part is not None:
        made["ids_BxH"] = jnp.full((batch, config.memgram_part.history), NOTHING, jnp.int32)
    if config.attention_part is not None:
        made["cache"] = empty_cache(config.attention_part, batch, length - TRIGRAM + 1)
        made["ledger"] = empty_ledger(config.ledger_part, batch)
    if config.loop_part is not None and config.loop_part.graph is not None:
        made["heard"] = empty_history(config.loop_part, batch, config.width, dtype)
    return Decoding(jnp.zeros((), jnp.int32), Past(**made), length)


def decode(
    model: Any, variables: Any, memory: dict[str, Any] | None, state: Decoding, tokens_BxT: jax.Array
) -> tuple[jax.Array, Decoding]:
    """Reads some more bytes of every text.

    Logits are those of the whole text but for rounding, which may tip a choice that was close to a tie (a motif, an
    expert, a step of the ledger's int8). T is static and takes no padding: under `jit` every T compiles once, and the
    first call, whose state has no bytes yet, apart from later ones.

    Args:
        model: an `ArbLM`.
        variables: its weights: the collection "ternary", with "dense" beside it or without.
        memory: bookkeeping, read only; None for that of a fresh model.
        state: `empty_decoding`, or what the last call returned.
        tokens_BxT: the bytes, integers: at least three in the first call, at least one in later ones.

    Returns:
        (logits float32 `(B, S, V)`, of the byte after each of the last S bytes: S = T, but T - 2 in the first call, as
        the first prediction is of the fourth byte; the state after these bytes).

    Raises:
        ConfigError: too few bytes, or more than there is room for. Inside a `jit` how many were read is not known, and
            only these T are compared: there the caller counts.
    """
    count, first = tokens_BxT.shape[1], state.past.tail_Bx2 is None
    least = TRIGRAM if first else 1
    if count < least:
        raise ConfigError(f"{'the first call' if first else 'a call'} must read at least {least} bytes, got {count}")
    known = 0 if isinstance(state.read, jax.core.Tracer) else int(state.read)
    if known + count > state.length:
        raise ConfigError(
            f"{known} bytes read and {count} more exceed the {state.length} that there is room for; "
            "ask empty_decoding for more, or begin anew with the last of them"
        )
    start = 0 if first else state.read - (TRIGRAM - 1)
    logits_BxSxV, past = model.apply(variables, tokens_BxT, memory, past=state.past, start=start)
    return logits_BxSxV, Decoding(state.read + count, past, state.length)


def past_after(
    past: Past,
    tokens_BxT: jax.Array,
    found: VQOutput | None,
    cache: Cache | None,
    ledger: Ledger | None,
    heard: History | None,
) -> Past:
    """The past of the positions after these tokens; it keeps what `past` keeps.

    `found` is the lookup of their motifs; `cache`, `ledger` and `heard` are what the parts made of those of `past`.
    """
    tail_Bx2 = tokens_BxT[:, :0] if past.tail_Bx2 is None else past.tail_Bx2
    motif_BxD, ids_BxH = past.motif_BxD, past.ids_BxH
    if found is not None:
        motif_BxD = None if motif_BxD is None else found.output_BxSxD[:, -1]
        ids_BxH = None if ids_BxH is None else _newest(ids_BxH, found.ids_BxS, ids_BxH.shape[1])
    return Past(_newest(tail_Bx2, tokens_BxT, TRIGRAM - 1), motif_BxD, ids_BxH, cache, ledger, heard)


def _newest(before_BxH: jax.Array, new_BxS: jax.Array, count: int) -> jax.Array:
    """The last `count` of both, int32 `(B, count)`."""
    both = jnp.concatenate([before_BxH.astype(jnp.int32), new_BxS.astype(jnp.int32)], axis=1)
    return both[:, both.shape[1] - count :]
