"""Configurations: a round trip through JSON, and refusals that name the flag, both values and what to do."""

import json
from dataclasses import replace
from typing import Any

import pytest

from arbs_jax.cli.options import ArbFlags, ModelFlags
from arbs_jax.config import KERNELS, MAY_CHANGE, DataConfig, LogConfig, RunConfig, TrainConfig
from arbs_jax.errors import ConfigError
from arbs_jax.models import PRESETS, preset
from arbs_jax.rules import RULES, Latent, RuleConfig
from arbs_jax.state import InitConfig
from arbs_jax.training.program import Program
from arbs_kernels import backends
from arbs_kernels.correlation_score.api import SCORE
from arbs_kernels.gradient_sample.api import SAMPLE
from arbs_kernels.latent_step.api import STEP
from arbs_kernels.packed_matmul.api import FORWARD, INPUT_GRADIENT
from arbs_kernels.row_gather.api import GATHER

FAR_FROM_DEFAULT = RunConfig(
    preset="byte-3m",
    model=preset("byte-3m", tied=True, dtype="bfloat16", remat=False),
    group_size=16,
    init=InitConfig(exponent_range=(-4, -1)),
    rule=RuleConfig("bigint", learning_rate=0.5, strength=16.0, warmup=7),
    data=DataConfig("texts/", 0.25, 1234),
    train=TrainConfig(
        steps=9,
        batch=3,
        context=128,
        accum=4,
        devices=2,
        seed=2**32 - 1,
        kernel="xla",
        products="float8",
        layers_at_once=2,
    ),
    log=LogConfig(1, 2, 3, 4, 5),
)

ARB = RunConfig(
    preset="arb-tiny",
    model=preset("arb-tiny", shield=("halting", "graph"), memgram=True, kg_rows=0, dtype="bfloat16"),
)


@pytest.mark.parametrize("config", [RunConfig(), FAR_FROM_DEFAULT, ARB])
def test_json_holds_all_of_it(config: RunConfig):
    saved = json.loads(json.dumps(config.to_json()))
    assert RunConfig.from_json(saved) == config
    # What the folder adds is no concern of the configuration's.
    assert RunConfig.from_json(saved | {"facts": {}, "unigram_entropy": 3.0}) == config


@pytest.mark.parametrize(
    "damage",
    [
        lambda saved: saved.pop("train"),
        lambda saved: saved["train"].update(speed=9),
        lambda saved: saved["train"].update(steps="many"),
        lambda saved: saved["init"].pop("exponent_range"),
        lambda saved: saved.update(model=None),
        lambda saved: saved.update(family="arb"),
        lambda saved: saved.pop("family"),
    ],
)
def test_a_saved_configuration_that_does_not_fit(damage: Any):
    saved = FAR_FROM_DEFAULT.to_json()
    damage(saved)
    with pytest.raises(ConfigError, match="does not fit this version"):
        RunConfig.from_json(saved)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrainConfig(steps=0), "--steps must be at least 1, got 0"),
        (lambda: TrainConfig(context=-2), "--ctx must be at least 1, got -2"),
        (lambda: TrainConfig(seed=2**32), r"--seed must be in \[0, 2\^32\), got 4294967296"),
        (lambda: TrainConfig(kernel="cuda"), "--kernel must be one of auto, xla, triton, got 'cuda'"),
        (lambda: TrainConfig(products="int4"), "--products must be one of dtype, float8, got 'int4'"),
        (lambda: LogConfig(eval_interval=0), "--eval-interval must be at least 1, got 0"),
        (lambda: RunConfig(group_size=7), "--group-size must be one of 4, .*, got 7"),
        (
            lambda: RunConfig(train=TrainConfig(context=1025)),
            "--ctx 1025 is longer than the model's context of 1024 bytes; lower it or choose another --preset",
        ),
        (lambda: replace(ARB, train=TrainConfig(context=2)), "--ctx 2 is too short .* 3 bytes"),
        (lambda: preset("arb-tiny", context=8192), "8192 positions .* slots of 16 .* ledger"),
        (lambda: preset("arb-tiny", vq=False), "--disable-vq needs --disable-graph as well"),
        (
            lambda: preset("arb-tiny", vq=False, graph=False, memgram=True),
            "--disable-vq needs --enable-memory left out",
        ),
        (lambda: preset("arb-tiny", shield=("loss",)), "shield must name terms of commitment, .*, got loss"),
        (lambda: preset("arb-tiny", top_k=9), "top_k must be at most .*, got 9 and 4"),
        (lambda: preset("arb-tiny", weight_graph=-1.0), "weight_graph must be at least 0, got -1"),
    ],
)
def test_refusals(make: Any, message: str):
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_kernel_by_name_is_one_that_every_operator_of_a_step_has():
    everywhere = set.intersection(*(set(table) for table in (FORWARD, INPUT_GRADIENT, SCORE, GATHER, SAMPLE, STEP)))
    assert everywhere | {"auto"} == set(KERNELS)


