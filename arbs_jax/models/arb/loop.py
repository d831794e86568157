"""The graph and the experts in a loop: each position thinks for as long as it needs, up to a limit.

One iteration, with the same matrices every time, is

    x <- a x + b e + graph(x) + experts(x + graph(x))

where `e` is what entered the loop. `a` and `b = 1 - a` are constants of each channel: a stable linear time-invariant
system that forgets at its own pace and cannot lose its input. They are computed from the channel's number, and are the
model's only floats. How long a position runs is adaptive computation time (Graves, 2016, arXiv:1603.08983): after each
iteration a halting unit says with what probability this was the last; a position halts once these sum to `halt`, what
is left to 1 is its last iteration's, and its result is the mean of its iterations weighted so. Positions that have
halted stay as they are; others may still hear them. Axes: B batch, S positions, D width, X experts, W offsets, L
positions of history, I iterations.
"""

from dataclasses import dataclass
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from arbs_jax.errors import ConfigError
from arbs_jax.layers import COLLECTION, DENSE, PROBES, SPECS, TernaryConfig, TernaryDense, TernaryRMSNorm
from arbs_jax.models.arb.edges import Edges
from arbs_jax.models.arb.experts import Experts, ExpertsConfig
from arbs_jax.models.arb.graph import GraphConfig, MessagePassing, message_band

History = dict[str, jax.Array]


@dataclass(frozen=True)
class LoopConfig:
    """Shape of the loop; its width is that of what enters it."""

    graph: GraphConfig | None
    """Message passing between motifs; None leaves it out."""
    experts: ExpertsConfig | None
    """Mixture of experts; None leaves it out."""
    max_iters: int = 4
    """Iterations after which every position halts."""
    halt: float = 0.99
    """A position halts once its halting probabilities sum to this."""
    retain: tuple[float, float] = (0.5, 0.95)
    """`a` of the first channel and of the last; those between are spaced evenly in their logarithm."""
    shielded: bool = False
    """Whether halting moves the halting unit alone, and not the positions that it reads."""
    remat: bool = True
    """Recompute each iteration in backward in place of keeping its activations."""

    def __post_init__(self) -> None:
        if self.graph is None and self.experts is None:
            raise ConfigError("loop.graph and loop.experts are both None, so the loop has nothing to do; give one")
        if self.max_iters < 1:
            raise ConfigError(f"loop.max_iters must be at least 1, got {self.max_iters}")
        if not 0 < self.halt <= 1:
            raise ConfigError(f"loop.halt must be in (0, 1], got {self.halt}")
        low, high = self.retain
        if not 0 < low <= high < 1:
            raise ConfigError(f"loop.retain must be ordered within (0, 1) for a stable loop, got {self.retain}")


class LoopOutput(NamedTuple):
    """What the loop makes of its input, and at what cost."""

    x_BxSxD: jax.Array
    """Mean of the iterations, weighted by halting, in the dtype of the input."""
    agreement_BxSxW: jax.Array
    """int8, of each position's last iteration, for `observe_edges`; W = 0 without a graph."""
    ponder_BxS: jax.Array
    """float32 in [1, max_iters], expected number of iterations."""
    remainder_BxS: jax.Array
    """float32 in (0, 1], weight of the last iteration."""
    iterations_BxS: jax.Array
    """int32 in [1, max_iters], iterations until the position halted."""
    load_X: jax.Array
    """float32, share of the choices of active positions that fell on each expert; X = 0 without experts."""
    balance: jax.Array
    """float32 (), mean of the balance losses of all iterations by active positions; 0 without experts."""
    halting_cost: jax.Array
    """float32 (), mean of `ponder`: to be paid for, so differentiable."""


class _Carry(NamedTuple):
    """What one iteration hands to the next."""

    x_BxSxD: jax.Array
    mean_BxSxD: jax.Array
    """float32, weighted sum so far."""
    halted_BxS: jax.Array
    """float32, sum of halting probabilities."""
    active_BxS: jax.Array
    """bool."""
    ponder_BxS: jax.Array
    remainder_BxS: jax.Array
    iterations_BxS: jax.Array
    agreement_BxSxW: jax.Array
    counts_X: jax.Array
    """int32, choices so far that fell on each expert."""
    balance: jax.Array
    """float32, sum over iterations by active positions."""


