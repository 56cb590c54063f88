"""The words of train.py's command line, before Hydra reads them."""

import ast
import json
from collections.abc import Iterator
from typing import Any

from training.compose import CONFIGS
from training.launch import hydra_quote


def expand(word: str) -> list[str]:
    """``optim={'lr': 0.05}``, which a wandb agent makes of nested parameters, as ``optim.lr=0.05``.

    Every other word stays as it is.
    """
    key, equals, value = word.partition("=")
    if not equals or not value.startswith("{"):
        return [word]
    try:
        nested = ast.literal_eval(value)
        return list(_flat(key, nested)) if isinstance(nested, dict) and nested else [word]
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return [word]  # in Hydra's own grammar, or a mistake that Hydra names


def _flat(key: str, value: Any) -> Iterator[str]:
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _flat(f"{key}.{name}", inner)
    else:
        yield f"{key}={hydra_quote(value) if isinstance(value, str) else json.dumps(value)}"


def fault(words: list[str]) -> str | None:
    """What Hydra would take in another way than it was meant, and what to write instead."""
    for word in words:
        key = word.partition("=")[0].lstrip("+")
        if word.startswith("+") and (CONFIGS / key).is_dir() and "=" in word:
            return f"{word}: {key} is a group that is there already; write {word.lstrip('+')}"
    return None


def config_fault(name: str | None) -> str | None:
    """What is wrong with Hydra's ``--config-name``, where the configs are our own."""
    if name is None or name.removesuffix(".yaml") == "config":
        return None
    group, _, option = name.removesuffix(".yaml").rpartition("/")
    if group and (CONFIGS / group / f"{option}.yaml").is_file():
        return f"--config-name={name} is one option of a group; write {group}={option}"
    return f"--config-name={name}: all settings are in config; leave it out"
