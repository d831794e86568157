"""A chain with what the byte model has not: a sparse table, experts, a loop, memory that observes, terms of a loss."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from arbs_jax import Integral, TernaryConfig, TernaryDense, TernaryExperts, TernaryTable
from arbs_jax.models.stages import Stage
from arbs_jax.rules import RuleConfig, Schedule, make_rule
from arbs_jax.state import MatrixSpec
from arbs_kernels.row_update import put_rows

ROWS, WIDTH, EXPERTS, LOOPS, GROUP = 40, 8, 3, 2, 4
RULE = Integral(schedule=Schedule(steps=20, warmup=2), votes_per_step=2, fraction_bits=40)
MARK, MARKED = 5, 2
"""Exponent that observing writes into rows of the table, and how many they are, from the number of the step on."""


class Front(nn.Module):
    """Rows of a table, a few of others beside them, each through the matrix of its expert; in whole numbers."""

    ternary: TernaryConfig
    rows: int = ROWS
    width: int = WIDTH

    @nn.compact
    def __call__(self, ids, sizes):
        book = TernaryTable(num_embeddings=self.rows, features=self.width, config=self.ternary, name="book")
        near = jax.lax.stop_gradient(book.peek((ids + 1) % self.rows))
        x = book(ids) + near
        return TernaryExperts(experts=EXPERTS, features=self.width, config=self.ternary, name="experts")(x, sizes)


def ternary_config(rule: Any) -> TernaryConfig:
    return TernaryConfig(rule=rule, group_size=GROUP)


def specs(rows: int = ROWS, width: int = WIDTH) -> dict[str, Any]:
    """Specs nested like the state."""
    square = MatrixSpec(width, width, GROUP)
    return {
        "front": {
            "book": MatrixSpec(rows, width, GROUP, fan_in=1, table=True, sparse=True),
            "experts": MatrixSpec(width, width, GROUP, experts=EXPERTS),
        },
        "loop": square,
        "last": square,
    }


def observe(subtrees, memory, events, step, key):
    """Counts uses of rows, remembers the order of micro-batches, and writes into the rows that the step names."""
    book = subtrees["front"]["book"]
    marked = jnp.full((MARKED, book["exponent"].shape[1]), MARK, jnp.int8)
    rows = (step + jnp.arange(MARKED, dtype=jnp.int32)) % book["trits"].shape[0]
    book = book | {"exponent": put_rows(book["exponent"], rows, marked)}
    uses = memory["usage"]["uses"].at[events["ids"].reshape(-1)].add(jnp.int16(1))
    first = events["ids"][:, 0].astype(jnp.int64)
    return {"front": subtrees["front"] | {"book": book}}, {"usage": {"uses": uses, "first": first}}


def stages(rule: Any = RULE, rows: int = ROWS, width: int = WIDTH, told: int | None = None) -> tuple[Stage, ...]:
    """The chain; the batch is {"ids": int32 (M,), "sizes": int32 (X,), "y": float32 (M, width)}."""
    config = ternary_config(rule)
    front_module: Any = Front(config, rows, width)
    dense: Any = TernaryDense(features=width, config=config)

    def of(variables, name):
        return {key: tree[name] for key, tree in variables.items() if key != "memory"}

    def front(variables, carry, batch):
        used = variables["memory"]["usage"]["uses"][batch["ids"]]
        x = front_module.apply(of(variables, "front"), batch["ids"], batch["sizes"])
        return x + 0 * used[:, None].astype(jnp.float32), {"ids": batch["ids"]}

    def loop(variables, x, batch):
        own = of(variables, "loop")
        return jax.lax.scan(lambda x, _: (jnp.tanh(x + dense.apply(own, x)), None), x, length=LOOPS)[0]

    def last(variables, x, batch):
        y = dense.apply(of(variables, "last"), x)
        loss = jnp.mean((y - batch["y"]) ** 2)
        # Differentiated, this term would not be finite.
        return loss, {"square": loss, "root": jnp.sqrt(jnp.sum(0 * y))}

    lookups = lambda batch: {"front/book": batch["ids"].size if told is None else told}  # noqa: E731
    return (
        Stage(("front",), front, lookups=lookups, memory=("usage",), observe=observe),
        Stage(("loop",), loop),
        Stage(("last",), last),
    )


def state(rule: Any = RULE, rows: int = ROWS, width: int = WIDTH) -> dict[str, Any]:
    """Fresh state; pure."""
    config = ternary_config(rule)
    ids, sizes = jnp.zeros((1,), jnp.int32), jnp.ones((EXPERTS,), jnp.int32)
    dense = TernaryDense(features=width, config=config)
    keys = jax.random.split(jax.random.key(7), 3)
    x = jnp.zeros((1, width), jnp.float32)
    return {
        "front": Front(config, rows, width).init(keys[0], ids, sizes)["ternary"],
        "loop": dense.init(keys[1], x)["ternary"],
        "last": dense.init(keys[2], x)["ternary"],
    }


def latent() -> Any:
    """A rule that rounds at random, in votes and updates, and keeps moments of rows."""
    return make_rule(RuleConfig("latent18", warmup=2), steps=20, votes_per_step=2)


def memory(rows: int = ROWS, micro: int = 2) -> dict[str, Any]:
    """Fresh memory."""
    return {"usage": {"uses": jnp.zeros((rows,), jnp.int16), "first": jnp.zeros((micro,), jnp.int64)}}


def batches(
    micro: int = 2, rows: int = 6, seed: int = 0, width: int = WIDTH, table: int = ROWS
) -> dict[str, jax.Array]:
    """Random micro-batches; the second expert never has a row, and some rows are looked up more than once."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, table // 2, (micro, rows))
    ids[:, -1] = ids[0, 0]
    sizes = np.tile([rows // 2, 0, rows - rows // 2], (micro, 1))
    return {
        "ids": jnp.asarray(ids, jnp.int32),
        "sizes": jnp.asarray(sizes, jnp.int32),
        "y": jnp.asarray(rng.standard_normal((micro, rows, width)), jnp.float32),
    }
