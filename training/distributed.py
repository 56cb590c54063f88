"""Several processes as torchrun starts them, one to a GPU: shares of the work, and sums over all.

Without torchrun there is one process, and everything here leaves things as they are.
"""

import datetime
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")

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
def joined() -> Iterator[World]:
    """The processes know each other inside: they exchange by nccl on GPUs, by gloo on CPUs.

    Raises:
        ConnectionError: another process has died, or did not come to an exchange in time.
    """
    here = world()
    if here.size == 1:
        yield here
        return
    if not here.writes:
        logging.disable(logging.WARNING)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=PATIENCE)
    try:
        yield here
    except RuntimeError as error:
        # Gloo has no error of its own; its messages name its source file.
        if isinstance(error, dist.DistError) or "gloo" in str(error).lower():
            raise ConnectionError(
                f"process {here.rank} of {here.size}: another one has died or does not answer "
                f"({str(error).splitlines()[0]}); the same command with resume=auto goes on"
            ) from error
        raise
    # Not after an error: where another process is missing, nccl would wait for it.
    dist.destroy_process_group()


@contextmanager
def first_of_machine() -> Iterator[None]:
    """Each machine's first process goes through the ``with`` before its others begin with it.

    What it does there, a download for example, may take longer than an exchange.
    """
    here = world()
    if not dist.is_initialized():
        yield
        return
    group = dist.new_group(backend="gloo", timeout=datetime.timedelta(hours=2))
    if here.local_rank > 0:
        dist.barrier(group)
    yield
    if here.local_rank == 0:
        dist.barrier(group)


def from_first(make: Callable[[], T]) -> T:
    """What ``make`` gives in the first process, which alone calls it."""
    if not dist.is_initialized():
        return make()
    value = [make() if world().writes else None]
    dist.broadcast_object_list(value, 0, device=torch.device("cpu"))
    return cast(T, value[0])


def total(value: Tensor) -> Tensor:
    """The sum over all processes."""
    if dist.is_initialized():
        value = value.clone()
        dist.all_reduce(value)
    return value


def mean(value: Tensor) -> Tensor:
    """The mean over all processes."""
    return total(value) / world().size if dist.is_initialized() else value


def agreed(flag: bool) -> bool:
    """Whether it is true in any process; all must ask."""
    # On the CPU whatever the device: a GPU is not waited for.
    return flag if not dist.is_initialized() else total(torch.tensor(int(flag))).item() > 0


def averaging(network: Any, device: torch.device) -> Any:
    """``network`` such that gradients are the mean over the processes, and buffers the first's."""
    if not dist.is_initialized():
        return network
    return DistributedDataParallel(network, [device.index] if device.type == "cuda" else None)


def unaveraged(network: Any) -> AbstractContextManager[None]:
    """Gradients inside stay with their process, to be averaged with the next ones outside."""
    return network.no_sync() if dist.is_initialized() else nullcontext()


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
