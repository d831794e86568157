"""The loop: causal, adaptive, incremental; one set of matrices that votes in every iteration."""

from dataclasses import replace
from functools import cached_property, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fresh import fresh
from support import is_float

from arbs_jax import Integral, TernaryConfig
from arbs_jax.errors import ConfigError
from arbs_jax.models.arb.edge_updates import observe_edges
from arbs_jax.models.arb.edges import EdgeConfig
from arbs_jax.models.arb.experts import ExpertsConfig
from arbs_jax.models.arb.graph import GraphConfig, message_band
from arbs_jax.models.arb.loop import LoopConfig, MoEGraph, _Iteration, empty_history, halting_weight, injection
from arbs_jax.models.stages import Stage
from arbs_jax.state import iter_matrices
from arbs_jax.training.layerwise import Sweep
from arbs_jax.votes import make_probes

TERNARY = TernaryConfig(rule=Integral(), group_size=8)
GRAPH = GraphConfig(EdgeConfig(motifs=5, window=2, threshold=1), lookback=4)
CONFIG = LoopConfig(GRAPH, ExpertsConfig(experts=3, hidden=10), max_iters=3)
WIDTH, LENGTH, CUT = 15, 7, 4
RNG = np.random.default_rng(0)
X, CONTEXT, TOWARDS = (jnp.asarray(RNG.standard_normal((2, LENGTH, WIDTH)), jnp.float32) for _ in range(3))
IDS = jnp.asarray(RNG.integers(0, 5, (2, LENGTH)), jnp.int32)
EDGES = {"score": jnp.asarray(RNG.integers(-2, 3, (5, 5)), jnp.int8)}
# Three iterations of a few dozen float32 operations on values of order one.
TOLERANCE = 1000 * 2.0**-24


class Built:
    """A loop with fresh state; all that is asked of it is compiled in one piece, when first asked for."""

    def __init__(self, config, *context):
        self.config = config
        self.module = MoEGraph(config, TERNARY)
        self.inputs = (X, IDS, EDGES, *context)
        self.variables, self.specs = fresh(self.module, *self.inputs)

    def apply(self, *inputs):
        return self.module.apply(self.variables, *inputs)

    @cached_property
    def differentiated(self):
        """(gradients of a loss over the positions before CUT in probes, input and context, output)."""
        ternary = self.variables["ternary"]

        def loss(probes, x, *context):
            out = self.module.apply({"ternary": ternary, "probes": probes}, x, *self.inputs[1:3], *context)
            return jnp.sum((out.x_BxSxD * TOWARDS)[:, :CUT]) + jnp.sum(out.ponder_BxS[:, :CUT]), out

        probes = make_probes(ternary, self.specs, TERNARY.rule)
        arguments = (probes, X, *self.inputs[3:])
        return jax.jit(jax.grad(loss, argnums=tuple(range(len(arguments))), has_aux=True))(*arguments)

    @property
    def output(self):
        return self.differentiated[1]


@pytest.fixture(scope="module")
def built():
    return Built(CONFIG, CONTEXT)


def test_no_position_depends_on_later_ones(built):
    for gradient in map(np.asarray, built.differentiated[0][1:]):
        assert not gradient[:, CUT:].any()
        assert (np.abs(gradient[:, :CUT]).sum(-1) > 0).all()


def test_every_matrix_votes_once_an_iteration(built):
    found = dict(iter_matrices(built.variables["ternary"]))
    assert {path.split("/")[1] for path in found} == {"graph", "experts", "halting"}
    for path in found:
        collected = built.differentiated[0][0]
        for name in path.split("/"):
            collected = collected[name]
        # Of fourteen positions, somebody chooses each expert in every iteration.
        assert (np.asarray(collected["count"]) == CONFIG.max_iters).all(), path
        assert np.asarray(collected["score"]).any(), path


