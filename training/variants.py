"""Flatten settings, select those that affect results, and name variants, runs and folders."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any

from omegaconf import DictConfig

from configs.schema import OPTIONS, FolderConfig, decides_result, is_as_before, names_folder
from training.compose import parse_overrides

# Hydra's own keys in the settings of an option.
HYDRAS = ("_target_", "_partial_")
# The number of last parts of a network's path that distinguish runs: variant, seed, file.
KEPT_PARTS = 3
# Settings of how images are read, not which: they do not affect `data.Dataset.digest`.
OF_PIXELS = ("data.size", "data.white", "data.max_pixels")
# Significant digits shown of a value that a search has drawn.
DIGITS = 4
# The maximum length of a run's or group's name on wandb's server.
NAME_LENGTH = 128


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings into one level of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def public_settings(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the settings that affect a result, nested, without local folders and account names.

    Groups with no setting left are omitted. Of the path in ``init_from``, only the last
    `KEPT_PARTS` parts are kept.
    """
    kept: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            inside = public_settings(value, f"{prefix}{key}.")
            if inside or not value:
                kept[key] = inside
        elif prefix + key == "init_from" and value is not None:
            kept[key] = "/".join(PurePath(value).parts[-KEPT_PARTS:])
        elif decides_result(prefix + key):
            kept[key] = value
    return kept


def result_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that affect a result, flattened, without values older code implied."""
    return {
        key: value
        for key, value in flatten(config).items()
        if decides_result(key) and not is_as_before(key, value)
    }


def variant_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that affect a result, flattened, without the seed."""
    return {k: v for k, v in result_settings(config).items() if k != "seed"}


def images_key(config: Mapping[str, Any]) -> str:
    """Return a text that is equal for two runs exactly if they should use the same images."""
    settings = result_settings({"data": config["data"]})
    return json.dumps({k: v for k, v in settings.items() if k not in OF_PIXELS}, sort_keys=True)


def naming_words(cfg: DictConfig, words: Iterable[str]) -> list[str]:
    """Return the overrides of ``cfg`` for a folder's name: those of settings that affect a result.

    For images from a folder, ``data.name`` is always included, since ``data.root`` never is: for
    other data sets, it only says where a copy is.

    Raises:
        HydraException: if a word is not an override.
    """
    overrides = parse_overrides(list(words))
    naming = [str(o.input_line) for o in overrides if names_folder(o.key_or_group)]
    told = any(word.startswith("data.name=") for word in naming)
    if not told and cfg.data["_target_"] == FolderConfig._target_:
        naming.append(f"data.name={cfg.data.name}")
    return naming


def option_name(group: str, settings: dict[str, Any]) -> str:
    """Return the option of a group, such as ``sgd``, to which these ``settings`` belong."""
    names = {kind._target_: name for there, name, kind in OPTIONS if there == group}
    return names[settings["_target_"]]


def variant_label(config: dict[str, Any], model: str, attention: str) -> str:
    """Return a name shared by exactly those runs that differ only in the seed.

    It has the network, the attention with dk, dv and Nh, and a digest of all `variant_settings`.
    """
    text = json.dumps(variant_settings(config), sort_keys=True)
    own = config["attention"]
    amounts = [f"{key}={own[key]}" for key in ("dk", "dv", "Nh") if key in own]
    return " ".join([model, attention, *amounts, _digest(text)])


def run_name(
    words: Iterable[str], attention: str, seed: int, *, group: str = "", fixed: Iterable[str] = ()
) -> str:
    """Return a run's name on the dashboard, such as ``aa dk=0.5 Nh=4 seed=0``.

    Args:
        words: the run's overrides.
        attention: the run's option of the group ``attention``.
        seed: the run's seed.
        group: the run's group; an experiment of the same name is not repeated.
        fixed: the settings that are the same in all runs of the sweep, which are left out.
    """
    same = {"attention", *(key.lstrip("+") for key in fixed)}
    pairs = [word.lstrip("+").partition("=")[::2] for word in words if not word.startswith("~")]
    pairs = [pair for pair in pairs if pair[0] not in same and pair != ("experiment", group)]
    model = [value for key, value in pairs if key == "model"]
    pairs = [(key, value) for key, value in pairs if key != "model" and names_folder(key)]
    last = [key.rpartition(".")[2] for key, _ in pairs]
    shown = [
        f"{short if last.count(short) == 1 else key}={few_digits(value)}"
        for short, (key, value) in zip(last, pairs, strict=True)
    ]
    ends = len(" ".join([*model, attention, f"seed={seed}"])) + 1
    middle = within_length(" ".join(shown), max(16, NAME_LENGTH - ends))
    return " ".join([*model, attention, *filter(None, [middle]), f"seed={seed}"])


def few_digits(value: str) -> str:
    """Round ``value`` to `DIGITS` digits if it is a number with many, as a search draws them."""
    digits = value.partition("e")[0].lstrip("-0.")
    if "." not in value or len(digits) <= DIGITS + 1:
        return value
    try:
        text = f"{float(value):.{DIGITS}g}"
    except ValueError:
        return value
    return text if "." in text or "e" in text else f"{text}.0"


def within_length(text: str, length: int) -> str:
    """Return ``text``, with a digest in place of its end if it is longer than ``length``."""
    return text if len(text) <= length else f"{text[: length - 9]}-{_digest(text)}"


def folder_name(words: Iterable[str]) -> str:
    """Return a folder name for these overrides, with a digest if it cannot show all of them."""
    text = ",".join(words) or "default"
    name = re.sub(r"[^\w.,=+\[\]-]+", "-", text).encode()[:150].decode(errors="ignore")
    if name == text and text.strip("."):
        return name
    return f"{name.strip('.')}-{_digest(text)}"


def _digest(text: str) -> str:
    # Names of a user's folders may contain bytes that are not UTF-8.
    return hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=4).hexdigest()
