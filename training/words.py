"""Preprocess and check the words of train.py's command line before Hydra reads them."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from training.compose import CONFIGS
from training.launch import override


def expand(word: str) -> list[str]:
    """Expand a wandb agent's nested parameters: ``optim={'lr': 0.05}`` to ``optim.lr=0.05``.

    Every other word stays as it is.
    """
    key, equals, value = word.partition("=")
    if not equals or not value.startswith("{"):
        return [word]
    try:
        nested = ast.literal_eval(value)
        return list(_flat(key, nested)) if isinstance(nested, dict) and nested else [word]
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return [word]  # a dict in Hydra's own grammar, or an error that Hydra reports


def _flat(key: str, value: Any) -> Iterator[str]:
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _flat(f"{key}.{name}", inner)
    else:
        yield override(key, value)


def fault(words: list[str]) -> str | None:
    """Return a message on the first word that Hydra would misread; None if there is none."""
    for word in words:
        key, equals, value = word.lstrip("+").partition("=")
        if not equals or not key or not (CONFIGS / key).is_dir():
            continue
        if word.startswith("+"):
            return f"{word}: {key} is already in the defaults; write {word.lstrip('+')}"
        if value.startswith("[") and key != "experiment":  # experiments may be a list
            options = value.strip("[ ]")
            return f"{word}: a run takes one option of {key}; -m {key}={options} runs each"
    return None


def config_fault(name: str | None, added: str | None, instead: str | None) -> str | None:
    """Return what is wrong with Hydra's ``--config-name``, ``--config-dir`` or ``--config-path``.

    A user's own primary config must begin its defaults with ours, which has all settings.
    """
    if instead is not None and not Path(instead, "config.yaml").is_file():
        return f"--config-path={instead} has no config.yaml; --config-dir={instead} adds its files"
    option = "config" if name is None else name.removesuffix(".yaml")
    if option == "config" or instead is not None:
        return None
    own = None if added is None else Path(added, f"{option}.yaml")
    if own is not None and own.is_file():
        return None if _has_defaults(own) else f"{own}: begin it with defaults: [config, _self_]"
    group, _, choice = option.rpartition("/")
    if group and (CONFIGS / group / f"{choice}.yaml").is_file():
        return f"--config-name={name} is one option of a group; write {group}={choice}"
    where = "" if own is None else f"there is no {own}, and "
    return f"--config-name={name}: {where}all settings are in config; leave it out"


def _has_defaults(file: Path) -> bool:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return True  # Hydra reports the error
    return isinstance(content, dict) and "defaults" in content