def test_costs_are_in_their_bounds(built):
    out = built.output
    assert len(np.unique(out.iterations_BxS)) > 1
    assert out.iterations_BxS.min() >= 1
    assert out.iterations_BxS.max() <= CONFIG.max_iters
    assert (out.ponder_BxS >= 1 - 1e-6).all()
    assert (out.ponder_BxS <= out.iterations_BxS + 1e-6).all()
    assert (out.remainder_BxS > 0).all()
    assert (out.remainder_BxS <= 1).all()
    np.testing.assert_allclose(out.halting_cost, out.ponder_BxS.mean(), rtol=1e-6)
    np.testing.assert_allclose(out.load_X.sum(), 1, rtol=1e-6)
    assert 0.9 < out.balance < 3
    assert out.agreement_BxSxW.dtype == jnp.int8
    assert (np.asarray(out.agreement_BxSxW)[:, 1:, 0] != 0).all()


def test_halting_weights_follow_the_definition():
    rng, halt, last = np.random.default_rng(1), 0.99, 5
    probability = rng.beta(0.6, 0.6, (6, 200)).astype(np.float32)
    halted, active = np.zeros(200, np.float32), np.ones(200, bool)
    weights = []
    for step in range(6):
        weight, halts = halting_weight(probability[step], halted, active, jnp.asarray(step == last), halt)
        weights.append(np.asarray(weight))
        halted, active = halted + weights[-1], active & ~np.asarray(halts)
    assert not active.any()
    for position in range(200):
        total, expected = np.float32(0), np.zeros(6, np.float32)
        for step in range(6):
            if total + probability[step, position] >= halt or step == last:
                expected[step] = 1 - total
                break
            expected[step] = probability[step, position]
            total += expected[step]
        np.testing.assert_allclose(np.asarray(weights)[:, position], expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(np.sum(weights, axis=0), 1, rtol=0, atol=1e-6)


def test_injection_is_a_stable_system_that_keeps_its_input():
    keep = np.asarray(injection(9, (0.5, 0.95)))
    np.testing.assert_allclose(keep[[0, -1]], [0.5, 0.95], rtol=1e-6)
    np.testing.assert_allclose(np.diff(np.log(keep)), np.log(1.9) / 8, rtol=1e-4)
    assert injection(1, (0.5, 0.95)).shape == (1,)


@pytest.mark.slow
def test_halted_positions_stay_as_they_are(built):
    longer = Built(replace(CONFIG, max_iters=6), CONTEXT)
    early = np.asarray(built.output.iterations_BxS) < CONFIG.max_iters
    assert early.any()
    for name in ("x_BxSxD", "ponder_BxS", "remainder_BxS", "iterations_BxS", "agreement_BxSxW"):
        one, two = np.asarray(getattr(built.output, name)), np.asarray(getattr(longer.output, name))
        np.testing.assert_allclose(one[early], two[early], rtol=0, atol=TOLERANCE, err_msg=name)


@pytest.mark.slow
def test_a_part_at_a_time_equals_the_whole(built):
    step = jax.jit(built.apply)
    history = empty_history(CONFIG, 2, WIDTH, jnp.float32)
    parts = []
    for at in range(LENGTH):
        here = slice(at, at + 1)
        out, history = step(X[:, here], IDS[:, here], EDGES, CONTEXT[:, here], history)
        parts.append(out)
    for name in ("x_BxSxD", "ponder_BxS", "iterations_BxS", "agreement_BxSxW"):
        joined = np.concatenate([getattr(part, name) for part in parts], axis=1)
        np.testing.assert_allclose(joined, getattr(built.output, name), rtol=0, atol=TOLERANCE, err_msg=name)


@pytest.mark.slow
def test_votes_are_summed_over_iterations():
    """Against the iterations written out, each with probes of its own."""
    config = replace(CONFIG, experts=None, remat=False)
    built = Built(config)
    ternary = built.variables["ternary"]
    probes = make_probes(ternary, built.specs, TERNARY.rule)

    def looped(probes):
        out = built.module.apply({"ternary": ternary, "probes": probes}, *built.inputs)
        return jnp.sum(out.x_BxSxD * TOWARDS)

    def unrolled(each):
        band = message_band(GRAPH, EDGES, IDS)
        carry = built.module._start(X)
        for at, probes in enumerate(each):
            variables = {"ternary": ternary["loop"], "probes": probes["loop"]}
            last = jnp.asarray(at == config.max_iters - 1)
            carry, _ = _Iteration(config, TERNARY).apply(variables, carry, last, X, band, None, None)
        return jnp.sum(carry.mean_BxSxD * TOWARDS)

    got = jax.jit(jax.grad(looped))(probes)
    each = jax.jit(jax.grad(unrolled))([probes] * config.max_iters)
    expected = jax.tree.map(lambda *parts: sum(parts), *each)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=1e-6), got, expected)


