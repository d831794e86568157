"""The parts of the ARB model are tested at sizes where compiling is all that takes time."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def compile_quickly(quick_compilation: None) -> None:
    """See `quick_compilation`."""
