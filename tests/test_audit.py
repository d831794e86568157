"""The account of persistent state against a count by hand, and against what is really allocated."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fresh import packed_bytes

from arbs_jax.audit import audit, require_integers
from arbs_jax.config import RunConfig
from arbs_jax.errors import StateError
from arbs_jax.layers import COLLECTION
from arbs_jax.models import PRESETS, VOCABULARY, ModelConfig
from arbs_jax.rules import RuleConfig, default_group_size
from arbs_jax.rules.registry import LATENT_RULES
from arbs_jax.training.program import Program


def matrices(model: ModelConfig) -> dict[str, list[tuple[int, int]]]:
    """Shapes by part, from the architecture's description."""
    query, key = model.heads * model.head_dim, model.kv_heads * model.head_dim
    block = [
        (query, model.width),
        (key, model.width),
        (key, model.width),
        (model.width, query),
        (model.hidden, model.width),
        (model.hidden, model.width),
        (model.width, model.hidden),
    ]
    table = [(VOCABULARY, model.width)]
    return {"embed": table, "blocks": block * model.layers} | ({} if model.tied else {"head": table})


def account_of(config: RunConfig, *more: jax.ShapeDtypeStruct):
    program = Program(config)
    state = program.abstract_state
    return audit(program.abstract_variables, program.specs, [state.step, state.halted, *more])


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("group_size", [32, 12])
def test_every_preset_adds_up(name: str, group_size: int):
    account = account_of(
        RunConfig(preset=name, model=PRESETS[name], group_size=group_size, rule=RuleConfig("integral"))
    )
    by_part = matrices(PRESETS[name])
    everything = [shape for shapes in by_part.values() for shape in shapes]
    groups = sum(rows * -(-columns // group_size) for rows, columns in everything)
    assert account.weights_by_part == {
        part: sum(rows * columns for rows, columns in shapes) for part, shapes in by_part.items()
    }
    assert account.bytes_by_leaf == {
        "trits": sum(rows * packed_bytes(columns) for rows, columns in everything),
        "exponent": groups,
        "corr": 8 * groups,
        "votes": 8 * len(everything),
        "other": 2 * 4,
    }
    assert account.logical_ternary_weights == sum(account.weights_by_part.values())
    assert account.state_bytes == sum(account.bytes_by_leaf.values())
    assert account.bits_per_weight == 8 * account.state_bytes / account.logical_ternary_weights
    assert account.float_params == account.float_buffers == 0
    require_integers(account)


@pytest.mark.parametrize(("rule", "most"), [("latent4", 4.0), ("latent6", 6.5), ("latent10", 10.3), ("latent18", 18.3)])
@pytest.mark.parametrize("name", [name for name in PRESETS if name != "byte-0.4m"])
def test_rules_that_move_the_trits_stay_under_their_bits(name: str, rule: str, most: float):
    """From a width of 256, with the group size that such rules take when none is asked for."""
    config = RunConfig(preset=name, model=PRESETS[name], rule=RuleConfig(rule))
    account = account_of(config)
    model, settings = PRESETS[name], LATENT_RULES[rule]
    assert config.group_size == default_group_size(rule) == 256
    assert account.bits_per_weight <= most
    require_integers(account)
    everything = [shape for shapes in matrices(model).values() for shape in shapes]
    packed = sum(rows * packed_bytes(columns) for rows, columns in everything)
    assert account.bytes_by_leaf["trits"] == packed
    assert account.bytes_by_leaf["residual"] == (settings.planes - 1) * packed
    if settings.momentum == "int8":
        assert account.bytes_by_leaf["momentum"] == account.logical_ternary_weights
    else:
        ranks = [max(1, min(shape) // settings.rank_divisor) for shape in everything]
        sides = zip(("left", "right"), zip(*everything, strict=True), strict=True)
        for side, sizes in sides:
            assert account.bytes_by_leaf[side] == sum(size * rank for size, rank in zip(sizes, ranks, strict=True))
            assert account.bytes_by_leaf[f"{side}_scale"] == 2 * sum(ranks)


@pytest.mark.parametrize(("tied", "rule"), [(False, "latent10"), (True, "latent18"), (True, "integral")])
def test_what_is_allocated_is_what_was_counted(tied: bool, rule: str):
    config = RunConfig(
        model=ModelConfig(width=32, heads=2, kv_heads=1, head_dim=16, hidden=33, tied=tied), rule=RuleConfig(rule)
    )
    state = Program(config).init_state()
    assert account_of(config).state_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(state))


def test_floats_are_counted_and_refused():
    program = Program(RunConfig(model=ModelConfig(width=32, heads=2, kv_heads=1, head_dim=16, hidden=32)))
    variables = {
        COLLECTION: program.abstract_variables[COLLECTION],
        "params": {"gain": jax.ShapeDtypeStruct((32,), jnp.bfloat16)},
        "batch_stats": {"mean": np.zeros((3, 5), np.float32), "count": np.zeros((), np.int32)},
    }
    account = audit(variables, program.specs, extra=[jax.ShapeDtypeStruct((7,), jnp.float32)])
    assert (account.float_params, account.float_buffers) == (32, 15 + 7)
    assert account.bytes_by_leaf["other"] == 32 * 2 + 15 * 4 + 4 + 7 * 4
    with pytest.raises(StateError, match="found 32 float parameters and 22 floats in buffers"):
        require_integers(account)
