"""A run that is stopped or killed anywhere and resumed is bitwise equal to an uninterrupted run."""

import errno
import os
import signal
import subprocess
import sys
import time
from functools import cache, partial

import pytest
import torch
from torch import nn

import train
from data import Batches, batches
from training import checkpoint, cli, stopping
from training.assemble import build_model
from training.compose import compose_config
from training.device import set_deterministic
from training.run_folder import RunFolder

from fault_test import differences
from helpers import TINY, exit_code, refused, rows, slow

# A limit that is over before the first step, because the process is already older.
AT_ONCE = "max_minutes=1e-9"

# A run of two epochs of three steps and an evaluation of two, in half a second.
SMALL = [
    *(w for w in TINY if "data." not in w and "batch" not in w),
    "data.train_size=24",
    "data.test_size=10",
    "batch_size=8",
    "eval_batch_size=5",
    "model.aa.stages=[3]",
]


@pytest.fixture
def run(run):
    """The tiny runs of the other tests, made even smaller."""
    return lambda *overrides, folder="run": run(*overrides, folder=folder, base=SMALL)


@pytest.fixture(autouse=True)
def usual_algorithms():
    """Turn deterministic algorithms off again, which a run leaves on."""
    yield
    set_deterministic(False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A function that returns folder and summary of a run with overrides, trained only once."""

    @cache
    def train_once(*overrides):
        folder = tmp_path_factory.mktemp("whole")
        cfg = compose_config([*SMALL, *overrides, f"out_dir={folder}"])
        return folder, train.train(cfg, folder)

    return train_once


def state(folder):
    """Return the contents of a run's last checkpoint without the settings."""
    state = torch.load(folder / "last.pt", weights_only=True)
    del state["config"]
    return state


def assert_same(a, b):
    assert rows(a) == rows(b)
    a, b = state(a), state(b)
    assert differences(a, b) == []
    # `differences` ignores these, because they may differ after a kill; here they may not.
    assert (a["wandb_id"], a["epoch_state"]["seconds"]) == (
        b["wandb_id"],
        b["epoch_state"]["seconds"],
    )


def ending_in(network, last):
    network.head = nn.Sequential(network.head, last)
    return network


KINDS = {
    "sgd-ema-fp16": ["optim=sgd", "ema=0.9", "precision=fp16"],
    "augmented-clipped": [
        "augmentation={crop_pad:2,flip:alternating,cutout:8,policy:rand,erasing:0.5,mixup:1,cutmix:1}",
        *("grad_clip=0.1", "model.drop_path=0.5", "attention.dropout=0.3"),
        "optim.lr_factors.head=2",
    ],
    "warm-up-accumulated": ["schedule=warmup_cosine", "schedule.warmup=0.5", "grad_accum=2"],
    "bf16-preact-smooth": [
        *("precision=bf16", "model.block=preact", "model.dropout=0.3", "label_smoothing=0.1"),
    ],
    "se-deterministic": ["attention=se", "attention.ratio=2", "deterministic=true"],
}


@pytest.mark.parametrize(
    "overrides",
    [k if name == "augmented-clipped" else slow(k) for name, k in KINDS.items()],
    ids=KINDS,
)
def test_stopped_after_every_step(run, tmp_path, monkeypatch, caplog, overrides):
    # The scale would not move within so few steps.
    moving = partial(torch.amp.GradScaler, growth_interval=2)
    monkeypatch.setattr(torch.amp, "GradScaler", moving)
    run(*overrides, folder="whole")
    # After three steps, the time is over before the evaluation; the next part starts with it and
    # always finishes it.
    for place in ((0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (1, 3)):
        torch.randn(7)  # random numbers that the process drew in between must not matter
        caplog.clear()
        with pytest.raises(SystemExit) as stopped, caplog.at_level("INFO"):
            run(*overrides, AT_ONCE, "resume=auto", folder="parts")
        assert stopped.value.code == 0
        kept = state(tmp_path / "parts")
        assert (len(kept["rows"]), kept["epoch_state"]["step"]) == place
        assert not (tmp_path / "parts" / "summary.json").exists()
        (told,) = [m for m in caplog.messages if m.startswith("stopped (max_minutes=1e-09) after ")]
        assert "; run the same command with resume=auto to continue" in told
    assert len(rows(tmp_path / "parts")) == 1
    # After the last evaluation there is nothing left to stop.
    run(*overrides, AT_ONCE, "resume=auto", folder="parts")
    assert_same(tmp_path / "whole", tmp_path / "parts")


class Killed(BaseException):
    """Stands for a SIGKILL, which leaves the run no chance to clean up."""


@pytest.mark.parametrize("steps", [slow(1), 3, slow(5), slow(6), slow(8)])
def test_killed_after_a_checkpoint_inside_an_epoch(run, whole, tmp_path, monkeypatch, steps):
    """With a checkpoint after every second step, later steps and evaluations are repeated."""
    overrides = ["data.train_size=32", "ema=0.9"]
    expected, _ = whole(*overrides)
    original, made = Batches._make, []
    monkeypatch.setattr(train.time, "monotonic", lambda: 60.0 * len(made))  # a minute a step

    def make(self, draws, positions):
        if len(made) == steps:
            raise Killed
        made.append(positions)
        return original(self, draws, positions)

    monkeypatch.setattr(Batches, "_make", make)
    if steps < 8:
        with pytest.raises(Killed):
            run(*overrides, "checkpoint_minutes=2", folder="parts")
        monkeypatch.undo()
        if steps > 1:
            kept = state(tmp_path / "parts")
            place = len(kept["rows"]), kept["epoch_state"]["step"]
            assert place == {3: (0, 2), 5: (0, 4), 6: (1, 2)}[steps]
        run(*overrides, "resume=auto", folder="parts")
    else:
        run(*overrides, "checkpoint_minutes=2", folder="parts")
    assert_same(expected, tmp_path / "parts")


@pytest.mark.parametrize(
    ("minutes", "saved"), [(2, [1, 3, 5]), slow("null", [1, 2, 3, 4, 5]), slow(99, [1, 5])]
)
def test_short_epochs_are_saved_when_the_minutes_are_over(
    run, tmp_path, monkeypatch, minutes, saved
):
    """An epoch takes a minute. A kill after the fourth loses those since the last checkpoint."""
    words = ["epochs=5", f"checkpoint_minutes={minutes}"]
    evaluate, save, write = train.evaluate, checkpoint.save, RunFolder.write_metrics
    now, kept = [0.0], []

    def after_a_minute(*arguments):
        now[0] += 60
        return evaluate(*arguments)

    def noted(*arguments):
        kept.append(len(arguments[-1].rows))
        save(*arguments)

    def killed(folder, content):
        write(folder, content)
        if len(content) == 4:
            raise Killed

    monkeypatch.setattr(stopping.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(stopping, "BEGUN", 0.0)
    monkeypatch.setattr(train, "evaluate", after_a_minute)
    monkeypatch.setattr(checkpoint, "save", noted)
    run(*words, folder="whole")
    assert kept == saved
    monkeypatch.setattr(RunFolder, "write_metrics", killed)
    with pytest.raises(Killed):
        run(*words, folder="parts")
    assert len(rows(tmp_path / "parts")) == 4
    last = len(state(tmp_path / "parts")["rows"])
    assert last == max(n for n in saved if n < 5)
    # After resuming, rows without a checkpoint are gone until their epochs are trained again.
    monkeypatch.setattr(RunFolder, "write_metrics", write)
    monkeypatch.setattr(train, "evaluate", evaluate)
    with pytest.raises(SystemExit):
        run(*words, AT_ONCE, "resume=auto", folder="parts")
    assert len(rows(tmp_path / "parts")) == last
    run(*words, "resume=auto", folder="parts")
    assert_same(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("name", ["write_metrics", slow("write_summary")])
def test_killed_after_the_checkpoint_of_an_epoch(run, whole, tmp_path, monkeypatch, name):
    """The kill comes before the rows or the summary that belong to the checkpoint are written."""

    def killed(folder, content):
        if content:  # a run that starts writes an empty list of rows
            raise Killed

    monkeypatch.setattr(RunFolder, name, killed)
    with pytest.raises(Killed):
        run(folder="parts")
    monkeypatch.undo()
    assert len(state(tmp_path / "parts")["rows"]) == (1 if name == "write_metrics" else 2)
    summary = run("resume=auto", folder="parts")
    assert_same(whole()[0], tmp_path / "parts")
    assert (tmp_path / "parts" / "summary.json").exists()
    assert summary["per_class_top1"] is not None
    expected = whole()[1]
    free = {name: expected[name] for name in ("perf/total_seconds", "config")}
    assert summary | free == expected


def signalled(monkeypatch, number, at_batch):
    """Send this process a signal at the n-th batch, counting evaluation batches as well."""
    made = []

    def counting(original):
        def make(*arguments):
            made.append(1)
            if len(made) == at_batch:
                os.kill(os.getpid(), number)
            return original(*arguments)

        return make

    monkeypatch.setattr("data.batches.Batches._make", counting(Batches._make))
    monkeypatch.setattr(batches, "_normalize", counting(batches._normalize))


# A training batch counts twice, because it is also normalized: 6 in an epoch, 2 in its evaluation,
# and one for measuring the entropy of attention.
@pytest.mark.parametrize(
    ("at_batch", "epochs", "step"),
    [slow(1, 0, 1), slow(6, 0, 3), slow(7, 0, 3), (8, 0, 3), slow(9, 1, 0), slow(10, 1, 1)],
)
def test_signals_finish_the_step_and_save(
    run, whole, tmp_path, monkeypatch, capfd, at_batch, epochs, step
):
    number = list(stopping.SIGNALS)[at_batch % 3]
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    handlers = [signal.getsignal(s) for s in stopping.SIGNALS]
    signalled(monkeypatch, number, at_batch)
    with pytest.raises(SystemExit) as stopped:
        run(folder="parts")
    monkeypatch.undo()
    assert stopped.value.code == 128 + number
    assert [signal.getsignal(s) for s in stopping.SIGNALS] == handlers
    assert f"{number.name}: saving after this step" in capfd.readouterr().err
    kept = state(tmp_path / "parts")
    assert (len(kept["rows"]), kept["epoch_state"]["step"]) == (epochs, step)
    run("resume=auto", folder="parts")
    assert_same(whole()[0], tmp_path / "parts")


@pytest.fixture
def clock(monkeypatch):
    """A list with the current time as seen by `stopping`; the process has just started."""
    now = [5000.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(stopping, "BEGUN", now[0])
    return now


@pytest.mark.parametrize(
    ("launched", "first", "second", "seconds", "ends"),
    [
        (False, signal.SIGINT, signal.SIGINT, 0.1, True),
        (False, signal.SIGTERM, signal.SIGINT, 0.1, True),
        (False, signal.SIGINT, signal.SIGTERM, 9.0, False),
        (True, signal.SIGINT, signal.SIGINT, 1.9, False),
        (True, signal.SIGINT, signal.SIGINT, 2.1, True),
    ],
)
def test_a_second_interrupt_ends_the_process_unless_torchrun_repeats_the_first(
    clock, monkeypatch, capfd, launched, first, second, seconds, ends
):
    codes = []
    monkeypatch.setattr(stopping.os, "_exit", codes.append)
    with stopping.Stop(None, launched) as stop:
        assert stop.why() is None
        os.kill(os.getpid(), first)
        clock[0] += seconds
        os.kill(os.getpid(), second)
        assert stop.signal == first
        assert stop.why() == first.name
    assert codes == ([130] if ends else [])
    assert capfd.readouterr().err.count("saving after this step") == 1


def test_the_time_is_over_after_max_minutes_of_the_process(clock):
    stop = stopping.Stop(2.5)
    clock[0] += 149.9
    assert stop.why() is None
    clock[0] += 0.1
    assert stop.why() == "max_minutes=2.5"
    assert list(stop.until_signalled("abc")) == ["a", "b", "c"]
    stop.signal = signal.SIGTERM
    assert list(stop.until_signalled("abc")) == ["a"]
    assert stop.why() == "SIGTERM"


def test_another_processs_signal_is_this_ones_too(monkeypatch):
    monkeypatch.setattr(stopping.distributed, "all_reduce_max", lambda own: max(own, 15))
    with stopping.Stop(None, launched=True) as stop:
        assert stop.any_signal()
        assert stop.why() == "SIGTERM"
        assert not stop.will_resume


def test_a_signal_that_comes_while_processes_ask_each_other_is_not_lost(monkeypatch):
    with stopping.Stop(None) as stop:

        def ask(own):
            os.kill(os.getpid(), signal.SIGTERM)
            return own

        monkeypatch.setattr(stopping.distributed, "all_reduce_max", ask)
        assert not stop.any_signal()
        assert stop.signal == signal.SIGTERM


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 0), ("SIGINT", 0), ("SIGUSR1", 138)])
def test_what_the_agent_of_a_sweep_stops_has_not_failed(monkeypatch, name, code):
    """Three failures would end the agent; a preempted run counts as failed and is resumed."""
    monkeypatch.setenv("WANDB_SWEEP_ID", "s1")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    stop = stopping.Stop(None)
    stop.signal = signal.Signals[name]
    assert stop.will_resume == (name == "SIGUSR1")
    with pytest.raises(SystemExit) as stopped:
        stop.leave(finished=False)
    assert stopped.value.code == code


def test_a_signal_at_the_very_end_leaves_a_finished_run(run, tmp_path, monkeypatch):
    write = RunFolder.write_summary

    def signal_and_write(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        write(*arguments)

    monkeypatch.setattr(RunFolder, "write_summary", signal_and_write)
    with pytest.raises(SystemExit) as stopped:
        run()
    assert stopped.value.code == 143
    assert (tmp_path / "run" / "summary.json").exists()


@pytest.mark.parametrize(("job", "code"), [("17", 0), slow("17", 1), slow(None, 0)])
def test_slurm_is_asked_to_queue_the_job_again(run, tmp_path, monkeypatch, caplog, job, code):
    said = tmp_path / "said"
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f"#!/bin/sh\necho $@ > {said}\necho no such job >&2\nexit {code}\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    if job is not None:
        monkeypatch.setenv("SLURM_JOB_ID", job)
    signalled(monkeypatch, signal.SIGUSR1, 1)
    with pytest.raises(SystemExit) as stopped:
        run()
    assert stopped.value.code == 138
    assert ("this is not a Slurm job" in caplog.text) == (job is None)
    assert (said.read_text() if said.exists() else None) == (job and "requeue 17\n")
    warned = "job 17 was not requeued (no such job); run `scontrol requeue 17`" in caplog.text
    assert warned == (code == 1)


def test_the_time_counts_from_the_beginning_of_the_process():
    code = "import time; first_line = time.monotonic(); from training import stopping; "
    code += "print(stopping.BEGUN, first_line)"
    before = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    began, first_line = map(float, done.stdout.split())
    # The system counts in hundredths of a second, from a rounded boot time.
    assert before - 0.1 < began < first_line


def test_an_interrupted_epoch_tells_its_whole_time(run, tmp_path):
    with pytest.raises(SystemExit):
        run(AT_ONCE)
    path = tmp_path / "run" / "last.pt"
    kept = torch.load(path, weights_only=True)
    assert 0 < kept["epoch_state"]["seconds"] < 1e6
    kept["epoch_state"] |= {"seconds": 1e6, "peak_memory_mib": 1e6}
    torch.save(kept, path)
    run("resume=auto")
    first, second = torch.load(path, weights_only=True)["rows"]
    assert 1e6 < first["perf/epoch_seconds"] < 2e6
    assert 24 / 2e6 < first["perf/images_per_s"] < 24 / 1e6
    assert first["perf/peak_memory_mib"] == 1e6
    assert second["perf/epoch_seconds"] < 1e6
    assert second["perf/peak_memory_mib"] < 1e6


@pytest.mark.slow
def test_a_damaged_checkpoint_costs_its_steps_and_nothing_else(run, whole, tmp_path, caplog):
    for _ in range(2):
        with pytest.raises(SystemExit):
            run(AT_ONCE, "resume=auto", folder="parts")
    last, before = tmp_path / "parts" / "last.pt", tmp_path / "parts" / "previous.pt"
    last.write_bytes(last.read_bytes()[:5000])
    good = before.read_bytes()
    with pytest.raises(ValueError, match=r"other settings: attention.Nh"):
        run("attention.Nh=2", "resume=auto", folder="parts")
    assert last.stat().st_size == 5000  # the rejected command changes nothing
    with pytest.raises(SystemExit):
        run(AT_ONCE, "resume=auto", folder="parts")
    assert before.read_bytes() == good  # not replaced by the damaged checkpoint
    assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == [
        m for m in caplog.messages if m.startswith(f"{last} is damaged")
    ]
    run("resume=auto", folder="parts")
    assert_same(whole()[0], tmp_path / "parts")


@pytest.mark.parametrize("name", ["last.pt", slow("metrics.csv"), slow("summary.json")])
def test_a_full_disk_ends_a_run_with_one_line(run, whole, tmp_path, monkeypatch, capsys, name):
    """The disk is full at the second write of a file, or at the first write of the summary."""
    words = [*SMALL, f"out_dir={tmp_path}", f"run_dir='{tmp_path / 'parts'}'"]
    fsync, seen = os.fsync, []

    def full(handle):
        path = os.readlink(f"/proc/self/fd/{handle}")
        seen.append(os.path.basename(path).removesuffix(".partial"))
        if seen.count(name) == (1 if name == "summary.json" else 2):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    line = refused(capsys, cli.run, *words)
    monkeypatch.undo()
    assert line.startswith(f"train.py: {tmp_path / 'parts' / name} cannot be written (No space")
    kept = state(tmp_path / "parts")
    assert len(kept["rows"]) == (1 if name == "last.pt" else 2)
    assert not (tmp_path / "parts" / "summary.json").exists()
    run("resume=auto", folder="parts")
    assert_same(whole()[0], tmp_path / "parts")


def test_a_run_that_replaces_another_leaves_nothing_of_it(run, tmp_path):
    run("seed=5")
    with pytest.raises(SystemExit):
        run(AT_ONCE, "overwrite=true")
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"last.pt", "train.log", ".hydra"}


@pytest.mark.slow
def test_a_signal_ends_a_sweep(monkeypatch, tmp_path, capsys):
    small = [w for w in SMALL if "epochs" not in w]
    signalled(monkeypatch, signal.SIGTERM, 10)  # in the second run
    words = ["-m", *small, "epochs=1", "seed=0,1,2", f"out_dir={tmp_path}"]
    assert exit_code(cli.run, *words) == 143
    assert "3 jobs: 1 done, 1 stopped, 1 not started" in capsys.readouterr().out
    folders = sorted(p.name for p in tmp_path.rglob("seed=*"))
    assert folders == ["seed=0", "seed=1"]
    assert len(list(tmp_path.rglob("summary.json"))) == 1


@pytest.mark.slow
def test_deterministic_refuses_what_is_not(run, monkeypatch):
    """With deterministic=true, an operation without a deterministic version is an error."""

    class Scattering(nn.Module):
        def forward(self, x):
            index = torch.zeros(len(x), dtype=torch.int64)
            return x + x.detach().clone().put_(index, x.detach()[:, 0]).mean() * 0

    def scattering(cfg, **sizes):
        return ending_in(build_model(cfg, **sizes), Scattering())

    monkeypatch.setattr("training.assemble.build_model", scattering)
    run("epochs=1", folder="a")
    with pytest.raises(RuntimeError, match="put_ does not have a deterministic implementation"):
        run("epochs=1", "deterministic=true", folder="b")
    run("epochs=1", folder="c")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_deterministic_on_a_gpu(run, tmp_path, precision):
    overrides = ["deterministic=true", f"precision={precision}", "device=cuda", "ema=0.9"]
    run(*overrides, folder="whole")
    run(*overrides, folder="again")
    assert_same(tmp_path / "whole", tmp_path / "again")
    for _ in range(4):
        with pytest.raises(SystemExit):
            run(*overrides, AT_ONCE, "resume=auto", folder="parts")
    run(*overrides, "resume=auto", folder="parts")
    assert_same(tmp_path / "whole", tmp_path / "parts")
