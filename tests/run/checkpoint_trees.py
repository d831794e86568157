"""A tree to save, folders of saved ones, and what must come back."""

from pathlib import Path

import numpy as np

from arbs_jax.run.checkpoints import Checkpointer
from arbs_jax.run.limbs import PERSISTENT_DTYPES, flatten_tree


def make_tree(seed: int = 0) -> dict:
    """Every persistent dtype at its extremes, a canary, and the empty."""
    rng = np.random.default_rng(seed)
    extremes = {
        name: np.array([[np.iinfo(name).min, seed % 100], [1, np.iinfo(name).max]], name) for name in PERSISTENT_DTYPES
    }
    return {
        "layer.0": {
            "trits": rng.integers(0, 243, (16, 32), dtype=np.uint8),
            "corr": np.array([[2**40, -(2**40), seed]], np.int64),
            "votes": np.array(2**40 + seed, np.int64),
        },
        "extremes": extremes,
        "nothing": {},
        "no_rows": np.zeros((0, 3), np.int64),
    }


def assert_same(tree: dict, wanted: dict) -> None:
    """Same paths, types and values, with no tolerance."""
    have, want = flatten_tree(tree), flatten_tree(wanted)
    assert list(have) == list(want)
    for path, leaf in want.items():
        if isinstance(leaf, dict):
            assert have[path] == {}
        else:
            assert type(have[path]) is np.ndarray
            np.testing.assert_array_equal(have[path], leaf, strict=True)


def save_all(folder: Path, steps: list[int]) -> None:
    """Saves the tree of each step."""
    with Checkpointer(folder, keep=10) as saver:
        for step in steps:
            saver.save(step, make_tree(step), {"step": step})


def hidden(folder: Path) -> list[str]:
    """Names of what a save has begun and not finished."""
    return [path.name for path in folder.rglob("*") if "tmp" in path.name]
