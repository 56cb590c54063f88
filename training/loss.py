"""Loss and accuracy of a step: of labels that may be soft, and classes that may have weights."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from data import Images
from training import distributed

BALANCED = "balanced"


def class_weights(
    asked: str | Sequence[float] | None, images: Images, classes: int
) -> Tensor | None:
    """The weight of each class, (classes,) on the device of ``images``; None if all are alike.

    ``balanced`` are N / (classes * n) for a class with n of all N images: all classes then weigh
    the same together.

    Raises:
        ValueError: the list ``asked`` for has not a number for each class.
    """
    if asked is None:
        return None
    if asked == BALANCED:
        counts = torch.bincount(images.labels, minlength=classes)
        return len(images) / (classes * counts.clamp(min=1)).float()
    if len(asked) != classes:
        raise ValueError(f"class_weights has {len(asked)} numbers for {classes} classes")
    return torch.tensor(list(map(float, asked)), device=images.labels.device)


def relative_weights(labels: Tensor, weights: Tensor) -> Tensor:
    """The weights (B,) of images over their mean in the batch, all processes' shards of it.

    ``labels`` are (B,), or (B, classes) where they are soft: an image then has the mean of the
    classes' weights.
    """
    of_images = weights[labels] if labels.dim() == 1 else labels @ weights
    return of_images / distributed.all_reduce_mean({"weight": of_images.mean()})["weight"]


def cross_entropy(
    logits: Tensor, labels: Tensor, label_smoothing: float, weights: Tensor | None
) -> Tensor:
    """The mean cross-entropy over the images, each times its weight of ``weights``, (B,), if any.

    With `relative_weights` of a whole batch the mean of this over its micro-batches and processes
    is the sum of weight times loss over the sum of the weights.
    """
    if weights is None:
        return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    losses = F.cross_entropy(logits, labels, label_smoothing=label_smoothing, reduction="none")
    return (weights * losses).mean()


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """The fraction of images with the highest of ``logits`` (B, classes) at their label.

    Where ``labels`` are soft, (B, classes), the mean of what they give to the class chosen.
    """
    chosen = logits.argmax(dim=1)
    right = chosen == labels if labels.dim() == 1 else labels.gather(1, chosen[:, None])
    return right.float().mean()
