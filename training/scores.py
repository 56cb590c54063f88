"""Evaluation of a network on labeled images: accuracy, calibration and confusion."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.distributed import all_reduce_sum

NOT_FINITE = "the network's outputs are not finite: its weights are damaged or diverged"


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    autocast: torch.autocast,
    observers: Sequence[Callable[[Tensor, Tensor], None]] = (),
) -> tuple[dict[str, float], list[float | None]]:
    """Return ``loss`` (mean cross-entropy, nats), ``top1`` and ``top5`` (%), and top-1 by class.

    The scores are over all images; the top-1 accuracy of a class without images is None. With
    several processes, all must call this, each with its shard of the images. ``observers`` are
    called with the logits (B, classes) and the labels (B,) of each batch.
    """
    model.eval()
    losses: list[Tensor] = []
    in_top5: list[Tensor] = []
    by_class: list[Tensor] = []  # (2, classes): correctly classified images, and all images
    for images, labels in batches:
        with autocast:
            logits = model(images)
        logits = logits.float()
        if logits.device.type == "mps":  # MPS has no float64
            logits, labels = logits.cpu(), labels.cpu()
        losses.append(F.cross_entropy(logits, labels, reduction="sum").double())
        best5 = logits.topk(min(5, logits.shape[1]), dim=1).indices
        in_top5.append((best5 == labels[:, None]).sum())
        for observe in observers:
            observe(logits, labels)
        right = (logits.argmax(dim=1) == labels).double()
        # Not bincount, whose output size would force the CPU to wait for the GPU.
        counts = right.new_zeros(2, logits.shape[1])
        by_class.append(counts.index_add_(1, labels, torch.stack((right, torch.ones_like(right)))))
    assert by_class
    right_in, images_of = all_reduce_sum(torch.stack(by_class).sum(0)).tolist()
    images_seen = sum(images_of)
    scores = {
        "loss": all_reduce_sum(torch.stack(losses).sum()).item() / images_seen,
        "top1": 100 * sum(right_in) / images_seen,
        "top5": 100 * all_reduce_sum(torch.stack(in_top5).sum()).item() / images_seen,
    }
    classes = zip(right_in, images_of, strict=True)
    return scores, [100 * right / seen if seen else None for right, seen in classes]


class Calibration:
    """How well a network's confidence, its highest probability, matches its accuracy.

    With ``bins`` of equal width over the confidences from 0 to 1, the expected calibration error is
    the mean over all images of |accuracy - confidence| in their bin (Guo et al., ICML 2017,
    equation 3, with 15 bins).
    """

    def __init__(self, bins: int = 15) -> None:
        # For each bin: the number of images, the sum of their confidences, and the number correct.
        self.sums = torch.zeros(3, bins, dtype=torch.float64)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Count a batch: logits (B, classes) and labels (B,)."""
        confidence, predicted = logits.double().cpu().softmax(dim=1).max(dim=1)
        # A confidence on an edge belongs to the bin below it, as in the paper.
        bins = self.sums.shape[1]
        index = ((confidence * bins).ceil().long() - 1).clamp(0, bins - 1)
        right = (predicted == labels.cpu()).double()
        values = torch.stack((torch.ones_like(confidence), confidence, right))
        self.sums.index_add_(1, index, values)

    def rows(self) -> list[dict[str, float | None]]:
        """Return each bin's image count, mean confidence and accuracy in [0, 1]; None if empty."""
        return [
            {
                "images": images,
                "confidence": confidence / images if images else None,
                "accuracy": right / images if images else None,
            }
            for images, confidence, right in self.sums.T.tolist()
        ]

    def expected_error(self) -> float:
        """Return the expected calibration error, in [0, 1]."""
        images, confidence, right = self.sums
        return float((right - confidence).abs().sum() / images.sum())


class ClassScore(NamedTuple):
    """The scores of one class; recall and precision in percent.

    Attributes:
        images: number of images of the class.
        predicted: number of images predicted as the class.
        recall: fraction of ``images`` predicted correctly; None without any images.
        precision: fraction of ``predicted`` that are correct; None without any predictions.
    """

    images: int
    predicted: int
    recall: float | None
    precision: float | None


class Confusion:
    """A confusion matrix: image ``counts`` (classes, classes).

    Rows are the true classes, columns the predicted ones.
    """

    def __init__(self, classes: int) -> None:
        self.counts = torch.zeros(classes, classes, dtype=torch.int64)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Count a batch: logits (B, classes) and labels (B,)."""
        predicted, classes = logits.argmax(dim=1).cpu(), len(self.counts)
        pairs = torch.bincount(labels.cpu() * classes + predicted, minlength=classes**2)
        self.counts += pairs.view(classes, classes)

    def by_class(self) -> list[ClassScore]:
        """Return recall and precision of each class."""
        right = self.counts.diagonal().tolist()
        images, predicted = self.counts.sum(dim=1).tolist(), self.counts.sum(dim=0).tolist()
        return [
            ClassScore(of, as_, 100 * r / of if of else None, 100 * r / as_ if as_ else None)
            for r, of, as_ in zip(right, images, predicted, strict=True)
        ]


def most_mistaken(counts: Sequence[Sequence[int]], most: int) -> list[int]:
    """Return the ``most`` classes with the most mistakes: false negatives plus false positives."""

    def mistakes(index: int) -> int:
        return sum(counts[index]) + sum(row[index] for row in counts) - 2 * counts[index][index]

    worst = sorted(range(len(counts)), key=lambda index: -mistakes(index))
    return sorted(worst[:most])
