"""The integer state of one ternary matrix, and of trees of them.

A matrix is a dict of leaves (the collection "ternary" of a Linen model holds one dict a matrix):

    trits     uint8 (N, P)   T, five to a byte (arbs_kernels.codec)
    exponent  int8  (N, R)   E, log2 of the base scale
    corr      int64 (N, R)   c, correlation accumulator
    votes     int64 ()       n, votes taken

so that `W = 2^(E + shift(c, n)) * T`, with the shift given by the rule, which may add integer leaves of its own. Under
`nn.scan` every leaf gains a leading layer axis; the matrices of experts (`MatrixSpec.experts`) have an axis of experts,
after that of layers if there are both.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from arbs_jax.errors import ConfigError, StateError
from arbs_kernels.codec import pack_rows, packed_width, padding_is_zero, valid_codes
from arbs_kernels.shapes import GROUP_SIZES, group_count
from arbs_kernels.table_autodiff import MOST_ROWS

BASE_LEAVES = ("trits", "exponent", "corr", "votes")
_DRAWN_AT_ONCE = 2**20
"""Weights of a matrix that are drawn at a time: random bits and what becomes of them take some 30 bytes each."""

Matrix = dict[str, jax.Array]
Tree = Mapping[str, Any]


@jax.tree_util.register_static
@dataclass(frozen=True)
class MatrixSpec:
    """Shape of one logical ternary matrix; what the packed leaves alone do not tell."""

    out_features: int
    """`N`, rows."""
    in_features: int
    """`K`, columns."""
    group_size: int = 32
    """`G`, columns that share one scale."""
    fan_in: int = 0
    """Inputs summed into one output, for initialisation; 0 means `in_features` (a table that is looked up has 1)."""
    table: bool = False
    """Whether rows stand for symbols (an embedding, an output head): such a matrix is no map between two spaces, and
    rules that treat others as such leave its rows alone."""
    sparse: bool = False
    """Whether rows are touched only by lookups, few in a step: such a table is neither probed nor moved as a whole."""
    experts: int = 0
    """`X`, matrices of this shape in one, their leaves stacked on a leading axis; 0 is one matrix without that axis."""

    def __post_init__(self) -> None:
        if self.out_features < 1 or self.in_features < 1:
            raise ConfigError(f"a ternary matrix needs at least one row and column, got {self.shape}")
        if self.group_size not in GROUP_SIZES:
            raise ConfigError(f"group_size must be one of {GROUP_SIZES}, got {self.group_size}")
        if self.sparse and self.out_features > MOST_ROWS:
            raise ConfigError(
                f"a sparse table has at most {MOST_ROWS} rows (votes carry ids as float32), got {self.out_features}; "
                "divide it into several"
            )
        if self.experts < 0 or (self.sparse and self.experts):
            raise ConfigError(
                f"experts must be at least 0, and 0 for a sparse table, got {self.experts} with sparse={self.sparse}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """`(N, K)`."""
        return self.out_features, self.in_features

    @property
    def weights(self) -> int:
        """Logical weights, of all experts."""
        return self.out_features * self.in_features * max(self.experts, 1)

    @property
    def groups(self) -> int:
        """`R`, groups in a row."""
        return group_count(self.in_features, self.group_size)

    @property
    def packed(self) -> int:
        """`P`, bytes in a row."""
        return packed_width(self.in_features)

    @property
    def single(self) -> "MatrixSpec":
        """The spec of one expert's matrix; of what is one matrix, its own."""
        return replace(self, experts=0) if self.experts else self

    def leaf_types(self) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """dtype and shape of the four base leaves of an unstacked matrix, or of an unstacked set of experts."""
        axes = (self.experts,) if self.experts else ()
        per_group = (*axes, self.out_features, self.groups)
        return {
            "trits": (np.dtype(np.uint8), (*axes, self.out_features, self.packed)),
            "exponent": (np.dtype(np.int8), per_group),
            "corr": (np.dtype(np.int64), per_group),
            "votes": (np.dtype(np.int64), axes),
        }


