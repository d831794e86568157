"""Newton-Schulz iterations on Gram matrices by a Triton kernel: one matrix a program, which never leaves the chip.

As operations of XLA they are forty of two microseconds each, most of that waiting. Products of float32 are three of
tf32 here, by the tensor cores, and as exact to a roundoff or two.
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from arbs_kernels.gram_newton_schulz.api import MOST_TRITON
from arbs_kernels.gram_newton_schulz.reference import TINY, Coefficients
from arbs_kernels.selection import UnsupportedError
from arbs_kernels.triton_launch import in_one_launch, launch


@triton.jit
def _product(a, b):
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def _iterations(
    gram_ptr,
    coefficients_ptr,
    factor_out,
    R: tl.constexpr,
    COUNT: tl.constexpr,
    RIDGE: tl.constexpr,
    TINY: tl.constexpr,
    SIZE: tl.constexpr,
):
    at = tl.arange(0, SIZE)
    i, j = at[:, None], at[None, :]
    start = tl.program_id(0).to(tl.int64) * (R * R)
    inside = (i < R) & (j < R)
    gram = tl.load(gram_ptr + start + i * R + j, mask=inside, other=0.0)
    scale = tl.full((SIZE,), 1.0, tl.float32)
    if RIDGE > 0:
        diagonal = tl.where(i == j, gram, 0.0)
        unit = 1 / tl.sqrt(tl.sum(diagonal, axis=1) + TINY)
        gram *= unit[:, None] * (1 / tl.sqrt(tl.sum(diagonal, axis=0) + TINY))[None, :]
        norm = tl.sqrt(tl.sum(tl.sum(gram * gram, axis=1), axis=0))
        bound = tl.minimum(1 / (norm + TINY), 1.0)
        gram = gram * bound + tl.where(i == j, RIDGE, 0.0)
        scale = unit * tl.sqrt(bound)
    total = tl.where(i == j, 1.0, 0.0)
    for n in tl.static_range(COUNT):
        a = tl.load(coefficients_ptr + 3 * n)
        b = tl.load(coefficients_ptr + 3 * n + 1)
        c = tl.load(coefficients_ptr + 3 * n + 2)
        polynomial = tl.where(i == j, a, 0.0) + b * gram + c * _product(gram, gram)
        total = polynomial if n == 0 else _product(polynomial, total)
        if n + 1 < COUNT:
            gram = _product(_product(polynomial, gram), polynomial)
    tl.store(factor_out + start + i * R + j, scale[:, None] * total, mask=inside)


def iterate(gram: jax.Array, *, coefficients: Coefficients, ridge: float) -> jax.Array:
    """See `api.gram_newton_schulz`."""
    if gram.shape[0] > MOST_TRITON:
        raise UnsupportedError(
            f"gram_newton_schulz: implementation 'triton' takes at most {MOST_TRITON} columns, got {gram.shape[0]}; "
            "pass 'xla'"
        )
    return in_one_launch(_launched, gram, coefficients=coefficients, ridge=ridge)


def _launched(stack: jax.Array, *, coefficients: Coefficients, ridge: float) -> jax.Array:
    count, R, _ = stack.shape
    return launch(
        _iterations,
        stack,
        jnp.asarray(coefficients, jnp.float32),
        out=jax.ShapeDtypeStruct(stack.shape, jnp.float32),
        num_warps=4,
        num_stages=1,
        grid=(count,),
        R=R,
        COUNT=len(coefficients),
        RIDGE=ridge,
        TINY=TINY,
        SIZE=max(16, triton.next_power_of_2(R)),
    )
