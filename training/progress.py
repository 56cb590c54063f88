"""The progress of a run: finished epochs, the current epoch, and where they were trained."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, InstanceOf, Strict
from torch import Tensor

from models.fields import Whole, parse
from training.records import Amount, Percentage, Segment, row_type

# The metrics of a step that are fractions; their means over an epoch are in percent.
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
    """The state of the current epoch; checkpoints within the epoch contain it.

    Attributes:
        step: steps taken.
        totals: for each metric, by name, a tensor (2,): the sum over the steps where it was finite,
            and the number of those steps.
        first_nonfinite_step: the first step with a non-finite loss, else the epoch's number of
            steps. On the device, like the totals: reading it at each step would stall a GPU.
        lr: learning rate of the last step.
        seconds: time spent training.
        peak_memory_mib: peak memory use.
    """

    step: Whole
    totals: dict[str, Annotated[InstanceOf[Tensor], AfterValidator(_is_pair)]]
    first_nonfinite_step: Annotated[InstanceOf[Tensor], AfterValidator(_is_step)]
    lr: Amount
    seconds: Amount
    peak_memory_mib: Amount

    @classmethod
    def begin(cls, steps: int) -> "EpochState":
        """Return the state before the first of ``steps`` steps."""
        return cls(0, {}, torch.tensor(steps), 0.0, 0.0, 0.0)

    def to(self, device: torch.device) -> "EpochState":
        """Return a copy with its tensors on ``device``."""
        return replace(
            self,
            totals={name: total.to(device) for name, total in self.totals.items()},
            first_nonfinite_step=self.first_nonfinite_step.to(device),
        )

    def after_step(self, figures: dict[str, Tensor], lr: float) -> "EpochState":
        """Return the state after one more step with these metrics, scalars on the device.

        ``loss`` must be among them. Each becomes a column of metrics.csv, see `training_metrics`.
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
        """Return a metric's mean over the steps where it was finite, or 0; fractions in percent."""
        total, steps = self.totals[name].tolist()
        return (100 if name in FRACTIONS else 1) * total / max(1, steps)

    def training_metrics(self) -> dict[str, float]:
        """Return the mean of each metric as ``train/NAME``, and the last learning rate."""
        return {f"train/{name}": self.mean(name) for name in self.totals} | {"train/lr": self.lr}

    def raise_if_nonfinite(self, epoch: int, steps: int) -> None:
        """Raise FloatingPointError, naming epoch and step, if a loss was not finite.

        Here epoch and step count from 0, in the message from 1.
        """
        step = int(self.first_nonfinite_step)
        if step < steps:
            raise FloatingPointError(
                f"the loss is not finite in epoch {epoch + 1}, step {step + 1} of {steps}; "
                "a lower optim.lr or grad_clip may help"
            )


def _counted(figure: Tensor) -> Tensor:
    """Return (figure, 1), or (0, 0) if not finite: fp16's gradient scaler skips such a step."""
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
    """The progress of a run, saved in each checkpoint along with the weights, see `state_dict`.

    Attributes:
        epoch_state: the state of the current epoch.
        rows: the metrics of each finished epoch.
        per_class_top1: top-1 accuracy of each class after the last finished epoch, in percent.
        segments: where the epochs were trained; several if the run was continued elsewhere.
        wandb_id: the ID of the run on the dashboard.
        losses: readings of the loss: the number of steps the run has taken, then the sum and the
            number of the finite losses in the epoch so far.
    """

    epoch_state: EpochState
    rows: Annotated[list[dict[str, Any]], Strict(), AfterValidator(_are_rows)]
    per_class_top1: Annotated[list[Percentage | None], Strict()] | None
    segments: Annotated[list[Segment], Strict()]
    wandb_id: str | None
    losses: Annotated[list[list[float]], Strict()] = field(default_factory=list)

    @classmethod
    def begin(cls, steps: int) -> "Progress":
        """Return the progress of a new run whose epochs have ``steps`` steps."""
        return cls(EpochState.begin(steps), [], None, [], None)

    def state_dict(self) -> dict[str, Any]:
        """Return the progress as plain values, from which `models.fields.parse` restores it."""
        return {**vars(self), "epoch_state": vars(self.epoch_state).copy()}

    @property
    def position(self) -> str:
        """Describe how far the run is."""
        step = self.epoch_state.step
        inside = f", step {step} of the next" if step else ""
        return f"after epoch {len(self.rows)}{inside}"

    def start_segment(self, provenance: dict[str, Any]) -> None:
        """Start a new segment if commit, versions, hardware, precision or processes changed."""
        last: Mapping[str, Any] = self.segments[-1] if self.segments else {}
        if last != {**last, **provenance}:
            segment = {"first_epoch": len(self.rows) + 1, **provenance}
            self.segments = [*self.segments, parse(Segment, segment, "segments")]

    def read_loss(self, epoch_state: EpochState, steps: int) -> dict[int, float]:
        """Record a reading of the loss at ``epoch_state``, in an epoch of ``steps`` steps.

        Returns the newest of `step_losses`; empty if no loss since the last reading was finite.
        """
        step = len(self.rows) * steps + epoch_state.step
        self.losses = [*self.losses, [float(step), *epoch_state.totals["loss"].tolist()]]
        return _means(([[0.0] * 3, *self.losses])[-2:], steps)

    def step_losses(self, steps: int) -> dict[int, float]:
        """Return the mean loss between consecutive readings, by the run's number of steps.

        The first reading in an epoch (of ``steps`` steps) has the mean since the epoch's start.
        """
        return _means([[0.0] * 3, *self.losses], steps)

    def finish_epoch(
        self, row: dict[str, Any], per_class_top1: list[float | None], steps: int
    ) -> None:
        """Add the metrics of the finished epoch, and reset the state for the next one.

        A run started with an earlier version of the code keeps the columns that it has.
        """
        columns = self.rows[0] if self.rows else row
        self.rows = [*self.rows, {name: row[name] for name in row if name in columns}]
        self.per_class_top1 = per_class_top1
        self.epoch_state = EpochState.begin(steps)
