"""A mixture of experts without a capacity: every position reaches the `top_k` experts that it chose.

Positions are sorted by expert and each expert multiplies its own run of rows (`arbs_kernels.grouped_matmul`). Axes: M
positions of all sequences, D width, X experts, K choices of a position.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from arbs_jax.errors import ConfigError
from arbs_jax.layers import TernaryConfig, TernaryDense, TernaryExperts, TernaryRMSNorm
from arbs_jax.models.checks import require_positive


@dataclass(frozen=True)
class ExpertsConfig:
    """Shape of the experts; their width is that of what they are applied to."""

    experts: int = 8
    """Experts, each a gated MLP."""
    hidden: int = 320
    """Channels of an expert's MLP."""
    top_k: int = 2
    """Experts that a position reaches."""
    router_hidden: int = 0
    """Channels in which positions and centroids are compared; 0 compares them in those of the position."""
    shielded: bool = False
    """Whether the balance loss moves the routing centroids alone, and not the positions; the centroids then vote twice,
    once for each."""

    def __post_init__(self) -> None:
        require_positive("experts", self, "experts", "hidden", "top_k")
        if self.router_hidden < 0:
            raise ConfigError(f"experts.router_hidden must be at least 0, got {self.router_hidden}")
        if self.top_k > self.experts:
            raise ConfigError(
                f"experts.top_k must be at most experts.experts, got {self.top_k} and {self.experts}; lower top_k"
            )


class Routing(NamedTuple):
    """Where positions go."""

    experts_MxK: jax.Array
    """int32, chosen experts, the most probable first, ties by number; X for positions that go nowhere."""
    weights_MxK: jax.Array
    """float32, probabilities of the chosen, summing to 1."""
    counts_X: jax.Array
    """int32, positions that chose each expert."""
    balance: jax.Array
    """float32 (), see `balance_loss`."""


class ExpertsOutput(NamedTuple):
    """What the experts make of positions, and how evenly these were spread."""

    update: jax.Array
    """In the shape and dtype of the input; 0 for inactive positions."""
    counts_X: jax.Array
    """int32, active positions that each expert took; their sum is `top_k` times the active positions."""
    balance: jax.Array
    """float32 (), see `balance_loss`."""


def balance_loss(probability_MxX: jax.Array, counts_X: jax.Array, active_M: jax.Array) -> jax.Array:
    """`X * sum_x load_x * mean probability_x` (Fedus et al., 2021, equation 4): 1 when even, X when all choose one.

    The load is the share of choices, which sums to 1 and has no gradient. Means are over active positions; 0 without
    any.
    """
    load_X = counts_X.astype(jnp.float32) / jnp.maximum(jnp.sum(counts_X, dtype=jnp.int32), 1).astype(jnp.float32)
    active = active_M.astype(jnp.float32)
    mean_X = jnp.sum(probability_MxX * active[:, None], axis=0) / jnp.maximum(jnp.sum(active), 1)
    return counts_X.shape[0] * jnp.sum(load_X * mean_X)


