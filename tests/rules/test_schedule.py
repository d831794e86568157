"""The integer schedule is the float formula to 2^-10, and the same bits everywhere."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arbs_jax.errors import ConfigError
from arbs_jax.rules.schedule import UNIT_BITS, Schedule

SCHEDULES = [
    Schedule(),
    Schedule(steps=1, warmup=0, final=1.0),
    Schedule(steps=7, warmup=3, final=0.0),
    Schedule(steps=50, warmup=100),
    Schedule(steps=997, warmup=0, final=0.31),
    Schedule(steps=10_000_000, warmup=7_919, final=0.1),
]

multiplier = jax.jit(lambda schedule, steps: schedule.multiplier(steps), static_argnums=0)


def some_steps(schedule):
    """All steps of a short run, a sample of a long one, and steps past the end."""
    end = schedule.steps + schedule.warmup
    edges = [0, schedule.warmup - 1, schedule.warmup, schedule.warmup + 1, schedule.steps, end, 2 * end, 2**31 - 1]
    return np.unique(np.clip(np.concatenate([np.linspace(0, end, 3001).astype(np.int64), edges]), 0, None)).astype(
        np.int32
    )


def by_formula(schedule, step):
    if step < schedule.warmup:
        return (step + 1) / schedule.warmup
    position = min(max((step - schedule.warmup) / max(schedule.steps - schedule.warmup, 1), 0), 1)
    return schedule.final + (1 - schedule.final) * 0.5 * (1 + math.cos(math.pi * position))


@pytest.fixture(params=SCHEDULES, ids=lambda s: f"{s.steps}-{s.warmup}-{s.final}")
def schedule(request):
    return request.param


def test_within_a_thousandth_of_the_formula(schedule):
    steps = some_steps(schedule)
    got = np.asarray(multiplier(schedule, steps)) / 2**UNIT_BITS
    np.testing.assert_allclose(got, [by_formula(schedule, int(step)) for step in steps], rtol=0, atol=2**-10)


def test_rises_then_falls(schedule):
    steps = some_steps(schedule)
    values = np.asarray(multiplier(schedule, steps))
    assert (np.diff(values[steps < schedule.warmup]) >= 0).all()
    assert (np.diff(values[steps >= schedule.warmup]) <= 0).all()
    assert values.min() >= 0
    assert values.max() <= 2**UNIT_BITS


def test_ends(schedule):
    at = lambda step: int(multiplier(schedule, np.int32(step)))  # noqa: E731
    assert at(schedule.warmup) == 2**UNIT_BITS
    assert at(0) > 0
    last = max(schedule.steps, schedule.warmup + 1)
    assert at(last) == at(2**31 - 1) == round(schedule.final * 2**UNIT_BITS)


def test_the_same_integers_in_every_mode(schedule):
    steps = some_steps(schedule)[::50]
    compiled = multiplier(schedule, steps)
    assert compiled.dtype == jnp.int64
    eager = schedule.multiplier(jnp.asarray(steps))
    assert eager.dtype == jnp.int64
    one_by_one = [int(schedule.multiplier(int(step))) for step in steps[:5]]
    for wide in (True, False):
        with jax.enable_x64(wide):
            again = jax.jit(schedule.multiplier)(steps)
            assert again.dtype == jnp.int64
            np.testing.assert_array_equal(again, compiled)
    np.testing.assert_array_equal(eager, compiled)
    assert one_by_one == np.asarray(compiled)[:5].tolist()


def test_float_steps_do_not_enter():
    """Nothing in the trace is a float, so nothing can round differently elsewhere."""
    traced = jax.make_jaxpr(Schedule().multiplier)(jnp.int32(3))
    assert "f32" not in str(traced)
    assert "f64" not in str(traced)
    assert "i64" in str(traced)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps >= 1 and warmup >= 0, got 0 and 100"),
        ({"warmup": -1}, "got 1000 and -1"),
        ({"final": 1.5}, r"in \[0, 1\], got 1.5"),
        ({"final": -0.1}, "got -0.1"),
        ({"final": float("nan")}, "got nan"),
    ],
)
def test_configuration_out_of_range(arguments, message):
    with pytest.raises(ConfigError, match=message):
        Schedule(**arguments)
