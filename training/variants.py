"""Settings as flat keys, and those of them that decide a result."""

from typing import Any

from configs.schema import NO_EFFECT_ON_RESULT


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def result_settings(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that decide a result, flattened."""
    return {k: v for k, v in flatten(config).items() if k not in NO_EFFECT_ON_RESULT}
