"""What fits a device and what does not, by the numbers that a device and a compiled step give."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from arbs_jax.cli.runs import make_room
from arbs_jax.config import RunConfig
from arbs_jax.errors import ConfigError
from arbs_jax.training import room
from arbs_jax.training.program import Program
from arbs_jax.training.room import check_room, device_room, peak_bytes, reserve


def device(stats):
    return SimpleNamespace(memory_stats=lambda: stats)


def test_room_is_what_is_left_of_the_limit():
    assert device_room(device({"bytes_limit": 1000, "bytes_in_use": 300})) == 700
    assert device_room(device({"bytes_limit": 1000})) == 1000


@pytest.mark.parametrize("stats", [None, {}, {"bytes_in_use": 3}])
def test_a_device_that_does_not_tell_has_any_room(stats):
    assert device_room(device(stats)) is None
    check_room(2**60, None)


def test_what_fits_passes_to_the_byte():
    check_room(1000, 1000)
    with pytest.raises(ConfigError, match="needs 1 MB, this device has 0 MB"):
        check_room(1001, 1000)


def test_the_message_has_both_figures_and_what_to_do():
    message = r"a step of arb-3b needs 2,036 MB, this device has 1,999 MB; lower --batch, --ctx or --layers"
    with pytest.raises(ConfigError, match=message):
        check_room(2_035_500_000, 1_999_900_000, "a step of arb-3b")


def test_a_donated_argument_counts_once():
    x = jax.ShapeDtypeStruct((1024,), jnp.float32)
    plain, donated = (jax.jit(lambda x: x + 1, donate_argnums=at).lower(x).compile() for at in ((), (0,)))
    assert peak_bytes(plain) - peak_bytes(donated) == 4096
    assert peak_bytes(donated) >= 4096


def test_what_is_reserved_is_one_piece_and_given_back(monkeypatch: pytest.MonkeyPatch):
    pieces = []
    zeros = jnp.zeros
    monkeypatch.setattr(room, "device_room", lambda _: 2**40)
    monkeypatch.setattr(jnp, "zeros", lambda *shape, **kwargs: pieces.append(zeros(*shape, **kwargs)) or pieces[-1])
    (cpu,) = jax.local_devices()[:1]
    assert reserve(2**20 + 1, cpu)
    (piece,) = pieces
    assert piece.nbytes == 2**21
    assert piece.is_deleted()


def test_what_is_not_there_in_one_piece_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def refused(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(room, "device_room", lambda _: 2**40)
    monkeypatch.setattr(jnp, "zeros", refused)
    assert not reserve(4_830_815_205, jax.local_devices()[0])
    make_room(4_830_815_205, Program(RunConfig()))
    assert "the device does not give 4,831 MB in one piece" in " ".join(capsys.readouterr().err.split())


def test_a_device_that_does_not_tell_is_left_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jnp, "zeros", None)
    assert reserve(2**60, device(None))
