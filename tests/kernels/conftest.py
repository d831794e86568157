"""How kernels for Hopper are tested on other machines."""

import contextlib
from collections.abc import Iterator

import pytest

from arbs_kernels import backends


@pytest.fixture
def simulated() -> Iterator[None]:
    """Mosaic kernels run as they are on Hopper, simulated on a CPU, and on GPUs before it not at all."""
    capability = backends.compute_capability()
    if 0.0 < capability < 9.0:
        pytest.skip("needs Hopper, or a CPU to simulate it")
    with contextlib.nullcontext() if capability else backends.interpreted():
        yield
