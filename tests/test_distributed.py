"""Two processes: what they share, reduce and normalize together, against a single process."""

import datetime
import os
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from training import distributed

from app import App
from helpers import ROOT, free_ports

CPU = torch.device("cpu")


def network(dtype):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(45, 2)
    ).to(dtype)


def example(dtype):
    generator = torch.Generator().manual_seed(1)
    return 3 * torch.randn(6, 3, 5, 5, generator=generator, dtype=dtype) + 1


def results_of(model, forward, x):
    """Return loss, gradients, running statistics and evaluation output after a training step."""
    loss = forward(x).square().mean()
    loss.backward()
    distributed.broadcast_buffers(model)
    model.eval()
    return [
        distributed.all_reduce_sum(loss.detach()) / distributed.world().size,
        *(p.grad for p in model.parameters()),
        *model.buffers(),
        model(example(x.dtype)).detach(),
    ]


def become(rank, port):
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)


def one_of_two(rank, port, synchronized, folder):
    become(rank, port)
    with distributed.process_group() as world:
        assert (world.rank, world.size, world.is_main) == (rank, 2, rank == 0)
        model = network(torch.float64)
        if synchronized:
            distributed.convert_sync_batchnorm(model, CPU)
        names = set(model.state_dict())
        x = example(torch.float64).chunk(2)[rank]
        results = results_of(model, distributed.wrap_ddp(model, CPU), x)
        assert distributed.all_reduce_max(rank) == 1
        assert distributed.all_reduce_sum(torch.tensor(rank + 1)).item() == 3
        means = distributed.all_reduce_mean({"a": torch.tensor(float(rank)), "b": torch.ones(())})
        assert means == {"a": 0.5, "b": 1.0}
        assert distributed.all_reduce_max(-1 - rank) == -1
        assert distributed.broadcast_from_main(lambda: {"rank": rank}) == {"rank": 0}
        marker = Path(folder) / f"first{synchronized}"
        with distributed.local_main_first():
            assert marker.exists() == (rank == 1)
            marker.touch()
    assert names == set(network(torch.float64).state_dict())
    torch.save(results, f"{folder}/{rank}.pt")


def spawn(function, *arguments):
    """Call ``function(rank, port, *arguments)`` in two processes."""
    given = (*free_ports(1), *arguments)
    program = f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'tests')]}; "
    program += f"import test_distributed; test_distributed.{function.__name__}(RANK, *{given})"
    processes = [App(["-c", program.replace("RANK", str(rank))]) for rank in (0, 1)]
    assert [process.wait(240) for process in processes] == [0, 0]


def two_processes(synchronized, folder):
    spawn(one_of_two, synchronized, str(folder))
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.slow
def test_synchronized_normalization_is_that_of_the_whole_batch(tmp_path):
    model = network(torch.float64)
    expected = results_of(model, model, example(torch.float64))
    for results in two_processes(True, tmp_path):
        for a, b in zip(results, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_without_it_each_normalizes_its_part_and_the_first_ones_statistics_count(tmp_path):
    first, second = two_processes(False, tmp_path)
    model = network(torch.float64)
    losses, gradients = [], []
    for part in example(torch.float64).chunk(2):
        model.zero_grad()
        losses.append(model(part).square().mean())
        losses[-1].backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(first[0], sum(losses).detach() / 2)
    for ours, a, b in zip(first[1:6], *gradients, strict=True):
        torch.testing.assert_close(ours, (a + b) / 2)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b)


def slow_or_wrong(rank, port):
    """Compiling and reading files may take longer than the usual timeout.

    Also, each process may fail to read the files.
    """
    become(rank, port)
    with distributed.process_group():  # one process may start much later than the other
        assert distributed.all_reduce_max(rank) == 1
    distributed.COLLECTIVE_TIMEOUT = datetime.timedelta(seconds=2)
    with distributed.process_group(compiles=True):
        if rank == 0:
            time.sleep(4)
        assert distributed.all_reduce_sum(torch.tensor(rank + 1)).item() == 3
    with distributed.process_group():
        assert distributed.broadcast_from_main(lambda: time.sleep(4) or rank) == 0
        with (
            pytest.raises(ValueError, match="no images"),
            distributed.errors_in_all(),
            distributed.local_main_first(),
        ):
            raise ValueError("no images")


@pytest.mark.slow
def test_files_and_compilers_may_take_long_and_wrong_files_are_an_error_in_all_processes():
    spawn(slow_or_wrong)


def jobs_of_two(rank, port, folder):
    """Run jobs of a sweep: errors in only one process, then two jobs that succeed."""
    become(rank, port)

    def find():
        raise FileNotFoundError("by rank 0")

    def fail(rank, failing):
        with distributed.process_group():
            if not failing:
                distributed.broadcast_from_main(find)
            with distributed.errors_in_all():
                if rank == failing:
                    raise ValueError(f"by rank {rank}")

    for failing in range(2):
        expected = ValueError if failing else FileNotFoundError
        with pytest.raises(expected, match=f"by rank {failing}"):
            fail(rank, failing)
    for job in range(2):
        closed = Path(folder) / str(job)
        with distributed.process_group():
            assert distributed.all_reduce_sum(torch.tensor(rank + 1)).item() == 3
            if rank == 0:
                time.sleep(0.5)  # closing resources that only the main process has open
                closed.touch()
        assert closed.exists()


@pytest.mark.slow
def test_an_error_of_one_is_raised_in_all_and_the_next_job_begins(tmp_path):
    spawn(jobs_of_two, str(tmp_path))


def test_one_process_is_left_as_it_is(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with distributed.process_group() as world:
        assert world == (0, 1, 0)
        assert world.is_main
        model = network(torch.float32)
        assert distributed.wrap_ddp(model, CPU) is model
        assert distributed.convert_sync_batchnorm(model, CPU) is model
        assert type(model[1]) is nn.BatchNorm2d
        value = torch.tensor(3.0)
        assert distributed.all_reduce_sum(value) is value
        assert distributed.all_reduce_mean({"a": value}) == {"a": value}
        assert distributed.all_reduce_max(-1) == -1
        assert distributed.broadcast_from_main(lambda: value) is value
        with pytest.raises(OSError, match="here"), distributed.errors_in_all():
            raise OSError("here")
        with (
            distributed.errors_in_all(),
            distributed.local_main_first(),
            distributed.no_sync(model),
        ):
            pass


def test_half_precision_stays(monkeypatch):
    monkeypatch.setattr(distributed.dist, "get_world_size", lambda: 1)
    norm = nn.BatchNorm2d(5)
    x = example(torch.float32)[:, [0, 1, 2, 0, 1]]
    expected = norm(x)
    statistics = norm.running_mean.clone(), norm.running_var.clone()
    norm.reset_running_stats()
    norm.__class__ = distributed._SyncedBatchNorm2d
    torch.testing.assert_close(norm(x), expected)
    torch.testing.assert_close((norm.running_mean, norm.running_var), statistics)
    assert norm(x.bfloat16()).dtype == torch.bfloat16
    norm.eval()
    with pytest.raises(AssertionError):
        torch.testing.assert_close(norm(x), expected)


def test_an_error_without_words_is_told_by_its_name(monkeypatch):
    """Errors from torch.distributed may have no message."""
    monkeypatch.setattr(distributed, "world", lambda: distributed.World(0, 2, 0))
    monkeypatch.setattr(distributed, "_init_group", lambda *_: None)
    words = r"rank 0 of 2: another process has died or does not answer \(DistStoreError\)"
    with pytest.raises(ConnectionError, match=words), distributed.process_group():
        raise torch.distributed.DistStoreError