@pytest.mark.slow
@pytest.mark.parametrize("off", ["graph", "experts"])
def test_either_part_can_be_left_out(off):
    built = Built(replace(CONFIG, **{off: None}))
    assert off not in built.variables["ternary"]["loop"]
    assert not [leaf for leaf in jax.tree.leaves(built.variables) if is_float(leaf)]
    out = built.output
    assert np.isfinite(out.x_BxSxD).all()
    assert out.agreement_BxSxW.shape[-1] == (0 if off == "graph" else 2)
    assert out.load_X.shape == (0 if off == "experts" else 3,)
    assert np.isfinite(out.balance)


@pytest.mark.slow
def test_bfloat16_stays_bfloat16_and_finite(built):
    def loss(x, context):
        out = built.apply(x, IDS, EDGES, context)
        return jnp.sum((out.x_BxSxD * TOWARDS).astype(jnp.float32)) + out.halting_cost, out

    short = (X.astype(jnp.bfloat16), CONTEXT.astype(jnp.bfloat16))
    gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(*short)
    assert out.x_BxSxD.dtype == jnp.bfloat16
    assert out.ponder_BxS.dtype == out.balance.dtype == out.load_X.dtype == jnp.float32
    for gradient in gradients:
        assert gradient.dtype == jnp.bfloat16
        assert np.isfinite(np.asarray(gradient, np.float32)).all()
        assert np.asarray(gradient, np.float32).any()


@pytest.mark.slow
def test_a_sweep_moves_every_matrix_and_counts_the_edges(built):
    """As a stage: edges are bookkeeping memory, ids and agreements its events."""

    def apply(variables, carry, batch):
        own = {name: variables[name]["loop"] for name in ("ternary", "probes") if name in variables}
        out = built.module.apply(own, batch["x"], batch["ids"], variables["memory"]["edges"])
        loss = jnp.mean(jnp.square(out.x_BxSxD - batch["x"])) + 0.1 * out.balance + 0.01 * out.halting_cost
        events = {"ids": batch["ids"], "agreement": out.agreement_BxSxW}
        return (loss, {"balance": out.balance, "ponder": out.halting_cost}), events

    def observe(subtrees, memory, events, step, key):
        counted = observe_edges(GRAPH.edges, memory["edges"], events["ids"], events["agreement"], step)
        return subtrees, {"edges": counted}

    stage = Stage(("loop",), apply, memory=("edges",), observe=observe)
    module = Built(CONFIG)
    sweep = Sweep((stage,), TERNARY.rule, {"loop": module.specs})
    ternary, batch = {"loop": module.variables["ternary"]}, {"x": X[:, None], "ids": IDS[:, None]}
    blocked = jnp.asarray(False)
    swept = jax.jit(sweep)(ternary, batch, jnp.int32(0), jax.random.key(0), blocked, {"edges": EDGES})
    assert swept.moved
    assert set(swept.terms) == {"balance", "ponder"}
    for path, matrix in iter_matrices(swept.ternary):
        assert (np.asarray(matrix["votes"]) > 0).all(), path
        assert np.asarray(matrix["corr"]).any(), path
    assert swept.memory["edges"]["score"].dtype == jnp.int8
    assert (swept.memory["edges"]["score"] != EDGES["score"]).any()


def test_mistakes_are_named(built):
    for change, message in [
        ({"graph": None, "experts": None}, r"loop\.graph and loop\.experts are both None"),
        ({"max_iters": 0}, r"loop\.max_iters must be at least 1, got 0"),
        ({"halt": 1.5}, r"loop\.halt must be in \(0, 1\], got 1.5"),
        ({"retain": (0.5, 1.0)}, r"loop\.retain .* got \(0.5, 1.0\)"),
    ]:
        with pytest.raises(ConfigError, match=message):
            replace(CONFIG, **change)
    with pytest.raises(ConfigError, match="edges are None; pass edges"):
        jax.eval_shape(built.apply, X, IDS, None)
    with pytest.raises(ConfigError, match="there is no history to keep"):
        empty_history(replace(CONFIG, graph=None), 1, WIDTH, jnp.float32)
