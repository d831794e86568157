"""The whole ARB model: which parts it has, that nothing looks ahead, and that a step trains all of them."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arb_modules import TERNARY
from fresh import fresh
from support import assert_trees_equal, is_float, values_of

from arbs_jax import Integral, TernaryConfig
from arbs_jax.errors import ConfigError
from arbs_jax.models.arb.config import TERMS, ArbConfig
from arbs_jax.models.arb.model import ArbLM, empty_memory
from arbs_jax.models.arb.stages import arb_stages
from arbs_jax.models.byte_lm import cross_entropy
from arbs_jax.rules import Schedule
from arbs_jax.state import iter_matrices
from arbs_jax.training.layerwise import Sweep
from arbs_jax.training.step import TrainState, fresh_state, jit_step, make_step

CONFIG = ArbConfig(
    width=32,
    context=64,
    embedding=16,
    sequencer_hidden=48,
    vq_rows=24,
    vq_dim=8,
    kg_rows=20,
    kg_hidden=8,
    memgram=True,
    memgram_rows=32,
    layers=1,
    heads=2,
    head_dim=16,
    rope_dim=8,
    latent=16,
    hidden=48,
    ledger_stride=4,
    ledger_slots=16,
    lookback=4,
    experts=3,
    expert_hidden=16,
    max_moe_iters=2,
    head_hidden=48,
    modality_hidden=8,
)
PARTS = {"sequencer", "vq", "kg", "memgram", "blocks", "reader", "loop", "foresight"}
PARTS |= {"head_entry", "head_layers", "head_logits"}
UNTRAINED = {"video", "talker", "router"}
"""Heads for other modalities."""
LENGTH = 21
SENTENCE = np.frombuffer(b"the quick brown fox jumps over the lazy dog. ", np.uint8)
STEPS = 40


def texts(step: int) -> np.ndarray:
    """Two micro-batches of four windows into the sentence over and over, uint8 (2, 4, T+1)."""
    starts = np.random.default_rng(step).integers(0, SENTENCE.size, (2, 4, 1))
    return SENTENCE[(starts + np.arange(LENGTH + 1)) % SENTENCE.size]


@cache
def shapes(config: ArbConfig):
    """The state tree of a fresh model, as shapes."""
    model = ArbLM(config, TERNARY)
    return jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 5), jnp.int32)))["ternary"]


def without(*names: str) -> ArbConfig:
    """The configuration with some of its switches off."""
    return replace(CONFIG, **dict.fromkeys(names, False))


def remembered(config: ArbConfig):
    """Bookkeeping with edges between most pairs, so that messages are sent."""
    memory = empty_memory(config)
    if "edges" in memory:
        memory["edges"] = {"score": jnp.asarray(np.random.default_rng(1).integers(-9, 10, (24, 24)), jnp.int8)}
    return memory


OFF = {
    ("vq", "graph", "memgram", "moe"): {"vq", "kg", "memgram", "foresight", "loop"},
    ("vq", "graph", "memgram", "attention"): {"vq", "kg", "memgram", "foresight", "blocks", "reader", "head_entry"},
    ("attention", "graph", "moe"): {"blocks", "reader", "head_entry", "loop"},
    ("attention", "memgram", "moe"): {"blocks", "reader", "head_entry", "memgram"},
    ("vq", "graph", "memgram", "attention", "moe"): PARTS - {"sequencer", "head_layers", "head_logits"},
}
"""Switches, and the subtrees that go with them: every part by itself, so that a step is compiled soon, and none."""


@pytest.mark.parametrize("off", OFF, ids=" ".join)
def test_a_part_that_is_off_has_no_state_and_no_stage(off):
    config = without(*off)
    assert set(shapes(config)) == PARTS - OFF[off] | UNTRAINED
    stages = arb_stages(config, TERNARY)
    assert {key for stage in stages for key in stage.keys} == PARTS - OFF[off]
    known = {name for stage in stages for name in stage.memory}
    assert known == set(jax.eval_shape(lambda: empty_memory(config)))
    assert known == ({"vq", "kg", "memgram", "edges"} - OFF[off]) - ({"edges"} if "graph" in off else set())


def test_halves_of_the_loop_and_composites_and_other_heads_are_off_one_by_one():
    tree = shapes(CONFIG)
    assert set(tree) == PARTS | UNTRAINED
    assert set(tree["loop"]["loop"]) == {"graph", "experts", "halting"}
    assert set(shapes(without("moe"))["loop"]["loop"]) == {"graph", "halting"}
    smaller = shapes(replace(CONFIG, graph=False, kg_rows=0, modality_hidden=0))
    assert set(smaller) == PARTS - {"kg"}
    assert set(smaller["loop"]["loop"]) == {"experts", "halting"}
    assert all(jnp.issubdtype(leaf.dtype, jnp.integer) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vq": False}, "--disable-vq needs --disable-graph"),
        ({"vq": False, "graph": False}, "--disable-vq needs .*--enable-memory"),
        ({"shield": ("balance", "prediction")}, r"terms of commitment, halting, balance, graph, got prediction"),
        ({"weight_graph": float("nan")}, r"model\.weight_graph must be at least 0, got nan"),
        ({"kg_rows": -1}, r"model\.kg_rows must be at least 0, got -1"),
        ({"max_moe_iters": 0}, r"model\.max_moe_iters must be at least 1, got 0"),
        ({"context": 1000}, r"ledger"),
        ({"rope_dim": 16}, r"rope_dim must be below attention\.head_dim"),
    ],
)
def test_configurations_that_cannot_be(change, message):
    with pytest.raises(ConfigError, match=message):
        replace(CONFIG, **change)


def test_two_bytes_make_no_position():
    model = ArbLM(CONFIG, TERNARY)
    with pytest.raises(ConfigError, match="at least 3 bytes to make a position, got a sequence of 2"):
        jax.eval_shape(model.apply, {"ternary": shapes(CONFIG)}, jax.ShapeDtypeStruct((1, 2), jnp.int32))


@pytest.mark.slow
def test_logits_know_nothing_of_later_bytes_and_of_other_texts():
    model, tokens = ArbLM(CONFIG, TERNARY), np.random.default_rng(0).integers(0, 256, (2, 9)).astype(np.int32)
    variables, _ = fresh(model, tokens, whole=True)
    apply = jax.jit(lambda tokens: model.apply(variables, tokens, remembered(CONFIG)))
    logits = np.asarray(apply(tokens))
    assert logits.shape == (2, 7, 288)
    assert logits.dtype == np.float32
    for at in range(3, 9):
        changed = tokens.copy()
        changed[0, at] = (changed[0, at] + 1) % 256
        differs = (np.asarray(apply(changed)) != logits).any(axis=-1)
        assert not differs[0, : at - 2].any()
        assert differs[0, at - 2]
        assert not differs[1].any()


class Trained:
    """A step of the whole model, compiled once."""

    def __init__(self, config: ArbConfig):
        self.config = config
        rule = Integral(learning_rate=0.15, schedule=Schedule(steps=STEPS, warmup=2), votes_per_step=2)
        ternary = TernaryConfig(rule=rule, group_size=8)
        self.model = ArbLM(config, ternary)
        self.variables, specs = fresh(self.model, texts(0)[0], whole=True)
        self.function = make_step(Sweep(arb_stages(config, ternary), rule, specs), seed=0)
        self.step = jit_step(self.function)

    def state(self) -> TrainState:
        """Before the first step; the step may have it."""
        return fresh_state(jax.tree.map(jnp.copy, self.variables["ternary"]), remembered(self.config))


def assert_every_matrix_moved(before: TrainState, after: TrainState):
    old = dict(iter_matrices(before.ternary))
    for path, matrix in iter_matrices(after.ternary):
        if path.split("/")[0] in UNTRAINED:
            assert_trees_equal(matrix, old[path])
            continue
        assert (np.asarray(matrix["votes"]) > 0).any(), path
        assert (np.asarray(matrix["corr"]) != np.asarray(old[path]["corr"])).any(), path


def assert_loss_is_that_of_the_model(trained: Trained, metrics: dict):
    """The prediction is the cross-entropy of the plain call's logits; what is left of the loss are the other terms."""
    tokens = texts(0).reshape(-1, LENGTH + 1)
    logits = jax.jit(trained.model.apply)(trained.variables, tokens[:, :-1], remembered(trained.config))
    expected = cross_entropy(logits, tokens[:, 3:]).mean()
    assert float(metrics["loss"]) == float(metrics["loss/prediction"]) == pytest.approx(float(expected), rel=1e-5)
    weighted = {name: getattr(trained.config, f"weight_{name}") for name in TERMS}
    rest = sum(weight * float(metrics[f"loss/{name}"]) for name, weight in weighted.items())
    assert float(metrics["loss/total"]) == pytest.approx(float(expected) + rest, rel=1e-5)


