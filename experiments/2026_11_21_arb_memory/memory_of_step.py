"""Device memory of one training step of an ARB model, from the program compiled for an H200 that is not there.

    JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 JAX_PLATFORMS=cpu,cuda python memory_of_step.py --rule bigint

Batch 1, context 64, bfloat16, recomputed backward, the state donated; nothing is allocated. Prints the parts, the bytes
of state, and what XLA plans to hold. With `--dump` XLA also writes what lives at the peak (`*live-range.txt`) and which
buffers share memory (`*memory-usage-report.txt`), minutes before it is done with the kernels. On a machine without a
GPU the packed operators are those in plain XLA, which decode one whole matrix at a time; with `--as-h200` they are the
kernels that an H200 takes (triton must be installed).
"""

import argparse
import importlib
import pkgutil
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent / "2026_11_21_update_kernels"))
sys.path.insert(0, str(Path(__file__).parent.parent / "2026_11_20_rules"))
from kernels_of_step import target

import arbs_kernels
from arbs_jax.config import RunConfig, TrainConfig
from arbs_jax.models.arb.presets import ARB_PRESETS
from arbs_jax.models.presets import preset
from arbs_jax.rules import RULES, RuleConfig, default_group_size
from arbs_jax.training.program import Program
from arbs_jax.training.room import peak_bytes

H200 = {"compute_capability": 9.0, "device_kind": "NVIDIA H200", "multiprocessors": 132}


def as_h200() -> None:
    """Answers for an H200 whoever asks for the device, but those who would take cuDNN: it does not compile without."""
    for module in pkgutil.walk_packages(arbs_kernels.__path__, "arbs_kernels."):
        importlib.import_module(module.name)
    for name, module in list(sys.modules.items()):
        asks = name.startswith(("arbs_kernels", "arbs_jax.training"))
        for question, answer in H200.items():
            if asks and hasattr(module, question):
                setattr(module, question, lambda answer=answer: answer)
    jax.default_backend = lambda: "gpu"


def program_of(args: argparse.Namespace) -> Program:
    """The program whose step is compiled."""
    return Program(
        RunConfig(
            preset=args.preset,
            model=preset(args.preset, dtype="bfloat16", remat=True),
            group_size=default_group_size(args.rule),
            rule=RuleConfig(args.rule),
            train=TrainConfig(batch=1, context=args.context),
        )
    )


def main() -> None:
    """Parses flags, counts, compiles, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=ARB_PRESETS, default="arb-3b")
    parser.add_argument("--rule", choices=RULES, default="bigint")
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--dump", type=Path)
    parser.add_argument("--as-h200", action="store_true")
    args = parser.parse_args()
    jax.config.update("jax_explicit_x64_dtypes", "allow")
    if args.as_h200:
        as_h200()
    program = program_of(args)
    step, state, account = program.step, program.abstract_state, program.account
    table = Table("part", "weights, M", title=f"{args.preset}, {args.rule}", title_justify="left")
    for part, weights in account.weights_by_part.items():
        table.add_row(part, f"{weights / 1e6:,.1f}")
    table.add_row("all", f"{account.logical_ternary_weights / 1e6:,.1f}")
    Console(width=100).print(table, f"state {account.state_bytes / 1e6:,.0f} MB")

    device = target()
    tokens = jax.ShapeDtypeStruct((1, 1, args.context + 1), jnp.uint8)
    placed = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), (state, tokens))
    options = {"xla_dump_to": str(args.dump), "xla_dump_hlo_as_text": True} if args.dump else {}
    start = time.perf_counter()
    compiled = step.lower(*placed).compile(compiler_options=options)
    seconds = time.perf_counter() - start
    temporaries = compiled.memory_analysis().temp_size_in_bytes / 1e6
    print(f"temporaries {temporaries:,.0f} MB, peak {peak_bytes(compiled) / 1e6:,.0f} MB, compiled in {seconds:.0f} s")


if __name__ == "__main__":
    main()
