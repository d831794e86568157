"""The tuned table: what is looked up, what is tried in which order, and what a tuner writes."""

import json
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import random_matrix

from arbs_kernels import backends, packed_matmul, tuning
from arbs_kernels.packed_matmul import api
from arbs_kernels.selection import Implementation, UnsupportedError
from arbs_kernels.tuning import Choice, Timing, choice, entries, record, tuned

HERE = "Test GPU"


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty table in place of the package's, read as on a GPU of compute capability 9.0."""
    path = tmp_path / "tuned.json"
    path.write_text("{}")
    monkeypatch.setattr(tuning, "TABLE", path)
    monkeypatch.setattr(tuning, "device_kind", lambda: HERE)
    monkeypatch.setattr(tuning, "compute_capability", lambda: 9.0)
    tuning._load.cache_clear()
    yield path
    tuning._load.cache_clear()


def entry(implementation: str, rows: list[int | None], least: int = 0, dtype: str = "bfloat16", **tiles: int) -> dict:
    return {"dtype": dtype, "M": rows, "min_weights": least, "implementation": implementation, "tiles": tiles}


def write(path: Path, *found: dict) -> None:
    path.write_text(json.dumps({HERE: {"sum": list(found)}}))
    tuning._load.cache_clear()


def test_the_packaged_table_is_well_formed():
    content = json.loads(tuning.TABLE.read_text())
    assert "NVIDIA H200" in content
    for operators in content.values():
        for found in operators.values():
            for one in found:
                assert set(one) == set(entry("xla", [1, None]))
                assert one["M"][0] >= 1
    assert tuning._one_entry_a_line(content) == tuning.TABLE.read_text()


@pytest.mark.parametrize(
    ("capability", "order"),
    [
        (0.0, ("xla",)),
        (7.5, ("xla",)),
        (8.0, ("triton", "xla")),
        (8.9, ("triton", "xla")),
        (9.0, ("mosaic_gpu", "triton", "xla")),
        (12.0, ("mosaic_gpu", "triton", "xla")),
    ],
)
def test_an_unknown_device_goes_by_its_capability(capability, order, table, monkeypatch):
    monkeypatch.setattr(tuning, "compute_capability", lambda: capability)
    assert choice("sum", 1, 2, 3, 32) == Choice(order)


def test_the_first_entry_that_applies_wins(table):
    write(
        table,
        entry("triton", [1, 16], least=1000, block=64),
        entry("xla", [1, 16]),
        entry("mosaic_gpu", [17, None], stages=4),
        entry("triton", [17, None], dtype="float32"),
    )
    assert choice("sum", 1, 100, 10, 32) == Choice(("triton", "mosaic_gpu", "xla"), {"block": 64})
    assert choice("sum", 16, 100, 9, 32) == Choice(("xla", "mosaic_gpu", "triton"))
    assert choice("sum", 17, 1, 1, 32) == Choice(("mosaic_gpu", "triton", "xla"), {"stages": 4})
    assert choice("sum", 10**9, 1, 1, 32, jnp.float32).order[0] == "triton"
    assert choice("sum", 1, 100, 10, 32, jnp.float32) == Choice(("mosaic_gpu", "triton", "xla"))
    assert choice("difference", 1, 100, 10, 32) == Choice(("mosaic_gpu", "triton", "xla"))


def _says(name):
    return Implementation(lambda value, **tiles: (name, value, tiles))


def _refuses(value, **_):
    raise UnsupportedError(f"not {value}")


SHAPE = (4, 5, 6, 32)


