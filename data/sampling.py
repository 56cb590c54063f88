"""Orders in which an epoch draws its images, where that is not each of them once."""

import torch
from torch import Tensor


def balanced_order(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Indices (N,) of as many images as there are ``labels``, (N,), each class equally often.

    Where N is no multiple of the number of classes that have images, some chosen at random are
    drawn once more. No image of a class is drawn a second time before all have been drawn.
    """
    classes = labels.unique()
    quotas = torch.full((len(classes),), len(labels) // len(classes))
    quotas[torch.randperm(len(classes), generator=generator)[: len(labels) % len(classes)]] += 1
    drawn = []
    for label, quota in zip(classes, quotas.tolist(), strict=True):
        members = (labels == label).nonzero().flatten()
        rounds = -(-quota // len(members))
        orders = [torch.randperm(len(members), generator=generator) for _ in range(rounds)]
        drawn.append(members[torch.cat(orders)[:quota]] if orders else members[:0])
    order = torch.cat(drawn)
    return order[torch.randperm(len(order), generator=generator)]
