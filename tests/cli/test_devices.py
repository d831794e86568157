"""A run on two devices: the run on one but for how activations round, and one may go on where two stopped."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from commands import Reference, call, compiled, finish, flags, restore, tags

from arbs_jax.run.metrics import read_metrics

STEPS = 40


def losses(run: Path) -> np.ndarray:
    """Those on record."""
    return np.asarray([row["train_loss"] for row in read_metrics(run / "metrics.jsonl")])


@pytest.mark.slow
def test_two_devices_share_a_step(
    reference: Callable[..., Reference],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:  # The number of devices is fixed when a process starts.
        patch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
        begun = finish("train", "--run", run, *flags("integral", 2, STEPS), "--devices", 2, "--stop-at", 13)
        assert begun.returncode == 0, begun.stderr
        assert tags(run)["latest"] == 13
        resumed = finish("train", "--run", run, "--resume", "--stop-at", 27)
        assert resumed.returncode == 0, resumed.stderr
        assert compiled(resumed.stdout)["training step"] is False
    assert call("eval", "--run", run) == 0  # looks at it with one device
    capsys.readouterr()
    assert call("train", "--run", run, "--resume") == 1
    assert "--devices must be at most those of this process, which has 1, got 2" in capsys.readouterr().err
    assert call("train", "--run", run, "--resume", "--devices", 1) == 0
    whole = reference("integral", 2, STEPS).run
    np.testing.assert_allclose(losses(run), losses(whole), rtol=1e-2)
    (tree, metadata), (wanted, wanted_metadata) = restore(run, "final"), restore(whole, "final")
    assert (int(tree["step"]), metadata["data"]) == (STEPS, wanted_metadata["data"])
    assert int(tree["ternary"]["head"]["votes"]) == int(wanted["ternary"]["head"]["votes"]) == 2 * STEPS
