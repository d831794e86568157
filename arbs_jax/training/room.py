"""Whether a training step fits the device, asked before anything is allocated there."""

from typing import Any

from arbs_jax.errors import ConfigError

_MB = 10**6


def device_room(device: Any) -> int | None:
    """Bytes that this process may still take on a `jax.Device`; None where the device does not tell, as CPUs do not."""
    stats = device.memory_stats()
    if not stats or "bytes_limit" not in stats:
        return None
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0)


def peak_bytes(compiled: Any) -> int:
    """Bytes on the device while a compiled function (`jax.stages.Compiled`) runs: arguments, results that are not
    donated arguments, temporaries."""
    stats = compiled.memory_analysis()
    held = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    return held + stats.temp_size_in_bytes


def check_room(need: int, room: int | None, what: str = "this training step") -> None:
    """Refuses what does not fit.

    Args:
        need: bytes: before compiling those of the state (`arbs_jax.audit.Audit.state_bytes`), a lower bound; after it
            `peak_bytes`, what it takes without fragmentation.
        room: `device_room` before the state is there; None asks nothing.
        what: needs them, for the message.

    Raises:
        ConfigError: `need` is more than `room`; the message has both.
    """
    if room is not None and need > room:
        raise ConfigError(
            f"{what} needs {-(-need // _MB):,} MB, this device has {room // _MB:,} MB; lower --batch or --ctx, or "
            "choose another --preset"
        )
