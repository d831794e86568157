"""How programs are compiled: into a cache, so that the second start compiles nothing, and to repeat bit for bit."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import jax

from arbs_kernels.backends import compute_capability

FOUND = "/arbs_jax/executables/found"
"""Event (`jax.monitoring`): a whole program was read back (`arbs_jax.executables`)."""

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


def deterministic_options() -> dict[str, bool] | None:
    """`compiler_options` of `jax.jit` with which a program that holds cuDNN's attention gives the same bits every time.

    Its gradient adds in any order from some 512 positions on; what else a step does never does, and the options would
    cost it a tenth of its speed. None where there is no NVIDIA GPU.
    """
    return {"xla_gpu_exclude_nondeterministic_ops": True} if compute_capability() else None


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
