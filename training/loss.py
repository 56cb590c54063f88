"""Loss and accuracy of a step, with support for soft labels and class weights."""

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
    """Return the class weights, (classes,) on the device of ``images``; None if ``asked`` is None.

    With ``balanced``, a class with n of the N images gets N / (classes * n), so that every class
    has the same total weight.

    Raises:
        ValueError: if the list ``asked`` does not have one number per class.
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
    """Return the weights (B,) of images, divided by their mean over the batch of all processes.

    ``labels`` are (B,), or (B, classes) if soft: the weight of an image is then the mean of the
    class weights under its label.
    """
    of_images = weights[labels] if labels.dim() == 1 else labels @ weights
    return of_images / distributed.all_reduce_mean({"weight": of_images.mean()})["weight"]


def cross_entropy(
    logits: Tensor, labels: Tensor, label_smoothing: float, weights: Tensor | None
) -> Tensor:
    """Return the mean cross-entropy of the images, each times its weight (B,), if any are given.

    If the weights are the `relative_weights` of a whole batch, the mean over its micro-batches and
    processes is the weighted mean: the sum of weight times loss over the sum of the weights.
    """
    if weights is None:
        return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    losses = F.cross_entropy(logits, labels, label_smoothing=label_smoothing, reduction="none")
    return (weights * losses).mean()


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the fraction of images whose highest logit, of (B, classes), is that of their label.

    With soft ``labels`` (B, classes), return the mean probability they give the predicted class.
    """
    chosen = logits.argmax(dim=1)
    right = chosen == labels if labels.dim() == 1 else labels.gather(1, chosen[:, None])
    return right.float().mean()
