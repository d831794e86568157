"""Checks that the configurations of models and of their parts share."""

from typing import Any

from arbs_jax.errors import ConfigError

DTYPES = ("float32", "bfloat16")


def require_positive(section: str, config: Any, *names: str) -> None:
    """Refuses fields below 1.

    Raises:
        ConfigError: names the first such field of `section`, and its value.
    """
    for name in names:
        if getattr(config, name) < 1:
            raise ConfigError(f"{section}.{name} must be at least 1, got {getattr(config, name)}")


def require_dtype(section: str, config: Any) -> None:
    """Refuses activations that are neither float32 nor bfloat16.

    Raises:
        ConfigError: the dtype that was given.
    """
    if config.dtype not in DTYPES:
        raise ConfigError(f"{section}.dtype must be 'float32' or 'bfloat16', got {config.dtype!r}")