def test_none_falls_through_what_refuses_and_a_name_does_not(table):
    write(table, entry("triton", [1, None], block=64))
    everything = {"xla": _says("xla"), "mosaic_gpu": _says("mosaic_gpu"), "triton": _says("triton")}
    assert tuned("sum", everything, None, SHAPE, jnp.bfloat16)(7) == ("triton", 7, {"tiles": {"block": 64}})
    assert tuned("sum", everything, "triton", SHAPE, jnp.bfloat16)(7) == ("triton", 7, {"tiles": {"block": 64}})
    # Tiles are the tuned implementation's; another one chooses its own.
    assert tuned("sum", everything, "mosaic_gpu", SHAPE, jnp.bfloat16)(7) == ("mosaic_gpu", 7, {})
    refusing = everything | {"triton": Implementation(_refuses)}
    assert tuned("sum", refusing, None, SHAPE, jnp.bfloat16)(7) == ("mosaic_gpu", 7, {})
    with pytest.raises(UnsupportedError, match="not 7"):
        tuned("sum", refusing, "triton", SHAPE, jnp.bfloat16)(7)
    absent = everything | {"triton": Implementation(_refuses, lambda: "a slide rule")}
    assert tuned("sum", absent, None, SHAPE, jnp.bfloat16)(7) == ("mosaic_gpu", 7, {})
    with pytest.raises(UnsupportedError, match="needs a slide rule"):
        tuned("sum", absent, "triton", SHAPE, jnp.bfloat16)
    with pytest.raises(UnsupportedError, match="no implementation 'abacus'"):
        tuned("sum", absent, "abacus", SHAPE, jnp.bfloat16)
    only = {"xla": _says("xla")}
    assert tuned("sum", only, None, SHAPE, jnp.bfloat16)(7) == ("xla", 7, {})
    with pytest.raises(UnsupportedError, match="not 7"):
        tuned("sum", {"xla": Implementation(_refuses)}, None, SHAPE, jnp.bfloat16)(7)


def timing(rows: int, weights: int, implementation: str, seconds: float, shape: str = "", **tiles: int) -> Timing:
    return Timing(rows, weights, implementation, tiles, shape or f"{rows}x{weights}", seconds)


def test_entries_cover_every_size_with_the_fastest():
    found = entries(
        [
            timing(1, 100, "xla", 3.0),
            timing(1, 100, "triton", 2.0, block=8),
            timing(1, 100, "triton", 1.0, block=16),
            timing(16, 100, "xla", 2.0),
            timing(16, 100, "triton", 1.0, block=16),
            timing(1024, 100, "xla", 1.0),
            timing(1024, 100, "triton", 2.0),
            timing(1024, 10000, "xla", 2.0),
            timing(1024, 10000, "mosaic_gpu", 1.0),
        ],
        "bfloat16",
    )
    assert found == [
        entry("triton", [1, 128], block=16),
        entry("mosaic_gpu", [129, None], least=1001),
        entry("xla", [129, None]),
    ]


def test_two_shapes_of_one_size_are_weighed_together_and_failures_do_not_win():
    found = entries(
        [
            timing(8, 100, "xla", 1.0, "wide"),
            timing(8, 100, "xla", 8.0, "tall"),
            timing(8, 100, "triton", 2.0, "wide"),
            timing(8, 100, "triton", 3.0, "tall"),
            timing(8, 100, "mosaic_gpu", 0.1, "wide"),
        ],
        "float32",
    )
    assert found == [entry("triton", [1, None], dtype="float32")]


def test_what_is_recorded_is_found_again_and_the_rest_stays(table):
    content = {HERE: {"sum": [entry("xla", [1, None]), entry("xla", [1, None], dtype="float32")], "max": []}, "B": {}}
    table.write_text(json.dumps(content))
    record({"sum": [entry("triton", [1, None], block=4)]}, "bfloat16")
    assert choice("sum", 1, 2, 3, 32) == Choice(("triton", "mosaic_gpu", "xla"), {"block": 4})
    assert choice("sum", 1, 2, 3, 32, jnp.float32).order[0] == "xla"
    assert {name: set(of) for name, of in json.loads(table.read_text()).items()} == {HERE: {"sum", "max"}, "B": set()}
    assert max(len(line) for line in table.read_text().splitlines()) < 150


def test_an_operator_runs_what_the_table_says(table, monkeypatch):
    seen = {}

    def quick(x, trits, scale, *, group_size, tiles=None):
        seen.update(tiles or {})
        return jnp.zeros((x.shape[0], trits.shape[0]), x.dtype)

    monkeypatch.setitem(api.FORWARD, "quick", Implementation(quick))
    matrix = random_matrix(np.random.default_rng(1), 3, 10, 4)
    x = jnp.ones((2, 10), jnp.float32)
    table.write_text(
        json.dumps({HERE: {"packed_matmul": [entry("quick", [2, 2], least=30, dtype="float32", block=5)]}})
    )
    tuning._load.cache_clear()
    run = jax.jit(lambda x: packed_matmul.packed_matmul(x, matrix.trits, matrix.scale, group_size=4))
    assert not run(x).any()
    assert seen == {"block": 5}
    assert run(jnp.ones((3, 10), jnp.float32)).any()
    assert run(x.astype(jnp.bfloat16)).any()


def test_a_cpu_runs_xla():
    if backends.compute_capability() == 0.0:
        assert choice("packed_matmul", 1, 2, 3, 32) == Choice(("xla",))
