"""Do edges that pay a toll find the motifs that matter? See README.md."""

import argparse
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from arbs_jax import TernaryConfig
from arbs_jax.models.arb.edge_updates import observe_edges
from arbs_jax.models.arb.edges import EdgeConfig, empty_edges, pair_weights
from arbs_jax.models.arb.experts import ExpertsConfig
from arbs_jax.models.arb.graph import GraphConfig
from arbs_jax.models.arb.loop import LoopConfig, MoEGraph
from arbs_jax.models.stages import Stage
from arbs_jax.rules.registry import RuleConfig, make_rule
from arbs_jax.training.layerwise import Sweep
from arbs_jax.votes import matrix_specs

WIDTH, BATCH, LENGTH, SENDERS = 64, 16, 32, 6
MOTIFS = 2 * SENDERS
NEVER = 2**30
CASES = {
    "no edges": {},
    "agreement alone": {"toll": NEVER, "dense_motifs": MOTIFS},
    "toll of 1 in 16, dense": {"dense_motifs": MOTIFS},
    "toll of 1 in 16, slots": {"dense_motifs": 0, "buckets": 8},
    "true edges given": {"dense_motifs": MOTIFS},
}


def make_batch(rng: np.random.Generator, codes: np.ndarray) -> dict[str, np.ndarray]:
    """Sequences of senders; receiver `m` follows sender `m - SENDERS` at one or two positions and wants its payload.

    A position's vector is its motif's code plus a payload of its own. One micro-batch.
    """
    ids = np.zeros((BATCH, LENGTH), np.int32)
    payload = rng.standard_normal((BATCH, LENGTH, WIDTH)).astype(np.float32)
    wanted = np.zeros_like(payload)
    for row in range(BATCH):
        at = 0
        while at < LENGTH - 3:
            sender, gap = int(rng.integers(0, SENDERS)), int(rng.integers(1, 3))
            ids[row, at] = sender
            if gap == 2:
                ids[row, at + 1] = rng.integers(0, SENDERS)
            here = at + gap
            ids[row, here] = sender + SENDERS
            wanted[row, here] = payload[row, np.flatnonzero(ids[row, :here] == sender)[-1]]
            at = here + 1
    batch = {"x": codes[ids] + payload, "ids": ids, "wanted": wanted, "counts": ids >= SENDERS}
    return {name: leaf[None] for name, leaf in batch.items()}


def run(case: str, steps: int, seed: int) -> dict[str, float]:
    """Trains once; the mean squared error of the last fifty steps, and which edges there were at the end."""
    config = EdgeConfig(motifs=MOTIFS, window=3, **CASES[case])
    rule = make_rule(RuleConfig("latent10", learning_rate=0.1), steps=steps, votes_per_step=1)
    shape = LoopConfig(GraphConfig(config, lookback=8), ExpertsConfig(experts=4, hidden=64), max_iters=2)
    model = MoEGraph(shape, TernaryConfig(rule=rule, group_size=32))
    edges = empty_edges(config)
    if case == "true edges given":
        receiver = jnp.arange(SENDERS, MOTIFS, dtype=jnp.int32)
        edges = {"score": edges["score"].at[receiver, receiver - SENDERS].set(jnp.int8(127))}
    inputs = jnp.zeros((BATCH, LENGTH, WIDTH), jnp.float32), jnp.zeros((BATCH, LENGTH), jnp.int32), edges
    ternary = {"loop": jax.jit(model.init)(jax.random.key(seed), *inputs)["ternary"]}

    def apply(variables, carry, batch):
        own = {name: variables[name]["loop"] for name in ("ternary", "probes") if name in variables}
        out = model.apply(own, batch["x"], batch["ids"], variables["memory"]["edges"])
        error = jnp.mean(jnp.square(out.x_BxSxD - batch["wanted"]), axis=-1)
        error = jnp.sum(error * batch["counts"]) / jnp.sum(batch["counts"])
        loss = error + 0.01 * out.balance + 0.001 * out.halting_cost
        return (loss, {"error": error}), {"ids": batch["ids"], "agreement": out.agreement_BxSxW}

    def observe(subtrees, memory, events, step, key):
        if case in ("no edges", "true edges given"):
            return subtrees, memory
        counted = observe_edges(config, memory["edges"], events["ids"], events["agreement"], step)
        return subtrees, {"edges": counted}

    stage = Stage(("loop",), apply, memory=("edges",), observe=observe)
    sweep = jax.jit(Sweep((stage,), rule, {"loop": matrix_specs(model, *inputs)}))
    rng = np.random.default_rng(seed)
    codes = rng.standard_normal((MOTIFS, WIDTH)).astype(np.float32)
    memory, errors, start = {"edges": edges}, [], time.perf_counter()
    for step in range(steps):
        batch = make_batch(rng, codes)
        swept = sweep(ternary, batch, jnp.int32(step), jax.random.key(seed), jnp.asarray(False), memory)
        ternary, memory = swept.ternary, swept.memory
        errors.append(float(swept.terms["error"]))
    motifs = jnp.arange(MOTIFS, dtype=jnp.int32)
    found = np.asarray(pair_weights(config, memory["edges"], motifs, motifs)) != 0
    true = np.eye(MOTIFS, k=-SENDERS, dtype=bool)
    return {
        "case": case,
        "seed": seed,
        "error": round(float(np.mean(errors[-50:])), 4),
        "true_edges": int((found & true).sum()),
        "other_edges": int((found & ~true).sum()),
        "seconds": round(time.perf_counter() - start, 1),
    }


def main() -> None:
    """Runs every case and writes metrics.json beside this file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=2)
    arguments = parser.parse_args()
    results = []
    for case in CASES:
        for seed in range(arguments.seeds):
            results.append(run(case, arguments.steps, seed))
            print(results[-1], flush=True)
    Path(__file__).with_name("metrics.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
