"""Which settings make a run another variant, and which leave its result alone."""

from typing import Any

# They name, place, speed up or report a run.
RESULT_FREE = (
    "name",
    "out_dir",
    "resume",
    "overwrite",
    "device",
    "eval_batch_size",
    "log_every",
    "checkpoint_minutes",
    "max_minutes",
    "wandb.",
    "data.root",
    "data.download",
)


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def deciding(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that decide a result, flattened."""
    return {k: v for k, v in flatten(config).items() if not k.startswith(RESULT_FREE)}
