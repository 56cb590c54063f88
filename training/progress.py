"""How far a run has come: its finished epochs, the one in progress, and where they were trained."""

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from training.kinds import AMOUNT, OBJECT, Kind, is_whole


class StepFigures(NamedTuple):
    """What one step has shown, each a scalar on the device.

    Attributes:
        loss: mean loss of the whole batch, before the step.
        top1: fraction of the batch that the network had right then, in [0, 1].
        grad_norm: L2 norm of all gradients together, before they are clipped. fp16's scaler skips
            a step where it is not finite.
    """

    loss: Tensor
    top1: Tensor
    grad_norm: Tensor


@dataclass(frozen=True)
class EpochState:
    """What the epoch in progress has come to; checkpoints inside it keep the same.

    Attributes:
        step: steps taken.
        loss_sum: sum of their losses.
        top1_sum: sum of the fractions of their batches that were right.
        grad_norm_sum: sum of the norms of their gradients, where finite.
        finite_norms: number of steps with a finite norm.
        first_nonfinite_step: the first step whose loss was not finite, or the number of steps.
            On the device, like the sum: reading it at every step would make a GPU wait.
        lr: learning rate of the last step.
        seconds: time spent training.
        peak_memory_mib: most memory used.
    """

    step: int
    loss_sum: Tensor
    top1_sum: Tensor
    grad_norm_sum: Tensor
    finite_norms: Tensor
    first_nonfinite_step: Tensor
    lr: float = 0.0
    seconds: float = 0.0
    peak_memory_mib: float = 0.0

    @classmethod
    def begin(cls, steps: int) -> "EpochState":
        """Before the first of ``steps`` steps."""
        zero = torch.zeros(())
        return cls(0, zero, zero, zero, torch.tensor(0), torch.tensor(steps))

    def to(self, device: torch.device) -> "EpochState":
        """The same with its tensors on ``device``."""
        tensors: Any = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **tensors)

    def after_step(self, figures: StepFigures, lr: float) -> "EpochState":
        """One step later, which has shown ``figures``."""
        first = self.first_nonfinite_step
        first = torch.where(figures.loss.isfinite(), first, first.clamp(max=self.step))
        finite = figures.grad_norm.isfinite()
        return replace(
            self,
            step=self.step + 1,
            loss_sum=self.loss_sum + figures.loss,
            top1_sum=self.top1_sum + figures.top1,
            grad_norm_sum=self.grad_norm_sum + torch.where(finite, figures.grad_norm, 0.0),
            finite_norms=self.finite_norms + finite,
            first_nonfinite_step=first,
            lr=lr,
        )

    def training_metrics(self) -> dict[str, float]:
        """Means over the steps: ``train/loss``, ``train/top1`` in percent, ``train/grad_norm``.

        The last one is over the steps whose gradient was finite, and 0 without any.
        """
        return {
            "train/loss": self.loss_sum.item() / self.step,
            "train/top1": 100 * self.top1_sum.item() / self.step,
            "train/grad_norm": self.grad_norm_sum.item() / max(1, int(self.finite_norms)),
            "train/lr": self.lr,
        }

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
EPOCH_KINDS: dict[str, Kind] = {
    "step": ("a whole number of at least 0", lambda v: is_whole(v, 0)),
    "loss_sum": TENSOR,
    "top1_sum": TENSOR,
    "grad_norm_sum": TENSOR,
    "finite_norms": TENSOR,
    "first_nonfinite_step": TENSOR,
    "lr": AMOUNT,
    "seconds": AMOUNT,
    "peak_memory_mib": AMOUNT,
}
