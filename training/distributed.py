"""Several processes as torchrun starts them, one to a GPU: who is who, and sums over all.

The process of rank 0 is the main one: it writes files and prints. Without torchrun there is one
process, and everything here leaves things as they are.
"""

import datetime
import itertools
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cache
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from training.console import first_line
from training.world import World, world

T = TypeVar("T")

# A process that does not reach a collective operation within this time is given up, and all end.
COLLECTIVE_TIMEOUT = datetime.timedelta(seconds=50)
# The same where the first steps may wait for a compiler, which is not as fast in all processes.
TIMEOUT_WHILE_COMPILING = datetime.timedelta(minutes=10)
# The main process closes its tracking after the others are through, and uploads pictures.
TIMEOUT_AT_THE_END = datetime.timedelta(minutes=10)

# The others wait for one that downloads the data or reads all files of a folder.
TIMEOUT_OF_FILES = datetime.timedelta(hours=2)

_groups, _meetings = itertools.count(), itertools.count()


@contextmanager
def process_group(*, compiles: bool = False) -> Iterator[World]:
    """Within the ``with`` the processes communicate, by nccl on GPUs and by gloo on CPUs.

    The jobs of a sweep have a group each, one after the other.

    Args:
        compiles: whether a compiler runs meanwhile, for which the others wait longer.

    Raises:
        ConnectionError: another process has died, or did not answer in time.
    """
    here = world()
    if here.size == 1:
        yield here
        return
    if not here.is_main:
        logging.disable(logging.WARNING)
    try:
        _init_group(here, TIMEOUT_WHILE_COMPILING if compiles else COLLECTIVE_TIMEOUT)
        yield here
    except (ValueError, OSError, FloatingPointError, SystemExit):  # in all processes alike
        await_main()
        raise
    except RuntimeError as error:
        # Gloo has no error of its own; its messages name its source file.
        if isinstance(error, dist.DistError) or "gloo" in str(error).lower():
            raise ConnectionError(
                f"rank {here.rank} of {here.size}: another process has died or does not answer "
                f"({first_line(error)}); run the same command with resume=auto to continue"
            ) from error
        raise
    await_main()
    # Not after an error: where another process is missing, nccl would wait for it.
    dist.destroy_process_group()


def _init_group(here: World, patience: datetime.timedelta) -> None:
    if dist.is_initialized():  # an error has ended the job before, in all processes
        dist.destroy_process_group()
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
        # A name of its own, or the processes would find the addresses of the group before.
        store=dist.PrefixStore(f"aaconv-{next(_groups)}", _store()),
        rank=here.rank,
        world_size=here.size,
        timeout=patience,
    )


@cache
def _store() -> dist.Store:
    # Of torchrun's, or at MASTER_ADDR; one for all groups, since its port can be taken once.
    store, _, _ = next(dist.rendezvous("env://", timeout=COLLECTIVE_TIMEOUT))
    return cast(dist.Store, store)


def await_main(word: str = "") -> str | None:
    """Wait in the other processes until the main one has come here too; return its ``word``.

    torchrun ends all processes as soon as one has ended with an error; the main one, which has
    files to write and tables to print, is to be the first. None if it does not come.
    """
    here = world()
    if here.size == 1:
        return word
    key = f"aaconv-main-{next(_meetings)}"
    if here.is_main:
        _store().set(key, word)
        return word
    end = time.monotonic() + TIMEOUT_AT_THE_END.total_seconds()
    with suppress(dist.DistError):  # the main process is gone, and with it the store
        # In short steps, between which Python sees to signals.
        while time.monotonic() < end:
            if _store().check([key]):
                return _store().get(key).decode()
            time.sleep(0.05)
    return None


def _patient_group() -> Any:
    """All processes, waiting for what may take long, such as a download. All must call this."""
    return dist.new_group(backend="gloo", timeout=TIMEOUT_OF_FILES)


@contextmanager
def local_main_first() -> Iterator[None]:
    """On each machine local rank 0 goes through the ``with`` before the other processes enter it.

    What it does there, a download for example, may take longer than a collective operation.
    """
    here = world()
    if not dist.is_initialized():
        yield
        return
    group = _patient_group()
    if here.local_rank > 0:
        dist.barrier(group)
    try:
        yield
    finally:  # also after an error: the others find the same one
        if here.local_rank == 0:
            dist.barrier(group)


def broadcast_from_main(make: Callable[[], T]) -> T:
    """What ``make`` returns in the main process, which alone calls it, however long that takes.

    Raises:
        ValueError, OSError: that ``make`` has raised, in all processes alike.
    """
    if not dist.is_initialized():
        return make()
    group = _patient_group()
    made: list[tuple[T | None, Exception | None]] = [(None, None)]
    if world().is_main:
        try:
            made = [(make(), None)]
        except (ValueError, OSError) as error:
            made = [(None, error)]
    dist.broadcast_object_list(made, 0, group=group, device=torch.device("cpu"))
    value, raised = made[0]
    if raised is not None:
        raise raised
    return cast(T, value)


@contextmanager
def errors_in_all() -> Iterator[None]:
    """A ValueError or OSError of one process within the ``with`` is raised in all at its end."""
    raised: Exception | None = None
    try:
        yield
    except (ValueError, OSError) as error:
        raised = error
    if dist.is_initialized():
        of_all: list[Exception | None] = [None] * world().size
        dist.all_gather_object(of_all, raised)
        raised = next((error for error in of_all if error is not None), None)
    if raised is not None:
        raise raised


def all_reduce_sum(value: Tensor) -> Tensor:
    """The sum over all processes."""
    if dist.is_initialized():
        value = value.clone()
        dist.all_reduce(value)
    return value


def all_reduce_mean(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """The means over all processes of scalars, which go together."""
    if not dist.is_initialized():
        return values
    means = all_reduce_sum(torch.stack([*values.values()])) / world().size
    return dict(zip(values, means.unbind(), strict=True))


def all_reduce_max(value: int) -> int:
    """The greatest of all processes' values; all must call this."""
    if not dist.is_initialized():
        return value
    # On the CPU whatever the device: a GPU is not waited for.
    greatest = torch.tensor(value)
    dist.all_reduce(greatest, dist.ReduceOp.MAX)
    return int(greatest)


def wrap_ddp(model: nn.Module, device: torch.device) -> Any:
    """``model`` with gradients averaged over the processes, and the main process's buffers."""
    if not dist.is_initialized():
        return model
    return DistributedDataParallel(model, [device.index] if device.type == "cuda" else None)


def no_sync(wrapped_model: Any) -> AbstractContextManager[None]:
    """Within the ``with`` gradients are added up in each process and averaged only after it."""
    return wrapped_model.no_sync() if dist.is_initialized() else nullcontext()


def broadcast_buffers(model: nn.Module) -> None:
    """Give all processes the main one's running statistics, which its checkpoint has."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def convert_sync_batchnorm(model: nn.Module, device: torch.device) -> nn.Module:
    """``model`` with batch normalization over the shards of all processes, names unchanged."""
    if not dist.is_initialized():
        return model
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:  # torch's own synchronized one runs on GPUs alone
            module.__class__ = _SyncedBatchNorm2d
    return model


class _SyncedBatchNorm2d(nn.BatchNorm2d):
    """Batch normalization over all processes, for CPUs. Every process has as many images."""

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
        centered = wide - mean[:, None, None]
        variance = _Sum.apply(centered.square().sum(dim=(0, 2, 3))) / number
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * number / max(number - 1, 1), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centered * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


class _Sum(torch.autograd.Function):
    """The sum over all processes, whose gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return all_reduce_sum(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return all_reduce_sum(grad)
