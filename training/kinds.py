"""What the values in a run's files must be, and the checks that say in one line which is not."""

import json
from collections.abc import Callable
from typing import Any


class UnreadableError(ValueError):
    """A file of a run is damaged or of another format; the message is one line that says how."""


# What a value must be, in words, and whether it is. Nothing that a run measures is beyond float32;
# so sums and squares of what is read here stay finite.
Kind = tuple[str, Callable[[Any], bool]]
_LARGEST = 3.5e38


def is_number(value: Any) -> bool:
    """Whether ``value`` is a float, NaN and infinity included, or an int within its range."""
    whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _LARGEST
    return whole or isinstance(value, float)


def is_finite(value: Any) -> bool:
    """Whether ``value`` is a number of at most float32's range, neither NaN nor infinite."""
    return is_number(value) and -_LARGEST <= value <= _LARGEST


def is_whole(value: Any, least: int) -> bool:
    """Whether ``value`` is an int of at least ``least`` and less than 2^64."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**64


def is_percentage(value: Any) -> bool:
    """Whether ``value`` is a number from 0 to 100."""
    return is_finite(value) and 0 <= value <= 100


COUNT: Kind = ("a whole number of at least 1", lambda v: is_whole(v, 1))
SEED: Kind = ("a whole number of at least 0", lambda v: is_whole(v, 0))
AMOUNT: Kind = ("a number of at least 0", lambda v: is_finite(v) and v >= 0)
# A run whose losses or scores are not finite has diverged; its files are not damaged by that.
LOSS: Kind = ("a number", is_number)
SCORE: Kind = (
    "a number from 0 to 100",
    lambda v: is_percentage(v) or (is_number(v) and not is_finite(v)),
)
TEXT: Kind = ("text", lambda v: isinstance(v, str) and v != "")
TEXTS: Kind = ("a list of texts", lambda v: isinstance(v, list) and all(TEXT[1](t) for t in v))
OBJECT: Kind = ("an object", lambda v: isinstance(v, dict))
BY_CLASS: Kind = (
    "a list of numbers from 0 to 100, or null for a class without images",
    lambda v: isinstance(v, list) and all(x is None or is_percentage(x) for x in v),
)

SCORES = ("loss", "top1", "top5")
SPLITS = ("test", "val")
SCORE_KINDS = {"loss": LOSS, "top1": SCORE, "top5": SCORE}
SUMMARY_KEYS: dict[str, Kind] = {
    "epochs": COUNT,
    "seed": SEED,
    "train/loss": LOSS,
    "train/top1": SCORE,
    "train/lr": AMOUNT,
    "perf/total_seconds": AMOUNT,
    "class_names": TEXTS,
    "per_class_top1": BY_CLASS,
    "model": TEXT,
    "attention": TEXT,
    "data": TEXT,
    "evaluated_on": ("test or val", lambda v: v in SPLITS),
    "parameters": COUNT,
    "flops": COUNT,
    "segments": ("a list of at least one object", lambda v: isinstance(v, list) and v != []),
    "config": OBJECT,
}
SEGMENT_KEYS: dict[str, Kind] = {
    "first_epoch": COUNT,
    "commit": TEXT,
    "versions": ("an object of texts", lambda v: isinstance(v, dict) and TEXTS[1]([*v.values()])),
    "hardware": TEXT,
    "precision": TEXT,
    "processes": COUNT,
}
CONFIG_KEYS: dict[str, Kind] = {
    "seed": SEED,
    "epochs": COUNT,
    "attention": OBJECT,
    "data": OBJECT,
}
TRAINING_COLUMNS = ("epoch", "train/loss", "train/top1", "train/lr", "perf/epoch_seconds")


def check_keys(value: dict[str, Any], kinds: dict[str, Kind], where: str = "") -> None:
    """Raise UnreadableError unless ``value`` has these keys, each of its kind.

    ``where`` is what the message puts before a key's name.
    """
    for key, kind in kinds.items():
        if key not in value:
            raise UnreadableError(f"{where}{key} is missing")
        check_kind(value[key], kind, f"{where}{key}")


def check_kind(value: Any, kind: Kind, name: str) -> None:
    """Raise UnreadableError unless ``value``, called ``name``, is of that kind."""
    words, accepts = kind
    if not accepts(value):
        raise UnreadableError(f"{name} is {shortened(value)}, not {words}")


def check_values(value: Any, key: str, depth: int = 0) -> None:
    """Raise UnreadableError unless numbers in ``value`` are finite and it is not nested deeply."""
    if depth > 20:
        raise UnreadableError(f"{key[:40]}... is nested too deeply")
    numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
    if numeric and not is_finite(value):
        raise UnreadableError(f"{key} is {shortened(value)}, not a finite number")
    if isinstance(value, dict):
        for name, inner in value.items():
            check_values(inner, f"{key}.{name}", depth + 1)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            check_values(inner, f"{key}[{number}]", depth + 1)


def shortened(value: Any) -> str:
    """For a message. JSON's own words for what JSON holds: null and not None."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (RecursionError, ValueError, TypeError):
        text = f"a {type(value).__name__}"
    return text if len(text) <= 40 else f"{text[:37]}..."


def check_segments(segments: list[Any], where: str = "") -> None:
    """Raise UnreadableError unless each of a run's segments is complete."""
    for number, segment in enumerate(segments):
        check_kind(segment, OBJECT, f"{where}segments[{number}]")
        check_keys(segment, SEGMENT_KEYS, f"{where}segments[{number}].")
