"""A small version of tests/fault_test.py, and checks that it would detect differences."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fault_test
from fault_test import differences
from helpers import await_

# Four steps in two epochs, so most of the time is start-up.
BRIEF = [*fault_test.SMALL, "data.train_size=32", "data.test_size=16", "epochs=2"]


@pytest.mark.thorough
@pytest.mark.parametrize(("processes", "kills"), [(1, 1), (2, 1)])
def test_a_run_killed_at_random_moments_ends_as_one_that_was_not(tmp_path, processes, kills):
    outcome = fault_test.fault_test(
        tmp_path / "faults", kills=kills, seed=0, processes=processes, overrides=BRIEF
    )
    assert outcome["kills"] == len(outcome["moments"]) == kills
    assert outcome["differing"] == []
    assert outcome["missing_rows"] == outcome["repeated_rows"] == 0
    assert outcome["damaged_checkpoints"] == 0
    printed = fault_test.table(outcome)
    assert "0 missing rows, 0 repeated rows" in printed
    assert "0 values that differ" in printed


def test_the_comparison_sees_every_difference_but_the_clocks():
    def made(top1=1.0, weight=0.0, epochs=(1, 2), seconds=3.0):
        return {
            "last.pt": {"model": {"w": torch.tensor([weight, 1.0])}, "steps": [{"seconds": 1.0}]},
            "metrics.csv": [{"epoch": e, "seconds": seconds} for e in epochs],
            "summary.json": {"top1": top1, "config": {"out_dir": "a"}, "none": None},
        }

    assert differences(made(), made(seconds=4.0)) == []
    assert differences(made(), made(weight=1e-45)) == [".last.pt.model.w"]
    assert differences(made(), made(top1=1 + 2**-52)) == [".summary.json.top1"]
    assert differences(made(), made(epochs=(1, 1))) == [".metrics.csv.1.epoch"]
    for epochs in ((1,), (1, 2, 2)):
        assert differences(made(), made(epochs=epochs)) == [".metrics.csv"]
    other = made()
    del other["summary.json"]["none"]
    assert differences(made(), other) == differences(other, made()) == [".summary.json.none"]
    assert differences(torch.zeros(1), torch.zeros(1, dtype=torch.float64), "x") == ["x"]


def test_a_kill_leaves_nothing_alive_of_what_was_started():
    # Like torchrun's workers: a child process in its own session.
    below = "import os, time; os.setsid(); print(os.getpid(), flush=True); time.sleep(900)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {below!r}])"
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    child = Path("/proc") / run.stdout.readline().strip()
    assert child.exists()
    fault_test.kill(run)
    run.stdout.close()
    assert run.returncode == -9
    status = child / "status"
    await_(lambda: not child.exists() or "State:\tZ" in status.read_text(), "the child's end")


def test_a_run_that_fails_by_itself_is_no_result(tmp_path, monkeypatch):
    def begin(folder, overrides, processes):
        folder.with_suffix(".txt").write_text("before\nwhat is wrong\n")
        return subprocess.Popen(["false"])

    monkeypatch.setattr(fault_test, "begin", begin)
    with pytest.raises(RuntimeError, match=r"ended with code 1: \['what is wrong'\]"):
        fault_test.fault_test(tmp_path / "faults", kills=1, seed=0, processes=1, overrides=BRIEF)
