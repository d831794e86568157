"""Reads the ledger: attention over strides that have ended, mixed with the local context by a ternary gate.

Arrays are suffixed by their axes: B batch, S positions, N slots, D width, L latent, H heads, K channels of a head.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from arbs_jax.layers import TernaryConfig, TernaryDense, TernaryRMSNorm
from arbs_jax.models.arb.attention import AttentionConfig
from arbs_jax.models.arb.ledger import Ledger, LedgerConfig, Slots, append, read, starts, window_slots
from arbs_jax.models.byte_lm import rotate, rotation


class LedgerReader(nn.Module):
    """`(x, ledger, start, count) -> (context (B, S, D), ledger)`: what conditions graph, router and heads.

    Slots are those of the ledger, if there is one, followed by the strides that end within the window, whose gradient
    reaches `x`. A position sees the last `capacity` strides that have ended, one that ends with itself included: the
    same ones however the text is cut into windows. A slot of zeros that is always there makes the reading of nothing
    zero, and lets a position read less than a whole slot. Queries and keys are rotated by their position in strides.
    """

    attention: AttentionConfig
    """Width, heads, channels of a head and rotary base."""
    ledger: LedgerConfig
    ternary: TernaryConfig

    @nn.compact
    def __call__(
        self,
        x_BxSxD: jax.Array,
        ledger: Ledger | None = None,
        start: jax.Array | int = 0,
        count: jax.Array | int | None = None,
    ) -> tuple[jax.Array, Ledger | None]:
        """See the class.

        Args:
            x_BxSxD: output of the context blocks.
            ledger: of the positions before `start`; None reads the window alone and returns None.
            start: position of the first of `x`, int or int32 () or one for each text, int32 (B,).
            count: how many positions of `x` enter the ledger, the others being padding after them; None for all.

        Raises:
            ConfigError: the window does not fit the ledger (`arbs_jax.models.arb.ledger.append`).
        """
        local_BxSxD = TernaryRMSNorm()(x_BxSxD)
        latents_BxSxL = TernaryRMSNorm()(self._dense("latent_proj", self.ledger.latent)(local_BxSxD))
        slots = window_slots(self.ledger, latents_BxSxL, start, None if ledger is None else ledger["partial"])
        if ledger is not None:
            carried = read(ledger, x_BxSxD.dtype)
            slots = Slots(*(jnp.concatenate(pair, axis=1) for pair in zip(carried, slots, strict=True)))
            ledger = append(self.ledger, ledger, latents_BxSxL, start, count)
        reading_BxSxD = TernaryRMSNorm()(self._read(local_BxSxD, slots, start))
        both = jnp.concatenate([local_BxSxD, reading_BxSxD], axis=-1)
        gate = self._dense("gate_proj", self.attention.width)(both)
        share_BxSxD = jax.nn.sigmoid(gate.astype(jnp.float32)).astype(x_BxSxD.dtype)
        return local_BxSxD + share_BxSxD * (reading_BxSxD - local_BxSxD), ledger

    def _read(self, local_BxSxD: jax.Array, slots: Slots, start: jax.Array | int) -> jax.Array:
        """The attention's output `(B, S, D)`."""
        config, stride = self.attention, self.ledger.stride
        batch, length, _ = local_BxSxD.shape
        positions_BxS = starts(start, batch)[:, None] + jnp.arange(length, dtype=jnp.int32)

        def heads(name: str, x: jax.Array) -> jax.Array:
            flat = self._dense(name, config.heads * config.head_dim)(x)
            return flat.reshape(*x.shape[:2], config.heads, config.head_dim)

        def turned(x_BxNxHxK: jax.Array, positions_BxN: jax.Array) -> jax.Array:
            numbers = (positions_BxN // stride).reshape(-1)
            angles = rotation(numbers, config.head_dim, config.rope_theta, x_BxNxHxK.dtype)
            shape = (*positions_BxN.shape, 1, config.head_dim // 2)
            return rotate(TernaryRMSNorm()(x_BxNxHxK), *(angle.reshape(shape) for angle in angles))

        def after_nothing(x_BxNxHxK: jax.Array) -> jax.Array:
            return jnp.pad(x_BxNxHxK, ((0, 0), (1, 0), (0, 0), (0, 0)))

        q_BxSxHxK = turned(heads("q_proj", local_BxSxD), positions_BxS)
        k_BxNxHxK = after_nothing(turned(heads("k_up", slots.latents), slots.positions))
        v_BxNxHxK = after_nothing(heads("v_up", slots.latents))
        past_BxSxN = (positions_BxS + 1)[..., None] // stride - slots.positions[:, None] // stride  # 1 for the latest
        seen_BxSxN = slots.valid[:, None] & (past_BxSxN >= 1) & (past_BxSxN <= self.ledger.capacity)
        visible_BxSxN = jnp.pad(seen_BxSxN, ((0, 0), (0, 0), (1, 0)), constant_values=True)
        y_BxSxHxK = jax.nn.dot_product_attention(q_BxSxHxK, k_BxNxHxK, v_BxNxHxK, mask=visible_BxSxN[:, None])
        return self._dense("o_proj", config.width)(y_BxSxHxK.reshape(batch, length, -1))

    def _dense(self, name: str, features: int) -> TernaryDense:
        return TernaryDense(features=features, config=self.ternary, name=name)