def injection(width: int, retain: tuple[float, float]) -> jax.Array:
    """`a`, float32 (D,): how much of its state each channel keeps in an iteration; `1 - a` is taken from the input."""
    low, high = jnp.log(jnp.float32(retain[0])), jnp.log(jnp.float32(retain[1]))
    return jnp.exp(low + (high - low) * jnp.arange(width, dtype=jnp.float32) / max(width - 1, 1))


def halting_weight(
    probability: jax.Array, halted: jax.Array, active: jax.Array, last: jax.Array, halt: float
) -> tuple[jax.Array, jax.Array]:
    """(weight of this iteration, whether the position halts now); Graves (2016), equations 6 to 8.

    Args:
        probability: float32 (...), of halting now.
        halted: float32 (...), sum of the probabilities before.
        active: bool (...), whether the position runs; others weigh 0 and do not halt again.
        last: bool (), whether no iteration may follow.
        halt: the sum at which to halt.
    """
    halts = active & ((halted + probability >= halt) | last)
    return jnp.where(halts, 1 - halted, jnp.where(active, probability, 0)), halts


class _Iteration(nn.Module):
    """The body of the loop."""

    config: LoopConfig
    ternary: TernaryConfig

    @nn.compact
    def __call__(
        self,
        carry: _Carry,
        number: jax.Array,
        entered_BxSxD: jax.Array,
        band: jax.Array | None,
        context_BxSxD: jax.Array | None,
        earlier_BxLxD: jax.Array | None,
    ) -> tuple[_Carry, jax.Array | None]:
        config, before, active = self.config, carry.x_BxSxD, carry.active_BxS
        last = number == config.max_iters - 1
        update, messages = jnp.zeros_like(before), None
        if config.graph is not None and band is not None:
            graph = MessagePassing(config.graph, self.ternary, name="graph")
            update, agreement, latest = graph(TernaryRMSNorm()(before), band, context_BxSxD, earlier_BxLxD)
            carry = carry._replace(agreement_BxSxW=jnp.where(active[..., None], agreement, carry.agreement_BxSxW))
            messages = latest if earlier_BxLxD is not None else None
        if config.experts is not None:
            experts = Experts(config.experts, self.ternary, name="experts")
            made = experts(TernaryRMSNorm()(before + update), context_BxSxD, active, number)
            update = update + made.update
            running = jnp.sum(active, dtype=jnp.int32).astype(jnp.float32)
            carry = carry._replace(
                counts_X=carry.counts_X + made.counts_X, balance=carry.balance + made.balance * running
            )
        keep_D = injection(before.shape[-1], config.retain)
        mixed = before.astype(jnp.float32) * keep_D + entered_BxSxD.astype(jnp.float32) * (1 - keep_D)
        after = (mixed + update.astype(jnp.float32)).astype(before.dtype)
        return self._halt(carry, jnp.where(active[..., None], after, before), last), messages

    def _halt(self, carry: _Carry, x_BxSxD: jax.Array, last: jax.Array) -> _Carry:
        unit = TernaryDense(features=1, table=True, config=self.ternary, name="halting")
        read_BxSxD = jax.lax.stop_gradient(x_BxSxD) if self.config.shielded else x_BxSxD
        logit_BxS = unit(TernaryRMSNorm()(read_BxSxD).astype(jnp.float32))[..., 0]
        probability_BxS = nn.sigmoid(logit_BxS)
        active = carry.active_BxS
        weight_BxS, halts = halting_weight(probability_BxS, carry.halted_BxS, active, last, self.config.halt)
        iterations_BxS = carry.iterations_BxS + active
        return carry._replace(
            x_BxSxD=x_BxSxD,
            mean_BxSxD=carry.mean_BxSxD + weight_BxS[..., None] * x_BxSxD.astype(jnp.float32),
            halted_BxS=carry.halted_BxS + weight_BxS,
            active_BxS=active & ~halts,
            ponder_BxS=carry.ponder_BxS + weight_BxS * iterations_BxS.astype(jnp.float32),
            remainder_BxS=jnp.where(halts, weight_BxS, carry.remainder_BxS),
            iterations_BxS=iterations_BxS,
        )


