"""MemGram: a memory of n-grams of motif ids, found by hashing.

Two tables. The *structural* one is a sparse ternary table: a vector for each hashed n-gram, learned over the whole run.
The *conversational* one is bookkeeping: a slot keeps the 32-bit tag of the n-gram that lives in it and an int8 strength
that grows with every use and decays with every observation. What is read is the n-gram's vector, plain and once more
scaled by how strong it is in this conversation.

The n-gram of order o at position i is of ids `i-o+1 .. i`; where a sequence has no such ids yet nothing is read. Arrays
are suffixed by their axes: B batch, S positions, O orders, K channels of the table, D width, R slots.
"""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from arbs_jax.errors import ConfigError
from arbs_jax.layers import TernaryConfig, TernaryDense, TernaryTable
from arbs_jax.models.checks import require_dtype, require_positive
from arbs_kernels.noise import GOLDEN, mix

NOTHING = -1
"""The id of a position that is not there."""

Memory = dict[str, jax.Array]


@dataclass(frozen=True)
class MemGramConfig:
    """Shape of the n-gram memory."""

    rows: int = 1_000_000
    """Rows of the structural table, below 2^24."""
    dim: int = 64
    """Channels of one of its rows."""
    width: int = 128
    """`D`, channels of what is read."""
    orders: tuple[int, ...] = (2, 3)
    """Lengths of the n-grams, ascending."""
    conversational_rows: int = 65_536
    """Slots of the conversational table; every observation passes over all of them."""
    gain: int = 16
    """What a use adds to a strength."""
    decay: int = 5
    """An observation takes `strength >> decay`, and at least 1, from every strength."""
    dtype: str = "float32"
    """Activations: "float32" or "bfloat16"."""

    def __post_init__(self) -> None:
        if not 1 <= self.rows < 2**24:
            raise ConfigError(f"memgram.rows must be in [1, 2^24), got {self.rows}")
        require_positive("memgram", self, "dim", "width", "conversational_rows")
        if not self.orders or list(self.orders) != sorted(set(self.orders)) or self.orders[0] < 1:
            raise ConfigError(f"memgram.orders must be ascending lengths from 1, got {self.orders}")
        if not 1 <= self.gain <= 127:
            raise ConfigError(f"memgram.gain must be in [1, 127], the range of a strength, got {self.gain}")
        if not 0 <= self.decay <= 7:
            raise ConfigError(f"memgram.decay must be in [0, 7], got {self.decay}")
        require_dtype("memgram", self)

    @property
    def history(self) -> int:
        """Ids before a segment that its first n-grams reach back to."""
        return self.orders[-1] - 1


def empty_memgram(config: MemGramConfig) -> Memory:
    """The conversational table of a new conversation: `tags` int32 (R,), `strength` int8 (R,), 0 for an empty slot."""
    return {
        "tags": jnp.zeros((config.conversational_rows,), jnp.int32),
        "strength": jnp.zeros((config.conversational_rows,), jnp.int8),
    }


