"""Compiled programs kept as files, so that the next start does not even trace them.

JAX's persistent cache is keyed by the lowered program: to find it there, a start traces the whole model, lowers it and
compiles every Triton kernel in it, which for billions of weights takes minutes. Here the key is what decides the
program: its configuration, this package's source, the versions below it, the device, and JAX's options.
"""

import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import pickle
import platform
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable

import arbs_jax
import arbs_kernels
from arbs_jax.compilation import FOUND, measured
from arbs_jax.run.files import write_atomic
from arbs_kernels.backends import default_device, register_calls

MOST_FILES = 64
"""Kept in a cache; those used longest ago go first."""

_FOLDER = "arbs_executables"
_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "triton")
_DIGEST_BYTES = hashlib.sha256().digest_size
_WHERE_FROM = ("jax_compilation_cache_dir", "jax_persistent_cache")
"""Options that say where programs lie, not what they are."""

_log = logging.getLogger(__name__)


def compiled(name: str, function: Any, *arguments: Any, settings: Any, devices: list[jax.Device] | None = None) -> Any:
    """`function.lower(*arguments).compile()`, from JAX's cache folder where an earlier start left it there.

    Args:
        name: of the program, in the name of its file.
        function: from `jax.jit`.
        arguments: pytrees of arrays or `jax.ShapeDtypeStruct`.
        settings: JSON-like; with the arguments' shapes all that decides what `function` computes, besides its source.
        devices: that run it together; None for the default device.

    Returns:
        A `jax.stages.Compiled`. Without a cache folder (`arbs_jax.compilation.enable_cache`) nothing is kept, nor is
        what JAX's own cache had already.
    """
    folder = jax.config.jax_compilation_cache_dir
    if folder is None:
        return function.lower(*arguments).compile()
    path = Path(folder) / _FOLDER / f"{name}-{_key(name, arguments, settings)}"
    found = _read(path, arguments, devices or [default_device()])
    if found is not None:
        jax.monitoring.record_event(FOUND)
        return found
    with measured() as report:
        program = function.lower(*arguments).compile()
    if not report.hits:  # XLA's CPU backend cannot write out again what it has read: it would lack its functions.
        _keep(path, program)
    return program


def _key(name: str, arguments: Any, settings: Any) -> str:
    device = default_device()
    # As attributes: the values alone leave out what a context manager has set.
    options = {
        key: repr(getattr(jax.config, key, value))
        for key, value in jax.config.values.items()
        if not key.startswith(_WHERE_FROM)
    }
    facts = {
        "name": name,
        "arguments": str(jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), arguments)),
        "settings": settings,
        "source": _source(),
        "versions": [_version(package) for package in _PACKAGES],
        "device": [device.device_kind, device.client.platform_version, jax.local_device_count()],
        "host": _host(),
        "options": options,
        "flags": [os.environ.get("XLA_FLAGS"), os.environ.get("LIBTPU_INIT_ARGS")],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


@functools.cache
def _source() -> str:
    """Digest of every file of this project's packages."""
    digest = hashlib.sha256()
    for package in (arbs_jax, arbs_kernels):
        root = Path(str(package.__file__)).parent
        for path in sorted(root.rglob("*")):
            if path.suffix in {".py", ".json"}:
                digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


@functools.cache
def _host() -> str:
    """What instructions this host knows: programs for a CPU use all of them, and homes are shared between hosts."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _read(path: Path, arguments: Any, devices: list[jax.Device]) -> Any:
    """The program at `path`; None where there is none, or none that can be read: it is then made anew."""
    try:
        data = path.read_bytes()
        digest, content = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
        if hashlib.sha256(content).digest() != digest:
            raise ValueError("it is damaged")
        payload, results = pickle.loads(content)
        register_calls()
        program = serialize_executable.deserialize_and_load(
            payload,
            jax.tree.structure((arguments, {})),
            jax.tree.structure(results),
            execution_devices=devices,
        )
        os.utime(path)
    except FileNotFoundError:
        return None
    except Exception as error:  # Whatever is wrong with a file that only saves time must not end a run.
        _log.warning("compiling anew, for the kept program %s cannot be read: %s", path, error)
        with suppress(OSError):
            path.unlink()
        return None
    return program


def _keep(path: Path, program: Any) -> None:
    try:
        payload, _, out_tree = serialize_executable.serialize(program)
        content = pickle.dumps((payload, jax.tree.unflatten(out_tree, range(out_tree.num_leaves))))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, hashlib.sha256(content).digest() + content)
        oldest_first = sorted(path.parent.glob("[!.]*"), key=lambda file: file.stat().st_mtime)
        for file in oldest_first[:-MOST_FILES]:
            file.unlink(missing_ok=True)
    except Exception as error:  # A full disk, or a program that cannot be kept: it runs all the same.
        _log.warning("the next start will compile again, for the program %s cannot be kept: %s", path.name, error)
