"""How tests find `support` and `fresh` (this folder is on the import path), how they compile, and into what."""

import gc
import os
import shutil
import tempfile

import jax
import pytest

# Tracing makes objects by the hundred thousand, few of them garbage: looking for it after every 700 new ones takes up
# to a tenth of a test's time.
gc.freeze()
gc.set_threshold(200_000, 50, 100)

_QUICKLY = "jax_disable_most_optimizations"
_ASKED_FOR = jax.config.values[_QUICKLY]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Compiles without LLVM's optimisations, which take longer than what a test runs, but those marked `thorough`;
    processes that a test starts do as it does."""
    quickly = _ASKED_FOR or item.get_closest_marker("thorough") is None
    jax.config.update(_QUICKLY, quickly)
    os.environ[_QUICKLY.upper()] = str(int(quickly))


def pytest_configure(config: pytest.Config) -> None:
    """A compilation cache for all processes of the session, or the environment's: tests are small and compile much of
    the same. Workers, and processes that tests start, inherit it."""
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if folder is None:
        folder = tempfile.mkdtemp(prefix="jax-cache-")
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    options = {
        "jax_compilation_cache_dir": folder,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in options.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)
