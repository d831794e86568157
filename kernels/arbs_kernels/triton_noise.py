"""Rounding noise (`arbs_kernels.noise`) inside Triton kernels, bit for bit the same."""

import triton
import triton.language as tl

from arbs_kernels import noise

_FIRST_FACTOR, _SECOND_FACTOR = tl.constexpr(int(noise.FIRST_FACTOR)), tl.constexpr(int(noise.SECOND_FACTOR))
_COLUMN_STRIDE = tl.constexpr(int(noise.COLUMN_STRIDE))


@triton.jit
def _mix(bits):
    bits = (bits ^ (bits >> 16)) * tl.full((), _FIRST_FACTOR, tl.uint32)
    bits = (bits ^ (bits >> 15)) * tl.full((), _SECOND_FACTOR, tl.uint32)
    return bits ^ (bits >> 16)


@triton.jit
def of_rows(rows, seed):
    """A hash of the seed uint32 and of rows."""
    return _mix(rows.to(tl.uint32) ^ seed)


@triton.jit
def of_columns(row_hash, columns):
    """What `noise.positions` gives, from the hash of a row."""
    return _mix(row_hash + columns.to(tl.uint32) * tl.full((), _COLUMN_STRIDE, tl.uint32))


@triton.jit
def unit(bits):
    """Uniform float32 in [0, 1) of uint32."""
    return (bits >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08
