"""What a step costs by how it is compiled, each way in a process of its own.

    python compiled_step.py --preset byte-50m --batch 64 --context 256 --arms step first first-loops qat qat-loops

An arm is a program and, after dashes, what it is compiled with besides. `step`: a rule's step (`latent10`'s) as it is
trained with; `first`: with `xla_gpu_exclude_nondeterministic_ops` alone, with which XLA takes the first algorithm of
every product; `free`: without it; `tuned`: without it and then again with it, when the algorithms that it found are
still known; `qat` and `dense`: the baselines, compiled as JAX does. `WAYS` and `FLAGS` name what may follow. Of each:
seconds to compile, ms a step (each waited for, and with one in flight, as the training loop has it), the compiler's own
account of temporaries, whether two runs from one state give the same bits, and a checksum of them.
"""

import argparse
import os
import re
import subprocess
import sys
import time
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "2026_11_20_rules"))
from baselines import ADAMW_BF16, QAT
from harness import Setting
from step_cost import random_batches, timed

from arbs_jax.compilation import step_options
from arbs_jax.training.program import Program
from arbs_jax.training.step import jit_step, make_step

WAYS: dict[str, dict[str, Any]] = {
    "first": {"xla_gpu_exclude_nondeterministic_ops": True},
    "concurrent": {"xla_gpu_command_buffer_scheduling_mode": "CONCURRENT"},
    "regions": {"xla_gpu_command_buffer_scheduling_mode": "CONCURRENT_REGIONS"},
    "pdl": {"xla_gpu_enable_pdl_launch": True},
    "unrolled": {"xla_gpu_command_buffer_unroll_loops": True},
    "unfilled": {"xla_gpu_enable_dus_accumulator_zero_init_elimination": True},
    "free": {},
}
"""Options of the compiler."""
FLAGS = {
    "profiled": "--xla_gpu_command_buffer_update_mode=SKIP_PROFILED",
    "loops": "--xla_gpu_enable_command_buffer=+WHILE",
}
"""Ways that are flags of a process."""
BASELINES = {"qat": QAT, "dense": ADAMW_BF16}


def compiled(arm: str, setting: Setting, products: str) -> tuple[Any, Any]:
    """(compiled step, a function that makes a fresh state)."""
    config = setting.config("latent10")
    program = Program(replace(config, train=replace(config.train, products=products)))
    tokens = jax.ShapeDtypeStruct((1, setting.batch, setting.context + 1), jnp.uint8)
    name, *ways = (word for word in arm.split("-") if word not in FLAGS)
    options = {key: value for way in ways for key, value in WAYS[way].items()}
    if name in BASELINES:
        model, depth = program.model, program.config.model.layers
        init = jax.jit(lambda: BASELINES[name].init(program.specs, depth, jnp.uint32(0), jnp.float32(2e-3)))
        step = jax.jit(BASELINES[name].step(model, setting.steps), donate_argnums=0)
        return step.lower(jax.eval_shape(init), tokens).compile(compiler_options=options), init

    def made(own: dict[str, Any]) -> Any:
        step = jit_step(make_step(program.sweep, program.config.train.seed), own | options)
        return step.lower(program.abstract_state, tokens).compile()

    if name == "step":
        return made(step_options(cudnn_attention=True, in_one_graph=True) or {}), program.init_state
    step = made({} if name == "tuned" else WAYS[name])
    return (made(WAYS["first"]) if name == "tuned" else step), program.init_state


def one(arm: str, args: argparse.Namespace) -> None:
    """Compiles, runs, prints a line."""
    setting = Setting(args.preset, 1000, args.batch, args.context, dtype="bfloat16", remat=True)
    began = time.perf_counter()
    step, init = compiled(arm, setting, args.products)
    took = time.perf_counter() - began
    batches = random_batches(args.steps, args.batch, args.context)
    ends = []
    for _ in range(2):
        state, _ = timed(step, init(), batches, ahead=False)
        ends.append([np.asarray(leaf) for leaf in jax.tree.leaves(state)])
        state, waited = timed(step, state, batches, ahead=False)
        state, ahead = timed(step, state, batches, ahead=True)
        del state
    alike = sum(np.array_equal(a, b, equal_nan=a.dtype.kind == "f") for a, b in zip(*ends, strict=True))
    checksum = zlib.crc32(b"".join(leaf.tobytes() for leaf in ends[0]))
    algorithms = Counter(re.findall(r'"selected_algorithm":"?(\d+)', step.as_text()))
    print(
        f"{jax.devices()[0].device_kind}, {args.preset} {args.batch} x {args.context} {args.products}, {arm}: "
        f"compiled in {took:.0f} s, {1e3 * waited:.2f} ms a step, "
        f"{1e3 * ahead:.2f} with one in flight, "
        f"{step.memory_analysis().temp_size_in_bytes / 1e6:.0f} MB of temporaries, "
        f"{alike} of {len(ends[0])} leaves alike, checksum {checksum:08x}, algorithms {dict(algorithms)}",
        flush=True,
    )


def main() -> None:
    """Every arm in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="byte-50m")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--products", default="dtype")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--arms", nargs="+", default=["step", "first", "qat"])
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm:
        one(args.arm, args)
        return
    for arm in args.arms:
        flags = " ".join([os.environ.get("XLA_FLAGS", ""), *(FLAGS[way] for way in arm.split("-") if way in FLAGS)])
        subprocess.run([sys.executable, *sys.argv, "--arm", arm], check=False, env=os.environ | {"XLA_FLAGS": flags})


if __name__ == "__main__":
    main()
