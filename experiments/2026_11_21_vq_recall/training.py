"""Does a book in training stay findable, and does revival help? 4,096 rows of 16 channels, 300 steps, candidates 64.

    python experiments/2026_11_21_vq_recall/training.py

Inputs are 200 normal centres with noise of 0.1; the loss is reconstruction, commitment and codebook.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from arbs_jax import TernaryConfig, matrix_specs, update, value_and_votes
from arbs_jax.models.arb.usage import empty_usage, observe_usage, observe_vq
from arbs_jax.models.arb.vq import SharedVQ, VQConfig, vq_events
from arbs_jax.rules.registry import LATENT_RULES
from arbs_jax.rules.schedule import Schedule

STEPS, BATCH, WIDTH = 300, 128, 16
TERNARY = TernaryConfig(replace(LATENT_RULES["latent10"], schedule=Schedule(steps=STEPS, warmup=10)), group_size=16)
CONFIG = VQConfig(
    rows=4096, width=WIDTH, dim=WIDTH, exact_rows=1, blocks=16, block_rows=4, revive_after=20, commitment=1.0
)
MODEL = SharedVQ(CONFIG, TERNARY)
KEY = jax.random.key(5)


def stepper(specs, revives: bool):
    """One jitted step: (state, usage, x, step) to (state, usage, distance, recall)."""

    def loss(variables, x):
        out = MODEL.apply(variables, x)
        return jnp.mean(jnp.square(out.output_BxSxD - x)) + jnp.mean(out.commitment_BxS + out.codebook_BxS)

    @jax.jit
    def step(state, usage, x, at):
        _, votes = value_and_votes(loss, TERNARY.rule, specs, {"codebook": BATCH})(
            state, x, key=jax.random.fold_in(KEY, at)
        )
        out = MODEL.apply({"ternary": state}, x)
        events = vq_events(out, worst=8)
        exact = MODEL.apply({"ternary": state}, out.latent_BxSxK, True, method="nearest")
        state = update(TERNARY.rule, specs, state, votes, at, KEY)
        if revives:
            book, usage = observe_vq(dict(state["codebook"]), usage, events, at, KEY, CONFIG, TERNARY)
            state = state | {"codebook": book}
        else:
            usage = observe_usage(usage, events["ids"], at, CONFIG)
        return state, usage, jnp.mean(out.codebook_BxS), jnp.mean(exact == out.ids_BxS)

    return step


def main() -> None:
    centres = np.random.default_rng(0).standard_normal((200, WIDTH)).astype(np.float32)
    example = jnp.zeros((1, BATCH, WIDTH), jnp.float32)
    born = jax.jit(MODEL.init)(jax.random.key(0), example)["ternary"]
    specs = matrix_specs(MODEL, example)
    print("| revival | steps | distance | recall |\n|---|---:|---:|---:|")
    for revives in (False, True):
        state, usage, step = born, empty_usage(CONFIG), stepper(specs, revives)
        rng = np.random.default_rng(1)
        seen = []
        for at in range(STEPS):
            x = centres[rng.integers(0, 200, BATCH)] + 0.1 * rng.standard_normal((BATCH, WIDTH)).astype(np.float32)
            state, usage, *measured = step(state, usage, jnp.asarray(x[None]), jnp.int32(at))
            seen.append([float(value) for value in measured])
            if at + 1 in (20, 100, 200, 300):
                distance, recall = np.mean(seen[-20:], axis=0)
                print(
                    f"| {'yes' if revives else 'no'} | {at - 18} to {at + 1} | {distance:.3f} | {recall:.3f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
