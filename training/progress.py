"""How far a run has come: its finished epochs, the one in progress, and where they were trained."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, InstanceOf, Strict
from torch import Tensor

from models.fields import Whole, parse
from training.records import Amount, Percentage, Segment, row_type

# The figures of a step that are fractions; their means over an epoch are in percent.
FRACTIONS = ("top1",)


def _is_pair(value: Tensor) -> Tensor:
    if value.shape != (2,):
        raise ValueError(f" has the shape {tuple(value.shape)}, not (2,)")
    if not value.is_floating_point():
        raise ValueError(f" is {value.dtype}, not of floating-point numbers")
    return value


def _is_step(value: Tensor) -> Tensor:
    if value.shape != () or value.dtype != torch.int64:
        raise ValueError(f" is {value.dtype} of shape {tuple(value.shape)}, not a whole number")
    return value


def _are_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for number, row in enumerate(rows, start=1):
        where = f" of epoch {number}"
        if parse(row_type(tuple(row)), row, where)["epoch"] != number:
            raise ValueError(f"{where}: epoch is {row['epoch']}")
    return rows


@dataclass(frozen=True)
class EpochState:
    """What the epoch in progress has come to; checkpoints inside it keep the same.

    Attributes:
        step: steps taken.
        totals: of each figure that the steps have shown, by its name: the sum over the steps
            where it was finite, and their number, (2,).
        first_nonfinite_step: the first step whose loss was not finite, or the number of steps.
            On the device, like the totals: reading it at every step would make a GPU wait.
        lr: learning rate of the last step.
        seconds: time spent training.
        peak_memory_mib: most memory used.
    """

    step: Whole
    totals: dict[str, Annotated[InstanceOf[Tensor], AfterValidator(_is_pair)]]
    first_nonfinite_step: Annotated[InstanceOf[Tensor], AfterValidator(_is_step)]
    lr: Amount
    seconds: Amount
    peak_memory_mib: Amount

    @classmethod
    def begin(cls, steps: int) -> "EpochState":
        """Before the first of ``steps`` steps."""
        return cls(0, {}, torch.tensor(steps), 0.0, 0.0, 0.0)

    def to(self, device: torch.device) -> "EpochState":
        """The same with its tensors on ``device``."""
        return replace(
            self,
            totals={name: total.to(device) for name, total in self.totals.items()},
            first_nonfinite_step=self.first_nonfinite_step.to(device),
        )

    def after_step(self, figures: dict[str, Tensor], lr: float) -> "EpochState":
        """One step later, which has shown ``figures``, scalars on the device, ``loss`` among them.

        Each becomes a column of metrics.csv, see `training_metrics`.
        """
        first = self.first_nonfinite_step
        return replace(
            self,
            step=self.step + 1,
            totals={name: self.totals.get(name, 0) + _counted(figures[name]) for name in figures},
            first_nonfinite_step=torch.where(
                figures["loss"].isfinite(), first, first.clamp(max=self.step)
            ),
            lr=lr,
        )

    def mean(self, name: str) -> float:
        """Of a figure over the steps where it was finite; 0 without any, percent of a fraction."""
        total, steps = self.totals[name].tolist()
        return (100 if name in FRACTIONS else 1) * total / max(1, steps)

    def training_metrics(self) -> dict[str, float]:
        """``train/NAME``, the mean over the steps, for each figure; ``train/lr`` is the last."""
        return {f"train/{name}": self.mean(name) for name in self.totals} | {"train/lr": self.lr}

    def raise_if_nonfinite(self, epoch: int, steps: int) -> None:
        """Raise FloatingPointError, naming epoch and step, if a loss was not finite.

        Epoch and step are counted from 0 here and from 1 in the message.
        """
        step = int(self.first_nonfinite_step)
        if step < steps:
            raise FloatingPointError(
                f"the loss is not finite in epoch {epoch + 1}, step {step + 1} of {steps}; "
                "a lower optim.lr or grad_clip may help"
            )


def _counted(figure: Tensor) -> Tensor:
    """The figure and 1, or 0 and 0 where it is not finite: fp16's scaler skips such a step."""
    finite = figure.isfinite()
    return torch.stack((torch.where(finite, figure, 0.0), finite.float()))


