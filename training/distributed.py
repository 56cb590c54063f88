"""Several processes as torchrun starts them, one to a GPU: shares of the work, and sums over all.

Without torchrun there is one process, and everything here leaves things as they are.
"""

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

# A process that does not come to a sum within this time is given up, and all end.
PATIENCE = datetime.timedelta(seconds=50)


class World(NamedTuple):
    """Which of ``size`` processes this is, counted over all machines and on this one."""

    rank: int
    size: int
    local_rank: int

    @property
    def writes(self) -> bool:
        """Whether this is the one process that writes files and speaks."""
        return self.rank == 0


def world() -> World:
    """This process among those that torchrun has started, by its environment variables."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if not all(name in os.environ for name in names):
        return World(0, 1, 0)
    return World(*(int(os.environ[name]) for name in names))


@contextmanager
def joined(device: torch.device) -> Iterator[World]:
    """The processes know each other inside: nccl on GPUs, gloo on CPUs.

    Raises:
        RuntimeError: later, from any exchange, if another process has died or does not answer.
    """
    here = world()
    if here.size == 1:
        yield here
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield here
    finally:
        dist.destroy_process_group()


def total(value: Tensor) -> Tensor:
    """The sum over all processes."""
    if dist.is_initialized():
        value = value.clone()
        dist.all_reduce(value)
    return value


def agreed(flag: bool, device: torch.device) -> bool:
    """Whether it is true in any process; all must ask."""
    if not dist.is_initialized():
        return flag
    return total(torch.tensor(int(flag), device=device)).item() > 0


def wait() -> None:
    """Return when all processes have come here."""
    if dist.is_initialized():
        dist.barrier()


def averaging(network: Any, device: torch.device) -> Any:
    """``network`` such that gradients are the mean over the processes, and buffers the first's."""
    if not dist.is_initialized():
        return network
    return DistributedDataParallel(network, [device.index] if device.type == "cuda" else None)


def same_buffers(model: nn.Module) -> None:
    """Running statistics of all processes become those of the first, which its checkpoint has."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def synchronise_normalisation(model: nn.Module, device: torch.device) -> nn.Module:
    """``model`` with batch normalisation over the batches of all processes, names unchanged."""
    if not dist.is_initialized():
        return model
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:  # torch's own synchronised one runs on GPUs alone
            module.__class__ = _SyncedBatchNorm2d
    return model


class _SyncedBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation over all processes, for CPUs. Every process has as many images."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.momentum is not None
        assert self.num_batches_tracked is not None
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        number = dist.get_world_size() * x.numel() // x.shape[1]
        mean = _Sum.apply(wide.sum(dim=(0, 2, 3))) / number
        centred = wide - mean[:, None, None]
        variance = _Sum.apply(centred.square().sum(dim=(0, 2, 3))) / number
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * number / max(number - 1, 1), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


class _Sum(torch.autograd.Function):
    """The sum over all processes, whose gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return total(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return total(grad)
