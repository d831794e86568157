"""Gather of effective rows from a packed table, and the sums of their gradients."""

from arbs_kernels.row_gather.api import packed_row_gather, sums_of_rows

__all__ = ["packed_row_gather", "sums_of_rows"]
