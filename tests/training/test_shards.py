"""Two devices and two micro-batches are the same, bit for bit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_shards_equal_micro_batches():
    """shard_map and pmap over two devices, in a process of its own: the number of devices is fixed at its start."""
    script = Path(__file__).with_name("two_devices.py")
    folders = [str(script.parent), str(script.parent.parent), *sys.path]
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "PYTHONPATH": os.pathsep.join(folders),
    }
    result = subprocess.run(
        [sys.executable, "-W", "error", str(script)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["shard_map", "pmap", "sampling", "latent", "four", "exchange", "poison", "tables"]
