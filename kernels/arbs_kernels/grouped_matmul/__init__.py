"""Products of rows sorted by expert, each with its own packed ternary matrix."""

from arbs_kernels.grouped_matmul.api import (
    grouped_matmul,
    grouped_matmul_input_gradient,
    grouped_score,
    grouped_weight_gradient,
)

__all__ = ["grouped_matmul", "grouped_matmul_input_gradient", "grouped_score", "grouped_weight_gradient"]
