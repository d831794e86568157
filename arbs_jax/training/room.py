"""Whether a training step fits the device, asked before anything is allocated there; and room for it in one piece."""

from typing import Any

import jax
import jax.numpy as jnp

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
            f"{what} needs {-(-need // _MB):,} MB, this device has {room // _MB:,} MB; lower --batch, --ctx or "
            "--layers-at-once, or choose another --preset"
        )


def reserve(need: int, device: Any) -> bool:
    """Has the allocator fetch `need` bytes in one piece, to hand out what comes next from it.

    Fetched as they are asked for (where memory is not pre-allocated), pieces of the device double in size from one to
    the next, and whatever leaves less than 128 MiB of one takes all of it: `arb-3b` then held 2,150 MB of a planned
    1,847, or 1,988, as it happened.

    Args:
        need: `peak_bytes` of what will run.
        device: that tells of its memory; others, as CPUs, are left alone.

    Returns:
        Whether they were to be had, in one piece and beside what other processes hold. What will run may find them in
        several.
    """
    if device_room(device) is None:
        return True
    try:
        jax.block_until_ready(jnp.zeros((-(-need // 2**20), 2**20), jnp.uint8, device=device)).delete()
    except jax.errors.JaxRuntimeError:
        return False
    return True
