"""Correlation of gradient signs with trits, summed over groups."""

from arbs_kernels.correlation_score.api import correlation_score
from arbs_kernels.correlation_score.reference import score_of_gradient, weight_gradient

__all__ = ["correlation_score", "score_of_gradient", "weight_gradient"]
