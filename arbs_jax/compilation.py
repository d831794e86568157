"""How programs are compiled: into a cache, so that the second start compiles nothing, and to repeat bit for bit."""

import functools
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp

from arbs_kernels.backends import compute_capability

FOUND = "/arbs_jax/executables/found"
"""Event (`jax.monitoring`): a whole program was read back (`arbs_jax.executables`)."""

_FASTER: dict[str, bool | str] = {
    # XLA's own list, and loops: the GPU goes from layer to layer by itself, where the host would launch every one.
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE",
    # What a loop stacks is not filled with zeros first.
    "xla_gpu_enable_dus_accumulator_zero_init_elimination": True,
}
"""experiments/2026_11_29_compilation has what they gain."""

_HIT = "/jax/compilation_cache/cache_hits"
_MISS = "/jax/compilation_cache/cache_misses"


def enable_cache(folder: str | None = None) -> Path:
    """Points JAX's persistent cache at `folder`, else $ARBS_CACHE_DIR, else ~/.cache/arbs_jax; programs of any size.

    Returns the folder. Call before the first compilation.
    """
    chosen = folder or os.environ.get("ARBS_CACHE_DIR") or Path("~/.cache/arbs_jax").expanduser()
    path = Path(chosen).absolute()
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return path


def step_options(cudnn_attention: bool, in_one_graph: bool) -> dict[str, bool | str] | None:
    """`compiler_options` of `jax.jit` for a training step, None where there is no NVIDIA GPU.

    A step that holds cuDNN's attention is made to give the same bits every time: that gradient adds in any order from
    some 512 positions on. What else a step does never does, and the option would cost it a tenth of its speed.

    A step `in_one_graph` is faster by options that change no bit of what it computes; those that this XLA does not know
    are left out.
    """
    if not compute_capability():
        return None
    repeatable = {"xla_gpu_exclude_nondeterministic_ops": True} if cudnn_attention else {}
    faster = {name: value for name, value in _FASTER.items() if _known(name, value)} if in_one_graph else {}
    return repeatable | faster


@functools.cache
def _known(name: str, value: bool | str) -> bool:
    """Whether XLA compiles with such an option."""
    try:
        jax.jit(lambda: jnp.int32(0), compiler_options={name: value}).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


@dataclass
class CompileReport:
    """What compiling cost: filled in when the `measured` block ends."""

    seconds: float = 0.0
    hits: int = 0
    misses: int = 0

    @property
    def cached(self) -> bool:
        """Whether every program came from the cache."""
        return self.hits > 0 and self.misses == 0

    def __str__(self) -> str:
        source = "from the cache" if self.cached else "compiled"
        return f"{self.seconds:.1f} s ({source})"


@contextmanager
def measured() -> Iterator[CompileReport]:
    """Times a block and counts its hits and misses in the persistent cache, and programs read back whole as hits."""
    report = CompileReport()

    def listen(event: str, **_: object) -> None:
        report.hits += event in (_HIT, FOUND)
        report.misses += event == _MISS

    jax.monitoring.register_event_listener(listen)
    start = time.perf_counter()
    try:
        yield report
    finally:
        report.seconds = time.perf_counter() - start
        jax.monitoring.unregister_event_listener(listen)
