"""What it is worth that the gated activation keeps one product whole (`arbs_jax.layers.silu_gated`), in both arms.

    python gated.py --batch 64 --context 256

`latent10` and QAT, with it ("gated") and with the formula as JAX differentiates it ("plain"), by turns in one process,
with remat and one step in flight.
"""

import argparse
import sys
from pathlib import Path

import jax
from flax import linen as nn

sys.path.insert(0, str(Path(__file__).parent.parent / "2026_11_20_rules"))
from harness import Setting
from step_cost import arms, by_turns, compiled, random_batches

from arbs_jax.models import byte_lm


def main() -> None:
    """Prints a line an arm."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="byte-50m")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--layers-at-once", type=int, default=12)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--turns", type=int, default=6)
    args = parser.parse_args()
    setting = Setting(args.preset, 1000, args.batch, args.context, dtype="bfloat16", remat=True)
    made = {}
    for way, activation in (("gated", byte_lm.silu_gated), ("plain", lambda gate, up: nn.silu(gate) * up)):
        byte_lm.silu_gated = activation
        lowered = arms(setting, ["latent10"], [args.layers_at_once], ["auto"], ["dtype"], ["qat"])
        made |= {(way, *arm): step for arm, step in lowered.items()}
    steps = compiled(made)
    states = {arm: init() for arm, (_, init) in made.items()}
    batches = random_batches(args.steps, args.batch, args.context)
    seconds = by_turns(steps, states, batches, args.turns, ahead=True)
    for arm, step in steps.items():
        temporaries = step.memory_analysis().temp_size_in_bytes / 1e6
        took = 1e3 * seconds[arm]
        shape = f"{jax.devices()[0].device_kind}, {args.preset} {args.batch} x {args.context}"
        print(f"{shape}, {arm[1]}, {arm[0]}: {took:.2f} ms, {temporaries:.0f} MB of temporaries", flush=True)


if __name__ == "__main__":
    main()
