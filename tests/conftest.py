"""Puts this folder on the import path, for `support` and `fresh`, and says how thoroughly tests compile."""

import jax
import pytest

_QUICKLY = "jax_disable_most_optimizations"
_ASKED_FOR = jax.config.values[_QUICKLY]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Compiles without LLVM's optimisations, which take longer than what a test runs, but those marked `thorough`."""
    jax.config.update(_QUICKLY, _ASKED_FOR or item.get_closest_marker("thorough") is None)
