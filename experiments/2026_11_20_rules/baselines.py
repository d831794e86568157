"""Float baselines on optax: float32 AdamW, and quantisation-aware training in the manner of BitNet b1.58."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from arbs_jax.layers import DENSE
from arbs_jax.models import cross_entropy
from arbs_jax.state import MatrixSpec
from arbs_kernels.decode import expand_groups, group_sum

GROUP = 32
WARMUP = 100


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FloatState:
    """Float latents, optimizer moments, step and learning rate of one run."""

    params: Any
    moments: Any
    step: jax.Array
    rate: jax.Array


def fake_ternary(w: jax.Array) -> jax.Array:
    """`s * clip(round(w/s), -1, 1)`, `s` the mean |w| of each group of 32 columns; gradients pass straight through."""
    columns = w.shape[-1]
    size = group_sum(jnp.ones_like(w), GROUP)
    scale = expand_groups(group_sum(jnp.abs(w), GROUP) / size, columns, GROUP) + 1e-8
    ternary = scale * jnp.clip(jnp.round(w / scale), -1, 1)
    return w + jax.lax.stop_gradient(ternary - w)


@dataclass(frozen=True)
class Baseline:
    """AdamW with decoupled weight decay 0.1, betas 0.9 and 0.95, linear warm-up and a cosine to `final`."""

    name: str
    ternary: bool
    """Whether the forward pass sees ternary weights."""
    final: float = 0.0
    dtype: str = "float32"
    """Of the weights and the moments."""

    def init(self, specs: Any, layers: int, seed: jax.Array, rate: jax.Array) -> FloatState:
        """Normal latents with the library's standard deviations (min(0.1, 1/sqrt(fan_in)))."""
        leaves, structure = jax.tree.flatten(specs, is_leaf=lambda node: isinstance(node, MatrixSpec))
        keys = jax.random.split(jax.random.key(seed), len(leaves))

        def weight(key: jax.Array, spec: MatrixSpec, stacked: bool) -> dict[str, jax.Array]:
            std = min(0.1, (spec.fan_in or spec.in_features) ** -0.5)
            shape = (layers, *spec.shape) if stacked else spec.shape
            return {"weight": std * jax.random.normal(key, shape, jnp.dtype(self.dtype))}

        paths = jax.tree_util.tree_flatten_with_path(specs, is_leaf=lambda node: isinstance(node, MatrixSpec))[0]
        stacked = [path[0].key == "blocks" for path, _ in paths]
        params = structure.unflatten(
            [weight(key, spec, flag) for key, spec, flag in zip(keys, leaves, stacked, strict=True)]
        )
        return FloatState(params, self._optimizer.init(params), jnp.zeros((), jnp.int32), rate)

    @property
    def _optimizer(self) -> optax.GradientTransformation:
        return optax.chain(optax.scale_by_adam(b1=0.9, b2=0.95), optax.add_decayed_weights(0.1))

    def weights(self, params: Any) -> Any:
        """What the forward pass multiplies with."""
        return jax.tree.map(fake_ternary, params) if self.ternary else params

    def step(self, model: Any, steps: int) -> Any:
        """`(state, tokens uint8 (1, B, T+1)) -> (state, loss)`."""
        shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, min(WARMUP, steps // 5), steps, end_value=self.final)

        def step(state: FloatState, tokens: jax.Array) -> tuple[FloatState, jax.Array]:
            window = tokens[0].astype(jnp.int32)

            def loss(params: Any) -> jax.Array:
                logits = model.apply({DENSE: self.weights(params)}, window[:, :-1])
                return cross_entropy(logits, window[:, 1:]).mean()

            value, gradient = jax.value_and_grad(loss)(state.params)
            updates, moments = self._optimizer.update(gradient, state.moments, state.params)
            rate = state.rate * shape(state.step + 1)
            params = jax.tree.map(lambda p, u: (p - rate * u).astype(p.dtype), state.params, updates)
            return FloatState(params, moments, state.step + 1, state.rate), value

        return step


QAT = Baseline("qat", ternary=True)
ADAMW = Baseline("adamw", ternary=False)
ADAMW_BF16 = Baseline("adamw-bf16", ternary=False, dtype="bfloat16")
"""Dense, and nothing in float32: the cheapest that AdamW can be."""
