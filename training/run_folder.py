"""The folder of a run: what its files are called, how they are read back, and what they must hold.

    metrics.csv      a row for each epoch
    summary.json     the last epoch's scores and where they come from; only of a finished run
    failed.json      instead of it where a loss or a score was not finite
    last.pt          the newest checkpoint, and previous.pt the one before
    train.log        what the run printed
    .hydra/          the settings, as Hydra writes them

Every reader checks the format's version and the keys it promises: what is damaged is named in one
line, file and key, and nothing after that has to guess.
"""

import csv
import hashlib
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# Of everything in a run's folder. A change of names or meanings raises it.
FORMAT = 2

METRICS = "metrics.csv"
SUMMARY = "summary.json"
FAILURE = "failed.json"
LAST = "last.pt"
PREVIOUS = "previous.pt"
CONFIG = Path(".hydra") / "config.yaml"

_NUMBER = (int, float)
_SUMMARY_KEYS: dict[str, Any] = {
    "epochs": int,
    "seed": int,
    "train/loss": _NUMBER,
    "perf/total_seconds": _NUMBER,
    "per_class_top1": list,
    "class_names": list,
    "model": str,
    "attention": str,
    "data": str,
    "evaluated_on": str,
    "parameters": int,
    "flops": int,
    "stretches": list,
    "config": dict,
}
_STRETCH_KEYS: dict[str, Any] = {
    "first_epoch": int,
    "commit": str,
    "versions": dict,
    "hardware": str,
    "precision": str,
    "processes": int,
}
_CONFIG_KEYS: dict[str, Any] = {"seed": int, "epochs": int, "attention": dict, "data": dict}
_TRAINING_COLUMNS = ("epoch", "train/loss", "train/lr", "perf/epoch_seconds")
SCORES = ("loss", "top1", "top5")


class UnreadableError(ValueError):
    """A file of a run is damaged or of another format; the message is one line that says how."""


def is_run(names: Iterable[str]) -> bool:
    """Whether a folder with files of these names is a run's."""
    return not {METRICS, SUMMARY, LAST, PREVIOUS, FAILURE}.isdisjoint(names)


def read_summary(folder: Path) -> dict[str, Any]:
    """What summary.json holds, checked.

    Raises:
        FileNotFoundError: there is none.
        UnreadableError: it is damaged or of another format.
    """
    path = folder / SUMMARY
    summary = _read_json(path)
    _check_keys(summary, _SUMMARY_KEYS, path)
    _check_keys(summary["config"], _CONFIG_KEYS, path, "config.")
    _check_keys(summary, {f"{summary['evaluated_on']}/{s}": _NUMBER for s in SCORES}, path)
    if not summary["stretches"]:
        raise UnreadableError(f"{path}: stretches is empty")
    for stretch in summary["stretches"]:
        _check_type(stretch, dict, path, "stretches")
        _check_keys(stretch, _STRETCH_KEYS, path, "stretches.")
    return summary


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The rows of metrics.csv, one for each epoch from 1 on, all values as numbers.

    Raises:
        FileNotFoundError: there is none.
        UnreadableError: it is damaged or of another format.
    """
    path = folder / METRICS
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            header, texts = reader.fieldnames or [], list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UnreadableError(f"{path} is damaged: {_reason(error)}") from None
    for column in _TRAINING_COLUMNS:
        if column not in header:
            raise UnreadableError(f"{path} has no column {column}: it is of another format")
    rows = []
    for number, text in enumerate(texts, start=1):
        row = {}
        for column in header:
            try:
                row[column] = float(text[column])
            except (TypeError, ValueError):
                raise UnreadableError(
                    f"{path}, row {number}: {column} is {text[column]!r}, not a number"
                ) from None
        if row["epoch"] != number:
            raise UnreadableError(f"{path}, row {number}: epoch is {text['epoch']!r}")
        rows.append(row)
    return rows


def read_failure(folder: Path) -> str | None:
    """Why the run of ``folder`` has no result, where a number stopped being finite; else None.

    Raises:
        UnreadableError: failed.json is damaged or of another format.
    """
    path = folder / FAILURE
    try:
        failure = _read_json(path)
    except FileNotFoundError:
        return None
    _check_keys(failure, {"error": str}, path)
    return str(failure["error"])


def planned_epochs(folder: Path) -> int | None:
    """How many epochs the run is meant to have, by its settings; None where they do not tell."""
    try:
        text = (folder / CONFIG).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    found = re.search(r"^epochs: (\d+)$", text, flags=re.MULTILINE)
    return int(found[1]) if found else None


def folder_name(words: Iterable[str]) -> str:
    """A folder's name for these overrides, with a digest where it cannot show all of them."""
    text = ",".join(words)
    name = re.sub(r"[^\w.,=+\[\]-]+", "-", text).encode()[:150].decode(errors="ignore")
    if name == text:
        return name
    return f"{name}-{hashlib.blake2b(text.encode(), digest_size=4).hexdigest()}"


def first_nonfinite(values: dict[str, Any]) -> str | None:
    """The first of ``values`` that is a number and not finite, by name; None if all are."""
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            return name
    return None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise UnreadableError(f"{path} is damaged: {_reason(error)}") from None
    _check_type(value, dict, path, "the whole")
    if value.get("format") != FORMAT:
        raise UnreadableError(
            f"{path} has format {value.get('format', 1)}; this version reads format {FORMAT}"
        )
    return value


def _check_keys(value: dict[str, Any], kinds: dict[str, Any], path: Path, where: str = "") -> None:
    for key, kind in kinds.items():
        if key not in value:
            raise UnreadableError(f"{path}: {where}{key} is missing")
        _check_type(value[key], kind, path, f"{where}{key}")


def _check_type(value: Any, kind: Any, path: Path, key: str) -> None:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise UnreadableError(f"{path}: {key} is {_shortened(value)}, which it cannot be")


def _shortened(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 40 else f"{text[:37]}..."


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
