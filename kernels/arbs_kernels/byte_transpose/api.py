"""The transposed matrix of numbers of one byte, for products whose operands must end with the axis they sum over."""

import jax

from arbs_kernels.backends import triton_missing
from arbs_kernels.byte_transpose import reference
from arbs_kernels.selection import Implementation, select
from arbs_kernels.triton_launch import lazily

TRANSPOSE = {
    "xla": Implementation(reference.transposed),
    "triton": Implementation(lazily("arbs_kernels.byte_transpose.triton", "transposed"), triton_missing),
}


def byte_transpose(values: jax.Array, *, implementation: str | None = None) -> jax.Array:
    """`values^T`, written out; under `vmap` all matrices go in one launch.

    Args:
        values: `(M, C)` of a dtype of one byte, such as float8 or int8.
        implementation: "xla", "triton", or None for the best that works here.

    Returns:
        `(C, M)` in the dtype of `values`.

    Raises:
        ValueError: not a matrix of bytes. UnsupportedError: no such implementation.
    """
    run = select("byte_transpose", TRANSPOSE, implementation, ("triton",))
    if values.ndim != 2 or values.dtype.itemsize != 1:
        raise ValueError(
            f"byte_transpose: values must be (M, C) of a dtype of one byte, got {values.dtype} {values.shape}"
        )
    return run(values)
