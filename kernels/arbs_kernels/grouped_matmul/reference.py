"""Grouped products in plain XLA: a loop over blocks of rows of one expert, decoded as its turn comes.

`jax.lax.ragged_dot` would be shorter, but XLA expands it to X masked products, on CPUs and GPUs alike: X times the
operations, and temporaries of X times the activations beside all experts' dense weights. Here every row is multiplied
once (but for the last block of an expert, which is padded), and one expert's weight is dense at a time.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from arbs_kernels.correlation_score.reference import score_of_gradient, weight_gradient
from arbs_kernels.packed_matmul import reference as matmul
from arbs_kernels.shapes import group_count

BLOCK = 256
"""Rows multiplied at a time: enough that decoding the weight for them is a small part of it."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Blocks:
    """Where the blocks of experts begin; those of an expert follow one another."""

    first_row: jax.Array
    """int32 (X,), of each expert."""
    end_row: jax.Array
    """int32 (X,), past the last row of each expert."""
    end_block: jax.Array
    """int32 (X,), past the last block of each expert."""

    def at(self, block: jax.Array, size: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """(expert, first row, boolean (size,): which rows are the expert's, whether it is the expert's first block)."""
        expert = jnp.searchsorted(self.end_block, block, side="right").astype(jnp.int32)
        before = jnp.where(expert > 0, self.end_block[jnp.maximum(expert - 1, 0)], 0)
        row = self.first_row[expert] + (block - before) * size
        return expert, row, row + jnp.arange(size, dtype=jnp.int32) < self.end_row[expert], block == before


def _blocks(group_sizes: jax.Array, rows: int, size: int) -> _Blocks:
    end = jnp.minimum(jnp.cumsum(group_sizes, dtype=jnp.int32), rows)
    first = jnp.concatenate([jnp.zeros((1,), jnp.int32), end[:-1]])
    return _Blocks(first, end, jnp.cumsum(-((first - end) // size), dtype=jnp.int32))


def _padded(values: jax.Array, size: int) -> jax.Array:
    """With `size` more rows, so that a block that begins at any row is whole."""
    return jnp.pad(values, ((0, size), (0, 0)))


def _block_of(values: jax.Array, row: jax.Array, inside: jax.Array) -> jax.Array:
    taken = jax.lax.dynamic_slice_in_dim(values, row, inside.shape[0])
    return jnp.where(inside[:, None], taken, jnp.zeros((), values.dtype))


def _products(
    rows: jax.Array, group_sizes: jax.Array, width: int, product: Callable[[jax.Array, jax.Array], jax.Array]
) -> jax.Array:
    """`product(block, expert)` of every block, `(M, width)`; other experts' rows are zeros in it.

    A block's rows past its expert's end become 0 and are written again by the blocks that follow.
    """
    size = max(1, min(BLOCK, rows.shape[0]))
    blocks, padded = _blocks(group_sizes, rows.shape[0], size), _padded(rows, size)

    def step(block: jax.Array, result: jax.Array) -> jax.Array:
        expert, row, inside, _ = blocks.at(block, size)
        return jax.lax.dynamic_update_slice_in_dim(result, product(_block_of(padded, row, inside), expert), row, 0)

    empty = jnp.zeros((rows.shape[0] + size, width), rows.dtype)
    return jax.lax.fori_loop(jnp.int32(0), blocks.end_block[-1], step, empty)[: rows.shape[0]]


def forward(x: jax.Array, group_sizes: jax.Array, trits: jax.Array, scale: jax.Array, *, group_size: int) -> jax.Array:
    """See `api.grouped_matmul`."""

    def product(block: jax.Array, expert: jax.Array) -> jax.Array:
        return matmul.forward(block, trits[expert], scale[expert], group_size=group_size)

    return _products(x, group_sizes, trits.shape[1], product)


def input_gradient(
    dy: jax.Array, group_sizes: jax.Array, trits: jax.Array, scale: jax.Array, *, in_features: int, group_size: int
) -> jax.Array:
    """See `api.grouped_matmul_input_gradient`."""

    def product(block: jax.Array, expert: jax.Array) -> jax.Array:
        return matmul.input_gradient(
            block, trits[expert], scale[expert], in_features=in_features, group_size=group_size
        )

    return _products(dy, group_sizes, in_features, product)


def score(x: jax.Array, dy: jax.Array, group_sizes: jax.Array, trits: jax.Array, *, group_size: int) -> jax.Array:
    """See `api.grouped_score`: one expert's dW at a time, in float32, summed over its blocks."""
    scores = jnp.zeros((*trits.shape[:2], group_count(x.shape[1], group_size)), jnp.int32)

    def score_of(dw: jax.Array, expert: jax.Array) -> jax.Array:
        return score_of_gradient(dw, trits[expert], group_size=group_size)

    return _of_gradients(x, dy, group_sizes, scores, score_of)


def weight_gradients(x: jax.Array, dy: jax.Array, group_sizes: jax.Array, *, dtype: jnp.dtype) -> jax.Array:
    """See `api.grouped_weight_gradient`: one expert's sum at a time, in float32."""
    gradients = jnp.zeros((group_sizes.shape[0], dy.shape[1], x.shape[1]), dtype)
    return _of_gradients(x, dy, group_sizes, gradients, lambda dw, expert: dw.astype(dtype))


def _of_gradients(
    x: jax.Array,
    dy: jax.Array,
    group_sizes: jax.Array,
    result: jax.Array,
    entry: Callable[[jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    """`result` (X, ...) with `entry(dW, expert)` of every expert that has rows."""
    size = max(1, min(BLOCK, x.shape[0]))
    blocks = _blocks(group_sizes, x.shape[0], size)
    padded_x, padded_dy = _padded(x, size), _padded(dy, size)

    def step(block: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        dw, result = carry
        expert, row, inside, is_first = blocks.at(block, size)
        new = weight_gradient(_block_of(padded_x, row, inside), _block_of(padded_dy, row, inside))
        dw = jnp.where(is_first, new, dw + new)
        # Of an expert's blocks the last one writes what stays.
        return dw, result.at[expert].set(entry(dw, expert))

    zeros = jnp.zeros((dy.shape[1], x.shape[1]), jnp.float32)
    return jax.lax.fori_loop(jnp.int32(0), blocks.end_block[-1], step, (zeros, result))[1]
