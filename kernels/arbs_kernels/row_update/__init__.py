"""Rows of packed state out of a table and back into it, without touching the rest."""

from arbs_kernels.row_update.api import put_rows, rows_of, sum_rows, unique_rows

__all__ = ["put_rows", "rows_of", "sum_rows", "unique_rows"]
