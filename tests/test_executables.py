"""Programs kept as files: found again, and only where nothing that decides them has changed."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from support import assert_trees_equal

from arbs_jax import executables
from arbs_jax.compilation import measured
from arbs_jax.config import RunConfig, TrainConfig
from arbs_jax.executables import compiled
from arbs_jax.models import ModelConfig
from arbs_jax.rules import RuleConfig
from arbs_jax.training.program import Program

SHAPE = jax.ShapeDtypeStruct((4,), jnp.int32)


OPTIONS = {
    "jax_compilation_cache_dir": None,
    "jax_persistent_cache_min_compile_time_secs": 1e9,
    "jax_persistent_cache_min_entry_size_bytes": 0,
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path) -> Iterator[Path]:
    """Of the programs, below a folder in which JAX keeps nothing of its own: it keeps what took longer than ever."""
    before = {name: getattr(jax.config, name) for name in OPTIONS}
    compilation_cache.reset_cache()
    for name, value in (OPTIONS | {"jax_compilation_cache_dir": str(tmp_path)}).items():
        jax.config.update(name, value)
    yield tmp_path / "arbs_executables"
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


class Traced:
    """`x * factor`, and how often it was traced."""

    def __init__(self, factor: int = 3):
        self.factor, self.times = factor, 0

    def program(self, shape: Any = SHAPE, name: str = "times", **settings: Any) -> Any:
        """Compiled by a `jax.jit` of its own, which remembers nothing."""

        def times(tree: dict[str, jax.Array]) -> dict[str, jax.Array]:
            self.times += 1
            return {"y": tree["x"] * self.factor}

        return compiled(name, jax.jit(times), {"x": shape}, settings=settings)


def test_the_second_start_traces_nothing(folder: Path):
    first, second = Traced(), Traced()
    first.program(factor=3)
    with measured() as report:
        program = second.program(factor=3)
    assert (first.times, second.times) == (1, 0)
    assert report.cached
    assert len(list(folder.iterdir())) == 1
    assert program({"x": np.arange(4, dtype=np.int32)})["y"].tolist() == [0, 3, 6, 9]
    assert program.memory_analysis().argument_size_in_bytes == 16


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({"factor": 5}, id="settings"),
        pytest.param({"shape": jax.ShapeDtypeStruct((5,), jnp.int32)}, id="shape"),
        pytest.param({"shape": jax.ShapeDtypeStruct((4,), jnp.uint32)}, id="dtype"),
        pytest.param({"name": "others"}, id="name"),
    ],
)
def test_another_program_is_not_mistaken_for_it(other: dict[str, Any]):
    Traced().program(factor=3)
    traced = Traced(other.get("factor", 3))
    shape = other.get("shape", SHAPE)
    program = traced.program(**{"factor": 3} | other)
    assert traced.times == 1
    assert program({"x": jnp.ones(shape.shape, shape.dtype)})["y"].tolist() == [traced.factor] * shape.shape[0]


def test_what_jax_had_already_is_not_written_again(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """On a CPU it could be read and not run."""
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    for starts in range(3):
        monkeypatch.setattr(executables, "_source", lambda text=str(starts): text)
        with measured() as report:
            program = Traced().program()
        assert program({"x": np.ones(4, np.int32)})["y"].tolist() == [3] * 4
        assert report.cached == (starts > 0)
        assert len(list(folder.iterdir())) == 1


@pytest.mark.parametrize("what", ["source", "version", "host", "flags", "option"])
def test_what_lies_beneath_may_not_change(what: str, monkeypatch: pytest.MonkeyPatch):
    Traced().program()
    again = Traced()
    match what:
        case "source":
            monkeypatch.setattr(executables, "_source", lambda: "another")
        case "version":
            monkeypatch.setattr(executables, "_version", lambda package: f"{package} of tomorrow")
        case "host":
            monkeypatch.setattr(executables, "_host", lambda: "flags: fpu")
        case "flags":
            monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    if what == "option":
        with jax.default_matmul_precision("highest"):
            again.program()
    else:
        again.program()
    assert again.times == 1


def test_the_source_is_that_of_both_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    digests = []
    for package in ("arbs_jax", "arbs_kernels"):
        for text in ("a = 1", "a = 2"):
            (tmp_path / package).mkdir(exist_ok=True)
            (tmp_path / package / "__init__.py").write_text(text)
            monkeypatch.setattr(getattr(executables, package), "__file__", str(tmp_path / package / "__init__.py"))
            digests.append(executables._source.__wrapped__())
    assert len(set(digests)) == 4


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: data[:50] + b"x" + data[51:], lambda data: b""]
)
def test_a_damaged_file_is_said_and_replaced(folder: Path, damage: Any, caplog: pytest.LogCaptureFixture):
    Traced().program()
    (kept,) = folder.iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(damage(whole))
    again, after = Traced(), Traced()
    with caplog.at_level(logging.WARNING):
        assert again.program()({"x": np.ones(4, np.int32)})["y"].tolist() == [3] * 4
    assert f"{kept} cannot be read" in caplog.text
    after.program()
    assert (again.times, after.times) == (1, 0)


def test_a_folder_that_cannot_be_written_is_said(folder: Path, caplog: pytest.LogCaptureFixture):
    folder.write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        assert Traced().program()({"x": np.ones(4, np.int32)})["y"].tolist() == [3] * 4
    assert "cannot be kept" in caplog.text


def test_programs_used_longest_ago_make_room(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(executables, "MOST_FILES", 2)
    for name in ("a", "b", "a", "c"):
        Traced().program(name=name)
    assert sorted(path.name[0] for path in folder.iterdir()) == ["a", "c"]


def test_without_a_cache_nothing_is_kept(folder: Path):
    jax.config.update("jax_compilation_cache_dir", None)
    for _ in range(2):
        traced = Traced()
        traced.program()
        assert traced.times == 1
    assert not folder.exists()


def test_a_step_that_was_read_back_takes_the_same_step(folder: Path):
    model = ModelConfig(width=32, layers=1, heads=2, kv_heads=1, head_dim=16, hidden=32, context=8)
    config = RunConfig(
        model=model, group_size=32, rule=RuleConfig("bigint"), train=TrainConfig(steps=3, batch=2, context=8)
    )
    tokens = np.random.default_rng(0).integers(0, 256, (1, 2, 9), dtype=np.uint8)
    after = []
    for start in range(2):
        program = Program(config)
        with measured() as report:
            step, state = program.compile_step(), program.init_state()
        assert report.cached == (start == 1)
        trits = jax.tree.leaves(state.ternary)[0]
        state, metrics = step(state, tokens)
        assert trits.is_deleted()  # The state is donated, read back or not.
        after.append((state, metrics))
    assert sorted(path.name.split("-")[0] for path in folder.iterdir()) == ["init", "step"]
    assert_trees_equal(*after)
