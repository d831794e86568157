"""Which rows of a codebook are used, and new rows in place of those that are not.

Usage is four bytes a row, int16 (N, 2): a count of uses and the epoch it was written in, `revive_after` steps each. A
count halves with every epoch, but only when its row is looked at again: what it is worth now follows from its epoch. So
a step touches the rows it used and no others. Rows are born with one use, and are dead once theirs have come down to 0:
a row of c uses lives on for `floor(log2 c) + 1` epochs without another.

Both numbers lie in one array, lest one be overwritten before the other is made from it and the compiler copy it whole.
"""

import jax
import jax.numpy as jnp
import numpy as np

from arbs_jax.layers import TernaryConfig
from arbs_jax.models.arb.search import candidate_rows
from arbs_jax.models.arb.vq import INPUT_STEPS, VQConfig
from arbs_jax.rules.noise import salt_of
from arbs_jax.state import Matrix, MatrixSpec, init_matrix
from arbs_jax.tables import put_back
from arbs_kernels.latents import encode, half_range, zero_half_range
from arbs_kernels.noise import GOLDEN, mix
from arbs_kernels.row_update import put_rows, rows_of, unique_rows

MOST_USES = 32767
_WINDOW = 256
"""Rows looked at for each input where every row of the book is compared anyway."""

Usage = jax.Array


def empty_usage(config: VQConfig) -> Usage:
    """The usage of a fresh book, at step 0."""
    return jnp.broadcast_to(jnp.asarray([1, 0], jnp.int16), (config.rows, 2))


def observe_usage(usage: Usage, ids: jax.Array, step: jax.Array, config: VQConfig) -> Usage:
    """Counts the rows `ids` (integers of any shape), each as often as it comes, up to 32767.

    The result does not depend on the order of the ids; those outside the book count nothing.
    """
    flat = jnp.where((ids >= 0) & (ids < config.rows), ids, config.rows).reshape(-1)
    rows, place = unique_rows(flat, table_rows=config.rows)
    times = jnp.zeros(rows.shape, jnp.int32).at[place].add(1, mode="drop")
    count = jnp.minimum(_worth(rows_of(usage, rows), step, config) + times, MOST_USES)
    return _written(usage, rows, count, step, config)


def observe_vq(
    leaves: Matrix,
    usage: Usage,
    events: dict[str, jax.Array],
    step: jax.Array,
    key: jax.Array,
    config: VQConfig,
    ternary: TernaryConfig,
) -> tuple[Matrix, Usage]:
    """(leaves, usage) after what `vq_events` told of one or more lookups, stacked on any leading axes: what was used is
    counted, then dead rows are redrawn. See `observe_usage` and `revive`."""
    usage = observe_usage(usage, events["ids"], step, config)
    inputs_WxK = events["inputs"].reshape(-1, config.dim)
    return revive(leaves, usage, inputs_WxK, step, key, config, ternary)


def dead(usage: Usage, ids: jax.Array, step: jax.Array, config: VQConfig) -> jax.Array:
    """Whether the uses of rows `ids` (integers in range, any shape) have come down to 0; bool of their shape."""
    return (_worth(rows_of(usage, ids.reshape(-1)), step, config) == 0).reshape(ids.shape)


