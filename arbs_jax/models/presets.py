"""Named model shapes, from a toy that trains in a minute on two CPU cores to billions of weights."""

from dataclasses import replace
from typing import Any

from arbs_jax.errors import ConfigError
from arbs_jax.models.arb.config import ArbConfig
from arbs_jax.models.arb.presets import ARB_PRESETS
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


FAMILIES: dict[str, dict[str, Any]] = {"byte": PRESETS, "arb": ARB_PRESETS}
"""Presets by the family of models that they are of."""


def family_name(config: ModelConfig | ArbConfig) -> str:
    """ "arb" or "byte"."""
    return "arb" if isinstance(config, ArbConfig) else "byte"


def preset(name: str, **changes: Any) -> Any:
    """The preset of that name, with fields replaced: a `ModelConfig` or an `ArbConfig`.

    Raises:
        ConfigError: no such preset, or a field out of range.
    """
    everything = {key: config for presets in FAMILIES.values() for key, config in presets.items()}
    if name not in everything:
        raise ConfigError(f"no preset {name!r}; pass one of {', '.join(everything)}")
    return replace(everything[name], **changes)
