"""Puts this folder on the import path, for `support` and `fresh`, and says how thoroughly tests compile."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(scope="module")
def quick_compilation() -> Iterator[None]:
    """Compiles what a module's tests run without LLVM's optimisations, which take longer than the programs run."""
    name = "jax_disable_most_optimizations"
    before = jax.config.values[name]
    jax.config.update(name, True)
    yield
    jax.config.update(name, before)
