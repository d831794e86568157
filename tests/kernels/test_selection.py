"""Which implementation runs, and what is said where none can."""

import jax
import pytest

from arbs_kernels import backends
from arbs_kernels.packed_matmul import packed_matmul
from arbs_kernels.selection import Implementation, UnsupportedError, select


def lacking():
    return "a slide rule"


TABLE = {
    "xla": Implementation(lambda: "plain"),
    "quick": Implementation(lambda: "quick"),
    "absent": Implementation(lambda: "absent", lacking),
}


def test_none_takes_the_first_preferred_that_runs():
    assert select("sum", TABLE, None, ["absent", "quick", "xla"])() == "quick"
    assert select("sum", TABLE, None, ["absent"])() == "plain"
    assert select("sum", TABLE, None, ["never heard of"])() == "plain"
    assert select("sum", TABLE, None)() == "plain"


def test_a_name_is_taken_at_its_word():
    assert select("sum", TABLE, "quick", ["xla"])() == "quick"
    message = "sum: implementation 'absent' needs a slide rule; pass 'xla' or 'quick', or None"
    with pytest.raises(UnsupportedError, match=message):
        select("sum", TABLE, "absent", ["xla"])
    with pytest.raises(
        UnsupportedError, match="sum has no implementation 'slow'; pass one of absent, quick, xla, or None"
    ):
        select("sum", TABLE, "slow")


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="says what a CPU lacks")
def test_a_cpu_lacks_gpu_backends_and_says_so():
    assert backends.compute_capability() == 0.0
    assert "compute capability 9.x (Hopper), and this is 'cpu'" in (backends.mosaic_gpu_missing() or "")
    assert "compute capability 8.0 or later (Ampere), and this is 'cpu'" in (backends.triton_missing() or "")
    with backends.interpreted():
        assert backends.mosaic_gpu_missing() is None
        assert backends.triton_missing() is not None
    assert not backends.is_interpreted()


def test_the_default_device_is_the_configured_one():
    with jax.default_device(jax.devices("cpu")[0]):
        assert backends.device_kind() == "cpu"


def test_operators_go_through_it():
    with pytest.raises(UnsupportedError, match="packed_matmul has no implementation 'abacus'"):
        packed_matmul(None, None, None, group_size=32, implementation="abacus")
