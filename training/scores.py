"""How good a network is on labelled images."""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def correct_in_top(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    """How many of the labels (B,) are among the k highest of the logits (B, classes).

    With fewer classes than k every label is.
    """
    best = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return (best == labels[:, None]).sum()


@torch.no_grad()
def evaluate(
    model: nn.Module | Callable[[Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    autocast: torch.autocast,
) -> dict[str, float]:
    """Mean cross-entropy (nats) and top-1 and top-5 accuracy (per cent) over all images."""
    if isinstance(model, nn.Module):
        model.eval()
    total: list[Tensor] = []
    images_seen = 0
    for images, labels in batches:
        with autocast:
            logits = model(images)
        logits = logits.float()
        loss = F.cross_entropy(logits, labels, reduction="sum")
        top1, top5 = (correct_in_top(logits, labels, k) for k in (1, 5))
        total.append(torch.stack((loss.double(), top1.double(), top5.double())))
        images_seen += len(labels)
    assert images_seen > 0
    loss_sum, top1_sum, top5_sum = torch.stack(total).sum(0).tolist()
    return {
        "eval_loss": loss_sum / images_seen,
        "top1": 100 * top1_sum / images_seen,
        "top5": 100 * top5_sum / images_seen,
    }
