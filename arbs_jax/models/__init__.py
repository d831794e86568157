"""Models made of ternary modules."""

from arbs_jax.models.byte_lm import VOCABULARY, ByteLM, ModelConfig, cross_entropy, empty_cache
from arbs_jax.models.presets import PRESETS, preset

__all__ = ["PRESETS", "VOCABULARY", "ByteLM", "ModelConfig", "cross_entropy", "empty_cache", "preset"]