def revive(
    leaves: Matrix,
    usage: Usage,
    inputs_WxK: jax.Array,
    step: jax.Array,
    key: jax.Array,
    config: VQConfig,
    ternary: TernaryConfig,
) -> tuple[Matrix, Usage]:
    """(leaves, usage) with dead rows redrawn at inputs that were far from every row; integers in and out, in place
    where they are donated.

    Each input takes the first dead row among those it looks at: its candidates, the likeliest first, so that the row
    lives as near to its own signs as may be; or, of a book that is searched whole, a window that begins at a hash of
    (key, step, input). Of two inputs that choose one row, the first has it. Inputs that repeat an earlier one or are
    all zeros take none.

    Args:
        leaves: the book's, all of them.
        usage: its usage.
        inputs_WxK: int8, as `vq_events` gives them: few, for they are compared with one another.
        step: int32 ().
        key: of the run; the same on every step.
        config: the book's.
        ternary: the configuration that drew the leaves; a redrawn row is as fresh as its first.
    """
    salt = mix(salt_of(key) ^ mix(jnp.asarray(step).astype(jnp.uint32)))
    looked_at_WxC = _looked_at(inputs_WxK, salt, config)
    dead_WxC = dead(usage, looked_at_WxC, step, config)
    first_dead_W = jnp.argmax(dead_WxC, axis=-1)
    chosen_W = jnp.take_along_axis(looked_at_WxC, first_dead_W[:, None], axis=-1)[:, 0]
    same_row = chosen_W[:, None] == chosen_W[None, :]
    same_input = jnp.all(inputs_WxK[:, None] == inputs_WxK[None, :], axis=-1)
    wanted_W = jnp.any(dead_WxC, axis=-1) & jnp.any(inputs_WxK != 0, axis=-1) & ~_any_before(same_input)
    takes_W = wanted_W & ~_any_before(same_row & wanted_W[None, :])
    rows = jnp.where(takes_W, chosen_W, config.rows)
    leaves = _redrawn(leaves, rows, inputs_WxK, jax.random.fold_in(key, step), config, ternary)
    return leaves, _written(usage, rows, jnp.ones(rows.shape, jnp.int32), step, config)


def _epoch(step: jax.Array, config: VQConfig) -> jax.Array:
    return (jnp.asarray(step, jnp.int32) // config.revive_after).astype(jnp.int16)


def _worth(own: Usage, step: jax.Array, config: VQConfig) -> jax.Array:
    """int32 (U,): counts of rows (U, 2) after the epochs since they were written, which wrap around after 65,536."""
    age = jax.lax.bitcast_convert_type(_epoch(step, config) - own[:, 1], jnp.uint16)
    return own[:, 0].astype(jnp.int32) >> jnp.minimum(age, 15).astype(jnp.int32)


def _written(usage: Usage, rows: jax.Array, count: jax.Array, step: jax.Array, config: VQConfig) -> Usage:
    now = jnp.full(count.shape, _epoch(step, config), jnp.int16)
    return put_rows(usage, rows, jnp.stack([count.astype(jnp.int16), now], axis=-1))


def _looked_at(inputs_WxK: jax.Array, salt: jax.Array, config: VQConfig) -> jax.Array:
    """Ids int32 (W, C)."""
    if not config.exact:
        return candidate_rows(inputs_WxK.astype(jnp.float32), config.runs, config.blocks)
    inputs = jnp.arange(inputs_WxK.shape[0], dtype=jnp.uint32)
    start = (mix(inputs * GOLDEN ^ salt) % np.uint32(config.rows)).astype(jnp.int32)
    window = jnp.arange(min(_WINDOW, config.rows), dtype=jnp.int32)
    return (start[:, None] + window) % config.rows


def _any_before(pairs: jax.Array) -> jax.Array:
    """For each entry (W,) whether it is paired, in (W, W), with one before it."""
    return jnp.any(jnp.tril(pairs, k=-1), axis=-1)


def _redrawn(
    leaves: Matrix,
    rows: jax.Array,
    inputs_WxK: jax.Array,
    key: jax.Array,
    config: VQConfig,
    ternary: TernaryConfig,
) -> Matrix:
    """The leaves with rows (W,) fresh but for their trits and residuals, which are those of the inputs."""
    spec = MatrixSpec(rows.shape[0], config.dim, ternary.group_size, fan_in=1, table=True, sparse=True)
    base, own = jax.random.split(key)
    fresh = ternary.rule.init(own, init_matrix(base, spec, ternary.init), spec)
    planes = 1 + (fresh["residual"].shape[0] if "residual" in fresh else 0)
    # An input of one root mean square is a latent of the standard spread, 3^(planes - 1): rounded, in integers.
    spread = 2 * zero_half_range(planes) + 1
    v = (inputs_WxK.astype(jnp.int32) * (2 * spread) + INPUT_STEPS) // (2 * INPUT_STEPS)
    fresh |= encode(jnp.clip(v, -half_range(planes), half_range(planes)), planes)
    per_row = {name: leaf for name, leaf in fresh.items() if name in ternary.rule.row_leaves}
    return put_back(ternary.rule, leaves, rows, per_row)
