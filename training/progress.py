"""How far a run has come: its finished epochs, the one in progress, and where they were trained."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import torch
from pydantic import InstanceOf, Strict
from torch import Tensor

from models.fields import Whole, parse
from training.records import Amount, Percentage, Segment


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
        further_sums: of the other figures of the steps, by name.
    """

    step: Whole
    loss_sum: InstanceOf[Tensor]
    top1_sum: InstanceOf[Tensor]
    grad_norm_sum: InstanceOf[Tensor]
    finite_norms: InstanceOf[Tensor]
    first_nonfinite_step: InstanceOf[Tensor]
    lr: Amount
    seconds: Amount
    peak_memory_mib: Amount
    further_sums: dict[str, InstanceOf[Tensor]] = field(default_factory=dict)

    @classmethod
    def begin(cls, steps: int) -> "EpochState":
        """Before the first of ``steps`` steps."""
        zero = torch.zeros(())
        return cls(0, zero, zero, zero, torch.tensor(0), torch.tensor(steps), 0.0, 0.0, 0.0)

    def to(self, device: torch.device) -> "EpochState":
        """The same with its tensors on ``device``."""
        moved: Any = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        further = {name: total.to(device) for name, total in self.further_sums.items()}
        return replace(self, **moved, further_sums=further)

    def after_step(self, figures: dict[str, Tensor], lr: float) -> "EpochState":
        """One step later, which has shown ``figures``, each a scalar on the device.

        These are ``loss``, the mean of the whole batch before the step; ``top1``, the fraction of
        it that the network had right then, in [0, 1]; ``grad_norm``, the L2 norm of all gradients
        together, before they are clipped; fp16's scaler skips a step where it is not finite.
        Further ones become metrics, too, by their mean over the steps.
        """
        further = dict(figures)
        loss, top1, grad_norm = (further.pop(name) for name in ("loss", "top1", "grad_norm"))
        first, finite = self.first_nonfinite_step, grad_norm.isfinite()
        return replace(
            self,
            step=self.step + 1,
            loss_sum=self.loss_sum + loss,
            top1_sum=self.top1_sum + top1,
            grad_norm_sum=self.grad_norm_sum + torch.where(finite, grad_norm, 0.0),
            finite_norms=self.finite_norms + finite,
            first_nonfinite_step=torch.where(loss.isfinite(), first, first.clamp(max=self.step)),
            lr=lr,
            further_sums={n: self.further_sums.get(n, 0) + value for n, value in further.items()},
        )

    def training_metrics(self) -> dict[str, float]:
        """Means over the steps: ``train/loss``, ``train/top1`` in percent, and so on.

        That of ``train/grad_norm`` is over the steps where it was finite, and 0 without any.
        """
        further = {f"train/{n}": total.item() / self.step for n, total in self.further_sums.items()}
        return {
            "train/loss": self.loss_sum.item() / self.step,
            "train/top1": 100 * self.top1_sum.item() / self.step,
            "train/grad_norm": self.grad_norm_sum.item() / max(1, int(self.finite_norms)),
            **further,
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
    """All that a run has done so far; a checkpoint has it, see `state_dict`, beside the weights.

    Attributes:
        epoch_state: of the epoch in progress.
        rows: the metrics of each finished epoch.
        per_class_top1: top-1 accuracy of each class after the last of them, in percent.
        segments: where the epochs were trained: a run that is continued elsewhere has several.
        wandb_id: of the run on the dashboard.
    """

    epoch_state: EpochState
    rows: Annotated[list[dict[str, Any]], Strict()]
    per_class_top1: Annotated[list[Percentage | None], Strict()] | None
    segments: Annotated[list[Segment], Strict()]
    wandb_id: str | None

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

    def finish_epoch(
        self, row: dict[str, Any], per_class_top1: list[float | None], steps: int
    ) -> None:
        """Add a finished epoch's metrics; the next one is before its first step."""
        self.rows = [*self.rows, row]
        self.per_class_top1 = per_class_top1
        self.epoch_state = EpochState.begin(steps)
