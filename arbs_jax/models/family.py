"""What training, evaluation and the command line ask of a model, whichever it is: the byte model or the ARB model."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from arbs_jax.layers import MEMORY, TernaryConfig
from arbs_jax.models.arb.config import ArbConfig
from arbs_jax.models.arb.model import ArbLM, empty_memory
from arbs_jax.models.arb.presets import PARTS
from arbs_jax.models.arb.sequencer import TRIGRAM, targets
from arbs_jax.models.arb.stages import arb_stages
from arbs_jax.models.attention import takes_cudnn
from arbs_jax.models.byte_lm import ByteLM, ModelConfig, cross_entropy
from arbs_jax.models.byte_stages import byte_stages
from arbs_jax.models.stages import Stage
from arbs_jax.rules.noise import run_key
from arbs_jax.votes import matrix_specs

AnyConfig = ModelConfig | ArbConfig

_TOKENS = (1, 8)
"""Shape of the tokens with which models are initialised; nothing depends on it."""
_FRESH = 2**31 - 1


def _fresh_key(seed: jax.Array) -> jax.Array:
    """Key of fresh state, none of those that training derives; its draws are compiled sooner than JAX's own."""
    return jax.random.fold_in(run_key(seed), _FRESH)


class Family(Protocol):
    """A model with its ternary configuration; pure functions over collections and uint8 tokens `(B, T+1)`."""

    @property
    def module(self) -> Any:
        """The Linen module; untyped because Linen types `apply` as a union with mutable collections."""
        ...

    @property
    def specs(self) -> Any:
        """Logical shapes of every matrix."""
        ...

    @property
    def stacks(self) -> tuple[str, ...]:
        """Subtrees whose leaves are stacked over layers."""
        ...

    @property
    def parts(self) -> Mapping[str, str]:
        """Names of parts by the path of their state, where they differ from it (`arbs_jax.audit.audit`)."""
        ...

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The chain that is trained."""
        ...

    def variables(self, seed: jax.Array) -> dict[str, Any]:
        """All collections of a fresh model, bookkeeping among them, from an integer seed ()."""
        ...

    def nats(self, variables: dict[str, Any], tokens: jax.Array) -> jax.Array:
        """Nats of every predicted byte, float32 `(B, self.predicted(T))`."""
        ...

    def predicted(self, context: int) -> int:
        """Bytes predicted in a window of `context` bytes and the one after them."""
        ...

    def takes_cudnn(self, batch: int, context: int) -> bool:
        """Whether attention goes to cuDNN here (`arbs_jax.models.attention`)."""
        ...

    @property
    def in_one_graph(self) -> bool:
        """Whether a GPU takes the loops of a step into its graph of kernels (`arbs_jax.compilation.step_options`), as
        was measured to gain."""
        ...


@dataclass(frozen=True)
class ByteFamily:
    """The byte model (`arbs_jax.models.byte_lm`)."""

    config: ModelConfig
    ternary: TernaryConfig
    stacks = ("blocks",)
    in_one_graph = True

    @property
    def parts(self) -> Mapping[str, str]:
        """See `Family`."""
        return {}

    @cached_property
    def module(self) -> Any:
        """See `Family`."""
        return ByteLM(self.config, self.ternary)

    @cached_property
    def specs(self) -> Any:
        """See `Family`."""
        return matrix_specs(self.module, jax.ShapeDtypeStruct(_TOKENS, jnp.int32))

    @property
    def stages(self) -> tuple[Stage, ...]:
        """See `Family`."""
        return byte_stages(self.config, self.ternary)

    def variables(self, seed: jax.Array) -> dict[str, Any]:
        """See `Family`."""
        return self.module.init(_fresh_key(seed), jnp.zeros(_TOKENS, jnp.int32))

    def nats(self, variables: dict[str, Any], tokens: jax.Array) -> jax.Array:
        """See `Family`."""
        tokens = tokens.astype(jnp.int32)
        return cross_entropy(self.module.apply(variables, tokens[:, :-1]), tokens[:, 1:])

    def predicted(self, context: int) -> int:
        """See `Family`."""
        return context

    def takes_cudnn(self, batch: int, context: int) -> bool:
        """See `Family`."""
        q, k = (
            jax.ShapeDtypeStruct((batch, context, heads, self.config.head_dim), self.config.dtype)
            for heads in (self.config.heads, self.config.kv_heads)
        )
        return takes_cudnn(self.config.attention, q, k, k)


@dataclass(frozen=True)
class ArbFamily:
    """The ARB model (`arbs_jax.models.arb`)."""

    config: ArbConfig
    ternary: TernaryConfig
    in_one_graph = False

    @property
    def parts(self) -> Mapping[str, str]:
        """See `Family`."""
        return PARTS

    @property
    def stacks(self) -> tuple[str, ...]:
        """See `Family`."""
        there = {"blocks": self.config.attention, "head_layers": self.config.head_layers}
        return tuple(name for name, count in there.items() if count)

    @cached_property
    def module(self) -> Any:
        """See `Family`."""
        return ArbLM(self.config, self.ternary)

    @cached_property
    def specs(self) -> Any:
        """See `Family`."""
        return matrix_specs(self.module, jax.ShapeDtypeStruct(_TOKENS, jnp.int32), whole=True)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """See `Family`."""
        return arb_stages(self.config, self.ternary)

    def variables(self, seed: jax.Array) -> dict[str, Any]:
        """See `Family`."""
        fresh = self.module.init(_fresh_key(seed), jnp.zeros(_TOKENS, jnp.int32))
        return {**fresh, MEMORY: empty_memory(self.config)}

    def nats(self, variables: dict[str, Any], tokens: jax.Array) -> jax.Array:
        """See `Family`."""
        weights = {name: tree for name, tree in variables.items() if name != MEMORY}
        logits = self.module.apply(weights, tokens[:, :-1], variables.get(MEMORY))
        return cross_entropy(logits, targets(tokens))

    def predicted(self, context: int) -> int:
        """See `Family`."""
        return context + 1 - TRIGRAM

    def takes_cudnn(self, batch: int, context: int) -> bool:
        """See `Family`."""
        if not self.config.attention:
            return False
        shape = (batch, self.predicted(context), self.config.heads, self.config.head_dim)
        q = jax.ShapeDtypeStruct(shape, self.config.dtype)
        return takes_cudnn("auto", q, q, q)


def family_of(config: AnyConfig, ternary: TernaryConfig) -> Family:
    """The family that a configuration is of."""
    return ArbFamily(config, ternary) if isinstance(config, ArbConfig) else ByteFamily(config, ternary)
