"""Gather of effective rows from a packed table."""

from arbs_kernels.row_gather.api import packed_row_gather

__all__ = ["packed_row_gather"]
