"""Shapes that matter, one list for the operators' tests, benchmarks and tuners."""

from dataclasses import dataclass, field

from arbs_kernels.shapes import group_count


@dataclass(frozen=True)
class Case:
    """One ternary matrix and how many rows of activations (or how many ids) meet it."""

    rows: int
    """`M`."""
    out_features: int
    """`N`."""
    in_features: int
    """`K`."""
    group_size: int
    """`G`."""
    why: str = field(compare=False)
    """What is special about it."""
    experts: int = 1
    """`X`, matrices that share the rows of activations equally; some operators take one only."""

    @property
    def groups(self) -> int:
        """`R`."""
        return group_count(self.in_features, self.group_size)

    @property
    def products(self) -> int:
        """Multiplications in one product, `M*N*K`."""
        return self.rows * self.out_features * self.in_features

    def __str__(self) -> str:
        experts = f"e{self.experts}" if self.experts > 1 else ""
        return f"{self.rows}x{self.out_features}x{self.in_features}g{self.group_size}{experts}"


CASES = (
    Case(1, 1, 1, 32, "one weight"),
    Case(2, 3, 5, 4, "one byte a row, a last group of one column"),
    Case(1, 5, 33, 32, "one row of activations, a last group of one column"),
    Case(7, 48, 64, 6, "groups that straddle bytes"),
    Case(13, 20, 160, 8, "small groups"),
    Case(9, 40, 96, 12, "groups that are no power of two"),
    Case(3, 17, 81, 16, "odd everywhere"),
    Case(5, 33, 70, 32, "a short last group, no axis a multiple of anything"),
    Case(4, 16, 128, 64, "even everywhere"),
    Case(3, 7, 64, 96, "a group longer than the row"),
    Case(17, 31, 257, 128, "one column past two groups"),
    Case(6, 24, 300, 256, "the largest group"),
    Case(129, 130, 131, 32, "one past a tile on every axis"),
    Case(5, 24, 2053, 32, "long rows, which begin at multiples of 32 bytes"),
    Case(64, 288, 256, 32, "the head of a small byte model"),
    Case(1, 10240, 10240, 32, "decoding with a large layer"),
    Case(1024, 10240, 10240, 32, "a large layer on a short batch"),
    Case(16384, 10240, 10240, 32, "a large layer in training"),
    Case(8192, 5632, 2048, 32, "the MLP of the 1b preset, up"),
    Case(8192, 2048, 5632, 32, "the MLP of the 1b preset, down"),
)
"""Small ones first; the large ones are layers that people train."""

EXPERT_CASES = (
    Case(512, 128, 512, 32, "four small experts", experts=4),
    Case(128, 512, 2048, 32, "decoding with two rows for each of 64 experts", experts=64),
    Case(8192, 1024, 1024, 32, "eight experts", experts=8),
    Case(16384, 512, 2048, 32, "64 narrow experts", experts=64),
)
"""Rows sorted by expert."""

SMALL_CASES = tuple(case for case in CASES if case.products <= 2**23)
"""What a CPU can check against float64 in no time."""