def ngram_hashes(
    ids_BxS: jax.Array, orders: tuple[int, ...], history_BxH: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """(hashes uint32, whether the n-gram is whole bool), `(B, S, O)` each, of motif ids int32.

    `history_BxH` holds the `orders[-1] - 1` ids before these, `NOTHING` where there are none; None stands for no ids.
    """
    batch, length = ids_BxS.shape
    reach = orders[-1] - 1
    if history_BxH is None:
        history_BxH = jnp.full((batch, reach), NOTHING, jnp.int32)
    if history_BxH.shape != (batch, reach):
        raise ConfigError(f"memgram history must be the {reach} ids before, {(batch, reach)}, got {history_BxH.shape}")
    known = jnp.concatenate([history_BxH.astype(jnp.int32), ids_BxS.astype(jnp.int32)], axis=1)
    hashes, whole = [], []
    for order in orders:
        hashed = jnp.full((batch, length), np.uint32(order), jnp.uint32)
        complete = jnp.ones((batch, length), bool)
        for back in range(order):
            part = jax.lax.slice_in_dim(known, reach - back, reach - back + length, axis=1)
            hashed = mix(hashed * GOLDEN ^ part.astype(jnp.uint32))
            complete &= part >= 0
        hashes.append(hashed)
        whole.append(complete)
    return jnp.stack(hashes, axis=-1), jnp.stack(whole, axis=-1)


def conversational_strength(memory: Memory, hashes: jax.Array) -> jax.Array:
    """Strengths int8, shaped as `hashes` uint32, of n-grams in this conversation; 0 where the slot is another's."""
    slot, tag = _address(hashes, memory["tags"].shape[0])
    return jnp.where(memory["tags"][slot] == tag, memory["strength"][slot], jnp.int8(0))


def observe_memgram(
    memory: Memory, ids_BxS: jax.Array, config: MemGramConfig, history_BxH: jax.Array | None = None
) -> Memory:
    """The conversational table after a segment of motif ids; integers in and out, whatever the order of the batch.

    Every strength decays. An n-gram whose slot is its own gains `gain` for every use, up to 127. In a slot that stays
    at less than `gain` and was not used it is replaced by a newcomer; of several newcomers the largest tag wins.
    """
    hashes, whole = ngram_hashes(ids_BxS, config.orders, history_BxH)
    slots = config.conversational_rows
    slot, tag = _address(hashes.reshape(-1), slots)
    slot = jnp.where(whole.reshape(-1), slot, slots)
    strength = memory["strength"].astype(jnp.int32)
    own = (memory["tags"][slot] == tag) & (strength[slot] > 0)
    uses = jnp.zeros((slots,), jnp.int32).at[slot].add(own.astype(jnp.int32), mode="drop")
    least = jnp.iinfo(jnp.int32).min
    newcomer = jnp.full((slots,), least, jnp.int32).at[slot].max(jnp.where(own, least, tag), mode="drop")
    decayed = jnp.maximum(strength - jnp.maximum(strength >> config.decay, 1), 0)
    # Capped before the product: a gain times the uses of a long batch stays within 32 bits, and 127 is the end of it.
    grown = jnp.minimum(decayed + config.gain * jnp.minimum(uses, 127), 127)
    replaced = (uses == 0) & (newcomer > least) & (decayed < config.gain)
    return {
        "tags": jnp.where(replaced, newcomer, memory["tags"]),
        "strength": jnp.where(replaced, config.gain, grown).astype(jnp.int8),
    }


class MemGram(nn.Module):
    """Motif ids `(B, S)` and the conversational table to what is remembered, `(B, S, D)`; see the module."""

    config: MemGramConfig
    ternary: TernaryConfig

    @nn.compact
    def __call__(self, ids_BxS: jax.Array, memory: Memory, history_BxH: jax.Array | None = None) -> jax.Array:
        """See the class. Positions without a whole n-gram read zeros, and their lookups' gradients are zero."""
        config = self.config
        hashes, whole = ngram_hashes(ids_BxS, config.orders, history_BxH)
        table = TernaryTable(
            num_embeddings=config.rows,
            features=config.dim,
            dtype=jnp.dtype(config.dtype),
            config=self.ternary,
            name="structural",
        )
        rows_BxSxOxK = table((hashes % np.uint32(config.rows)).astype(jnp.int32))
        rows_BxSxOxK = jnp.where(whole[..., None], rows_BxSxOxK, jnp.zeros((), rows_BxSxOxK.dtype))
        strength = conversational_strength(memory, hashes).astype(rows_BxSxOxK.dtype) / 127
        both = jnp.concatenate([rows_BxSxOxK, rows_BxSxOxK * strength[..., None]], axis=-1)
        flat = both.reshape(*ids_BxS.shape, -1)
        return TernaryDense(features=config.width, config=self.ternary, name="out")(flat)


def _address(hashes: jax.Array, slots: int) -> tuple[jax.Array, jax.Array]:
    """(slots int32, tags int32) of hashes; tags are of other bits than slots."""
    tag = mix(hashes ^ GOLDEN)
    return (hashes % np.uint32(slots)).astype(jnp.int32), jax.lax.bitcast_convert_type(tag, jnp.int32)
