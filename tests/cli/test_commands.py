"""What the commands print and leave behind when all goes well."""

import json
import math
import os
import re
import subprocess
from pathlib import Path

import pytest
from commands import EVAL_INTERVAL, LOG_INTERVAL, STEPS, call, command, compiled, finish, flags, restore, weights

from arbs_jax.models import PRESETS
from arbs_jax.run.metrics import read_metrics

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@pytest.mark.parametrize("name", ["train", "sample", "eval", "audit", "warmup"])
def test_help_explains_every_flag(name: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        call(name, "--help")
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    # A default of None or a type in braces says nothing to people.
    assert "None" not in out
    assert "{" not in out
    assert "--run DIR" in out
    if name == "train":
        for flag in [
            "--data",
            "--steps",
            "--batch",
            "--ctx",
            "--accum",
            "--seed",
            "--rule",
            "--preset",
            "--resume",
            "--merge",
            "--kernel",
            "--checkpoint",
            "--eval-interval",
            "--save-interval",
            "--log-interval",
            "--no-save",
            "--stop-at",
        ]:
            assert f"{flag} " in out
        assert all(preset in out for preset in PRESETS)
        assert "--disable-vq " in out
        assert "--model byte|arb" in out


def test_a_run_folder_is_complete(finished: Path):
    config = json.loads((finished / "config.json").read_text())
    length = {"steps": STEPS, "batch": 2, "context": 16, "accum": 2, "devices": 1, "layers_at_once": None}
    assert config["train"] == length | {"seed": 0, "kernel": "auto", "products": "dtype"}
    assert 3 < config["unigram_entropy"] < 3.5
    assert config["facts"]["logical_ternary_weights"] == weights("byte-0.4m")
    rows = read_metrics(finished / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(LOG_INTERVAL, STEPS + 1, LOG_INTERVAL))
    assert all(math.isfinite(row["train_loss"]) for row in rows)
    assert [row["step"] for row in rows if "val_loss" in row] == [EVAL_INTERVAL, STEPS]
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    assert (finished / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert len((finished / "sample.txt").read_bytes()) == 32 + 240
    assert any((finished / "tensorboard").iterdir())
    best = min((row["val_loss"], row["step"]) for row in rows if "val_loss" in row)
    tree, metadata = restore(finished, "best")
    assert int(tree["step"]) == best[1]
    assert metadata["progress"]["best"] == best[0]
    for name in ("latest", "final"):
        assert int(restore(finished, name)[0]["step"]) == STEPS


@pytest.mark.slow
def test_output_that_is_no_terminal_holds_no_control_characters(tmp_path: Path):
    done = finish("train", "--run", tmp_path / "run", *flags("integral", 2), "--no-save")
    assert done.returncode == 0, done.stderr
    assert not CONTROL.findall(done.stdout)
    assert done.stderr == ""
    for part in ("unigram entropy", f"step {STEPS:6}", "Result", "best validation", "Sample", "float parameters"):
        assert part in done.stdout
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert "checkpoints" not in done.stdout


def test_sample_repeats_with_its_seed_and_greedily_without(finished: Path, capsys: pytest.CaptureFixture[str]):
    def text(*words: str) -> str:
        capsys.readouterr()
        assert call("sample", "--run", finished, "--prompt", "The ", "--bytes", 40, *words) == 0
        out, err = capsys.readouterr()
        assert f"40 bytes from {finished} at step" in err
        assert out.startswith("The ")
        assert not CONTROL.findall(out)
        return out

    assert text("--seed", "3") == text("--seed", "3") == text("--seed", "3", "--packed")
    assert text("--seed", "3") != text("--seed", "4")
    greedy = text("--temperature", "0")
    assert greedy == text("--top-k", "1", "--seed", "5")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--temperature", "-1"), "--temperature must be at least 0 and finite, got -1.0"),
        (("--top-k", "257"), "--top-k must be in [0, 256], got 257"),
        (("--top-p", "0"), "--top-p must be in (0, 1], got 0.0"),
        (("--seed", "-1"), "--seed must be in [0, 2^32), got -1"),
        (("--bytes", "0"), "--bytes must be at least 1, got 0"),
        (("--prompt", ""), "--prompt is empty"),
        (("--checkpoint", "worst"), "unknown checkpoint name 'worst'"),
        (("--checkpoint", "7"), "there is no checkpoint of step 7"),
    ],
)
def test_sample_refuses(words: tuple[str, str], expected: str, finished: Path, capsys: pytest.CaptureFixture[str]):
    assert call("sample", "--run", finished, *words) == 1
    out, err = capsys.readouterr()
    assert expected in err
    assert out == ""


