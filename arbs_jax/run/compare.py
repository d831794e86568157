"""What differs between a saved tree and the one a model wants, and how to take over the part that agrees."""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from arbs_jax.errors import CheckpointError
from arbs_jax.run.limbs import Tree, flatten_tree, unflatten_tree

_STYLES = {"new": "green", "dropped": "red", "changed": "yellow"}


@dataclass(frozen=True)
class LeafSpec:
    """Dtype (by name) and shape of one leaf."""

    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"


@dataclass(frozen=True)
class Difference:
    """One leaf on which two trees disagree; `saved` is None where it is new, `wanted` is None where it is dropped."""

    path: str
    saved: LeafSpec | None
    wanted: LeafSpec | None
    kind: Literal["new", "dropped", "changed"]


@dataclass(frozen=True)
class MergeReport:
    """Paths by what became of them: taken from the checkpoint, left fresh because the checkpoint lacks them,
    left fresh because dtype or shape changed, and present in the checkpoint but not wanted."""

    loaded: tuple[str, ...]
    new: tuple[str, ...]
    changed: tuple[str, ...]
    dropped: tuple[str, ...]


def _specs(tree: Mapping[str, Any]) -> dict[str, LeafSpec]:
    return {
        path: LeafSpec(str(leaf.dtype), tuple(leaf.shape))
        for path, leaf in flatten_tree(tree).items()
        if not isinstance(leaf, dict)
    }


def compare_trees(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[Difference]:
    """The leaves on which the trees disagree, in the order of `wanted`, the dropped ones last.

    Args:
      saved, wanted: nested dicts of anything with a dtype and a shape: arrays or `jax.ShapeDtypeStruct`.
    """
    have, want = _specs(saved), _specs(wanted)
    differences = [
        Difference(path, have.get(path), spec, "changed" if path in have else "new")
        for path, spec in want.items()
        if have.get(path) != spec
    ]
    return differences + [Difference(path, spec, None, "dropped") for path, spec in have.items() if path not in want]


def difference_table(differences: list[Difference]) -> Table:
    """The differences as a table with one row a leaf."""
    table = Table("leaf", "in the checkpoint", "in this model", "", title="Checkpoint and model disagree")
    table.columns[0].overflow = "fold"
    for difference in differences:
        saved, wanted = difference.saved or "-", difference.wanted or "-"
        style = _STYLES[difference.kind]
        table.add_row(difference.path, str(saved), str(wanted), f"[{style}]{difference.kind}[/]")
    return table


def merge_trees(saved: Mapping[str, Any], fresh: Mapping[str, Any]) -> tuple[Tree, MergeReport]:
    """A tree shaped like `fresh` whose leaves come from `saved` wherever dtype and shape agree.

    Returns:
      The tree (leaves are the very objects of `saved` and `fresh`) and the account of every path.
    """
    by_kind: dict[str, list[str]] = {"new": [], "changed": [], "dropped": []}
    for difference in compare_trees(saved, fresh):
        by_kind[difference.kind].append(difference.path)
    stay = {*by_kind["new"], *by_kind["changed"]}
    source, flat = flatten_tree(saved), flatten_tree(fresh)
    loaded = [path for path, leaf in flat.items() if not isinstance(leaf, dict) and path not in stay]
    flat.update({path: source[path] for path in loaded})
    report = MergeReport(tuple(loaded), tuple(by_kind["new"]), tuple(by_kind["changed"]), tuple(by_kind["dropped"]))
    return unflatten_tree(flat), report


def resume_tree(saved: Mapping[str, Any], fresh: Mapping[str, Any], *, merge: bool) -> tuple[Tree, MergeReport]:
    """`merge_trees`, but a model that differs from the checkpoint must have been asked for with `merge`.

    Raises:
      CheckpointError: the trees differ and `merge` is False; the message ends with the table of differences.
    """
    differences = compare_trees(saved, fresh)
    if differences and not merge:
        page = io.StringIO()
        Console(file=page, width=110, color_system=None).print(difference_table(differences))
        raise CheckpointError(
            f"the checkpoint and this model differ in {len(differences)} leaves; use the configuration it was saved "
            f"with, or ask for merging to keep what agrees\n{page.getvalue().rstrip()}"
        )
    return merge_trees(saved, fresh)
