"""The inverse of a Cholesky factor: what makes columns with a given Gram matrix orthonormal."""

from arbs_kernels.inverse_cholesky.api import inverse_cholesky

__all__ = ["inverse_cholesky"]