@pytest.mark.slow
def test_a_prompt_that_is_not_utf8_and_a_terminal_that_is_not_either(finished: Path):
    words = [*map(str.encode, command("sample", "--run", finished, "--bytes", 8, "--prompt")), b"\xff\xc3\xa9"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(words, capture_output=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"??")


@pytest.mark.slow
def test_a_reader_who_leaves_early_gets_no_traceback(finished: Path):
    words = command("sample", "--run", finished, "--bytes", 300)
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert b"Traceback" not in process.stderr.read()
    process.stderr.close()
    assert process.wait() == 1


def test_eval_agrees_with_training_and_speaks_json(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    wanted = read_metrics(finished / "metrics.jsonl")[-1]["val_loss"]
    words = ("eval", "--run", finished, "--checkpoint", "final", "--windows", 128)
    assert call(*words, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    # The batches are cut differently, so sums round differently.
    assert result["nats_per_byte"] == pytest.approx(wanted, rel=1e-5)
    assert result["bits_per_byte"] == result["nats_per_byte"] / math.log(2)
    assert (result["step"], result["context"], result["bytes"]) == (STEPS, 16, 128 * 16)
    assert call(*words) == 0
    out = capsys.readouterr().out
    assert f"{result['nats_per_byte']:.4f}" in out
    assert f"{result['bits_per_byte']:.4f}" in out
    (tmp_path / "text").write_bytes(b"ab" * 100)
    assert call("eval", "--run", finished, "--data", tmp_path / "text", "--ctx", 32, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["unigram_entropy"] == pytest.approx(math.log(2))
    assert result["bytes"] == (200 // 33) * 32
    assert call("eval", "--run", finished, "--ctx", 2000) == 1
    assert "--ctx 2000 is longer than the model's context of 1024" in capsys.readouterr().err


def test_the_newest_run_is_the_default(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    assert call("sample") == 1
    assert "no run below runs/; train one with `arbs train`, or pass --run" in capsys.readouterr().err
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").symlink_to(finished)
    assert call("sample", "--bytes", 3) == 0
    assert "runs/mine" in capsys.readouterr().err


def test_audit_of_a_preset_and_of_a_run(finished: Path, capsys: pytest.CaptureFixture[str]):
    assert call("audit", "--run", finished, "--json") == 0
    account = json.loads(capsys.readouterr().out)
    tree, _ = restore(finished)
    leaves = [tree["step"], tree["halted"]]
    pending = [tree["ternary"]]
    while pending:
        for value in pending.pop().values():
            (pending if isinstance(value, dict) else leaves).append(value)
    assert account["state_bytes"] == sum(leaf.nbytes for leaf in leaves)
    assert account["logical_ternary_weights"] == weights("byte-0.4m")
    assert account["bits_per_weight"] == 8 * account["state_bytes"] / weights("byte-0.4m")
    assert account["float_params"] == account["float_buffers"] == 0
    assert call("audit", "--preset", "byte-0.4m", "--rule", "integral", "--json") == 0
    assert json.loads(capsys.readouterr().out) == account
    assert call("audit", "--preset", "byte-1b") == 0
    assert f"{weights('byte-1b'):,}" in capsys.readouterr().out


@pytest.mark.parametrize(("rule", "most"), [("latent4", 4.0), ("latent6", 6.5), ("latent10", 10.3), ("latent18", 18.3)])
def test_audit_of_a_rule_that_moves_the_trits(rule: str, most: float, capsys: pytest.CaptureFixture[str]):
    assert call("audit", "--preset", "byte-3m", "--rule", rule, "--json") == 0
    account = json.loads(capsys.readouterr().out)
    assert account["logical_ternary_weights"] == weights("byte-3m")
    assert account["bits_per_weight"] == 8 * account["state_bytes"] / weights("byte-3m") <= most
    assert account["float_params"] == account["float_buffers"] == 0
    assert {"residual", "trits"} < set(account["bytes_by_leaf"])
    assert call("audit", "--preset", "byte-3m", "--rule", rule) == 0
    assert f"rule {rule}" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.thorough
def test_a_start_after_warmup_compiles_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ARBS_CACHE_DIR", str(tmp_path / "cache"))
    shape = flags("integral", 1, steps=3)
    assert (warm := finish("warmup", *shape)).returncode == 0, warm.stderr
    assert compiled(warm.stdout) == {"training step": True, "initial state": True, "validation": True}
    assert "predicted device memory" in warm.stdout
    done = finish("train", *shape, "--run", tmp_path / "run", "--no-save", "--stop-at", 2)
    assert done.returncode == 0, done.stderr
    assert compiled(done.stdout) == {"state": False, "training step": False}


def test_smoke_tells_what_a_model_costs_here(capsys: pytest.CaptureFixture[str]):
    words = ("--preset", "byte-0.4m", "--rule", "integral", "--ctx", 16, "--batch", 2)
    assert call("smoke", *words, "--backward", "--runs", 2, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["logical_ternary_weights"] == weights("byte-0.4m")
    assert found["nats_per_byte"] > 0
    assert min(found[name] for name in ("forward_cold", "forward_warm", "step_cold", "step_warm")) > 0
    assert len(found["peak_megabytes_after_each_step"]) == 3
