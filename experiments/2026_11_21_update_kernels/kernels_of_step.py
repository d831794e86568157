"""Device kernels and temporaries of one training step, counted in the program compiled for a GPU that is not there.

    JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 JAX_PLATFORMS=cpu,cuda python kernels_of_step.py --rules latent10 qat

XLA compiles for a described target without a device (`jax[cuda13]` must be installed). Autotuning cannot run, so every
product is a Triton fusion; counts are within 4% of those in a trace of the device. Loops are counted by their trips.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent / "2026_11_20_rules"))
from baselines import QAT
from harness import Setting

from arbs_jax.training.program import Program

TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 4800000000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 150000000000 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
runtime_version { major: 13 minor: 0 }
device_description_str: "NVIDIA H200"
"""
FREE = frozenset(
    ["parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "after-all", "opt-barrier"]
)
"""Operations that launch nothing of their own."""


def target() -> Any:
    """Sharding on the described device."""
    described = topologies.get_topology_desc(
        platform="cuda", topology_name="h200", target_config=TARGET, topology="1x1x1"
    )
    return jax.sharding.SingleDeviceSharding(described.devices[0])


def compiled_step(arm: str, setting: Setting, layers_at_once: int, device: Any) -> Any:
    """The training step of a rule, or of `qat`, compiled for the device."""

    def placed(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), tree)

    config = setting.config("latent10" if arm == "qat" else arm)
    program = Program(replace(config, train=replace(config.train, layers_at_once=layers_at_once)))
    tokens = placed(jax.ShapeDtypeStruct((1, setting.batch, setting.context + 1), jnp.uint8))
    if arm != "qat":
        return program.step.lower(placed(program.abstract_state), tokens).compile()
    layers = program.config.model.layers
    state = jax.eval_shape(lambda: QAT.init(program.specs, layers, jnp.uint32(0), jnp.float32(2e-3)))
    step = jax.jit(QAT.step(program.model, setting.steps), donate_argnums=0)
    return step.lower(placed(state), tokens).compile()


def computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Instruction lines of every computation of a compiled program, and the name of the entry."""
    found: dict[str, list[str]] = {}
    name, entry = "", ""
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{\s*$", line)
        if head:
            name = head.group(2)
            found[name] = []
            entry = name if head.group(1) else entry
        elif name and line.startswith("  "):
            found[name].append(line)
        elif line.startswith("}"):
            name = ""
    return found, entry


def after_type(text: str) -> str:
    """What follows the type that a right-hand side begins with; a tuple's parentheses nest."""
    depth = 0
    for position, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0 and character in " )":
            return text[position + 1 :]
    return ""


def operations(lines: list[str]) -> Iterator[tuple[str, str]]:
    """(operation, its line) of every instruction."""
    for line in lines:
        match = re.match(r"\s+(?:ROOT )?%?[\w.\-]+ = (.*)$", line)
        if not match:
            continue
        operation = re.match(r"\s*([\w\-]+)\(", after_type(re.sub(r"/\*.*?\*/", "", match.group(1))))
        if operation:
            yield operation.group(1), line


def kernels(text: str) -> int:
    """Device operations that one run of the program launches."""
    by_name, entry = computations(text)

    def of(name: str) -> int:
        total = 0
        for operation, line in operations(by_name[name]):
            if operation == "while":
                trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
                body = re.search(r"body=%?([\w.\-]+)", line)
                if not trips or not body:
                    raise ValueError(f"a loop without a known number of turns: {line.strip()[:80]}")
                total += int(trips.group(1)) * of(body.group(1))
            elif operation == "call":
                total += sum(of(called) for called in re.findall(r"to_apply=%?([\w.\-]+)", line))
            elif operation not in FREE and not operation.endswith("-done"):
                total += 1
        return total

    return of(entry)


def main() -> None:
    """Parses flags, compiles, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="byte-50m")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--remat", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--layers-at-once", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rules", nargs="+", default=["qat", "integral", "latent10"])
    args = parser.parse_args()
    device = target()
    table = Table(title=f"{args.preset}, batch {args.batch} x {args.context}, bfloat16", title_justify="left")
    for name in ("arm", "remat", "layers at once", "kernels", "temporaries MB"):
        table.add_column(name, justify="left" if name == "arm" else "right")
    for arm in args.rules:
        for remat in args.remat:
            for together in args.layers_at_once[:1] if arm == "qat" else args.layers_at_once:
                setting = Setting(args.preset, 1000, args.batch, args.context, dtype="bfloat16", remat=bool(remat))
                compiled = compiled_step(arm, setting, together, device)
                temporaries = compiled.memory_analysis().temp_size_in_bytes / 1e6
                table.add_row(arm, str(remat), str(together), f"{kernels(compiled.as_text()):,}", f"{temporaries:,.0f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
