"""The memory of a step does not grow with the weights: counted in compiled programs of two depths.

Buffers are assigned before LLVM sees the program: memory is, to the byte, that of a thorough compilation.
"""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
import toy_chain
from toy_chain import RULE

from arbs_jax import TernaryConfig, matrix_specs
from arbs_jax.models import ByteLM, ModelConfig
from arbs_jax.models.byte_stages import byte_stages
from arbs_jax.rules import RuleConfig, default_group_size, make_rule
from arbs_jax.training.layerwise import Sweep


def toy_memory(layers, width, rows):
    """The toy chain on one row of activations: (what a sweep is compiled from, its state, its batch)."""
    assert rows == 1
    ternary = jax.eval_shape(lambda: toy_chain.state(layers=layers, width=width))
    batch = {name: jax.ShapeDtypeStruct((1, 1, width), jnp.float32) for name in ("x", "y")}
    return (toy_chain.stages(width=width), RULE, toy_chain.specs(width=width)), ternary, batch


def byte_memory(layers, width, rows, rule="integral"):
    """The byte model on one sequence of `rows` bytes; its matrices have two shapes, so that little is compiled."""
    heads = width // 64
    shape = {"heads": heads, "kv_heads": heads, "head_dim": 64, "hidden": width, "tied": True}
    config = ModelConfig(width=width, layers=layers, context=rows, **shape)
    common = TernaryConfig(
        rule=make_rule(RuleConfig(rule), steps=100, votes_per_step=1), group_size=default_group_size(rule)
    )
    model = ByteLM(config, common)
    tokens = jnp.zeros((1, rows), jnp.int32)
    ternary = jax.eval_shape(lambda: model.init(jax.random.key(0), tokens)["ternary"])
    batch = jax.ShapeDtypeStruct((1, 1, rows + 1), jnp.uint8)
    return (byte_stages(config, common), common.rule, matrix_specs(model, tokens)), ternary, batch


def temporaries(build, rows, layers, width=256, **changes):
    """Bytes of temporaries of a compiled sweep, whose donated state is updated in place, and of the state."""
    arguments, ternary, batch = build(layers, width, rows)
    scalars = (jax.ShapeDtypeStruct((), jnp.int32), jax.random.key(0), jax.ShapeDtypeStruct((), jnp.bool))
    sweep = Sweep(*arguments, **changes)
    compiled = jax.jit(lambda *inputs: sweep(*inputs), donate_argnums=0).lower(ternary, batch, *scalars).compile()
    memory = compiled.memory_analysis()
    state = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(ternary))
    assert memory.alias_size_in_bytes >= state
    return memory.temp_size_in_bytes, state


@pytest.mark.parametrize(
    ("build", "rows", "together"),
    [
        pytest.param(toy_memory, 1, 1, id="toy"),
        pytest.param(byte_memory, 8, 1, id="integral", marks=pytest.mark.slow),
        pytest.param(partial(byte_memory, rule="latent10"), 32, 1, id="latent10", marks=pytest.mark.slow),
        pytest.param(toy_memory, 1, 2, id="toy-together"),
        pytest.param(partial(byte_memory, rule="latent10"), 32, 2, id="latent10-together", marks=pytest.mark.slow),
        pytest.param(partial(byte_memory, rule="latent18"), 32, 1, id="latent18", marks=pytest.mark.slow),
    ],
)
def test_memory_grows_with_depth_by_the_kept_inputs_alone(build, rows, together):
    """Weights dominate: hundreds of thousands a layer, a few rows of activations; and the gradient, latents and
    momentum that a rule makes of one layer are gone before those of the next."""
    # A loop of one turn is no loop, and what a few turns keep may fit between other arrays: the few layers are five.
    width, shallow, deep = 256, 5 * together, 8 * together
    few, many = (temporaries(build, rows, layers, layers_at_once=together)[0] for layers in (shallow, deep))
    kept = (deep - shallow) * rows * width * 4
    # Beyond the kept inputs, nothing but alignment: 64 bytes a layer would be generous.
    assert kept <= many - few <= kept + (deep - shallow) * 64


@pytest.mark.slow
def test_kept_activations_bring_no_copy_of_the_state():
    """Backward finds the state where it is: what a layer keeps is its activations, here a hundredth of its state."""
    (few, small), (many, large) = (temporaries(toy_memory, 1, layers, remat=False) for layers in (2, 8))
    assert 0 < many - few < (large - small) / 20
