"""Rules that move the trits: integer latents, integer momentum, integer second moments.

One step of one matrix, with `v` the latent (`arbs_kernels.latents`), `g` the gradient of a vote:

    u      = g / RMS, by stored row and column moments (Adafactor's factored form), clipped to [-4, 4]
    m      = beta m + (1 - beta) u                  integer momentum (`arbs_jax.rules.momentum`)
    d      = (1 - mix) m + mix u
    d      = polar factor of d                      Newton-Schulz, as in Muon; not for tables
    d      = RMS(d) sign(d) |d / RMS(d)|^power      large entries first: most steps are below one unit of v
    v     <- v + floor(-rate sigma d + dither)      sigma the spread of fresh latents
    shift <- shift - scale_rate * score             integrated log2-scale, as in `integral`

What a vote carries is integers only, so votes of micro-batches and shards add exactly: `u` as an int8 sample, the logs
of the row and column moments, the score. Floats live inside the update of one matrix.

A step on some rows of a sparse table is a step of the matrix of those rows. A row moves by the mean of the votes that
touched it, without low-rank momentum, which would be of the whole table.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from arbs_jax.errors import ConfigError
from arbs_jax.rules import planes
from arbs_jax.rules.base import Report, Votes, base_report, exp2_scale
from arbs_jax.rules.momentum import Int8Momentum, LowRankMomentum, Momentum, NoMomentum
from arbs_jax.rules.noise import dither_seed, salt_of, white, white_seed
from arbs_jax.rules.orthogonal import newton_schulz
from arbs_jax.rules.schedule import UNIT_BITS, Schedule
from arbs_jax.state import Matrix, MatrixSpec
from arbs_kernels.gradient_sample import LARGEST, STEPS, gradient_sample
from arbs_kernels.latent_step import latent_step

_FRACTION_BITS = 24
_SCORE_STEPS = 256
"""Steps per unit of the normalised score."""
_LOG_STEPS = 16
"""Steps per power of two of the stored moments."""
_TINY = 1e-30
_UNTOUCHED = np.iinfo(np.int16).min
"""Row moment of a sparse table's row that no vote has touched: its first vote's is taken as it is."""


@dataclass(frozen=True)
class Latent:
    """See the module. Named settings of it, by bits of state, are in `arbs_jax.rules.registry`."""

    planes: int = 5
    """Trit planes of a latent, 3^planes levels."""
    momentum: str = "low-rank"
    """"low-rank", "int8" or "none"."""
    rank_divisor: int = 16
    """Rank of the low-rank momentum is min(N, K) divided by this."""
    learning_rate: float = 0.08
    """Peak step of a latent, in units of the spread of fresh latents."""
    table_rate: float = 3.0
    """Multiplier of the rate for tables, whose steps are not orthogonalised and therefore smaller."""
    scale_rate: float = 0.02
    """Peak step of the log2-scale for a score of one RMS."""
    beta: float = 0.95
    """Decay of the momentum."""
    mix: float = 0.2
    """Share of the fresh sample in the step, beside the momentum."""
    moment_decay: float = 0.95
    """Decay of the row and column second moments; 0 uses this step's alone and stores none."""
    power: float = 2.0
    """Exponent of a step's entries, at constant RMS."""
    cautious: bool = False
    """Hold entries whose step disagrees in sign with the fresh sample."""
    schedule: Schedule = Schedule(final=0.0)
    """Multiplier of both rates."""
    dtype: str = "float32"
    """Of the sample, the direction and their products: "float32" or "bfloat16"."""

    probe = "gradient"
    row_leaves = ("trits", "exponent", "corr", "residual", "momentum", "row_moment")
    row_votes = ("score", "sample", "rows")

    implementation: str | None = None
    """Of the operators that sample gradients and move latents and momentum, None for the best that works."""

    def __post_init__(self) -> None:
        if not 1 <= self.planes <= 5:
            raise ConfigError(f"rule.planes must be in [1, 5], got {self.planes}")
        if self.momentum not in ("low-rank", "int8", "none"):
            raise ConfigError(f"rule.momentum must be 'low-rank', 'int8' or 'none', got {self.momentum!r}")
        if not 0 < self.learning_rate <= 4:
            raise ConfigError(f"rule.learning_rate must be in (0, 4] spreads a step, got {self.learning_rate}")
        for name in ("beta", "mix", "moment_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"rule.{name} must be in [0, 1], got {getattr(self, name)}")

    def _momentum(self, spec: MatrixSpec) -> Momentum:
        if self.momentum == "low-rank":
            return NoMomentum() if spec.sparse else LowRankMomentum(self.rank_divisor, self.implementation)
        return Int8Momentum() if self.momentum == "int8" else NoMomentum()

    def init(self, key: jax.Array, matrix: Matrix, spec: MatrixSpec) -> Matrix:
        """Redraws the trits as leading digits of fresh latents; adds `residual`, the momentum's leaves, and
        `row_moment` int16 (N,), `column_moment` int16 (K,)."""
        latents, momentum = jax.random.split(key)
        fresh = matrix | planes.init(latents, spec, self.planes) | self._momentum(spec).init(momentum, spec.shape)
        if self.moment_decay:
            fresh["row_moment"] = jnp.full((spec.out_features,), _UNTOUCHED if spec.sparse else 0, jnp.int16)
            fresh["column_moment"] = jnp.zeros((spec.in_features,), jnp.int16)
        return fresh

    def scale(self, leaves: Mapping[str, jax.Array], group_size: int) -> jax.Array:
        """Group scales, float32 (..., N, R)."""
        return exp2_scale(leaves["exponent"], leaves["corr"].astype(jnp.float32) * 2.0**-_FRACTION_BITS)

    def largest_vote(self, name: str) -> int | None:
        """That of `sample`, of which there are as many as weights."""
        return round(LARGEST * STEPS) if name == "sample" else None

    def vote(self, collected: Votes, matrix: Matrix, spec: MatrixSpec, key: jax.Array) -> Votes:
        """The gradient as integers, all int32: `sample` (N, K) in 1/31 RMS, `rows` (N,) and `columns` (K,) log2 moments
        in 1/16, `score` (N, R) in 1/256 RMS, `count` (). An all-zero or non-finite gradient is no vote at all."""
        squares = jnp.square(collected["gradient"].astype(jnp.float32))
        rows, columns = jnp.mean(squares, axis=1), jnp.mean(squares, axis=0)
        usable = (jnp.mean(rows) > 0) & jnp.isfinite(jnp.mean(rows))
        sample, agreement = gradient_sample(
            collected["gradient"],
            *_inverse_roots(rows, columns, spec),
            matrix["trits"],
            white_seed(salt_of(key), 0, jnp.int32(0)),
            group_size=spec.group_size,
            implementation=self.implementation,
        )
        mean = _mean_of_touched(jnp.square(agreement), collected)
        score = jnp.clip(agreement * jax.lax.rsqrt(mean + _TINY), -LARGEST, LARGEST)
        cast = {
            "sample": sample,
            "rows": _LOG_STEPS * jnp.log2(rows + _TINY),
            "columns": _LOG_STEPS * jnp.log2(columns + _TINY),
            "score": score * _SCORE_STEPS,
            "count": collected["count"],
        }
        return {name: jnp.where(usable, jnp.round(value), 0).astype(jnp.int32) for name, value in cast.items()}

    def update(
        self, matrix: Matrix, votes: Votes, spec: MatrixSpec, step: jax.Array, key: jax.Array
    ) -> tuple[Matrix, Report]:
        """The matrix after these votes, unchanged if there was none, and its report; see the module."""
        count = jnp.maximum(votes["count"], 1)
        multiplier = self.schedule.multiplier(step)
        peak = jnp.asarray(round(self.scale_rate * 2**_FRACTION_BITS), jnp.int64)
        rate = (multiplier * peak) >> UNIT_BITS
        pull = rate * votes["score"].astype(jnp.int64) // (_taken(votes, count).astype(jnp.int64) * _SCORE_STEPS)
        moved, counts = self._moved(matrix, votes, spec, step, salt_of(key))
        moved |= {"corr": matrix["corr"] - pull, "votes": matrix["votes"] + votes["count"].astype(jnp.int64)}
        # The latents, most of the state, stay where they are by themselves: no pass over them chooses.
        after = matrix | {
            name: new if name in ("trits", "residual") else jnp.where(votes["count"] > 0, new, matrix[name])
            for name, new in moved.items()
        }
        return after, base_report(self, matrix, after, votes, spec, counts)

    def _moved(
        self, matrix: Matrix, votes: Votes, spec: MatrixSpec, step: jax.Array, salt: jax.Array
    ) -> tuple[Matrix, jax.Array]:
        """(latents, momentum and moments after these votes, what `latent_step` counted)."""
        count = jnp.maximum(votes["count"], 1).astype(jnp.float32)
        taken = _taken(votes, count)
        u = votes["sample"].astype(jnp.float32) / (STEPS * taken)
        rows = votes["rows"].astype(jnp.float32) / (taken[:, 0] if spec.sparse else taken)
        columns = votes["columns"].astype(jnp.float32) / count
        moments: Matrix = {}
        if self.moment_decay:
            first = matrix["votes"] == 0
            row_log = self._blend(
                matrix["row_moment"], rows, matrix["row_moment"] == _UNTOUCHED if spec.sparse else first
            )
            column_log = self._blend(matrix["column_moment"], columns, first)
            of_row, of_column = _inverse_roots(_unlog(row_log), _unlog(column_log), spec)
            row_before, column_before = _inverse_roots(_unlog(rows), _unlog(columns), spec)
            u = u * ((of_row / row_before)[:, None] * (of_column / column_before)[None, :])
            u = jnp.clip(u, -LARGEST, LARGEST)
            moments = {
                "row_moment": _round_log(row_log, salt, 4, step),
                "column_moment": _round_log(column_log, salt, 5, step),
            }
        u = u.astype(self.dtype)
        d, kept = self._momentum(spec).advance(dict(matrix), u, self.beta, self.mix, salt, step)
        d = d if spec.table else newton_schulz(d)
        rms = jnp.sqrt(_mean_of_touched(jnp.square(d.astype(jnp.float32)), votes) + _TINY)
        if self.cautious:
            d = jnp.where(d * u > 0, d, 0)
        rate = self.learning_rate * (self.table_rate if spec.table else 1.0)
        rate *= self.schedule.multiplier(step).astype(jnp.float32) * 2.0**-UNIT_BITS
        none = jnp.zeros((0, *matrix["trits"].shape), jnp.uint8)
        trits, residual, counts = latent_step(
            d,
            matrix["trits"],
            matrix.get("residual", none),
            rms,
            jnp.where(votes["count"] > 0, rate * planes.spread(self.planes), 0.0),
            *dither_seed(salt, 6, step),
            power=self.power,
            implementation=self.implementation,
        )
        moved = {"trits": trits, "residual": residual} if self.planes > 1 else {"trits": trits}
        return moved | kept | moments, counts

    def _blend(self, stored: jax.Array, now: jax.Array, first: jax.Array) -> jax.Array:
        """Log2 (in 1/16) of the running mean of second moments whose logs are given."""
        mean = self.moment_decay * _unlog(stored.astype(jnp.float32)) + (1 - self.moment_decay) * _unlog(now)
        return jnp.where(first, now, _LOG_STEPS * jnp.log2(mean + _TINY))


def _unlog(log: jax.Array) -> jax.Array:
    return jnp.exp2(log / _LOG_STEPS)


def _round_log(log: jax.Array, salt: jax.Array, stream: int, step: jax.Array) -> jax.Array:
    """int16 codes, stochastically rounded so that a slow drift is not lost."""
    return jnp.floor(log + white(salt, stream, step, (1, log.shape[0]))[0]).astype(jnp.int16)


def _taken(votes: Votes, count: jax.Array) -> jax.Array:
    """Votes that a row took, at least 1, in the dtype of `count`, those of the matrix: all of them, or (N, 1) of a
    sparse table, of whose rows a vote touches some."""
    if "touched" not in votes:
        return count
    return jnp.maximum(votes["touched"], 1).astype(count.dtype)[:, None]


def _mean_of_touched(values: jax.Array, found: Votes) -> jax.Array:
    """Mean over all values (N, width), those of padding left out, which are zeros."""
    mean = jnp.mean(values)
    if "touched" not in found:
        return mean
    share = jnp.mean((found["touched"] > 0).astype(jnp.float32))
    return mean / jnp.maximum(share, 0.5 / values.shape[0])


def _inverse_roots(rows: jax.Array, columns: jax.Array, spec: MatrixSpec) -> tuple[jax.Array, jax.Array]:
    """Factors of rows (N,) and columns (K,) whose products are 1/RMS of the elements, from the mean squares of both.

    `row * column / mean` is the rank-one estimate of the elements' mean squares (Shazeer and Stern, 2018). Moments far
    below the mean are lifted to 1e-8 of it, so that dead rows stay quiet. The mean is that of the rows; of a sparse
    table, of which there are some rows here and padding, that of the columns.
    """
    mean = jnp.mean(columns if spec.sparse else rows) + _TINY
    lifted_rows, lifted_columns = rows + 1e-8 * mean, columns + 1e-8 * mean
    return jax.lax.rsqrt(lifted_rows / mean), jax.lax.rsqrt(lifted_columns)
