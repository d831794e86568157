"""`arbs bench` for real, on a CPU with small shapes; and how device time is taken."""

import json
import signal
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from commands import call

from arbs_jax.cli import bench
from arbs_kernels import timing, tuning
from arbs_kernels.benchmarks import BENCHMARKS
from arbs_kernels.cases import Case
from arbs_kernels.selection import Implementation, UnsupportedError

SMALL = ("--shapes", "2x3x5g4")


@pytest.mark.slow
def test_the_defaults_time_every_operator(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "bench.json"
    assert call("bench", "--json", path) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "copies" in out
    written = json.loads(path.read_text())
    assert written["device"] == jax.devices()[0].device_kind
    assert written["dtype"] == "bfloat16"
    assert written["date"].startswith("20")
    assert {row["op"] for row in written["rows"]} == set(BENCHMARKS)
    assert written["skipped"] == written["failed"] == []
    for row in written["rows"]:
        assert row["op"] in out
        assert row["seconds"] > 0
        assert row["ratio_to_dense"] == pytest.approx(row["dense_seconds"] / row["seconds"])
        assert row["ratio_to_roofline"] == pytest.approx(row["roofline_seconds"] / row["seconds"])
        assert {"implementation", "M", "N", "K", "G"} < set(row)


def test_one_operator_on_shapes_that_were_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "bench.json"
    words = ("--shapes", "7x5x33g8", "1x2x3g4", "--ops", "correlation_score", "--dtype", "float32")
    assert call("bench", *words, "--implementations", "xla", "--json", path) == 0
    out = capsys.readouterr().out
    assert "7x5x33g8" in out
    rows = json.loads(path.read_text())["rows"]
    assert [[row[name] for name in "MNKG"] for row in rows] == [[7, 5, 33, 8], [1, 2, 3, 4]]
    # x, dy, trits in; one int32 for each of 5 x 5 groups out.
    assert rows[0]["bytes"] == 4 * 7 * 33 + 4 * 7 * 5 + 5 * 7 + 4 * 5 * 5
    assert rows[0]["operations"] == 2 * 7 * 5 * 33


def test_what_was_measured_before_interruptions_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    measure, calls = timing.seconds_per_call, []

    def interrupted_at_the_last(*args: Any) -> float:
        calls.append(args)
        # Bandwidth, matrix rate; a dense and a packed arm of each shape.
        if len(calls) == 6:
            raise KeyboardInterrupt
        return measure(*args)

    def interrupted_again(report: Any, *args: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        report(*args)

    monkeypatch.setattr(timing, "seconds_per_call", interrupted_at_the_last)
    monkeypatch.setattr(bench, "_report", partial(interrupted_again, bench._report))
    handler = signal.getsignal(signal.SIGINT)
    path = tmp_path / "bench.json"
    words = ("--shapes", "7x5x33g8", "1x2x3g4", "--ops", "correlation_score", "--json", path)
    assert call("bench", *words, "--implementations", "xla") == 130
    out, err = capsys.readouterr()
    assert err == "interrupted\n"
    assert "7x5x33g8" in out
    assert [row["shape"] for row in json.loads(path.read_text())["rows"]] == ["7x5x33g8"]
    assert signal.getsignal(signal.SIGINT) is handler


def test_no_shape_is_timed_twice(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bench, "compute_capability", lambda: 9.0)
    monkeypatch.setattr(timing, "memory_budget", lambda: 2**38)
    arms = list(bench._arms(bench.Bench(), {name: ["xla"] for name in BENCHMARKS}, jnp.dtype(jnp.bfloat16)))
    assert len({bench._key(arm) for arm in arms}) == len(arms)
    assert {"1x10240x10240g32", "16384x10240x10240g32"} < {str(arm.case) for arm in arms}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--shapes", "64x64"), ("--shapes must be MxNxKgG", "'64x64'")),
        (("--shapes", "1x0x5g4"), ("at least 1", "'1x0x5g4'")),
        (("--shapes", "1x1x5g5"), ("G one of 4, 6, 8", "'1x1x5g5'")),
        (("--shapes", "2x1x5g4e3"), ("X experts that share the M rows", "'2x1x5g4e3'")),
        (("--shapes", "65536x262144x262144g32"), ("--shapes 65536x262144x262144g32", "GB")),
        (("--ops", "division"), ("--ops must be one of packed_matmul", "'division'")),
        (("--implementations", "abacus"), ("--implementations must be among", "xla", "'abacus'")),
        (("--dtype", "int8"), ("--dtype must be one of float32, bfloat16", "'int8'")),
        (("--json", "absent/file", *SMALL), ("--json: absent/file cannot be written", "No such file")),
    ],
)
def test_refuses_before_anything_is_timed(
    words: tuple[str, ...],
    expected: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(timing, "seconds_per_call", None)
    assert call("bench", *words) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.startswith("error: ")
    for part in expected:
        assert part in err


@pytest.mark.slow
def test_experts_are_of_grouped_products_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "bench.json"
    words = ("--shapes", "17x20x33g8e3", "--ops", "grouped_score", "latent_step", "packed_matmul", "--dtype", "float32")
    assert call("bench", *words, "--implementations", "xla", "--json", path) == 0
    assert "17x20x33g8e3" in capsys.readouterr().out
    rows = {row["op"]: row for row in json.loads(path.read_text())["rows"]}
    assert {name: row["X"] for name, row in rows.items()} == {"grouped_score": 3, "latent_step": 1, "packed_matmul": 1}
    # x, dy, sizes, trits in; one int32 for each of 3 x 20 x 5 groups out.
    assert rows["grouped_score"]["bytes"] == 4 * 17 * (33 + 20) + 4 * 3 + 3 * 20 * 7 + 4 * 3 * 20 * 5
    # The direction and four words in; five planes in and out; three counts of every row out.
    assert rows["latent_step"]["bytes"] == 4 * 20 * 33 + 4 * 4 + 2 * 5 * 20 * 7 + 4 * 20 * 3


def test_an_implementation_that_cannot_run_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    absent = Implementation(lambda: None, lambda: "a slide rule")  # pyrefly: ignore[bad-argument-type]
    monkeypatch.setitem(BENCHMARKS["packed_matmul"].implementations, "absent", absent)
    assert call("bench", "--implementations", "absent", *SMALL) == 1
    err = capsys.readouterr().err
    assert err == (
        "error: --implementations absent: packed_matmul: implementation 'absent' needs a slide rule; "
        "pass 'xla', or None\n"
    )


def test_what_breaks_is_told_and_the_rest_is_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def broken(*_: Any, **__: Any) -> jax.Array:
        raise RuntimeError("out of registers\nand more")

    def refuses(*_: Any, **__: Any) -> jax.Array:
        raise UnsupportedError("K must be even, got 5; pass 'xla'")

    table = BENCHMARKS["packed_matmul"].implementations
    monkeypatch.setitem(table, "broken", Implementation(broken))
    monkeypatch.setitem(table, "picky", Implementation(refuses))
    assert call("bench", "--ops", "packed_matmul", *SMALL) == 1
    out, err = capsys.readouterr()
    assert "xla" in out
    assert "left out: packed_matmul 2x3x5g4 picky: K must be even, got 5; pass 'xla'\n" in out
    assert err == "failed: packed_matmul 2x3x5g4 broken: RuntimeError: out of registers\n"


def test_tuning_writes_the_fastest_that_is_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "tuned.json"
    path.write_text('{"B": {"packed_matmul": []}}')
    monkeypatch.setattr(tuning, "TABLE", path)
    tuning._load.cache_clear()
    benchmark = BENCHMARKS["packed_matmul"]
    wrong = Implementation(lambda x, trits, scale, **_: jnp.zeros((x.shape[0], trits.shape[0]), x.dtype))
    same = Implementation(lambda *arrays, tiles=None, **static: benchmark.implementations["xla"].run(*arrays, **static))
    monkeypatch.setitem(benchmark.implementations, "wrong", wrong)
    monkeypatch.setitem(benchmark.implementations, "same", same)
    candidates = {"xla": [None], "wrong": [None], "same": [None, {"rows": 8}, {"rows": 16}]}
    monkeypatch.setattr(type(benchmark), "candidates", lambda _, name: candidates[name])
    fake = {None: 4.0, 8: 1.0, 16: 2.0}
    keep = timing.seconds_per_call

    def seconds(function: Any, *rest: Any) -> float:
        tiles = getattr(function, "keywords", {}).get("tiles")
        return fake[tiles["rows"]] if tiles else max(keep(function, *rest), 3.0)

    monkeypatch.setattr(timing, "seconds_per_call", seconds)
    assert call("bench", "--tune", "--ops", "packed_matmul", *SMALL) == 1
    out, err = capsys.readouterr()
    assert err == "failed: packed_matmul 2x3x5g4 wrong: its result is not that of 'xla'\n"
    assert f"wrote the fastest of packed_matmul for {jax.devices()[0].device_kind!r} to {path}" in out
    tuning._load.cache_clear()
    chosen = tuning.choice("packed_matmul", 2, 3, 5, 4)
    assert chosen.order[0] == "same"
    assert chosen.tiles == {"rows": 8}
    assert json.loads(path.read_text())["B"] == {"packed_matmul": []}
    tuning._load.cache_clear()


def test_help_explains_every_flag(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        call("bench", "--help")
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert "None" not in out
    assert "{" not in out
    for flag in ("--shapes", "--ops", "--implementations", "--dtype", "--json", "--tune"):
        assert f"{flag} " in out


def test_every_call_of_a_sequence_is_made():
    """Nothing is shared between calls or left out, even with inputs that are the same array."""
    side = 64
    one = jnp.ones((side, side), jnp.float32)
    program = jax.jit(lambda sets: timing.in_sequence(jnp.matmul, sets)).lower([(one, one)] * 5).compile()
    assert program.cost_analysis()["flops"] == pytest.approx(5 * 2 * side**3, rel=0.05)
    for product in program([(one, one)] * 5):
        assert float(product[0, 0]) == side


def test_times_grow_with_the_work():
    effort = timing.Effort(2**20, 2**20, 2, 2, 0.005, 3)
    loops = [
        timing.seconds_per_call(
            lambda x, n=n: jax.lax.fori_loop(0, n, lambda _, y: jnp.sin(y), x), [(jnp.ones((4096,)),)] * 2, effort
        )
        for n in (10, 1000)
    ]
    assert loops[1] > 5 * loops[0] > 0


def test_rotation_exceeds_the_cache_and_fits_the_memory(monkeypatch: pytest.MonkeyPatch):
    effort = timing.Effort(1000, 100, 2, 16, 0.01)
    monkeypatch.setattr(timing, "memory_budget", lambda: 4000)
    assert timing.rotation(200, 0, effort) == 5
    assert timing.rotation(1, 1, effort) == 16
    assert timing.rotation(900, 10, effort) == 2
    assert timing.rotation(1000, 500, effort) == 1
    assert timing.rotation(4001, 0, effort) == 0


def test_bytes_of_a_gather_are_those_of_its_rows():
    benchmark = BENCHMARKS["packed_row_gather"]
    case = Case(10, 1000, 50, 32, "")
    assert benchmark.bytes_moved(case, jnp.bfloat16) == 10 * 4 + 10 * (10 + 2 * 4) + 10 * 50 * 2
    assert benchmark.operations(case) == 0
