"""A learning-rate schedule in integers: linear warm-up, then a cosine, the same bits on every machine."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from arbs_jax.errors import ConfigError

UNIT_BITS = 16
"""The multiplier 1.0 is `2^UNIT_BITS`."""
_SEGMENTS = 1024
# Half a cosine period from 1 to 0, in units of 2^-UNIT_BITS; a float cosine on the device could differ by an ulp
# between backends, and a rounded ulp would break bit-for-bit equality.
_HALF_COSINE = np.array(
    [round(2**UNIT_BITS * 0.5 * (1 + math.cos(math.pi * i / _SEGMENTS))) for i in range(_SEGMENTS + 1)] + [0], np.int64
)


@dataclass(frozen=True)
class Schedule:
    """Multiplier of a peak rate: linear from 0 over `warmup` steps, then a cosine from 1 to `final` at `steps`."""

    steps: int = 1000
    """Length of the whole run; later steps keep `final`."""
    warmup: int = 100
    """Steps of linear warm-up; the first step already moves."""
    final: float = 0.05
    """Multiplier at the end."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.warmup < 0:
            raise ConfigError(f"a schedule needs steps >= 1 and warmup >= 0, got {self.steps} and {self.warmup}")
        if not 0.0 <= self.final <= 1.0:
            raise ConfigError(f"the schedule's final multiplier must be in [0, 1], got {self.final}")

    def multiplier(self, step: jax.Array) -> jax.Array:
        """int64 () in units of `2^-UNIT_BITS`, from an integer step; integer arithmetic throughout."""
        step = jnp.asarray(step).astype(jnp.int64)
        one = 2**UNIT_BITS
        warmup = (step + 1) * one // max(self.warmup, 1)
        span = max(self.steps - self.warmup, 1)
        position = jnp.clip(step - self.warmup, 0, span) * (_SEGMENTS * one) // span
        index, fraction = position // one, position % one
        # A table of int64 must be made inside the trace: as a captured constant it would be narrowed to int32.
        table = jnp.asarray(_HALF_COSINE.astype(np.int32))
        left, right = table[index].astype(jnp.int64), table[index + 1].astype(jnp.int64)
        cosine = left + (right - left) * fraction // one
        floor = round(self.final * one)
        return jnp.where(step < self.warmup, jnp.minimum(warmup, one), floor + (one - floor) * cosine // one)
