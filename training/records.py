"""What the files of a run hold: they are written and read as the types below, which name each key.

A record is the JSON object itself, a dict of the file's keys. Further keys are kept as they are.
"""

from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, with_config
from typing_extensions import NotRequired, TypedDict

from models import ATTENTIONS, Description
from models.fields import (
    Count,
    Finite,
    Format,
    Plain,
    Text,
    UnreadableError,
    Whole,
    are_plain,
    is_finite,
    is_number,
    parse,
)


def nonfinite(values: Mapping[str, Any]) -> str | None:
    """Of the first of ``values`` that is a number and not finite, what it is; None if all are."""
    for name, value in values.items():
        if is_number(value) and not is_finite(value):
            return f"{name} is {value:g}"
    return None


def _is_score(value: float) -> float:
    if is_finite(value) and not 0 <= value <= 100:
        raise ValueError(f" is {value:g}, not from 0 to 100")
    return value


# ---- metrics.csv --------------------------------------------------------------------------------

Amount = Annotated[Finite, Field(ge=0)]
Percentage = Annotated[Finite, Field(ge=0, le=100)]
# A run whose losses or scores are not finite has diverged; its files are not damaged by that.
Loss = Annotated[float, Field(strict=True)]
Score = Annotated[Loss, AfterValidator(_is_score)]

# The parts of a data set that a run may be evaluated on, and what the network is scored by.
SPLITS = ("test", "val")
SCORES = {"loss": Loss, "top1": Score, "top5": Score}


def row_type(columns: tuple[str, ...]) -> Any:
    """The type of a row of metrics.csv: a dict of the columns of each run, and of ``columns``."""
    on = next((s for s in SPLITS if any(c.startswith(f"{s}/") for c in columns)), SPLITS[0])
    return _metrics_type(("epoch", "perf/epoch_seconds", *columns), on)


@cache
def _metrics_type(names: tuple[str, ...], evaluated_on: str) -> Any:
    scores = (f"{evaluated_on}/{score}" for score in SCORES)
    all_names = dict.fromkeys(("train/loss", "train/top1", "train/lr", *scores, *names))
    return TypedDict("Metrics", {name: _metric_type(name) for name in all_names})  # type: ignore


def _metric_type(name: str) -> Any:
    split, _, score = name.partition("/")
    if split in SPLITS or name in ("train/loss", "train/top1"):
        return SCORES.get(score, Loss)
    return Amount


# ---- summary.json, failed.json ------------------------------------------------------------------


@with_config(extra="allow")
class Segment(TypedDict):
    """Where epochs from ``first_epoch`` on were trained; a run that is continued has several."""

    first_epoch: Count
    commit: Text
    versions: dict[str, Text]
    hardware: Text
    precision: Text
    processes: Count


@with_config(extra="allow")
class Settings(TypedDict):
    """Of a run's settings those that every reader of its results relies on."""

    seed: Whole
    epochs: Count
    model: dict[str, Any]
    attention: dict[str, Any]
    data: dict[str, Any]


@with_config(extra="allow")
class Summary(TypedDict):
    """A finished run: its metrics (see `check_summary`), and what they are of.

    ``data_digest`` tells the images from others that are called ``data``, too, and ``notes`` are on
    what was found there: see `data.Dataset`. Older code has written neither.
    """

    format: Format
    epochs: Count
    seed: Whole
    per_class_top1: list[Percentage | None]  # None for a class without images
    class_names: list[Text]
    model: Text
    attention: Literal[tuple(ATTENTIONS)]  # type: ignore[valid-type]
    data: Text
    data_digest: NotRequired[Text]
    notes: NotRequired[list[Text]]
    evaluated_on: Literal["test", "val"]
    parameters: Count
    flops: Count
    layers: NotRequired[list[dict[str, Any]]]
    segments: Annotated[list[Segment], Field(min_length=1)]
    config: Annotated[Settings, AfterValidator(are_plain)]


def check_summary(value: Any, where: str) -> Summary:
    """``value`` as a summary, with the last epoch's metrics, whose names have a slash, in it.

    Raises:
        UnreadableError: it is none, or values contradict each other; see `models.fields.parse`.
    """
    summary = parse(Summary, value, where)
    names = ("perf/total_seconds", *(name for name in value if "/" in name))
    parse(_metrics_type(names, summary["evaluated_on"]), value, where)
    for key in ("epochs", "seed"):
        if value[key] != value["config"][key]:
            raise UnreadableError(
                f"{where}: {key} is {value[key]}, but config.{key} is {value['config'][key]}"
            )
    classes, scored = len(summary["class_names"]), len(summary["per_class_top1"])
    if classes != scored:
        raise UnreadableError(
            f"{where}: per_class_top1 has {scored} values for {classes} class_names"
        )
    return summary


class Failure(TypedDict):
    """A run that has diverged, on the images of ``data_digest``, as in `Summary`."""

    format: Format
    error: Text
    data_digest: NotRequired[Text]


class NoRun(TypedDict):
    """Why a sweep's job has no run: its outcome, one of `training.outcome`'s, and its settings."""

    format: Format
    outcome: Literal["failed", "refused"]
    why: Text
    config: Annotated[dict[str, Any], AfterValidator(are_plain)]


# ---- last.pt ------------------------------------------------------------------------------------


@with_config(extra="allow")
class Checkpoint(TypedDict):
    """A run in progress, beside `training.progress.Progress` and the states of what trains."""

    format: Format
    config: Plain
    description: Description
    model: dict[str, Any]