@dataclass(frozen=True)
class InitConfig:
    """How fresh matrices are drawn: `T = sign(w) * (|w| > threshold)` for a normal `w`."""

    threshold: float = 0.5
    """Weights up to this many standard deviations become zero. The scaled init (std = min(0.1, 1/sqrt(fan_in)),
    threshold = min(0.05, std/2)) and the source layer's fixed 0.1 and 0.05 are both 0.5: only the ratio matters."""
    exponent_range: tuple[int, int] = (-8, 0)
    """`E = clamp(round(log2(0.5/sqrt(fan_in))), *exponent_range)`, the source layer's choice."""

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < 4:
            raise ConfigError(f"init.threshold must be in [0, 4) standard deviations, got {self.threshold}")
        low, high = self.exponent_range
        if not -126 <= low <= high <= 126:
            raise ConfigError(f"init.exponent_range must be ordered within [-126, 126], got {self.exponent_range}")

    @property
    def zero_probability(self) -> float:
        """Expected share of zero trits."""
        return math.erf(self.threshold / math.sqrt(2))

    def exponent(self, fan_in: int) -> int:
        """Base exponent of every group of a matrix with this fan-in."""
        low, high = self.exponent_range
        return int(np.clip(round(math.log2(0.5 / math.sqrt(fan_in))), low, high))


def init_trits(key: jax.Array, spec: MatrixSpec, init: InitConfig) -> jax.Array:
    """Random packed trits `uint8 (N, P)`.

    The distribution of `sign(w) * (|w| > threshold)` is drawn directly from 16 random bits a trit, in blocks of rows,
    so a table of millions of rows never has a temporary of its own shape.
    """
    zero_below = round(init.zero_probability * 2**16)

    def block(index: jax.Array, rows: int) -> jax.Array:
        bits = jax.random.bits(jax.random.fold_in(key, index), (rows, spec.in_features), jnp.uint16)
        nonzero = bits >= jnp.uint16(min(zero_below, 2**16 - 1))
        sign = ((bits & jnp.uint16(1)) * jnp.uint16(2)).astype(jnp.int8) - jnp.int8(1)
        return pack_rows(jnp.where(nonzero, sign, jnp.int8(0)))

    return rows_in_blocks(block, spec, axes=0)


