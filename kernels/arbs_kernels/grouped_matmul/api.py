"""`y = x W_e^T`, its gradients and its score, where consecutive runs of rows belong to experts `e`.

`group_sizes int32 (X,)` says how many rows each of the X experts has, in order; they are not negative. Rows past their
sum belong to no expert: their results are 0 and they vote for nothing. Where the sum exceeds M, the rows that are there
are taken.
"""

from typing import cast

import jax
import jax.numpy as jnp

from arbs_kernels.backends import triton_missing
from arbs_kernels.grouped_matmul import reference
from arbs_kernels.selection import Implementation, select
from arbs_kernels.shapes import check_activations, check_matrix, check_pair, check_trits
from arbs_kernels.triton_launch import lazily
from arbs_kernels.tuning import tuned

FORWARD = {
    "xla": Implementation(reference.forward),
    "triton": Implementation(lazily("arbs_kernels.grouped_matmul.triton", "forward"), triton_missing),
}
INPUT_GRADIENT = {
    "xla": Implementation(reference.input_gradient),
    "triton": Implementation(lazily("arbs_kernels.grouped_matmul.triton", "input_gradient"), triton_missing),
}
SCORE = {
    "xla": Implementation(reference.score),
    "triton": Implementation(lazily("arbs_kernels.grouped_matmul.triton", "score"), triton_missing),
}
WEIGHT_GRADIENT = {
    "xla": Implementation(reference.weight_gradients),
    "triton": Implementation(lazily("arbs_kernels.grouped_matmul.triton_gradient", "weight_gradients"), triton_missing),
}


def grouped_matmul(
    x: jax.Array,
    group_sizes: jax.Array,
    trits: jax.Array,
    scale: jax.Array,
    *,
    group_size: int,
    implementation: str | None = None,
) -> jax.Array:
    """Product of every row with the transposed weight of its expert.

    Args:
        x: activations `(M, K)` sorted by expert, float32 or bfloat16.
        group_sizes: `int32 (X,)`, rows of each expert.
        trits: `uint8 (X, N, P)`.
        scale: `float32 (X, N, ceil(K/group_size))`.
        group_size: columns that share one scale.
        implementation: "xla", "triton", or None for the best that works here.

    Returns:
        `(M, N)` in the dtype of `x`, accumulated in float32.

    Raises:
        ValueError: shapes or dtypes do not fit. UnsupportedError: no such implementation.
    """
    select("grouped_matmul", FORWARD, implementation)  # a wrong name is said first
    check_activations("grouped_matmul", "x", x, x.shape[-1])
    one = _one_expert("grouped_matmul", group_sizes, trits)
    check_matrix("grouped_matmul", one, _of_one("grouped_matmul", "scale", scale, trits), x.shape[1], group_size)
    shape = (x.shape[0], trits.shape[1], x.shape[1], group_size)
    run = tuned("grouped_matmul", FORWARD, implementation, shape, x.dtype)
    return run(x, group_sizes, trits, scale, group_size=group_size)


def grouped_matmul_input_gradient(
    dy: jax.Array,
    group_sizes: jax.Array,
    trits: jax.Array,
    scale: jax.Array,
    *,
    in_features: int,
    group_size: int,
    implementation: str | None = None,
) -> jax.Array:
    """Gradient of `grouped_matmul` in its activations.

    Args:
        dy: cotangent `(M, N)`, float32 or bfloat16.
        group_sizes: `int32 (X,)`, rows of each expert.
        trits: `uint8 (X, N, P)`.
        scale: `float32 (X, N, ceil(K/group_size))`.
        in_features: `K`, which the packed shape does not determine.
        group_size: columns that share one scale.
        implementation: "xla", "triton", or None for the best that works here.

    Returns:
        `(M, K)` in the dtype of `dy`, accumulated in float32.

    Raises:
        ValueError: shapes or dtypes do not fit. UnsupportedError: no such implementation.
    """
    operator = "grouped_matmul_input_gradient"
    select(operator, INPUT_GRADIENT, implementation)
    one = _one_expert(operator, group_sizes, trits)
    check_matrix(operator, one, _of_one(operator, "scale", scale, trits), in_features, group_size)
    check_activations(operator, "dy", dy, trits.shape[1])
    shape = (dy.shape[0], trits.shape[1], in_features, group_size)
    run = tuned(operator, INPUT_GRADIENT, implementation, shape, dy.dtype)
    return run(dy, group_sizes, trits, scale, in_features=in_features, group_size=group_size)


