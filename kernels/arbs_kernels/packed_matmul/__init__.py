"""Matrix product from packed ternary weights, and its input gradient."""

from arbs_kernels.packed_matmul.api import packed_matmul, packed_matmul_input_gradient
from arbs_kernels.packed_matmul.prepared import prepared_scale

__all__ = ["packed_matmul", "packed_matmul_input_gradient", "prepared_scale"]
