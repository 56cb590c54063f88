"""The contents of a run's files: the types below, used for writing and reading, name each key.

A record is the JSON object itself, a dict. Keys that a type does not name are kept unchanged.
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
    """Describe the first number in ``values`` that is not finite; return None if all are."""
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
# Non-finite losses or scores mean that a run has diverged, not that its files are damaged.
Loss = Annotated[float, Field(strict=True)]
Score = Annotated[Loss, AfterValidator(_is_score)]

# The splits that a run may be evaluated on, and the scores of an evaluation.
SPLITS = ("test", "val")
SCORES = {"loss": Loss, "top1": Score, "top5": Score}


def row_type(columns: tuple[str, ...]) -> Any:
    """Return the type of a row of metrics.csv: the columns that every run has, and ``columns``."""
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
    """Where the epochs from ``first_epoch`` on were trained; a resumed run may have several."""

    first_epoch: Count
    commit: Text
    versions: dict[str, Text]
    hardware: Text
    precision: Text
    processes: Count


@with_config(extra="allow")
class Settings(TypedDict):
    """The settings that every reader of a run's results relies on."""

    seed: Whole
    epochs: Count
    model: dict[str, Any]
    attention: dict[str, Any]
    data: dict[str, Any]


@with_config(extra="allow")
class Summary(TypedDict):
    """A finished run: its metrics (see `check_summary`) and how they were obtained.

    ``data_digest`` distinguishes the images from others also called ``data``, and ``notes`` are
    remarks on the images, see `data.Dataset`. Older code wrote neither.
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
    """Check ``value`` and return it as a summary, with the last epoch's metrics (names with a "/").

    Raises:
        UnreadableError: if it is not a summary (see `models.fields.parse`) or contradicts itself.
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
    """The error of a run that has diverged; ``data_digest`` is as in `Summary`."""

    format: Format
    error: Text
    data_digest: NotRequired[Text]


class NoRun(TypedDict):
    """Why a sweep's job has no run: its outcome (see `training.outcome`) and its settings."""

    format: Format
    outcome: Literal["failed", "refused"]
    why: Text
    config: Annotated[dict[str, Any], AfterValidator(are_plain)]


# ---- last.pt ------------------------------------------------------------------------------------


@with_config(extra="allow")
class Checkpoint(TypedDict):
    """A checkpoint, apart from `training.progress.Progress` and the other state dicts."""

    format: Format
    config: Plain
    description: Description
    model: dict[str, Any]
