"""Shape arithmetic and the checks that every operator makes before it launches anything."""

import jax
import jax.numpy as jnp

from arbs_kernels.codec import packed_width

GROUP_SIZES = (4, 6, 8, 12, 16, 32, 64, 96, 128, 256)


def group_count(in_features: int, group_size: int) -> int:
    """Groups in a row, `R = ceil(K/G)`; groups never cross rows and the last may be short."""
    return -(-in_features // group_size)


def check_trits(operator: str, trits: jax.Array, in_features: int, group_size: int) -> None:
    """Checks `trits uint8 (N, P)` against the logical width, and the group size.

    Raises:
        ValueError: a dtype, shape or size does not fit; the message holds both values.
    """
    if group_size not in GROUP_SIZES:
        raise ValueError(f"{operator}: group_size must be one of {GROUP_SIZES}, got {group_size}")
    if in_features < 1:
        raise ValueError(f"{operator}: in_features must be at least 1, got {in_features}")
    if trits.dtype != jnp.uint8 or trits.ndim != 2 or trits.shape[1] != packed_width(in_features):
        raise ValueError(
            f"{operator}: trits must be uint8 (N, {packed_width(in_features)}) for in_features={in_features}, "
            f"got {trits.dtype} {trits.shape}"
        )


def check_matrix(operator: str, trits: jax.Array, scale: jax.Array, in_features: int, group_size: int) -> None:
    """`check_trits`, and `scale float32 (N, R)` as well.

    Raises:
        ValueError: a dtype, shape or size does not fit; the message holds both values.
    """
    check_trits(operator, trits, in_features, group_size)
    expected = (trits.shape[0], group_count(in_features, group_size))
    if scale.dtype != jnp.float32 or scale.shape != expected:
        raise ValueError(f"{operator}: scale must be float32 {expected}, got {scale.dtype} {scale.shape}")


def check_pair(operator: str, x: jax.Array, dy: jax.Array) -> None:
    """Checks that activations `x` and a cotangent `dy` can make a weight gradient.

    Raises:
        ValueError: they differ in rows or dtype; the message holds both values.
    """
    if x.shape[0] != dy.shape[0] or x.dtype != dy.dtype:
        raise ValueError(
            f"{operator}: x and dy must agree in rows and dtype, got {x.dtype} {x.shape} and {dy.dtype} {dy.shape}"
        )


def check_activations(operator: str, name: str, value: jax.Array, width: int) -> None:
    """Checks one activation matrix `(M, width)` in float32 or bfloat16.

    Raises:
        ValueError: rank, width or dtype does not fit; the message holds both values.
    """
    if value.ndim != 2 or value.shape[1] != width:
        raise ValueError(f"{operator}: {name} must have shape (M, {width}), got {value.shape}")
    if value.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"{operator}: {name} must be float32 or bfloat16, got {value.dtype}")