def route(logits_MxX: jax.Array, active_M: jax.Array, top_k: int) -> Routing:
    """Choices from float32 logits; inactive positions go nowhere and count nowhere."""
    experts = logits_MxX.shape[-1]
    probability_MxX = jax.nn.softmax(logits_MxX, axis=-1)
    # `top_k` puts the lower index first among equals.
    chosen_MxK, experts_MxK = jax.lax.top_k(probability_MxX, top_k)
    experts_MxK = jnp.where(active_M[:, None], experts_MxK.astype(jnp.int32), experts)
    counts_X = jnp.zeros((experts,), jnp.int32).at[experts_MxK.reshape(-1)].add(1, mode="drop")
    weights_MxK = chosen_MxK / jnp.sum(chosen_MxK, axis=-1, keepdims=True)
    return Routing(experts_MxK, weights_MxK, counts_X, balance_loss(probability_MxX, counts_X, active_M))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def rearrange(copies: int, rows: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    """`copies` of each row `(M, D)`, side by side and then in another order: `(copies M, D)`.

    `order` and `inverse` int32 (copies M,) are permutations that undo each other. The gradient is gathered, where that
    of a plain gather would be scattered: faster, and in one order of summation.
    """
    return rows[order // copies]


def _rearrange_forward(copies: int, rows: jax.Array, order: jax.Array, inverse: jax.Array):
    return rearrange(copies, rows, order, inverse), inverse


def _rearrange_backward(copies: int, inverse: jax.Array, dy: jax.Array):
    own = dy[inverse].reshape(-1, copies, dy.shape[-1])
    return jnp.sum(own, axis=1, dtype=jnp.float32).astype(dy.dtype), None, None


rearrange.defvjp(_rearrange_forward, _rearrange_backward)


class Router(nn.Module):
    """Positions `(M, D)`, and their context if there is any, to float32 logits `(M, X)`.

    Inner products of the normalised position with the routing centroids, the rows of a ternary table; the context has
    centroids of its own. With `router_hidden` a projection and SiLU come before, and are normalised again.
    """

    config: ExpertsConfig
    ternary: TernaryConfig

    @nn.compact
    def __call__(self, x_MxD: jax.Array, context_MxD: jax.Array | None) -> jax.Array:
        hidden = self.config.router_hidden

        def compare(name: str, vectors: jax.Array) -> jax.Array:
            table = TernaryDense(features=self.config.experts, table=True, config=self.ternary, name=name)
            if hidden:
                project = TernaryDense(features=hidden, config=self.ternary, name=f"{name}_proj")
                vectors = nn.silu(project(TernaryRMSNorm()(vectors)))
            return table(TernaryRMSNorm()(vectors.astype(jnp.float32)))

        logits_MxX = compare("centroids", x_MxD)
        if context_MxD is not None:
            logits_MxX = logits_MxX + compare("context_centroids", context_MxD)
        return logits_MxX


class Experts(nn.Module):
    """Normalised positions `(..., D)` to `ExpertsOutput`: the weighted sum of `top_k` SiLU-gated MLPs.

    Inactive positions (bool (...), all active by default) cost no expert anything, and vote for none.
    `use` is the number of this use of the experts in a pass.
    """

    config: ExpertsConfig
    ternary: TernaryConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        context: jax.Array | None = None,
        active: jax.Array | None = None,
        use: jax.Array | int = 0,
    ) -> ExpertsOutput:
        config = self.config
        x_MxD = x.reshape(-1, x.shape[-1])
        context_MxD = None if context is None else context.reshape(-1, context.shape[-1])
        active_M = jnp.ones(x_MxD.shape[:1], jnp.bool_) if active is None else active.reshape(-1)
        router = Router(config, self.ternary, name="router")
        routing = route(router(x_MxD, context_MxD), active_M, config.top_k)
        if config.shielded:
            alone = jax.nn.softmax(router(*jax.lax.stop_gradient((x_MxD, context_MxD))), axis=-1)
            routing = routing._replace(balance=balance_loss(alone, routing.counts_X, active_M))

        chosen = routing.experts_MxK.reshape(-1)
        number = jnp.arange(chosen.shape[0], dtype=jnp.int32)
        # Stable: in order of (expert, position). Those that go nowhere come last, where rows belong to no expert.
        order = jax.lax.sort((chosen, number), num_keys=1, is_stable=True)[1]
        inverse = jnp.zeros_like(order).at[order].set(number, unique_indices=True)

        def grouped(name: str, features: int, rows: jax.Array) -> jax.Array:
            layer = TernaryExperts(experts=config.experts, features=features, config=self.ternary, name=name)
            return layer(rows, routing.counts_X, use)

        rows = rearrange(config.top_k, x_MxD, order, inverse)
        hidden = nn.silu(grouped("gate_proj", config.hidden, rows)) * grouped("up_proj", config.hidden, rows)
        made = rearrange(1, grouped("down_proj", x.shape[-1], hidden), inverse, order)
        made_MxKxD = made.reshape(-1, config.top_k, x.shape[-1]).astype(jnp.float32)
        update = jnp.sum(made_MxKxD * routing.weights_MxK[..., None], axis=1).astype(x.dtype)
        return ExpertsOutput(update.reshape(x.shape), routing.counts_X, routing.balance)
