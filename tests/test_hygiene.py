"""The packages keep their arrows: kernels import JAX only, the core needs no more than jax and flax bring."""

import subprocess
import sys

import pytest

# Flax itself brings optax, orbax and rich.
BLOCKED = ("grain", "tyro", "tensorboardX", "matplotlib", "datasets")
PROGRAM = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError(f"{{name}} is blocked")

sys.meta_path.insert(0, Blocked())
import {module}
"""


@pytest.mark.parametrize(
    ("module", "blocked"),
    [
        ("arbs_kernels.autodiff", (*BLOCKED, "flax", "arbs_jax", "optax", "orbax", "rich")),
        ("arbs_jax", BLOCKED),
        ("arbs_jax.models", BLOCKED),
        ("arbs_jax.training.layerwise", BLOCKED),
    ],
)
def test_imports_stay_within_their_means(module, blocked):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(module=module, blocked=set(blocked))], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
