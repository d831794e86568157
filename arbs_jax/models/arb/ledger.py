"""The ledger: a compressed record of past context, in integers, carried from segment to segment.

A *stride* is a run of `stride` consecutive positions, aligned to the start of the text. When its last position has been
read, the mean of its latents goes into one slot: int8 values that share a power of two. A ledger is a dict of

    latents   int8  (B, C, L)   slots
    exponents int8  (B, C)      log2 of a slot's unit
    positions int32 (B, C)      the last position of a slot's stride, -1 for a slot that is empty
    partial   int32 (B, L)      sum over the stride that is not complete yet

Latents are rounded to a fixed point before they are added, so sums are exact: a text gives the same ledger bit for bit
however it is cut into segments. Where a text grows longer than the ledger, the newest slots are written over the
oldest. `LedgerReader` (`arbs_jax.models.arb.reader`) reads it.

Arrays are suffixed by their axes: B batch, S positions, C slots, N strides that S positions touch, L latent.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from arbs_jax.errors import ConfigError
from arbs_jax.models.checks import require_positive

Ledger = dict[str, jax.Array]

_FRACTION_BITS = 10
_LARGEST = 2**15 - 1
_MAX_STRIDE = 2**15


@dataclass(frozen=True)
class LedgerConfig:
    """Shape of a ledger."""

    latent: int = 64
    """`L`, channels of a slot."""
    stride: int = 16
    """Positions that one slot stands for; a power of two, so that means are exact."""
    capacity: int = 256
    """`C`, slots."""

    def __post_init__(self) -> None:
        require_positive("ledger", self, "latent", "stride", "capacity")
        if self.stride & (self.stride - 1) or self.stride > _MAX_STRIDE:
            raise ConfigError(f"ledger.stride must be a power of two up to {_MAX_STRIDE}, got {self.stride}")

    def check_context(self, length: int) -> None:
        """Refuses a text that would write over its own beginning.

        Raises:
            ConfigError: `length` positions have more strides than there are slots.
        """
        if length // self.stride > self.capacity:
            raise ConfigError(
                f"a context of {length} positions exceeds a ledger of {self.capacity} slots of {self.stride} "
                f"positions, {self.capacity * self.stride} in all; raise ledger.capacity or ledger.stride"
            )


class Slots(NamedTuple):
    """What can be read, C slots or the N strides of a window."""

    latents: jax.Array
    """Activations `(B, C, L)`."""
    positions: jax.Array
    """int32 `(B, C)`, the last position of each stride: earlier positions must not read it."""
    valid: jax.Array
    """bool `(B, C)`, whether there is anything in the slot."""


def empty_ledger(config: LedgerConfig, batch: int) -> Ledger:
    """A ledger of nothing, for `batch` texts."""
    slots = (batch, config.capacity)
    return {
        "latents": jnp.zeros((*slots, config.latent), jnp.int8),
        "exponents": jnp.zeros(slots, jnp.int8),
        "positions": jnp.full(slots, -1, jnp.int32),
        "partial": jnp.zeros((batch, config.latent), jnp.int32),
    }


def append(
    config: LedgerConfig,
    ledger: Ledger,
    latents_BxSxL: jax.Array,
    start: jax.Array | int,
    count: jax.Array | int | None = None,
) -> Ledger:
    """The ledger after S more positions; integers out, not differentiated.

    Args:
        config: of the ledger.
        ledger: after the positions before `start`.
        latents_BxSxL: float latents of about unit RMS; beyond +-32 they saturate.
        start: position of the first latent, int or int32 () or one for each text, int32 (B,).
        count: how many of the positions are text, the others being padding after it; like `start`, None for all.

    Raises:
        ConfigError: the segment does not fit the ledger; where `start` is an int, the text up to its end does not.
    """
    batch, length, _ = latents_BxSxL.shape
    _check_fits(config, length, start)
    first_B, count_B = starts(start, batch), starts(length if count is None else count, batch)
    is_text_BxS = jnp.arange(length, dtype=jnp.int32) < count_B[:, None]
    fixed = jnp.where(is_text_BxS[..., None], _fixed(latents_BxSxL), jnp.int32(0))
    sums, positions_BxN = _strides(config, fixed, ledger["partial"], first_B)
    complete_BxN = positions_BxN < (first_B + count_B)[:, None]
    values, exponents = _compress(config, sums[:, :-1])
    # Consecutive strides are at most as many as slots: no two of them share one.
    slot_BxN = jnp.where(complete_BxN, positions_BxN // config.stride % config.capacity, config.capacity)
    rows = jnp.arange(batch, dtype=jnp.int32)[:, None]
    written = {"latents": values, "exponents": exponents, "positions": positions_BxN}
    open_stride_B = jnp.sum(complete_BxN, axis=1, dtype=jnp.int32)
    return {
        **{name: ledger[name].at[rows, slot_BxN].set(new, mode="drop") for name, new in written.items()},
        "partial": jnp.take_along_axis(sums, open_stride_B[:, None, None], axis=1)[:, 0],
    }


def read(ledger: Ledger, dtype: jnp.dtype) -> Slots:
    """All slots of a ledger; their latents are exact in float32 and in bfloat16."""
    latents = _decompress(ledger["latents"], ledger["exponents"]).astype(dtype)
    return Slots(latents, ledger["positions"], ledger["positions"] >= 0)


def window_slots(
    config: LedgerConfig, latents_BxSxL: jax.Array, start: jax.Array | int = 0, partial_BxL: jax.Array | None = None
) -> Slots:
    """The strides that end within a window, as `append` would write them, differentiable in the latents.

    The forward value is that of the quantised slot; backward is that of the plain mean (straight-through).

    Args:
        config: of the ledger.
        latents_BxSxL: the window's latents.
        start: as in `append`.
        partial_BxL: the ledger's, for a window that starts within a stride; None for zeros.

    Raises:
        ConfigError: as in `append`.
    """
    batch, length, channels = latents_BxSxL.shape
    _check_fits(config, length, start)
    first_B = starts(start, batch)
    partial = jnp.zeros((batch, channels), jnp.int32) if partial_BxL is None else partial_BxL
    sums, positions_BxN = _strides(config, _fixed(latents_BxSxL), partial, first_B)
    exact = _decompress(*_compress(config, sums[:, :-1]))
    here_alone = jnp.zeros((batch, channels), jnp.float32)
    mean = _strides(config, latents_BxSxL.astype(jnp.float32), here_alone, first_B)[0][:, :-1] / config.stride
    # The parenthesis is exactly zero, so that the forward value is exactly the slot's.
    latents = jax.lax.stop_gradient(exact) + (mean - jax.lax.stop_gradient(mean))
    return Slots(latents.astype(latents_BxSxL.dtype), positions_BxN, positions_BxN < (first_B + length)[:, None])


def starts(start: jax.Array | int, batch: int) -> jax.Array:
    """Positions int32 (B,) from one for all texts or one for each."""
    return jnp.broadcast_to(jnp.asarray(start, jnp.int32), (batch,))


def _fixed(latents: jax.Array) -> jax.Array:
    """Latents in units of 2^-10, int32; a mean over up to 2^15 of them fits int32 before it is divided."""
    units = jnp.round(jax.lax.stop_gradient(latents).astype(jnp.float32) * 2**_FRACTION_BITS)
    return jnp.clip(units, -_LARGEST, _LARGEST).astype(jnp.int32)


def _check_fits(config: LedgerConfig, length: int, start: jax.Array | int) -> None:
    """Refuses what is known before the program runs to be too long."""
    config.check_context(length + start if isinstance(start, int) else length)


def _strides(
    config: LedgerConfig, latents_BxSxL: jax.Array, partial_BxL: jax.Array, first_B: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Sums over strides, for latents of any dtype.

    Returns:
        (sums `(B, N + 1, L)` of the strides that the positions may touch, the last of which cannot end among them; the
        last position of each of the first N, int32 `(B, N)`).
    """
    batch, length, channels = latents_BxSxL.shape
    count = (length + config.stride - 1) // config.stride
    room = jnp.zeros(((count + 1) * config.stride, channels), latents_BxSxL.dtype)
    zero = jnp.zeros((), jnp.int32)

    def place(own_SxL: jax.Array, phase: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(room, own_SxL, (phase, zero))

    placed = jax.vmap(place)(latents_BxSxL, first_B % config.stride)
    by_stride = placed.reshape(batch, count + 1, config.stride, channels)
    sums = jnp.sum(by_stride, axis=2, dtype=latents_BxSxL.dtype).at[:, 0].add(partial_BxL)
    number_BxN = (first_B // config.stride)[:, None] + jnp.arange(count, dtype=jnp.int32)
    return sums, (number_BxN + 1) * config.stride - 1


def _compress(config: LedgerConfig, sums: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Means as int8 (..., L) and the int8 (...) exponent of their unit, the smallest that fits, from sums int32."""
    magnitude = jnp.abs(sums)
    largest = jnp.max(magnitude, axis=-1, keepdims=True)
    bits = jnp.maximum(jnp.int32(32 - 7) - jax.lax.clz(largest), jnp.int32(0))
    shift = jnp.where(_halved(largest, bits) > 127, bits + 1, bits)
    values = (jnp.sign(sums) * _halved(magnitude, shift)).astype(jnp.int8)
    unit = shift[..., 0] - (_FRACTION_BITS + config.stride.bit_length() - 1)
    return values, unit.astype(jnp.int8)


def _halved(magnitude: jax.Array, times: jax.Array) -> jax.Array:
    """`magnitude / 2^times`, rounded half up."""
    return (magnitude + ((jnp.int32(1) << times) >> 1)) >> times


def _decompress(values: jax.Array, exponents: jax.Array) -> jax.Array:
    """float32 latents of slots, exactly: the power of two is put together from its bits."""
    power = jax.lax.bitcast_convert_type((exponents.astype(jnp.int32) + 127) << 23, jnp.float32)
    return values.astype(jnp.float32) * power[..., None]
