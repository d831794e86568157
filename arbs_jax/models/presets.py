"""Named model shapes, from a toy that trains in a minute on two CPU cores to a billion weights."""

from dataclasses import replace
from typing import Any

from arbs_jax.errors import ConfigError
from arbs_jax.models.byte_lm import ModelConfig

PRESETS: dict[str, ModelConfig] = {
    "byte-0.4m": ModelConfig(width=128, layers=2, heads=4, kv_heads=2, head_dim=32, hidden=320, context=1024),
    "byte-3m": ModelConfig(width=256, layers=4, heads=4, kv_heads=4, head_dim=64, hidden=672, context=1024),
    "byte-10m": ModelConfig(width=384, layers=6, heads=6, kv_heads=2, head_dim=64, hidden=1024, context=2048),
    "byte-25m": ModelConfig(width=512, layers=9, heads=8, kv_heads=2, head_dim=64, hidden=1376, context=2048),
    "byte-50m": ModelConfig(width=640, layers=12, heads=10, kv_heads=2, head_dim=64, hidden=1728, context=2048),
    "byte-100m": ModelConfig(width=768, layers=16, heads=12, kv_heads=4, head_dim=64, hidden=2048, context=2048),
    "byte-300m": ModelConfig(width=1024, layers=26, heads=16, kv_heads=4, head_dim=64, hidden=2816, context=4096),
    "byte-1b": ModelConfig(width=2048, layers=22, heads=16, kv_heads=4, head_dim=128, hidden=5632, context=4096),
}


def preset(name: str, **changes: Any) -> ModelConfig:
    """The preset of that name, with fields replaced.

    Raises:
        ConfigError: no such preset, or a field out of range.
    """
    if name not in PRESETS:
        raise ConfigError(f"no preset {name!r}; pass one of {', '.join(PRESETS)}")
    return replace(PRESETS[name], **changes)
