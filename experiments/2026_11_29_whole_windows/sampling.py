"""Bytes a second that a model draws with weights decoded once, with scales made once, and with neither.

    python experiments/2026_11_29_whole_windows/sampling.py [--preset byte-1b] [--bytes 200]

Fresh state, whose text is noise; the first bytes, which compile, are not counted. Memory is that of what is read.
"""

import argparse
import itertools
import sys
import time
from pathlib import Path

import jax

sys.path.insert(0, str(Path(__file__).parents[1] / "2026_11_20_rules"))

from harness import Setting

from arbs_jax.cli.text import inference_variables
from arbs_jax.layers import DENSE
from arbs_jax.sampling import Generator, SamplingConfig
from arbs_jax.training.program import Program


def main() -> None:
    """A line each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="byte-1b")
    parser.add_argument("--bytes", type=int, default=200)
    flags = parser.parse_args()
    print(jax.devices()[0].device_kind, jax.__version__, flush=True)
    program = Program(Setting(preset=flags.preset, context=512).config("latent10"))
    state = program.init_state()
    scales = inference_variables(program, state, packed=True)
    leaves = {name: tree for name, tree in scales.items() if name != DENSE}
    for what, make in (
        ("scales made once", lambda: scales),
        ("from accumulators", lambda: leaves),
        ("weights decoded once", lambda: inference_variables(program, state)),
    ):
        variables = make()
        read = variables[DENSE] if what.startswith("weights") else variables
        generator = Generator(program.model, variables, SamplingConfig(seed=1), flags.bytes + 20)
        drawn = generator(b"The ", flags.bytes + 10)
        text = list(itertools.islice(drawn, 10))
        start = time.perf_counter()
        text += list(drawn)
        rate = flags.bytes / (time.perf_counter() - start)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(read))
        print(f"{what:<24s} {rate:8.0f} bytes/s, {size / 1e6:8.1f} MB read at most, text {sum(text)}", flush=True)


if __name__ == "__main__":
    main()
