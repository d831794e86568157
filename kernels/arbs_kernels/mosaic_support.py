"""What Mosaic GPU kernels share: how they are launched, and what they cannot run.

Importing this module needs JAX alone, without a GPU.
"""

from arbs_kernels.backends import compute_capability, default_device, is_interpreted
from arbs_kernels.selection import UnsupportedError

SHARED_BYTES = 227 * 1024
"""Of one block, on data-centre GPUs since Hopper."""


def check_hopper(operator: str) -> None:
    """Checks that the default device has the warpgroup products of capability 9.

    Raises:
        UnsupportedError: it has not, and kernels are not simulated.
    """
    capability = compute_capability()
    if not is_interpreted() and int(capability) != 9:
        raise UnsupportedError(
            f"{operator}: implementation 'mosaic_gpu' takes compute capability 9.x (Hopper), got {capability}; "
            "pass 'triton' or 'xla'"
        )


def multiprocessors() -> int:
    """Of the default device: blocks of a kernel that keeps each of them busy. Two, where kernels are simulated."""
    if is_interpreted():
        return 2
    return default_device().core_count


def padded(size: int, multiple: int) -> int:
    """The next multiple."""
    return -(-size // multiple) * multiple
