"""From a configuration to functions: evaluation against NumPy, and shapes that agree with what is allocated."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import assert_trees_equal

from arbs_jax.config import LogConfig, RunConfig, TrainConfig
from arbs_jax.data import ValidationBatch
from arbs_jax.errors import StateError
from arbs_jax.layers import COLLECTION
from arbs_jax.models import ModelConfig, preset
from arbs_jax.rules import RuleConfig
from arbs_jax.training.program import GROUP_GRADIENT_BYTES, Program, group_within

MODEL = ModelConfig(width=32, layers=2, heads=2, kv_heads=1, head_dim=16, hidden=48, context=64)
RULE = RuleConfig("integral")
"""Compiles in a moment; runs with the default rule are the command line's tests."""
CONFIG = RunConfig(model=MODEL, rule=RULE, train=TrainConfig(context=8, batch=2, steps=10))


@pytest.fixture(scope="module")
def program() -> Program:
    return Program(CONFIG)


def shapes(tree: object) -> object:
    return jax.tree.map(lambda leaf: (leaf.shape, np.dtype(leaf.dtype)), tree)


def test_shapes_are_known_before_anything_is_allocated(program: Program):
    state = program.init_state()
    assert shapes(program.abstract_state) == shapes(state)
    assert shapes(program.abstract_variables[COLLECTION]) == shapes(state.ternary)
    assert set(program.abstract_variables) == {COLLECTION}
    program.check(state.ternary)
    assert int(state.step) == int(state.halted) == 0


def test_the_seed_alone_decides_the_initial_state(program: Program):
    trits = [
        np.asarray(
            Program(RunConfig(model=MODEL, rule=RULE, train=TrainConfig(seed=seed)))
            .init_state()
            .ternary["head"]["trits"]
        )
        for seed in (0, 1, 2**32 - 1)
    ]
    assert_trees_equal(trits[0], np.asarray(program.init_state().ternary["head"]["trits"]))
    assert len({each.tobytes() for each in trits}) == 3


def test_check_names_a_leaf_that_is_wrong(program: Program):
    ternary = program.init_state().ternary
    ternary["head"] = ternary["head"] | {"corr": ternary["head"]["corr"].astype(jnp.int32)}
    with pytest.raises(StateError, match=r"head.*corr"):
        program.check(ternary)


def test_evaluation_is_the_mean_over_the_valid_bytes(program: Program):
    rng = np.random.default_rng(0)
    windows = rng.integers(0, 256, (6, 9)).astype(np.uint8)
    padded = np.concatenate([windows[4:], np.zeros((2, 9), np.uint8)])
    batches = [
        ValidationBatch(windows[:4], np.ones(4, bool)),
        ValidationBatch(padded, np.array([True, True, False, False])),
    ]
    state = program.init_state()
    ternary = state.ternary
    logits = np.asarray(program.model.apply({COLLECTION: ternary}, windows[:, :-1].astype(np.int32)), np.float64)
    normal = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    chosen = np.take_along_axis(logits, windows[:, 1:, None].astype(np.int64), -1)[..., 0]
    # float32 logits and a float32 sum of 48 losses.
    assert program.evaluate(state, batches) == pytest.approx(np.mean(normal - chosen), rel=1e-5)


def test_the_compiled_step_takes_the_fresh_state_and_donates_it(program: Program):
    step, state = program.compile_step(), program.init_state()
    tokens = np.random.default_rng(1).integers(0, 256, (1, 2, 9)).astype(np.uint8)
    after, metrics = step(state, tokens)
    assert int(after.step) == 1
    assert int(metrics["halted"]) == 0
    assert shapes(after) == shapes(program.abstract_state)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.ternary))
    same, again = program.step(program.init_state(), tokens)
    assert float(metrics["loss"]) == float(again["loss"])
    assert_trees_equal(same, after)


@pytest.mark.slow
def test_float8_products_are_of_training_alone():
    """The loss of a step differs by what rounding does; that of validation does not know of it."""
    rng = np.random.default_rng(2)
    train = TrainConfig(context=64, batch=8, steps=10)
    tokens = rng.integers(0, 256, (1, train.batch, train.context + 1)).astype(np.uint8)
    validation = [ValidationBatch(tokens[0], np.ones(train.batch, bool))]
    losses, evaluated, exponents = [], [], []
    for products in ("dtype", "float8"):
        program = Program(replace(CONFIG, train=replace(train, products=products)))
        state = program.init_state()
        evaluated.append(program.evaluate(state, validation))
        after, metrics = program.step(state, tokens)
        losses.append(float(metrics["loss"]))
        exponents.append(np.asarray(after.ternary["blocks"]["mlp"]["up_proj"]["corr"]))
    assert evaluated[0] == evaluated[1] == pytest.approx(losses[0], rel=1e-5)
    assert 0 < abs(losses[1] - losses[0]) < 0.01 * losses[0]
    agreement = np.mean(exponents[0] * exponents[1] > 0)
    assert 0.7 < agreement < 1


def test_a_validation_batch_is_never_larger_than_what_is_asked_for():
    assert CONFIG.validation_batch == 8
    small = RunConfig(model=MODEL, train=TrainConfig(context=8), log=LogConfig(eval_windows=3))
    assert small.validation_batch == 3


@pytest.mark.parametrize(
    ("layers", "layer_bytes", "group"),
    [(12, 10, 4), (12, 8, 6), (12, 1, 12), (22, 3, 11), (22, 5, 2), (7, 39, 1), (1, 1, 1)],
)
def test_layers_move_together_as_far_as_their_gradients_fit(layers, layer_bytes, group):
    assert group_within(layers, layer_bytes, most=49) == group


def test_how_many_layers_move_together_is_the_device_s_choice_unless_told(monkeypatch):
    train = replace(CONFIG.train, layers_at_once=1)
    small, large = (
        Program(CONFIG),
        Program(replace(CONFIG, model=replace(MODEL, layers=4, hidden=4 * GROUP_GRADIENT_BYTES))),
    )
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    told = Program(replace(CONFIG, train=train))
    assert [program.layers_at_once["blocks"] for program in (told, small, large)] == [1, 2, 1]
    # A large batch keeps so much for backward that gradients of more layers hardly count.
    billion = RunConfig(model=preset("byte-1b", dtype="bfloat16"), train=TrainConfig(context=1024, batch=1))
    batches = {batch: Program(replace(billion, train=replace(billion.train, batch=batch))) for batch in (1, 4, 16, 64)}
    found = {batch: program.layers_at_once["blocks"] for batch, program in batches.items()}
    assert found == {1: 1, 4: 2, 16: 11, 64: 11}
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert small.layers_at_once == {"blocks": 1}
