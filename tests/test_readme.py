"""The README's program does what the README says."""

import re
from pathlib import Path

import jax
import numpy as np

README = Path(__file__).parents[1] / "README.md"


def test_five_line_training_loop_learns():
    (program,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    scope: dict = {}
    exec(compile(program, "README.md", "exec"), scope)
    first = scope["loss"](
        {"ternary": scope["net"].init(jax.random.key(1), scope["x"])["ternary"]}, scope["x"], scope["y"]
    )
    assert float(first) > 30
    assert float(scope["value"]) < 0.6
    assert all(np.issubdtype(leaf.dtype, np.integer) for leaf in jax.tree.leaves(scope["state"]))


def test_commands_are_the_ones_ci_runs():
    install_and_test = [line for line in README.read_text().splitlines() if re.match(r"pip install uv .*pytest$", line)]
    assert len(install_and_test) == 1
