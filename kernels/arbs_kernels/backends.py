"""What this machine can run: the device that computations go to by default, and what each backend needs of it.

"mosaic_gpu" kernels are Pallas kernels with Hopper's own instructions, which later GPUs lack; inside `interpreted()`
they run anywhere, slowly, for tests. "triton" kernels are for NVIDIA Ampere and later.
"""

import contextlib
import importlib
import importlib.util
from collections.abc import Iterator
from contextvars import ContextVar

import jax

_INTERPRETED: ContextVar[bool] = ContextVar("interpreted", default=False)


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Mosaic kernels traced within are simulated, on whatever device there is: for tests on a CPU."""
    token = _INTERPRETED.set(True)
    try:
        yield
    finally:
        _INTERPRETED.reset(token)


def is_interpreted() -> bool:
    """Whether Mosaic kernels are being simulated."""
    return _INTERPRETED.get()


def device_kind() -> str:
    """Name of the default device as its maker gives it, such as "NVIDIA H200" or "cpu"."""
    return default_device().device_kind


def compute_capability() -> float:
    """Of the default device, such as 9.0; 0.0 where it is no NVIDIA GPU."""
    device = default_device()
    if device.platform != "gpu":
        return 0.0
    try:
        return float(device.compute_capability)
    except (AttributeError, ValueError):  # other makers' GPUs have names there, or nothing
        return 0.0


def nothing_missing() -> None:
    """Runs everywhere."""


def mosaic_gpu_missing() -> str | None:
    """What this machine lacks for Mosaic kernels, or None."""
    if is_interpreted() or 9.0 <= compute_capability() < 10.0:
        return None
    return f"an NVIDIA GPU of compute capability 9.x (Hopper), and this is {_described()}"


def triton_missing() -> str | None:
    """What this machine lacks for Triton kernels, or None."""
    if compute_capability() < 8.0:
        return f"an NVIDIA GPU of compute capability 8.0 or later (Ampere), and this is {_described()}"
    if importlib.util.find_spec("triton") is None:
        return "triton, which is not installed (pip install 'arbs-jax[triton]')"
    return None


def float8_missing() -> str | None:
    """What this machine's GPU lacks for products of float8 operands, or None; other devices emulate them."""
    if compute_capability() >= 8.9 or compute_capability() == 0.0:
        return None
    return f"an NVIDIA GPU of compute capability 8.9 or later (Ada), and this is {_described()}"


def register_calls() -> None:
    """Makes known what compiled programs call on this machine.

    Importing a backend registers its handlers, and a program that is read back, not traced, imports none.
    """
    if mosaic_gpu_missing() is None:
        importlib.import_module("jax.experimental.pallas.mosaic_gpu")


def default_device() -> jax.Device:
    """Where computations go that name no device."""
    chosen = jax.config.jax_default_device
    if isinstance(chosen, jax.Device):
        return chosen
    return jax.local_devices(backend=chosen)[0]


def _described() -> str:
    capability = compute_capability()
    return f"{device_kind()!r}" + (f" of {capability}" if capability else "")