def grouped_score(
    x: jax.Array,
    dy: jax.Array,
    group_sizes: jax.Array,
    trits: jax.Array,
    *,
    group_size: int,
    implementation: str | None = None,
) -> jax.Array:
    """`correlation_score` of every expert over its own rows; 0 for an expert without rows.

    Args:
        x: activations `(M, K)`, float32 or bfloat16.
        dy: cotangent of the outputs `(M, N)`, same dtype as `x`.
        group_sizes: `int32 (X,)`, rows of each expert.
        trits: `uint8 (X, N, P)`.
        group_size: columns that share one scale.
        implementation: "xla", "triton", or None for the best that works here.

    Returns:
        `int32 (X, N, ceil(K/group_size))`, each in `[-group_size, group_size]`.

    Raises:
        ValueError: shapes or dtypes do not fit. UnsupportedError: no such implementation.
    """
    select("grouped_score", SCORE, implementation)
    check_activations("grouped_score", "x", x, x.shape[-1])
    one = _one_expert("grouped_score", group_sizes, trits)
    check_activations("grouped_score", "dy", dy, trits.shape[1])
    check_pair("grouped_score", x, dy)
    check_trits("grouped_score", one, x.shape[1], group_size)
    shape = (x.shape[0], trits.shape[1], x.shape[1], group_size)
    run = tuned("grouped_score", SCORE, implementation, shape, x.dtype)
    return run(x, dy, group_sizes, trits, group_size=group_size)


def grouped_weight_gradient(
    x: jax.Array,
    dy: jax.Array,
    group_sizes: jax.Array,
    *,
    dtype: jnp.dtype = jnp.float32,
    implementation: str | None = None,
) -> jax.Array:
    """`dW = dy^T x` of every expert over its own rows; 0 for an expert without rows.

    Args:
        x: activations `(M, K)`, float32 or bfloat16.
        dy: cotangent of the outputs `(M, N)`, same dtype as `x`.
        group_sizes: `int32 (X,)`, rows of each expert.
        dtype: of the result; sums are float32.
        implementation: "xla", "triton", or None for the best that works here.

    Returns:
        `(X, N, K)` in `dtype`.

    Raises:
        ValueError: shapes or dtypes do not fit. UnsupportedError: no such implementation.
    """
    operator = "grouped_weight_gradient"
    select(operator, WEIGHT_GRADIENT, implementation)
    check_activations(operator, "x", x, x.shape[-1])
    check_activations(operator, "dy", dy, dy.shape[-1])
    check_pair(operator, x, dy)
    _check_sizes(operator, group_sizes)
    shape = (x.shape[0], dy.shape[1], x.shape[1], 1)
    return tuned(operator, WEIGHT_GRADIENT, implementation, shape, x.dtype)(x, dy, group_sizes, dtype=dtype)


def _one_expert(operator: str, group_sizes: jax.Array, trits: jax.Array) -> jax.Array:
    """The trits of one expert when the numbers of experts agree: a shape and a dtype only, for checks."""
    _check_sizes(operator, group_sizes)
    if trits.ndim != 3 or trits.shape[0] != group_sizes.shape[0] or trits.shape[0] < 1:
        raise ValueError(
            f"{operator}: trits must be uint8 (X, N, P) with an expert for each of the {group_sizes.shape[0]} "
            f"group_sizes, got {trits.dtype} {trits.shape}"
        )
    return cast(jax.Array, jax.ShapeDtypeStruct(trits.shape[1:], trits.dtype))


def _check_sizes(operator: str, group_sizes: jax.Array) -> None:
    if group_sizes.ndim != 1 or group_sizes.dtype != jnp.int32:
        raise ValueError(f"{operator}: group_sizes must be int32 (X,), got {group_sizes.dtype} {group_sizes.shape}")


def _of_one(operator: str, name: str, array: jax.Array, trits: jax.Array) -> jax.Array:
    if array.ndim != 3 or array.shape[0] != trits.shape[0]:
        raise ValueError(f"{operator}: {name} must have {trits.shape[0]} experts on three axes, got {array.shape}")
    return cast(jax.Array, jax.ShapeDtypeStruct(array.shape[1:], array.dtype))
