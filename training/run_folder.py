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
import io
import json
import re
from collections.abc import Callable, Iterable
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

# What a value must be, in words, and whether it is. Nothing that a run measures is beyond float32;
# so sums and squares of what is read here stay finite.
_Kind = tuple[str, Callable[[Any], bool]]
_LARGEST = 3.5e38


def _is_number(value: Any) -> bool:
    whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _LARGEST
    return whole or isinstance(value, float)


def is_finite(value: Any) -> bool:
    """Whether ``value`` is a number of at most float32's range, neither NaN nor infinite."""
    return _is_number(value) and -_LARGEST <= value <= _LARGEST


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**64


def _is_percentage(value: Any) -> bool:
    return is_finite(value) and 0 <= value <= 100


_COUNT: _Kind = ("a whole number of at least 1", lambda v: _is_whole(v, 1))
_SEED: _Kind = ("a whole number of at least 0", lambda v: _is_whole(v, 0))
_AMOUNT: _Kind = ("a number of at least 0", lambda v: is_finite(v) and v >= 0)
# A run whose losses or scores are not finite has diverged; its files are not damaged by that.
_LOSS: _Kind = ("a number", _is_number)
_SCORE: _Kind = (
    "a number from 0 to 100",
    lambda v: _is_percentage(v) or (_is_number(v) and not is_finite(v)),
)
_TEXT: _Kind = ("text", lambda v: isinstance(v, str) and v != "")
_TEXTS: _Kind = ("a list of texts", lambda v: isinstance(v, list) and all(_TEXT[1](t) for t in v))
_OBJECT: _Kind = ("an object", lambda v: isinstance(v, dict))
_BY_CLASS: _Kind = (
    "a list of numbers from 0 to 100, or null for a class without images",
    lambda v: isinstance(v, list) and all(x is None or _is_percentage(x) for x in v),
)

SCORES = ("loss", "top1", "top5")
_SPLITS = ("test", "val")
_SCORE_KINDS = {"loss": _LOSS, "top1": _SCORE, "top5": _SCORE}
_SUMMARY_KEYS: dict[str, _Kind] = {
    "epochs": _COUNT,
    "seed": _SEED,
    "train/loss": _LOSS,
    "train/lr": _AMOUNT,
    "perf/total_seconds": _AMOUNT,
    "class_names": _TEXTS,
    "per_class_top1": _BY_CLASS,
    "model": _TEXT,
    "attention": _TEXT,
    "data": _TEXT,
    "evaluated_on": ("test or val", lambda v: v in _SPLITS),
    "parameters": _COUNT,
    "flops": _COUNT,
    "stretches": ("a list of at least one object", lambda v: isinstance(v, list) and v != []),
    "config": _OBJECT,
}
_STRETCH_KEYS: dict[str, _Kind] = {
    "first_epoch": _COUNT,
    "commit": _TEXT,
    "versions": ("an object of texts", lambda v: isinstance(v, dict) and _TEXTS[1]([*v.values()])),
    "hardware": _TEXT,
    "precision": _TEXT,
    "processes": _COUNT,
}
_CONFIG_KEYS: dict[str, _Kind] = {
    "seed": _SEED,
    "epochs": _COUNT,
    "attention": _OBJECT,
    "data": _OBJECT,
}
_TRAINING_COLUMNS = ("epoch", "train/loss", "train/lr", "perf/epoch_seconds")


class UnreadableError(ValueError):
    """A file of a run is damaged or of another format; the message is one line that says how."""


def is_run(names: Iterable[str]) -> bool:
    """Whether a folder with files of these names is a run's."""
    return not {METRICS, SUMMARY, LAST, PREVIOUS, FAILURE}.isdisjoint(names)


def read_summary(folder: Path) -> dict[str, Any]:
    """What summary.json holds, checked; its losses and scores may be NaN or infinite.

    Raises:
        FileNotFoundError: there is none.
        UnreadableError: it is damaged or of another format.
    """
    path = folder / SUMMARY
    summary = _read_json(path)
    _check_keys(summary, _SUMMARY_KEYS, path)
    _check_keys(summary["config"], _CONFIG_KEYS, path, "config.")
    _check_values(summary["config"], path, "config")
    on = summary["evaluated_on"]
    _check_keys(summary, {f"{on}/{name}": kind for name, kind in _SCORE_KINDS.items()}, path)
    for number, stretch in enumerate(summary["stretches"]):
        _check_kind(stretch, _OBJECT, path, f"stretches[{number}]")
        _check_keys(stretch, _STRETCH_KEYS, path, f"stretches[{number}].")
    for key in ("epochs", "seed"):
        if summary[key] != summary["config"][key]:
            raise UnreadableError(
                f"{path}: {key} is {summary[key]}, but config.{key} is {summary['config'][key]}"
            )
    names, scores = summary["class_names"], summary["per_class_top1"]
    if len(names) != len(scores):
        raise UnreadableError(
            f"{path}: per_class_top1 has {len(scores)} values for {len(names)} class_names"
        )
    return summary


