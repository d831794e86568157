"""A shielded term moves its own part alone: where it would leave the part, its gradient is exactly zero."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arb_modules import TERNARY, normal
from fresh import fresh

from arbs_jax.layers import TernaryDense
from arbs_jax.models.arb.config import ArbConfig
from arbs_jax.models.arb.edges import EdgeConfig
from arbs_jax.models.arb.experts import Experts, ExpertsConfig
from arbs_jax.models.arb.graph import GraphConfig
from arbs_jax.models.arb.loop import LoopConfig, MoEGraph
from arbs_jax.models.arb.stages import arb_stages
from arbs_jax.models.arb.vq import SharedVQ, VQConfig
from arbs_jax.votes import make_probes

X = normal(0, 2, 5, 10)
IDS = np.asarray([[0, 1, 2, 0, 1], [2, 2, 0, 1, 0]], np.int32)


def commitment(shielded):
    """(module, inputs after X, the term of its output, the matrix that the term must move all the same)"""
    book = VQConfig(rows=12, width=10, dim=5, shielded=shielded)
    return SharedVQ(book, TERNARY), (), lambda out: jnp.sum(out.commitment_BxS), "down"


def balance(shielded):
    layer = Experts(ExpertsConfig(experts=3, hidden=5, shielded=shielded), TERNARY)
    return layer, (), lambda out: out.balance, "router/centroids"


def halting(shielded):
    graph = GraphConfig(EdgeConfig(motifs=3), lookback=2)
    edges = {"score": jnp.full((3, 3), 9, jnp.int8)}
    layer = MoEGraph(LoopConfig(graph, None, max_iters=2, shielded=shielded, remat=False), TERNARY)
    return layer, (IDS, edges), lambda out: out.halting_cost, "loop/halting"


@pytest.mark.parametrize("part", [commitment, balance, pytest.param(halting, marks=pytest.mark.slow)])
def test_a_shielded_term_stays_in_its_part(part):
    def gradients(shielded):
        module, rest, term, own = part(shielded)
        variables, specs = fresh(module, X, *rest)
        lookups = {"codebook": 10} if part is commitment else None
        probes = make_probes(variables["ternary"], specs, TERNARY.rule, lookups=lookups)

        def loss(x, probes):
            return term(module.apply(variables | {"probes": probes}, x, *rest))

        dx, votes = jax.jit(jax.grad(loss, argnums=(0, 1)))(X, probes)
        for name in own.split("/"):
            votes = votes[name]
        return np.asarray(dx), np.asarray(votes["score"])

    (dx, own), (open_dx, open_own) = gradients(True), gradients(False)
    assert not dx.any()
    assert open_dx.any()
    # The part itself learns as much from the term, shielded or not.
    assert own.any()
    np.testing.assert_array_equal(own != 0, open_own != 0)


@pytest.mark.parametrize("shield", [("graph",), ()])
def test_predicting_the_next_motif_can_be_kept_from_the_stream(shield):
    config = ArbConfig(width=10, vq_rows=12, vq_dim=5, kg_rows=0, attention=False, head_hidden=5, shield=shield)
    (entry,) = (stage for stage in arb_stages(config, TERNARY) if "foresight" in stage.keys)
    ternary = {"foresight": fresh(TernaryDense(features=5, config=TERNARY), X)[0]["ternary"]}
    carry = {"latent": normal(1, 2, 5, 5), "terms": {}}
    tokens = np.zeros((2, 8), np.uint8)
    run = lambda x: entry.apply({"ternary": ternary}, carry | {"x": x}, tokens)["terms"]["graph"]  # noqa: E731
    assert bool(np.asarray(jax.jit(jax.grad(run))(X)).any()) == (not shield)
