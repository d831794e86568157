"""Matrices of one-byte numbers turned round, at the memory's speed."""

from arbs_kernels.byte_transpose.api import byte_transpose

__all__ = ["byte_transpose"]
