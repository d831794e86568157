"""Device memory of one training step of an ARB model, from the program compiled for an H200 that is not there.

    JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 JAX_PLATFORMS=cpu,cuda python memory_of_step.py --rule bigint

Batch 1, context 64, bfloat16, recomputed backward, the state donated; nothing is allocated. Prints the parts, the bytes
of state, and what XLA plans to hold. With `--dump` XLA also writes what lives at the peak (`*live-range.txt`) and which
buffers share memory (`*memory-usage-report.txt`), minutes before it is done with the kernels. On a machine without a
GPU the packed operators are those in plain XLA, which decode one whole matrix at a time.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent / "2026_11_21_update_kernels"))
sys.path.insert(0, str(Path(__file__).parent.parent / "2026_11_20_rules"))
from kernels_of_step import target

from arbs_jax.audit import Audit, audit
from arbs_jax.layers import COLLECTION, MEMORY, TernaryConfig
from arbs_jax.models.arb.model import ArbLM, empty_memory
from arbs_jax.models.arb.presets import ARB_PRESETS, PARTS, arb_preset
from arbs_jax.models.arb.stages import arb_stages
from arbs_jax.rules import RULES, RuleConfig, default_group_size, make_rule
from arbs_jax.training.layerwise import Sweep
from arbs_jax.training.room import peak_bytes
from arbs_jax.training.step import TrainState, fresh_state, jit_step, make_step
from arbs_jax.votes import matrix_specs


def step_of(preset: str, rule_name: str) -> tuple[Any, TrainState, Audit]:
    """(the jitted step, shapes of its state, the account of it)."""
    config = arb_preset(preset, dtype="bfloat16", remat=True)
    rule = make_rule(RuleConfig(rule_name), steps=1000, votes_per_step=1, dtype="bfloat16")
    ternary = TernaryConfig(rule, default_group_size(rule_name))
    model, tokens = ArbLM(config, ternary), jax.ShapeDtypeStruct((1, 8), jnp.int32)
    specs = matrix_specs(model, tokens, whole=True)

    def fresh(tokens: jax.Array) -> TrainState:
        return fresh_state(model.init(jax.random.key(0), tokens)[COLLECTION], empty_memory(config))

    state = jax.eval_shape(fresh, tokens)
    account = audit({COLLECTION: state.ternary, MEMORY: state.memory}, specs, [state.step, state.halted], PARTS)
    sweep = Sweep(arb_stages(config, ternary), rule, specs, remat=True, dtype="bfloat16")
    return jit_step(make_step(sweep, 0)), state, account


def main() -> None:
    """Parses flags, counts, compiles, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=ARB_PRESETS, default="arb-3b")
    parser.add_argument("--rule", choices=RULES, default="bigint")
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--dump", type=Path)
    args = parser.parse_args()
    jax.config.update("jax_explicit_x64_dtypes", "allow")
    step, state, account = step_of(args.preset, args.rule)
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
