"""Launching Triton kernels from JAX as XLA launches its own: what the backend's operators share.

Triton compiles a kernel to PTX while JAX traces (and keeps it on disk, by its source); XLA takes the PTX as a kernel of
the program, which it launches in command buffers beside those that it made itself. Importing this module does not need
triton. A kernel takes its arrays first, then pointers to its results, then constants only: shapes are compiled in,
which tells the compiler how rows are aligned.
"""

import functools
import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from arbs_kernels.backends import compute_capability
from arbs_kernels.selection import UnsupportedError

LARGEST_OFFSET = 2**31 - 1
"""Kernels address what they read with 32 bits."""

_TARGET = "__gpu$xla.gpu.ptx"
"""XLA's name for a call of a kernel given as PTX."""
_MOST_STATIC = 48 * 1024
"""Bytes of shared memory that a kernel may have without asking for them at the launch."""
_PTX_VERSION = 80
"""Any driver that JAX runs with compiles it; Triton would ask for one as new as itself. GPUs after Hopper need more."""
_POINTERS = {
    "bool": "*i1",
    "int8": "*i8",
    "int16": "*i16",
    "int32": "*i32",
    "int64": "*i64",
    "uint8": "*u8",
    "uint16": "*u16",
    "uint32": "*u32",
    "uint64": "*u64",
    "float16": "*fp16",
    "bfloat16": "*bf16",
    "float32": "*fp32",
    "float8_e4m3fn": "*u8",
    "float8_e5m2": "*u8",
}
"""Triton's names of pointers to dtypes. Kernels see the codes of float8: Triton need not know the type."""


@dataclass(frozen=True)
class Compiled:
    """A kernel as PTX."""

    name: str
    ptx: str
    shared_bytes: int
    """Of dynamic shared memory."""
    threads: int
    """Of one program."""
    parameters: int
    """Pointers that it takes: Triton appends some of its own."""


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
    results = jax.tree.leaves(out)
    pointers = tuple(_POINTERS[jnp.dtype(array.dtype).name] for array in (*arrays, *results))
    made = compiled(
        kernel, pointers, tuple(sorted(constants.items())), num_warps, num_stages, round(10 * compute_capability())
    )
    # What the kernel takes beyond its own pointers is scratch memory, which these kernels do not use.
    scratch = [jax.ShapeDtypeStruct((1,), jnp.uint8)] * (made.parameters - len(pointers))
    x, y, z = (*grid, 1, 1)[:3]
    places = {"grid_x": x, "grid_y": y, "grid_z": z, "block_x": made.threads, "block_y": 1, "block_z": 1}
    found = jax.ffi.ffi_call(_TARGET, [*results, *scratch], vmap_method="sequential")(
        *arrays,
        name=made.name,
        kernel_type="ptx",
        kernel_data=made.ptx,
        shared_mem_bytes=np.int32(made.shared_bytes),
        **{name: np.int32(size) for name, size in places.items()},
    )
    return jax.tree.unflatten(jax.tree.structure(out), found[: len(results)])


@functools.cache
def compiled(
    kernel: Any,
    pointers: tuple[str, ...],
    constants: tuple[tuple[str, int | float | bool | str], ...],
    num_warps: int,
    num_stages: int,
    capability: int,
) -> Compiled:
    """`kernel` for GPUs of a compute capability (90 is 9.0); needs triton, and no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = dict(zip(names, pointers, strict=False)) | {name: "constexpr" for name, _ in constants}
    # XLA's buffers begin at multiples of 16 bytes at least.
    aligned: dict[tuple[int, ...], list[list[Any]]] = {(i,): [["tt.divisibility", 16]] for i in range(len(pointers))}
    source = ASTSource(kernel, {name: signature[name] for name in names}, dict(constants), aligned)
    made = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={
            "num_warps": num_warps,
            "num_stages": num_stages,
            "enable_fp_fusion": True,
            "ptx_version": _PTX_VERSION if capability < 100 else None,
        },
    )
    return _as_taken(made.asm["ptx"], made.metadata.shared, 32 * num_warps)


def _as_taken(ptx: str, shared_bytes: int, threads: int) -> Compiled:
    """What Triton made, as XLA should take it.

    A kernel that asks for any shared memory at its launch gets all there is, at the expense of its L1 cache, so a small
    amount becomes part of the kernel (experiments/2026_11_28_launches).
    """
    entry = re.search(r"\.entry\s+(\w+)\s*\((.*?)\)", ptx, re.DOTALL)
    if entry is None:
        raise UnsupportedError("Triton compiled a kernel without an entry; pass implementation='xla'")
    if 0 < shared_bytes <= _MOST_STATIC:
        ptx = re.sub(r"\.extern (\.shared [^;]*)\[\];", rf"\1[{shared_bytes}];", ptx)
        shared_bytes = 0
    return Compiled(entry.group(1), ptx, shared_bytes, threads, entry.group(2).count(".param"))


def one_by_one(function: Callable[..., jax.Array], *arrays: jax.Array, **static: Any) -> jax.Array:
    """`function(*arrays, **static)`; under `vmap` it runs once for every mapped element, for kernels map nothing."""
    return jax.custom_batching.sequential_vmap(partial(function, **static))(*arrays)


def in_one_launch(function: Callable[..., Any], *arrays: jax.Array, **static: Any) -> Any:
    """`function(*arrays, **static)` of a function that takes and gives stacks: a leading axis is put on its arrays and
    taken off its results, and the axes of every `vmap` join it."""

    @jax.custom_batching.custom_vmap
    def run(*stacks: jax.Array) -> Any:
        return function(*stacks, **static)

    @run.def_vmap
    def mapped(size: int, batched: list[bool], *stacks: jax.Array) -> tuple[Any, Any]:
        whole = [
            stack if own else jnp.broadcast_to(stack, (size, *stack.shape))
            for stack, own in zip(stacks, batched, strict=True)
        ]
        length = whole[0].shape[1]
        out = run(*(stack.reshape(size * length, *stack.shape[2:]) for stack in whole))
        out = jax.tree.map(lambda leaf: leaf.reshape(size, length, *leaf.shape[1:]), out)
        return out, jax.tree.map(lambda _: True, out)

    return jax.tree.map(lambda leaf: leaf[0], run(*(array[None] for array in arrays)))


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
