"""Heads and the router between them: shapes, votes, positions that do not mix, ties."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arb_modules import TERNARY, Built, normal

from arbs_jax.errors import ConfigError
from arbs_jax.models import VOCABULARY
from arbs_jax.models.arb.head import (
    ByteHead,
    HeadConfig,
    OutputRouter,
    RouterConfig,
    TalkerConfig,
    TalkerHead,
    VideoConfig,
    VideoHead,
)

CONFIG = HeadConfig(width=16, hidden=12, layers=1)
X, CONTEXT = normal(0, 2, 3, 16), normal(1, 2, 3, 16)
HEADS = {
    "byte": (ByteHead(CONFIG, TERNARY), (VOCABULARY,)),
    "video": (VideoHead(CONFIG, VideoConfig(patches=3, channels=5), TERNARY), (3, 5)),
    "talker": (TalkerHead(CONFIG, TalkerConfig(codebooks=2, codes=7), TERNARY), (2, 7)),
}


@pytest.fixture(scope="module", params=HEADS)
def head(request):
    module, shape = HEADS[request.param]
    return Built(module, X, CONTEXT), shape


def test_a_head_has_its_shape(head):
    built, shape = head
    output = jax.eval_shape(built.module.apply, built.variables, X, CONTEXT)
    assert output.shape == (2, 3, *shape)
    assert output.dtype == jnp.float32
    state = set(built.variables["ternary"])
    assert "trunk" in state or state == {"head_entry", "head_layers", "head_logits"}


def test_every_matrix_votes(head):
    head[0].assert_every_matrix_votes_once()


def test_positions_do_not_mix():
    built = Built(ByteHead(CONFIG, TERNARY), X, CONTEXT)
    for place in range(2):
        changed = [X.copy(), CONTEXT.copy()]
        changed[place][:, 1] += normal(2, 16)
        differs = (np.asarray(built.apply(built.variables, *changed)) != built.output).any(axis=-1)
        np.testing.assert_array_equal(differs, [[False, True, False]] * 2)


def test_a_head_works_without_context_and_in_short_floats():
    head = ByteHead(replace(CONFIG, layers=0, dtype="bfloat16"), TERNARY)
    built = Built(head, X)
    assert set(built.variables["ternary"]) == {"head_logits"}
    total = jax.jit(jax.value_and_grad(lambda x: jnp.sum(head.apply(built.variables, x) ** 2)))
    value, gradient = total(jnp.asarray(X))
    assert value.dtype == jnp.float32
    assert np.isfinite(np.asarray(gradient)).all()
    assert np.asarray(gradient).any(axis=-1).all()


def test_the_router_chooses_by_the_mean_context_and_not_for_text():
    built = Built(OutputRouter(RouterConfig(), TERNARY), CONTEXT)
    logits, choice = built.output
    assert logits.shape == (2, 3)
    assert choice.dtype == jnp.int32
    np.testing.assert_array_equal(choice, np.argmax(logits, axis=-1))
    built.assert_every_matrix_votes_once()
    # Off, it needs no state; ties go to the first head.
    off = built.module.apply({}, CONTEXT, text=True)
    np.testing.assert_array_equal(off[0], np.zeros((2, 3), np.float32))
    np.testing.assert_array_equal(off[1], [0, 0])
    np.testing.assert_array_equal(built.apply(built.variables, jnp.zeros((2, 3, 16), jnp.float32))[1], [0, 0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HeadConfig(hidden=0), r"head\.hidden must be at least 1, got 0"),
        (lambda: HeadConfig(layers=-1), r"head\.layers must be at least 0, got -1"),
        (lambda: HeadConfig(dtype="int8"), r"head\.dtype must be .* got 'int8'"),
        (lambda: VideoConfig(patches=0), r"video\.patches must be at least 1, got 0"),
        (lambda: TalkerConfig(codes=0), r"talker\.codes must be at least 1, got 0"),
        (lambda: RouterConfig(heads=("byte", "byte")), r"router\.heads must be different names.*\('byte', 'byte'\)"),
    ],
)
def test_configuration_out_of_range(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
