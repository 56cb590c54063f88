"""How far a run has come: its finished epochs, the one in progress, and where they were trained."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from training.kinds import AMOUNT, OBJECT, Kind, is_whole

# The figures of a step that are fractions; their means over an epoch are in percent.
FRACTIONS = ("top1",)


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

    step: int
    totals: dict[str, Tensor]
    first_nonfinite_step: Tensor
    lr: float = 0.0
    seconds: float = 0.0
    peak_memory_mib: float = 0.0

    @classmethod
    def begin(cls, steps: int) -> "EpochState":
        """Before the first of ``steps`` steps."""
        return cls(0, {}, torch.tensor(steps))

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


@dataclass
class Progress:
    """All that a run has done so far; a checkpoint keeps it with the weights.

    Attributes:
        epoch_state: of the epoch in progress.
        rows: the metrics of each finished epoch.
        per_class_top1: top-1 accuracy of each class after the last of them, in percent.
        segments: where the epochs were trained: a run that is continued elsewhere has several.
        wandb_id: of the run on the dashboard.
    """

    epoch_state: EpochState
    rows: list[dict[str, Any]] = field(default_factory=list)
    per_class_top1: list[float | None] | None = None
    segments: list[dict[str, Any]] = field(default_factory=list)
    wandb_id: str | None = None

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Progress":
        """What `state_dict` has kept."""
        kept = {name: state[name] for name in KINDS}
        return cls(**kept | {"epoch_state": EpochState(**kept["epoch_state"])})

    def state_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "epoch_state": vars(self.epoch_state).copy(),
            "rows": self.rows,
            "per_class_top1": self.per_class_top1,
            "segments": self.segments,
            "wandb_id": self.wandb_id,
        }

    @property
    def position(self) -> str:
        """Where the run is, in words."""
        step = self.epoch_state.step
        inside = f", step {step} of the next" if step else ""
        return f"after epoch {len(self.rows)}{inside}"

    def start_segment(self, place: dict[str, Any]) -> None:
        """Note commit, versions, hardware, precision and processes of what is trained next."""
        if self.segments and self.segments[-1] == self.segments[-1] | place:
            return
        self.segments = [*self.segments, {"first_epoch": len(self.rows) + 1, **place}]

    def finish_epoch(
        self, row: dict[str, Any], per_class_top1: list[float | None], steps: int
    ) -> None:
        """Add a finished epoch's metrics; the next one is before its first step."""
        self.rows = [*self.rows, row]
        self.per_class_top1 = per_class_top1
        self.epoch_state = EpochState.begin(steps)


KINDS: dict[str, Kind] = {
    "epoch_state": OBJECT,
    "rows": ("a list of objects", lambda v: isinstance(v, list) and all(map(OBJECT[1], v))),
    "per_class_top1": ("a list or null", lambda v: v is None or isinstance(v, list)),
    "segments": ("a list", lambda v: isinstance(v, list)),
    "wandb_id": ("text or null", lambda v: v is None or isinstance(v, str)),
}
TENSOR: Kind = ("a tensor", lambda v: isinstance(v, Tensor))
TOTALS: Kind = (
    "an object of tensors of two numbers",
    lambda v: isinstance(v, dict) and all(getattr(t, "shape", None) == (2,) for t in v.values()),
)
EPOCH_KINDS: dict[str, Kind] = {
    "step": ("a whole number of at least 0", lambda v: is_whole(v, 0)),
    "totals": TOTALS,
    "first_nonfinite_step": TENSOR,
    "lr": AMOUNT,
    "seconds": AMOUNT,
    "peak_memory_mib": AMOUNT,
}
