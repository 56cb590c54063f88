"""What trains: data, network, optimizer, and where they are."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from data import Batches, Dataset
from models import Description
from training.world import World


class RunState(NamedTuple):
    """What trains: data, model, optimizer, and where they are."""

    world: World
    device: torch.device
    dtype: torch.dtype
    dataset: Dataset
    batches: Batches
    description: Description
    model: nn.Module
    wrapped_model: Any  # the model as training calls it: compiled, DistributedDataParallel
    ema_model: AveragedModel | None
    best_model: nn.Module | None  # the evaluated one after the epoch that is the best so far
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    autocast: torch.autocast
    scaler: torch.amp.GradScaler
    class_weights: Tensor | None  # (classes,), of the loss

    def stateful(self) -> dict[str, Any]:
        """The objects whose states a checkpoint keeps."""
        names = ("model", "optimizer", "schedule", "scaler", "ema_model", "best_model")
        return {n: getattr(self, n) for n in names if getattr(self, n) is not None}

    @property
    def evaluated_model(self) -> nn.Module:
        """The network whose scores count: the averaged one where there is one."""
        if self.ema_model is None:
            return self.model
        averaged: nn.Module = self.ema_model.module
        return averaged
