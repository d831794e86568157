"""A sample of a gradient by a Triton kernel: the gradient is read once, where its entries meet their trits."""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from arbs_kernels.gradient_sample import reference
from arbs_kernels.packed_decode.triton import power_of_plane, trit_of
from arbs_kernels.shapes import group_count
from arbs_kernels.triton_launch import in_one_launch, launch
from arbs_kernels.triton_noise import of_columns, of_rows, unit

_LARGEST, _STEPS = tl.constexpr(reference.LARGEST), tl.constexpr(reference.STEPS)
_ELEMENTS = 2048
"""Of a program."""


@triton.jit
def _sample(
    gradient_ptr,
    rows_ptr,
    columns_ptr,
    trits_ptr,
    seed_ptr,
    sample_out,
    agreement_out,
    N: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
    ROWS: tl.constexpr,
    SPAN: tl.constexpr,
):
    """One group of some rows; SPAN is G up to a power of two."""
    matrix = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(1)
    columns = group * G + tl.arange(0, SPAN)
    own = (columns < K) & (tl.arange(0, SPAN) < G)
    inside = (rows < N)[:, None] & own[None, :]
    place = matrix * (N * K) + rows.to(tl.int64)[:, None] * K + columns[None, :]
    g = tl.load(gradient_ptr + place, mask=inside, other=0.0).to(tl.float32)
    row_factor = tl.load(rows_ptr + matrix * N + rows, mask=rows < N, other=0.0)
    column_factor = tl.load(columns_ptr + matrix * K + columns, mask=own, other=0.0)
    u = g * (row_factor[:, None] * column_factor[None, :])
    u = tl.minimum(tl.maximum(u, -_LARGEST), _LARGEST)
    noise = unit(of_columns(of_rows(rows, tl.load(seed_ptr + matrix))[:, None], columns[None, :]))
    tl.store(sample_out + place, tl.floor(u * _STEPS + noise).to(tl.int8), mask=inside)

    plane = columns // P
    codes_at = matrix * (N * P) + rows.to(tl.int64)[:, None] * P + (columns - plane * P)[None, :]
    codes = tl.load(trits_ptr + codes_at, mask=inside, other=0)
    agreement = tl.sum(g * trit_of(codes, power_of_plane(plane)[None, :]).to(tl.float32), axis=1)
    tl.store(agreement_out + matrix * (N * R) + rows.to(tl.int64) * R + group, agreement, mask=rows < N)


def sample(
    gradient: jax.Array, rows: jax.Array, columns: jax.Array, trits: jax.Array, seed: jax.Array, *, group_size: int
) -> tuple[jax.Array, jax.Array]:
    """See `api.gradient_sample`."""
    return in_one_launch(_launched, gradient, rows, columns, trits, seed, group_size=group_size)


def _launched(gradient, rows, columns, trits, seed, *, group_size: int):
    stack, N, K = gradient.shape
    span = triton.next_power_of_2(group_size)
    height = max(1, _ELEMENTS // span)
    R = group_count(K, group_size)
    return launch(
        _sample,
        gradient,
        rows,
        columns,
        trits,
        seed,
        out=(jax.ShapeDtypeStruct(gradient.shape, jnp.int8), jax.ShapeDtypeStruct((stack, N, R), jnp.float32)),
        num_warps=4,
        num_stages=1,
        grid=(triton.cdiv(N, height), R, stack),
        N=N,
        K=K,
        P=trits.shape[-1],
        R=R,
        G=group_size,
        ROWS=height,
        SPAN=span,
    )