def rows_in_blocks(block: Callable[[jax.Array, int], Any], spec: MatrixSpec, axes: Any) -> Any:
    """Concatenates `block(index, rows)` over enough indices for the rows of `spec`, one block at a time.

    Args:
        block: makes a pytree of arrays for `rows` rows; `index` is an int32 ().
        spec: of the matrix; of the last block but one, rows that the last covers are lost.
        axes: pytree like the block's, with the position of the row axis in each array.
    """
    out_features = spec.out_features
    rows = min(out_features, max(_DRAWN_AT_ONCE // spec.in_features, 1))
    blocks = -(-out_features // rows)
    if blocks == 1:
        return block(jnp.int32(0), rows)

    # Each block is put where it belongs, so that the whole is made once: joined blocks would have to be copied. The
    # last one begins early enough to end with the table, over rows of the one before.
    def put(index: jax.Array, whole: Any) -> Any:
        row = jnp.minimum(index * rows, out_features - rows)
        return jax.tree.map(
            lambda axis, leaf, new: jax.lax.dynamic_update_slice_in_dim(leaf, new, row, axis),
            axes,
            whole,
            block(index, rows),
        )

    def room(axis: int, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.zeros((*leaf.shape[:axis], out_features, *leaf.shape[axis + 1 :]), leaf.dtype)

    one = jax.eval_shape(lambda index: block(index, rows), jax.ShapeDtypeStruct((), jnp.int32))
    return jax.lax.fori_loop(jnp.int32(0), jnp.int32(blocks), put, jax.tree.map(room, axes, one))


def init_matrix(key: jax.Array, spec: MatrixSpec, init: InitConfig | None = None) -> Matrix:
    """The four base leaves of a fresh matrix (see the module); accumulator and votes start at zero."""
    init = init or InitConfig()
    exponent = init.exponent(spec.fan_in or spec.in_features)
    per_group = (spec.out_features, spec.groups)
    return {
        "trits": init_trits(key, spec, init),
        "exponent": jnp.full(per_group, exponent, jnp.int8),
        "corr": jnp.zeros(per_group, jnp.int64),
        "votes": jnp.zeros((), jnp.int64),
    }


def is_matrix(node: Any) -> bool:
    """Whether a node of a state tree is one matrix's dict of leaves."""
    return isinstance(node, Mapping) and all(name in node for name in BASE_LEAVES)


def iter_matrices(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (path, matrix) in sorted path order, paths joined by "/"."""
    if is_matrix(tree):
        yield prefix, tree
        return
    if isinstance(tree, Mapping):
        for name in sorted(tree):
            yield from iter_matrices(tree[name], f"{prefix}/{name}" if prefix else name)


def map_matrices(function: Callable[..., Any], tree: Tree, *others: Tree, prefix: str = "") -> Any:
    """Applies `function(path, matrix, *nodes of others at that path)` to every matrix, keeping the nesting."""
    if is_matrix(tree):
        return function(prefix, tree, *others)
    return {
        name: map_matrices(
            function, tree[name], *(other[name] for other in others), prefix=f"{prefix}/{name}" if prefix else name
        )
        for name in tree
    }


def validate_matrix(path: str, matrix: Matrix, spec: MatrixSpec) -> None:
    """Checks dtypes, shapes and ranges of the base leaves; extra leaves must be integers. Host side, reads all bytes.

    A leading layer axis is allowed if every leaf has the same one.

    Raises:
        StateError: names the leaf, what it is and what it should be.
    """
    stack: tuple[int, ...] | None = None
    for name, (dtype, shape) in spec.leaf_types().items():
        if name not in matrix:
            raise StateError(f"{path}/{name} is missing; a ternary matrix has the leaves {', '.join(BASE_LEAVES)}")
        leaf = matrix[name]
        if np.dtype(leaf.dtype) != dtype:
            raise StateError(
                f"{path}/{name} must be {dtype}, got {leaf.dtype} (int64 narrowed by a transfer or a load?)"
            )
        leading = leaf.shape[: leaf.ndim - len(shape)]
        if leaf.shape[leaf.ndim - len(shape) :] != shape or len(leading) > 1:
            raise StateError(f"{path}/{name} must have shape {shape} (after a layer axis, if any), got {leaf.shape}")
        if stack is not None and leading != stack:
            raise StateError(f"{path}/{name} has layer axis {leading}, the leaves before it {stack}")
        stack = leading
    for name, leaf in matrix.items():
        if not np.issubdtype(leaf.dtype, np.integer):
            raise StateError(
                f"{path}/{name} must be an integer array, got {leaf.dtype}: persistent state holds no floats"
            )
    codes = valid_codes(np.asarray(matrix["trits"]))
    if not codes.all():
        raise StateError(f"{path}/trits holds {int((~codes).sum())} bytes that are no code of five trits")
    if not padding_is_zero(np.asarray(matrix["trits"]), spec.in_features):
        raise StateError(f"{path}/trits holds a non-zero trit past column {spec.in_features}, where rows are padded")
    votes = np.asarray(matrix["votes"])
    if (votes < 0).any():
        raise StateError(f"{path}/votes must be at least 0, got {int(votes.min())}")


def validate_tree(tree: Tree, specs: Tree) -> None:
    """`validate_matrix` for every matrix of a tree against a tree of specs of the same nesting.

    Raises:
        StateError: the first offending leaf, or the matrices that one tree has and the other has not.
    """
    wanted = flatten_specs(specs)
    found = dict(iter_matrices(tree))
    if wanted.keys() != found.keys():
        missing, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
        raise StateError(f"state and model disagree: missing matrices {missing}, unknown matrices {extra}")
    for path, matrix in found.items():
        validate_matrix(path, matrix, wanted[path])


def flatten_specs(specs: Any, prefix: str = "") -> dict[str, MatrixSpec]:
    """Tree of specs to a dict by path, paths joined by "/"."""
    if isinstance(specs, MatrixSpec):
        return {prefix: specs}
    return {
        path: spec
        for name in sorted(specs)
        for path, spec in flatten_specs(specs[name], f"{prefix}/{name}" if prefix else name).items()
    }