@pytest.mark.parametrize(
    ("capability", "installed", "needs"),
    [
        (0.0, True, r"an NVIDIA GPU of compute capability 8\.0 or later \(Ampere\), and this is 'cpu'"),
        (7.5, True, r"an NVIDIA GPU of compute capability 8\.0 or later \(Ampere\), and this is 'cpu' of 7\.5"),
        (8.6, False, r"triton, which is not installed \(pip install 'arbs-jax\[triton\]'\)"),
        (8.6, True, None),
    ],
)
def test_a_kernel_that_does_not_run_here_is_refused_before_anything_is_made(
    capability: float, installed: bool, needs: str | None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(backends, "compute_capability", lambda: capability)
    monkeypatch.setattr(backends, "device_kind", lambda: "cpu")
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: object() if installed else None)
    config = RunConfig(train=TrainConfig(kernel="triton"))  # can be read anywhere
    if needs is None:
        assert config.train.implementation == "triton"
        return
    with pytest.raises(ConfigError, match=f"^--kernel triton needs {needs}; pass --kernel auto$"):
        _ = Program(config).ternary


@pytest.mark.parametrize(("capability", "runs"), [(0.0, True), (8.6, False), (8.9, True), (9.0, True)])
def test_float8_products_are_refused_on_a_gpu_that_has_none(
    capability: float, runs: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(backends, "compute_capability", lambda: capability)
    monkeypatch.setattr(backends, "device_kind", lambda: "GPU")
    program = Program(RunConfig(train=TrainConfig(products="float8")))
    assert not program.ternary.float8  # validation has none of it
    if runs:
        assert program.config.train.float8
        return
    needs = r"an NVIDIA GPU of compute capability 8\.9 or later \(Ada\), and this is 'GPU' of 8\.6"
    with pytest.raises(ConfigError, match=f"^--products float8 needs {needs}; pass --products dtype$"):
        _ = program.sweep


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("kernel", "expected"), [("auto", None), ("xla", "xla"), ("triton", "triton")])
def test_the_kernel_is_that_of_every_operator(
    rule: str, kernel: str, expected: str | None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("arbs_jax.config._MISSING", {})
    ternary = Program(RunConfig(rule=RuleConfig(rule), train=TrainConfig(kernel=kernel))).ternary
    assert ternary.implementation == expected
    # The operator that moves latents is chosen by the rule.
    assert not isinstance(ternary.rule, Latent) or ternary.rule.implementation == expected


def test_flags_left_out_keep_what_the_run_has():
    assert ModelFlags().resolve(FAR_FROM_DEFAULT) == FAR_FROM_DEFAULT
    assert ModelFlags().resolve() == RunConfig()
    assert ModelFlags(steps=20).resolve(FAR_FROM_DEFAULT).train == replace(FAR_FROM_DEFAULT.train, steps=20)
    # The same preset again does not undo what else was chosen; another one does.
    assert ModelFlags(preset="byte-3m").resolve(FAR_FROM_DEFAULT).model == FAR_FROM_DEFAULT.model
    assert ModelFlags(preset="byte-10m").resolve(FAR_FROM_DEFAULT).model == PRESETS["byte-10m"]
    # A rate is in the unit of its rule.
    assert ModelFlags(rule="integral").resolve(FAR_FROM_DEFAULT).rule.learning_rate is None
    assert ModelFlags(rule="bigint").resolve(FAR_FROM_DEFAULT).rule.learning_rate == 0.5


def test_switches_of_the_arb_model():
    flags = ModelFlags(model="arb", arb=ArbFlags(disable_moe=True, enable_memory=True, max_moe_iters=2))
    config = flags.resolve()
    assert config.preset == "arb-tiny"
    assert config.model == preset("arb-tiny", moe=False, memgram=True, max_moe_iters=2)
    # Left out, they stay as the run has them; and the family is that of the preset.
    assert ModelFlags(steps=7).resolve(config).model == config.model
    assert ModelFlags(preset="byte-3m").resolve(config).model == PRESETS["byte-3m"]
    assert ModelFlags(model="byte").resolve(config).preset == RunConfig().preset


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (ModelFlags(arb=ArbFlags(top_k=1)), "--top-k is for the ARB model; pass --model arb"),
        (ModelFlags(model="arb", preset="byte-3m"), "--preset byte-3m is no shape of --model arb; .* arb-tiny"),
        (ModelFlags(model="arb", tied=True), "--tied is for the byte model"),
        (ModelFlags(model="arb", arb=ArbFlags(disable_moe=True, top_k=1)), "--disable-moe and --top-k contradict"),
        (
            ModelFlags(model="arb", arb=ArbFlags(disable_vq=True, disable_graph=True, enable_memory=True)),
            "--disable-vq and --enable-memory contradict",
        ),
        (
            ModelFlags(model="arb", arb=ArbFlags(disable_moe=True, disable_graph=True, max_moe_iters=2)),
            "--max-moe-iters with --disable-moe and --disable-graph: there is no loop",
        ),
    ],
)
def test_switches_that_contradict(flags: ModelFlags, message: str):
    with pytest.raises(ConfigError, match=message):
        flags.resolve()


def test_what_may_change_exists():
    document = RunConfig().to_json() | {"facts": {}}
    for key in MAY_CHANGE:
        node = document
        for part in key.split("."):
            node = node[part]


def test_as_many_micro_batches_as_devices_unless_told_or_begun():
    def accum(base=None, **flags):
        return ModelFlags(**flags).resolve(base).train.accum

    assert accum() == 1
    assert accum(devices=3) == 3
    assert accum(devices=3, accum=6) == 6
    begun = ModelFlags(accum=4).resolve()
    assert accum(begun, devices=2) == 4
    with pytest.raises(ConfigError, match="got 3 and 4; pass --accum 3 or a multiple of it"):
        accum(begun, devices=3)
