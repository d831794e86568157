"""A gradient as an integer sample of its normalised entries, and its agreement with the trits, in one pass."""

from arbs_kernels.gradient_sample.api import LARGEST, STEPS, gradient_sample

__all__ = ["LARGEST", "STEPS", "gradient_sample"]
