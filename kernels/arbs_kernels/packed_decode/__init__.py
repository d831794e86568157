"""Effective weights from packed ternary weights."""

from arbs_kernels.packed_decode.api import packed_decode

__all__ = ["packed_decode"]
