"""train.py under torchrun: two processes against one, being stopped, and one of them dying."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from training import run_folder, stopping

import fault_test
from app import App
from helpers import ROOT, TINY, await_, free_ports, rows

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
NEVER_ENDING = ["epochs=10000", "data.train_size=64"]
GUARD = 240  # seconds after which a process is considered hanging


@pytest.fixture
def start_run():
    """A function that starts a tiny run in ``folder`` with two processes, as a user would.

    Runs that a failed test left behind, some of which would never end, are killed.
    """
    started = []

    def go(folder, *overrides):
        words = [*TINY, "device=cpu", f"run_dir={folder}", f"out_dir={folder.parent}"]
        process = subprocess.Popen(
            [sys.executable, *TORCHRUN, "train.py", *words, *overrides],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield go
    for process in started:
        with process:  # closes its stream
            if process.poll() is None:
                fault_test.kill(process)


def train(*words, processes):
    """Start processes as torchrun would; return their exit codes and output."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if processes > 1:
        (port,) = free_ports(1)
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
        environment["WORLD_SIZE"] = str(processes)
    started = []
    for rank in map(str, range(processes)):
        own = {"RANK": rank, "LOCAL_RANK": rank} if processes > 1 else {}
        process = App(
            ["train.py", *words],
            cwd=ROOT,
            env=environment | own,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
    said = "".join(process.communicate(timeout=GUARD)[0] for process in started)
    return [process.returncode for process in started], said


def children(process):
    return Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()


# The number of evaluation images is odd, so the first process has one more.
SETTINGS = ["epochs=3", "data.test_size=41", "grad_accum=2", "ema=0.9", "grad_clip=0.5"]
# Sums in another order round differently. Adam turns gradients that are only rounding errors into
# full steps, and larger steps of SGD soon flip some ReLUs.
SETTINGS += ["optim=sgd", "optim.lr=0.003", "class_weights=balanced", "balanced_sampling=true"]
# Images of one process are mixed with images of the other.
SETTINGS += ["augmentation.policy=trivial", "augmentation.mixup=1", "augmentation.cutmix=1"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of one run with one process, with two, and with two without sync_batchnorm."""
    root = tmp_path_factory.mktemp("runs")
    folders = {name: root / name for name in ("one", "two", "apart")}
    for name, folder in folders.items():
        words = [*TINY, "device=cpu", f"run_dir={folder}", f"out_dir={root}", *SETTINGS]
        words += ["sync_batchnorm=false"] if name == "apart" else []
        codes, said = train(*words, processes=1 if name == "one" else 2)
        assert set(codes) == {0}, said
        assert said.count("epoch 3/3") == 1  # only one process prints
    return folders


@pytest.mark.slow
def test_two_processes_give_the_curve_of_one(runs):
    expected, got = rows(runs["one"]), rows(runs["two"])
    assert len(expected) == len(got) == 3
    for a, b in zip(expected, got, strict=True):
        for name, value in a.items():
            # The gradient norm depends on the weights, which agree to 1e-4.
            close = 1e-3 if name == "train/grad_norm" else 1e-5
            assert float(b[name]) == pytest.approx(float(value), rel=close, abs=close), name
    a, b = (json.loads((runs[n] / "summary.json").read_text()) for n in ("one", "two"))
    assert [s["segments"][0]["processes"] for s in (a, b)] == [1, 2]
    assert a["per_class_top1"] == pytest.approx(b["per_class_top1"])
    a, b = (torch.load(runs[n] / "last.pt", weights_only=True) for n in ("one", "two"))
    for part in ("model", "ema_model"):
        for name, value in a[part].items():
            torch.testing.assert_close(b[part][name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.thorough
def test_what_two_processes_drop_is_the_same_after_a_stop(tmp_path):
    words = [*TINY, "device=cpu", "epochs=1", f"out_dir={tmp_path}", "resume=auto"]
    words += ["model.drop_path=0.5", "attention.dropout=0.3"]
    for folder, limits in (("whole", ["null"]), ("parts", ["1e-9", "null"])):
        for limit in limits:
            own = [f"run_dir={tmp_path / folder}", f"max_minutes={limit}"]
            codes, said = train(*words, *own, processes=2)
            assert set(codes) == {0}, said
    assert rows(tmp_path / "whole") == rows(tmp_path / "parts")
    whole, parts = (
        torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "parts")
    )
    assert all(torch.equal(parts["model"][name], value) for name, value in whole["model"].items())


@pytest.mark.slow
def test_normalized_apart_the_curve_is_another(runs):
    losses = [float(rows(runs[name])[-1]["train/loss"]) for name in ("two", "apart")]
    assert abs(losses[0] - losses[1]) > 1e-4


@pytest.mark.thorough
def test_a_dead_process_ends_the_other_with_a_message(start_run, tmp_path):
    process = start_run(tmp_path / "dead", *NEVER_ENDING)
    await_((tmp_path / "dead" / "metrics.csv").exists, "an epoch", process)
    os.kill(int(children(process)[1]), signal.SIGKILL)
    said = process.communicate(timeout=GUARD)[0]
    assert process.returncode != 0
    assert said.count("another process has died or does not answer") == 1
    assert "with resume=auto to continue" in said


def test_an_error_is_told_before_torchrun_ends_the_process():
    before = {number: signal.getsignal(number) for number in stopping.SIGNALS}
    try:
        with pytest.raises(ConnectionError), stopping.Stop(None, launched=True):
            raise ConnectionError
        os.kill(os.getpid(), signal.SIGTERM)  # without a handler, the process would end here
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.thorough
def test_a_terminals_interrupt_which_torchrun_repeats_is_saved_once(start_run, tmp_path):
    folder = tmp_path / "signalled"
    process = start_run(folder, *NEVER_ENDING)
    await_((folder / "metrics.csv").exists, "an epoch", process)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=GUARD)[0]
    assert said.count("stopped (SIGINT) after epoch") == 1
    saved = torch.load(folder / "last.pt", weights_only=True)
    assert len(saved["rows"]) == len(rows(folder))
    step = saved["epoch_state"]["step"]
    inside = f", step {step} of the next" if step else ""
    assert f"after epoch {len(saved['rows'])}{inside}; run the same command" in said


JOBLIB = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("processes", "launcher"), [(2, []), (1, JOBLIB)], ids=["two processes", "joblib"]
)
def test_a_sweep_runs_to_its_end(processes, launcher, tmp_path):
    """Of 8 jobs, two succeed, one diverges, one is in use elsewhere, and four are rejected."""
    words = [*TINY, "device=cpu", *launcher]
    words += [f"hydra.sweep.dir={tmp_path}", "hydra.sweep.subdir=${hydra.job.num}"]
    words += ["seed=0,1", "optim.lr=0.1,1e30", "grad_clip=null,-1", "epochs=1", "resume=auto"]

    def sweep():
        with run_folder.claimed(tmp_path / "6"):
            codes, said = train("-m", *words, processes=processes)
        assert set(codes) == {1}, said
        assert "hydra/launcher" not in said, "the launcher repeats each job's overrides"
        for number in range(8):
            assert len(re.findall(rf"^job #{number}(?: of 8)?: seed=", said, re.MULTILINE)) == 1
        whose = "job #[0-9]: " if launcher else ""
        epochs = re.findall(r"^(.*)epoch 1/1: loss", said, re.MULTILINE)
        assert all(re.fullmatch(whose, before) for before in epochs), said
        table = [line for line in said.splitlines() if line.startswith("#")]
        return [re.search(r"  (\w+): ", line)[1] for line in table]

    trained, refused = ["done", "diverged", "done", "skipped"], ["refused"] * 4
    ends = sweep()
    assert (ends[::2], ends[1::2]) == (trained, refused), ends
    ends = sweep()
    assert ends[::2] == ["skipped" if end == "done" else end for end in trained], ends


@pytest.mark.slow
def test_a_mistake_is_told_once(tmp_path):
    words = [*TINY, "device=cpu", f"run_dir={tmp_path / 'out' / 'wrong'}", f"out_dir={tmp_path}"]
    codes, said = train(*words, "batch_size=32", "grad_accum=32", processes=2)
    assert set(codes) == {2}
    lines = [line for line in said.splitlines() if line.startswith("train.py:")]
    assert lines == ["train.py: batch_size=32 must be divisible by grad_accum=32 times 2 processes"]
    assert not (tmp_path / "out" / "wrong").exists()
