"""Newton-Schulz iterations in the space of a Gram matrix: by what to multiply columns to make them orthonormal."""

from arbs_kernels.gram_newton_schulz.api import MOST_TRITON, gram_newton_schulz

__all__ = ["MOST_TRITON", "gram_newton_schulz"]
