"""How often is the nearest of the candidates the nearest of all rows? Fresh books, 64 channels.

    python experiments/2026_11_21_vq_recall/recall.py
    python experiments/2026_11_21_vq_recall/recall.py --rows 10000000 --inputs 200 --settings 256x4 1024x4

Inputs are rows of the book plus normal noise, whose strength is given in root mean squares of the row, and normal
inputs that have nothing to do with any row. The share of rows compared is what candidates drawn at random would recall.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

from arbs_jax.models.arb.search import Runs, candidate_rows, nearest_candidate, nearest_row, plant, unit_rows
from arbs_jax.rules import Integral
from arbs_jax.state import MatrixSpec, init_matrix
from arbs_kernels.autodiff import MatmulSpec
from arbs_kernels.table_autodiff import ternary_rows

DIM, GROUP, BUDGET = 64, 32, 2**24
NOISE = (0.5, 1.0, 1.5, 2.0)
SETTINGS = ("4x256", "16x64", "64x16", "256x4", "1024x1", "64x64", "256x16", "1024x4", "1024x16")
"""Runs to probe, fewest rows in a run."""
COLUMNS = "| probes x rows of a run | compared | share of all | noise 0.5 | 1.0 | 1.5 | 2.0 | random | ms an input |"


def queries(peek, rows: int, count: int) -> dict[str, jax.Array]:
    """Inputs (count, 64) by name."""
    rng = np.random.default_rng(0)
    chosen = unit_rows(peek(jnp.asarray(rng.integers(0, rows, count), jnp.int32)))
    noise = rng.standard_normal((count, DIM)).astype(np.float32)
    return {f"{strength}": unit_rows(chosen + strength * noise) for strength in NOISE} | {"random": unit_rows(noise)}


def recall(leaves, runs: Runs, probes: int, count: int) -> str:
    """One row of the table."""
    static = MatmulSpec(DIM, GROUP, Integral())

    def peek(leaves, ids):
        return ternary_rows(ids, leaves, static, jnp.float32)

    exact = jax.jit(lambda leaves, x: nearest_row(x, runs.rows, lambda ids: peek(leaves, ids), BUDGET))
    among = jax.jit(lambda leaves, x: nearest_candidate(x, runs, probes, lambda ids: peek(leaves, ids), BUDGET))
    inputs = queries(lambda ids: peek(leaves, ids), runs.rows, count)
    compared = candidate_rows(inputs["random"][:1], runs, probes).size
    found, elapsed = [], []
    for x in inputs.values():
        guess = jax.block_until_ready(among(leaves, x))
        start = time.perf_counter()
        jax.block_until_ready(among(leaves, x))
        elapsed.append(time.perf_counter() - start)
        found.append(float(jnp.mean(guess == exact(leaves, x))))
    cells = [
        f"{probes} x {runs.span}",
        f"{compared:,}",
        f"{compared / runs.rows:.2%}",
        *(f"{value:.3f}" for value in found),
    ]
    return "| " + " | ".join([*cells, f"{1000 * min(elapsed) / count:.2f}"]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=131_072)
    parser.add_argument("--inputs", type=int, default=1000)
    parser.add_argument("--settings", nargs="+", default=SETTINGS)
    arguments = parser.parse_args()
    spec = MatrixSpec(arguments.rows, DIM, GROUP, fan_in=1, table=True, sparse=True)
    fresh = jax.jit(lambda key: init_matrix(key, spec))(jax.random.key(0))
    print(f"{arguments.rows:,} rows, {arguments.inputs} inputs each\n{COLUMNS}\n|---{'|---:' * 8}|")
    for setting in arguments.settings:
        probes, at_least = (int(number) for number in setting.split("x"))
        runs = Runs(arguments.rows, at_least)
        planted = jax.jit(lambda leaves, runs=runs: plant(leaves, runs, DIM))(fresh)
        print(recall(planted, runs, probes, arguments.inputs), flush=True)
    print(f"\nNot planted:\n{recall(fresh, runs, probes, arguments.inputs)}", flush=True)


if __name__ == "__main__":
    main()
