"""Puts this folder on the import path, for `support` and `fresh`, and says how thoroughly tests compile."""

import os

import jax
import pytest

_QUICKLY = "jax_disable_most_optimizations"
_ASKED_FOR = jax.config.values[_QUICKLY]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Compiles without LLVM's optimisations, which take longer than what a test runs, but those marked `thorough`;
    processes that a test starts do as it does."""
    quickly = _ASKED_FOR or item.get_closest_marker("thorough") is None
    jax.config.update(_QUICKLY, quickly)
    os.environ[_QUICKLY.upper()] = str(int(quickly))