def _means(losses: list[list[float]], steps: int) -> dict[int, float]:
    means = {}
    for before, (step, total, number) in pairwise(losses):
        same_epoch = (before[0] - 1) // steps == (step - 1) // steps
        old_total, old_number = before[1:] if same_epoch else (0.0, 0.0)
        if number > old_number:
            means[int(step)] = (total - old_total) / (number - old_number)
    return means


@dataclass
class Progress:
    """All that a run has done so far; a checkpoint has it, see `state_dict`, beside the weights.

    Attributes:
        epoch_state: of the epoch in progress.
        rows: the metrics of each finished epoch.
        per_class_top1: top-1 accuracy of each class after the last of them, in percent.
        segments: where the epochs were trained: a run that is continued elsewhere has several.
        wandb_id: of the run on the dashboard.
        losses: readings of the loss: the steps that the run has taken, and the sum and the number
            of the losses of their epoch so far, of those that were finite.
    """

    epoch_state: EpochState
    rows: Annotated[list[dict[str, Any]], Strict(), AfterValidator(_are_rows)]
    per_class_top1: Annotated[list[Percentage | None], Strict()] | None
    segments: Annotated[list[Segment], Strict()]
    wandb_id: str | None
    losses: Annotated[list[list[float]], Strict()] = field(default_factory=list)

    @classmethod
    def begin(cls, steps: int) -> "Progress":
        """Before the first epoch, of ``steps`` steps."""
        return cls(EpochState.begin(steps), [], None, [], None)

    def state_dict(self) -> dict[str, Any]:
        """As plain values, of which `models.fields.parse` makes an equal one."""
        return {**vars(self), "epoch_state": vars(self.epoch_state).copy()}

    @property
    def position(self) -> str:
        """Where the run is, in words."""
        step = self.epoch_state.step
        inside = f", step {step} of the next" if step else ""
        return f"after epoch {len(self.rows)}{inside}"

    def start_segment(self, provenance: dict[str, Any]) -> None:
        """Note commit, versions, hardware, precision and processes of what is trained next."""
        last: Mapping[str, Any] = self.segments[-1] if self.segments else {}
        if last != {**last, **provenance}:
            segment = {"first_epoch": len(self.rows) + 1, **provenance}
            self.segments = [*self.segments, parse(Segment, segment, "segments")]

    def read_loss(self, epoch_state: EpochState, steps: int) -> dict[int, float]:
        """Note the loss of an epoch of ``steps`` steps that has come to ``epoch_state``.

        Returns the newest of `step_losses`; none where no loss since the reading before was finite.
        """
        step = len(self.rows) * steps + epoch_state.step
        self.losses = [*self.losses, [float(step), *epoch_state.totals["loss"].tolist()]]
        return _means(([[0.0] * 3, *self.losses])[-2:], steps)

    def step_losses(self, steps: int) -> dict[int, float]:
        """By the steps that the run has taken, the mean of the loss since the reading before.

        The first reading of an epoch, of ``steps`` steps, has the mean from its beginning.
        """
        return _means([[0.0] * 3, *self.losses], steps)

    def finish_epoch(
        self, row: dict[str, Any], per_class_top1: list[float | None], steps: int
    ) -> None:
        """Add a finished epoch's metrics; the next one is before its first step.

        A run that an earlier version has begun goes on with the columns that it has.
        """
        columns = self.rows[0] if self.rows else row
        self.rows = [*self.rows, {name: row[name] for name in row if name in columns}]
        self.per_class_top1 = per_class_top1
        self.epoch_state = EpochState.begin(steps)