class MoEGraph(nn.Module):
    """Positions and their motifs to `LoopOutput`; with a history, to that and the history after these positions.

    State tree: `loop/graph`, `loop/experts` and `loop/halting`, each used, and voting, once an iteration.
    """

    config: LoopConfig
    ternary: TernaryConfig

    @nn.compact
    def __call__(
        self,
        x_BxSxD: jax.Array,
        motif_ids_BxS: jax.Array,
        edges: Edges | None,
        context_BxSxD: jax.Array | None = None,
        history: History | None = None,
    ):
        """One pass.

        Args:
            x_BxSxD: what enters the loop, float32 or bfloat16.
            motif_ids_BxS: int32, see `EdgeConfig.motifs`.
            edges: integer state; read only with a graph.
            context_BxSxD: what conditions messages and routing, such as a reading of the ledger.
            history: see `empty_history`; for decoding a few positions at a time, with edges that stay as they are.

        Raises:
            ConfigError: there is a graph but no edges.
        """
        config, band = self.config, None
        if config.graph is not None:
            if edges is None:
                raise ConfigError("loop.graph is on and edges are None; pass edges (`empty_edges`) or turn it off")
            if history is not None:
                motif_ids_BxS = jnp.concatenate([history["ids"], motif_ids_BxS.astype(jnp.int32)], axis=1)
            band = message_band(config.graph, edges, motif_ids_BxS)
        body = nn.remat(_Iteration, prevent_cse=False) if config.remat else _Iteration
        loop = nn.scan(
            body,
            variable_broadcast=(COLLECTION, PROBES, DENSE, SPECS),
            split_rngs={"params": False},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast, 0),
            length=config.max_iters,
        )(config, self.ternary, name="loop")
        numbers = jnp.arange(config.max_iters, dtype=jnp.int32)
        earlier = None if history is None else history["messages"]
        carry, messages = loop(self._start(x_BxSxD), numbers, x_BxSxD, band, context_BxSxD, earlier)
        output = _output(carry, x_BxSxD.dtype)
        if history is None:
            return output
        return output, {"ids": motif_ids_BxS[:, -history["ids"].shape[1] :], "messages": messages}

    def _start(self, x_BxSxD: jax.Array) -> _Carry:
        graph, experts = self.config.graph, self.config.experts
        positions = x_BxSxD.shape[:2]
        zero_BxS = jnp.zeros(positions, jnp.float32)
        return _Carry(
            x_BxSxD=x_BxSxD,
            mean_BxSxD=jnp.zeros(x_BxSxD.shape, jnp.float32),
            halted_BxS=zero_BxS,
            active_BxS=jnp.ones(positions, jnp.bool_),
            ponder_BxS=zero_BxS,
            remainder_BxS=zero_BxS,
            iterations_BxS=jnp.zeros(positions, jnp.int32),
            agreement_BxSxW=jnp.zeros((*positions, graph.edges.window if graph else 0), jnp.int8),
            counts_X=jnp.zeros((experts.experts if experts else 0,), jnp.int32),
            balance=jnp.float32(0),
        )


def _output(carry: _Carry, dtype: jnp.dtype) -> LoopOutput:
    runs = jnp.sum(carry.iterations_BxS, dtype=jnp.int32).astype(jnp.float32)
    choices = jnp.sum(carry.counts_X, dtype=jnp.int32).astype(jnp.float32)
    return LoopOutput(
        x_BxSxD=carry.mean_BxSxD.astype(dtype),
        agreement_BxSxW=carry.agreement_BxSxW,
        ponder_BxS=carry.ponder_BxS,
        remainder_BxS=carry.remainder_BxS,
        iterations_BxS=carry.iterations_BxS,
        load_X=carry.counts_X.astype(jnp.float32) / choices,
        balance=carry.balance / runs,
        halting_cost=jnp.mean(carry.ponder_BxS),
    )


def empty_history(config: LoopConfig, batch: int, width: int, dtype: jnp.dtype) -> History:
    """What positions to come may hear of those before them: nothing yet.

    Returns:
        `ids` int32 (B, L), motifs of the last `lookback` positions, -1 for none; `messages` (I, B, L, D), what they
        said in each iteration.

    Raises:
        ConfigError: there is no graph; positions then do not hear each other, and need no history.
    """
    if config.graph is None:
        raise ConfigError("loop.graph is None, so there is no history to keep; pass history=None")
    positions = (batch, config.graph.lookback)
    return {
        "ids": jnp.full(positions, -1, jnp.int32),
        "messages": jnp.zeros((config.max_iters, *positions, width), dtype),
    }
