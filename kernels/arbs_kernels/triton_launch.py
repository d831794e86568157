"""Launching Triton kernels from JAX, for every version of jax-triton: what the backend's operators share.

Importing this module needs neither triton nor jax-triton. A kernel takes its arrays first, then a pointer to its
result, then constants only: shapes are compiled in, which tells the compiler how rows are aligned.
"""

import importlib
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from arbs_kernels.selection import UnsupportedError

LARGEST_OFFSET = 2**31 - 1
"""Kernels address what they read with 32 bits."""


def lazily(module: str, name: str) -> Callable[..., jax.Array]:
    """The function `name` of `module`, which is imported at the first call: it needs triton."""

    def run(*args: Any, **kwargs: Any) -> jax.Array:
        return getattr(importlib.import_module(module), name)(*args, **kwargs)

    return run


def launch(
    kernel: Any,
    *arrays: jax.Array,
    out: jax.ShapeDtypeStruct | tuple[jax.ShapeDtypeStruct, ...],
    grid: tuple[int, ...],
    num_warps: int,
    num_stages: int,
    **constants: int | float | bool | str,
) -> Any:
    """Runs `kernel` over `grid`; results, nested like `out`, are not initialised."""
    import jax_triton

    # jax-triton 0.4 renamed the results. The compiler behind it stops fusing multiplications with additions by default.
    renamed = "out_type" in inspect.signature(jax_triton.triton_call).parameters
    named = {"out_type": out, "backend_options": {"enable_fp_fusion": True}} if renamed else {"out_shape": out}
    return jax_triton.triton_call(
        *arrays,
        kernel=kernel,
        grid=grid,
        num_warps=num_warps,
        num_stages=num_stages,
        **named,
        **constants,
    )


def one_by_one(function: Callable[..., jax.Array], *arrays: jax.Array, **static: Any) -> jax.Array:
    """`function(*arrays, **static)`; under `vmap` it runs once for every mapped element, for kernels map nothing."""
    return jax.custom_batching.sequential_vmap(partial(function, **static))(*arrays)


def check_size(operator: str, name: str, array: jax.Array | jax.ShapeDtypeStruct) -> None:
    """Checks that 32 bits address `array`.

    Raises:
        UnsupportedError: they do not.
    """
    if array.size > LARGEST_OFFSET:
        raise UnsupportedError(
            f"{operator}: implementation 'triton' takes at most {LARGEST_OFFSET} elements of {name}, "
            f"got {array.size} {array.shape}; pass 'xla'"
        )
