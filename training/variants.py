"""Settings as flat keys, those of them that decide a result, and what a variant is called."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any

from omegaconf import DictConfig

from configs.schema import OPTIONS, FolderConfig, decides_result, is_as_before, names_folder
from training.compose import parse_overrides

# Hydra's own words in the settings of an option.
HYDRAS = ("_target_", "_partial_")
# Of the path of a trained network as much as tells runs apart: variant, seed, file.
KEPT_PARTS = 3
# How images are read, and not which: `data.Dataset.digest` is the same for all their values.
OF_PIXELS = ("data.size", "data.white", "data.max_pixels")
# Of a setting that a search has drawn, where it is shown.
DIGITS = 4
# The longest name of a run or of a group that wandb's server takes.
NAME_LENGTH = 128


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def public_settings(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The settings that decide a result, nested: no folder of a machine, no name of an account.

    Groups of which nothing is left are left out, and of a file to begin with the end of its path
    is kept.
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
    """The settings that decide a result, flattened; as runs of older code have them."""
    return {
        key: value
        for key, value in flatten(config).items()
        if decides_result(key) and not is_as_before(key, value)
    }


def variant_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that decide a result except for the seed, flattened."""
    return {k: v for k, v in result_settings(config).items() if k != "seed"}


def images_key(config: Mapping[str, Any]) -> str:
    """A text that is the same for all runs of such settings that must be of the same images."""
    settings = result_settings({"data": config["data"]})
    return json.dumps({k: v for k, v in settings.items() if k not in OF_PIXELS}, sort_keys=True)


def naming_words(cfg: DictConfig, words: Iterable[str]) -> list[str]:
    """Those of the overrides of ``cfg`` that name a folder: of settings that change a result.

    Of a folder of images ``data.name`` is always among them, for `data.root` names no folder of
    results: of other data sets it only says where a copy is.

    Raises:
        HydraException: words that are no overrides.
    """
    overrides = parse_overrides(list(words))
    naming = [str(o.input_line) for o in overrides if names_folder(o.key_or_group)]
    told = any(word.startswith("data.name=") for word in naming)
    if not told and cfg.data["_target_"] == FolderConfig._target_:
        naming.append(f"data.name={cfg.data.name}")
    return naming


def option_name(group: str, settings: dict[str, Any]) -> str:
    """The option of a group, such as ``sgd``, that these ``settings`` are of."""
    names = {kind._target_: name for there, name, kind in OPTIONS if there == group}
    return names[settings["_target_"]]


def variant_label(config: dict[str, Any], model: str, attention: str) -> str:
    """A name for all runs that differ in nothing but the seed, and for no others.

    Network, attention with dk, dv and Nh, and a digest of all `variant_settings`.
    """
    text = json.dumps(variant_settings(config), sort_keys=True)
    own = config["attention"]
    amounts = [f"{key}={own[key]}" for key in ("dk", "dv", "Nh") if key in own]
    return " ".join([model, attention, *amounts, _digest(text)])


def run_name(
    words: Iterable[str], attention: str, seed: int, *, group: str = "", fixed: Iterable[str] = ()
) -> str:
    """A run's name on the dashboard, such as ``aa dk=0.5 Nh=4 seed=0``: what differs comes first.

    Args:
        words: its overrides.
        attention: the option that it has.
        seed: its seed.
        group: of the run; an experiment of the same name is not repeated.
        fixed: the settings that are the same in all runs of its sweep.
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
    """``value`` with `DIGITS` digits, where it is a number with the many that a search draws."""
    digits = value.partition("e")[0].lstrip("-0.")
    if "." not in value or len(digits) <= DIGITS + 1:
        return value
    try:
        text = f"{float(value):.{DIGITS}g}"
    except ValueError:
        return value
    return text if "." in text or "e" in text else f"{text}.0"


def within_length(text: str, length: int) -> str:
    """``text``, with a digest in place of its end where it is longer than ``length``."""
    return text if len(text) <= length else f"{text[: length - 9]}-{_digest(text)}"


def folder_name(words: Iterable[str]) -> str:
    """A folder's name for these overrides, with a digest where it cannot show all of them."""
    text = ",".join(words) or "default"
    name = re.sub(r"[^\w.,=+\[\]-]+", "-", text).encode()[:150].decode(errors="ignore")
    if name == text and text.strip("."):
        return name
    return f"{name.strip('.')}-{_digest(text)}"


def _digest(text: str) -> str:
    # Names of a user's folders may hold bytes that are no UTF-8.
    return hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=4).hexdigest()