@pytest.mark.slow
def test_a_step_trains_all_parts_the_same_every_time_and_training_learns():
    trained = Trained(CONFIG)
    begin = trained.state()
    after, metrics = trained.step(trained.state(), texts(0))
    again, metrics_again = trained.step(trained.state(), texts(0))
    assert_trees_equal((after, metrics), (again, metrics_again))
    assert_every_matrix_moved(begin, after)
    assert_loss_is_that_of_the_model(trained, metrics)
    for name, own in begin.memory.items():
        assert any(
            (one != two).any() for one, two in zip(*map(jax.tree.leaves, (own, after.memory[name])), strict=True)
        )
    state, losses = after, []
    for at in range(1, STEPS):
        state, metrics = trained.step(state, texts(at))
        losses.append(float(metrics["loss"]))
    assert not state.halted
    share = np.bincount(SENTENCE)[np.unique(SENTENCE)] / SENTENCE.size
    unigram_entropy = -np.sum(share * np.log(share))
    assert np.mean(losses[-5:]) < unigram_entropy / 2


@pytest.mark.slow
@pytest.mark.parametrize("off", OFF, ids=" ".join)
def test_a_step_runs_without_parts(off):
    trained = Trained(without(*off))
    begin = trained.state()
    after, metrics = trained.step(trained.state(), texts(0))
    assert np.isfinite(metrics["loss"])
    assert_every_matrix_moved(begin, after)


@pytest.mark.slow
def test_a_step_is_the_same_program_with_64_bit_defaults():
    trained = Trained(CONFIG)
    state = trained.state()
    with jax.enable_x64(True):
        program = jax.make_jaxpr(trained.function)(state, texts(0))
    long = [value for value in values_of(program) if is_float(value) and value.dtype == jnp.float64]
    assert not long
    kept = program.out_avals[: len(jax.tree.leaves(state))]
    assert [leaf.dtype for leaf in kept] == [leaf.dtype for leaf in jax.tree.leaves(state)]