def read_result(folder: Path) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """summary.json and metrics.csv of a finished run, checked against each other.

    Raises:
        FileNotFoundError: there is no summary.json: the run is not finished.
        UnreadableError: either file is damaged or of another format, or they disagree.
    """
    summary = read_summary(folder)
    path = folder / METRICS
    try:
        rows = read_metrics(folder)
    except FileNotFoundError:
        raise UnreadableError(f"{path} is missing, but there is a {SUMMARY}") from None
    if len(rows) != summary["epochs"]:
        raise UnreadableError(
            f"{path} has {len(rows)} epochs, but {SUMMARY} says epochs is {summary['epochs']}"
        )
    if f"{summary['evaluated_on']}/top1" not in rows[0]:
        raise UnreadableError(
            f"{path} has no column {summary['evaluated_on']}/top1, but {SUMMARY} says "
            f"evaluated_on is {summary['evaluated_on']}"
        )
    return summary, rows


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The rows of metrics.csv, one for each epoch from 1 on, all values as numbers.

    Losses and scores may be NaN or infinite.

    Raises:
        FileNotFoundError: there is none.
        UnreadableError: it is damaged or of another format.
    """
    path = folder / METRICS
    content = _read_text(path)
    try:
        reader = csv.DictReader(io.StringIO(content, newline=""))
        header, texts = list(reader.fieldnames or []), list(reader)
    except csv.Error as error:
        raise UnreadableError(f"{path} is damaged: {_reason(error)}") from None
    _check_header(header, path)
    if not content.endswith("\n"):
        raise UnreadableError(f"{path}, row {len(texts)}: the line is cut short")
    return [_read_row(text, header, number, path) for number, text in enumerate(texts, start=1)]


def _check_header(header: list[str], path: Path) -> None:
    if not header:
        raise UnreadableError(f"{path} is empty")
    on = next((s for s in _SPLITS if any(c.startswith(f"{s}/") for c in header)), _SPLITS[0])
    for column in (*_TRAINING_COLUMNS, *(f"{on}/{name}" for name in SCORES)):
        if header.count(column) != 1:
            what = "no column" if column not in header else "more than one column"
            raise UnreadableError(f"{path} has {what} {column}: it is damaged or of another format")


def _read_row(text: dict[Any, Any], header: list[str], number: int, path: Path) -> dict[str, float]:
    row = {}
    where = f"{path}, row {number}"
    if None in text:
        raise UnreadableError(f"{where} has more values than there are columns")
    for column in header:
        try:
            row[column] = float(text[column])
        except (TypeError, ValueError):
            raise UnreadableError(
                f"{where}: {column} is {_shortened(text[column])}, not a number"
            ) from None
        group, _, name = column.partition("/")
        if group in _SPLITS or column == "train/loss":
            kind = _SCORE_KINDS.get(name, _LOSS)
        else:
            kind = _AMOUNT
        if not kind[1](row[column]):
            raise UnreadableError(f"{where}: {column} is {text[column]}, not {kind[0]}")
    if row["epoch"] != number:
        raise UnreadableError(f"{where}: epoch is {text['epoch']}, not {number}")
    return row


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
    _check_keys(failure, {"error": _TEXT}, path)
    return str(failure["error"])


def planned_epochs(folder: Path) -> int | None:
    """How many epochs the run is meant to have, by its settings; None where they do not tell."""
    try:
        text = _read_text(folder / CONFIG)
    except (FileNotFoundError, UnreadableError):
        return None
    found = re.search(r"^epochs: ([0-9]{1,9})$", text, flags=re.MULTILINE)
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
        if _is_number(value) and not is_finite(value):
            return name
    return None


def _read_text(path: Path) -> str:
    try:
        if path.exists() and not path.is_file():  # to open a named pipe would wait for ever
            raise UnreadableError(f"{path} is not a file")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UnreadableError(f"{path} cannot be read ({error.strerror or error})") from None
    except UnicodeDecodeError as error:
        raise UnreadableError(f"{path} is damaged: {_reason(error)}") from None


def _read_json(path: Path) -> dict[str, Any]:
    text = _read_text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UnreadableError(f"{path} is damaged: {_reason(error)}") from None
    if not isinstance(value, dict):
        raise UnreadableError(f"{path} is damaged: it holds {_shortened(value)}, not an object")
    if not _is_whole(value.get("format", 1), 1) or value.get("format", 1) != FORMAT:
        raise UnreadableError(
            f"{path}: format is {_shortened(value.get('format', 1))}; this version reads format "
            f"{FORMAT}"
        )
    return value


def _check_keys(
    value: dict[str, Any], kinds: dict[str, _Kind], path: Path, where: str = ""
) -> None:
    for key, kind in kinds.items():
        if key not in value:
            raise UnreadableError(f"{path}: {where}{key} is missing")
        _check_kind(value[key], kind, path, f"{where}{key}")


def _check_kind(value: Any, kind: _Kind, path: Path, key: str) -> None:
    words, accepts = kind
    if not accepts(value):
        raise UnreadableError(f"{path}: {key} is {_shortened(value)}, not {words}")


def _check_values(value: Any, path: Path, key: str, depth: int = 0) -> None:
    """Settings may be whatever JSON has, but finite, and not nested without end."""
    if depth > 20:
        raise UnreadableError(f"{path}: {key[:40]}... is nested too deeply")
    numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
    if numeric and not is_finite(value):
        raise UnreadableError(f"{path}: {key} is {_shortened(value)}, not a finite number")
    if isinstance(value, dict):
        for name, inner in value.items():
            _check_values(inner, path, f"{key}.{name}", depth + 1)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            _check_values(inner, path, f"{key}[{number}]", depth + 1)


def _shortened(value: Any) -> str:
    """For a message. JSON's own words for what JSON holds: null and not None."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (RecursionError, ValueError):
        text = f"a {type(value).__name__}"
    return text if len(text) <= 40 else f"{text[:37]}..."


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
