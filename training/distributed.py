"""Training with several processes started by torchrun, one per GPU: groups and collectives.

The process of rank 0 is the main process: it writes files and prints. Without torchrun there is
only one process, and the functions here do nothing or return their input.
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

# If a process does not reach a collective operation within this time, all processes end.
COLLECTIVE_TIMEOUT = datetime.timedelta(seconds=50)
# The same with torch.compile, which may take longer in some processes during the first steps.
TIMEOUT_WHILE_COMPILING = datetime.timedelta(minutes=10)
# At the end, the others wait while the main process uploads pictures and closes its tracking.
TIMEOUT_AT_THE_END = datetime.timedelta(minutes=10)

# The others wait while one process downloads the data or reads all files of a folder.
TIMEOUT_OF_FILES = datetime.timedelta(hours=2)

_groups, _meetings = itertools.count(), itertools.count()


@contextmanager
def process_group(*, compiles: bool = False) -> Iterator[World]:
    """Connect the processes within the ``with``, by nccl on GPUs and by gloo on CPUs.

    Each job of a sweep has its own group, one after the other.

    Args:
        compiles: whether the run uses torch.compile, which needs a longer timeout.

    Raises:
        ConnectionError: if another process has died or did not answer in time.
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
    except (ValueError, OSError, FloatingPointError, SystemExit):  # raised in all processes
        await_main()
        raise
    except RuntimeError as error:
        # Gloo has no error class of its own; its messages name its source file.
        if isinstance(error, dist.DistError) or "gloo" in str(error).lower():
            raise ConnectionError(
                f"rank {here.rank} of {here.size}: another process has died or does not answer "
                f"({first_line(error)}); run the same command with resume=auto to continue"
            ) from error
        raise
    await_main()
    # Not after an error: if another process is gone, nccl would wait for it.
    dist.destroy_process_group()


def _init_group(here: World, patience: datetime.timedelta) -> None:
    if dist.is_initialized():  # the previous job of a sweep ended with an error, in all processes
        dist.destroy_process_group()
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
        # A new prefix: otherwise the processes would find the addresses of the previous group.
        store=dist.PrefixStore(f"aaconv-{next(_groups)}", _store()),
        rank=here.rank,
        world_size=here.size,
        timeout=patience,
    )


@cache
def _store() -> dist.Store:
    # torchrun's, or one at MASTER_ADDR; for all groups, since its port can be bound only once.
    store, _, _ = next(dist.rendezvous("env://", timeout=COLLECTIVE_TIMEOUT))
    return cast(dist.Store, store)


def await_main(word: str = "") -> str | None:
    """Wait in the other processes until the main process calls this, too; return its ``word``.

    torchrun ends all processes as soon as one ends with an error, so the main process, which has
    files to write and tables to print, must end first. None if it does not get here in time.
    """
    here = world()
    if here.size == 1:
        return word
    key = f"aaconv-main-{next(_meetings)}"
    if here.is_main:
        _store().set(key, word)
        return word
    end = time.monotonic() + TIMEOUT_AT_THE_END.total_seconds()
    with suppress(dist.DistError):  # the store is gone with the main process
        # Poll in short steps, so that Python can handle signals.
        while time.monotonic() < end:
            if _store().check([key]):
                return _store().get(key).decode()
            time.sleep(0.05)
    return None


def _patient_group() -> Any:
    """Return a group with a long timeout, for downloads for example; all processes must call it."""
    return dist.new_group(backend="gloo", timeout=TIMEOUT_OF_FILES)


@contextmanager
def local_main_first() -> Iterator[None]:
    """On each machine, local rank 0 runs the ``with`` block before the other processes enter it.

    It may take longer than a collective operation, for a download for example.
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
    finally:  # also after an error, which the others will run into themselves
        if here.local_rank == 0:
            dist.barrier(group)


def broadcast_from_main(make: Callable[[], T]) -> T:
    """Call ``make`` only in the main process, however long it takes, and return its result in all.

    Raises:
        ValueError, OSError: if ``make`` raises it; it is then raised in all processes.
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
    """Raise a ValueError or OSError of one process in all of them, at the end of the ``with``."""
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
    """Return the sum of ``value`` over all processes."""
    if dist.is_initialized():
        value = value.clone()
        dist.all_reduce(value)
    return value


def all_reduce_mean(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the means of scalars over all processes, with a single all-reduce."""
    if not dist.is_initialized():
        return values
    means = all_reduce_sum(torch.stack([*values.values()])) / world().size
    return dict(zip(values, means.unbind(), strict=True))


def all_reduce_max(value: int) -> int:
    """Return the maximum of ``value`` over all processes; all must call this."""
    if not dist.is_initialized():
        return value
    # On the CPU whatever the run's device, so as not to wait for a GPU.
    greatest = torch.tensor(value)
    dist.all_reduce(greatest, dist.ReduceOp.MAX)
    return int(greatest)


def wrap_ddp(model: nn.Module, device: torch.device) -> Any:
    """Wrap ``model`` in DDP: average gradients over the processes, broadcast rank 0's buffers."""
    if not dist.is_initialized():
        return model
    return DistributedDataParallel(model, [device.index] if device.type == "cuda" else None)


def no_sync(wrapped_model: Any) -> AbstractContextManager[None]:
    """Within the ``with``, accumulate gradients in each process without averaging them."""
    return wrapped_model.no_sync() if dist.is_initialized() else nullcontext()


def broadcast_buffers(model: nn.Module) -> None:
    """Broadcast the main process's buffers (running statistics), which are in its checkpoints."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def convert_sync_batchnorm(model: nn.Module, device: torch.device) -> nn.Module:
    """Make batch normalization in ``model`` use the whole batch of all processes; names stay."""
    if not dist.is_initialized():
        return model
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:  # torch's SyncBatchNorm does not run on CPUs
            module.__class__ = _SyncedBatchNorm2d
    return model


class _SyncedBatchNorm2d(nn.BatchNorm2d):
    """Batch normalization over all processes, for CPUs; all must have equally many images."""

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
    """The sum over all processes, whose gradient is the sum of all processes' gradients."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return all_reduce_sum(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return all_reduce_sum(grad)
