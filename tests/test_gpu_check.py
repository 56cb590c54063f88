"""scripts/gpu_check.py: shares of the time, what becomes of a step, going on, and a rehearsal."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch

from scripts import gpu_check
from scripts.gpu_check import Step


def python(code):
    return [sys.executable, "-c", code]


@pytest.fixture
def check(monkeypatch, tmp_path):
    """A function that runs the check with steps of the test; returns code and record."""

    def go(steps, minutes=1.0):
        monkeypatch.setattr(gpu_check, "plan", lambda *_: steps)
        words = ["--device", "cpu", "--minutes", str(minutes), "--out", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", ["gpu_check.py", *words])
        code = gpu_check.main()
        return code, json.loads((tmp_path / "check.json").read_text())["steps"]

    monkeypatch.setattr(gpu_check, "LEAST_S", 0.01)
    monkeypatch.setattr(gpu_check, "GRACE_S", 0.5)
    return go


def test_each_step_has_its_share_and_what_the_others_leave():
    steps = [Step(part, str(n), []) for part in ("tests", "steps") for n in range(2)]
    whole = 0.3 + 0.25
    assert gpu_check.limit(steps, 100) == pytest.approx(100 * 0.15 / whole)
    assert gpu_check.limit(steps[1:], 100) == pytest.approx(100 * 0.3 / whole)
    assert gpu_check.limit(steps[2:], 100) == pytest.approx(50)
    assert gpu_check.limit(steps[3:], 100) == pytest.approx(100)
    assert sum(gpu_check.SHARES.values()) == pytest.approx(1)


def test_what_becomes_of_steps(check, tmp_path, capsys):
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    steps = [
        Step("tests", "right", python("print('seen')")),
        Step("tests", "wrong", python("print('why'); raise SystemExit(3)")),
        Step("tests", "lacking", python("print()"), lacks="no GPU"),
        Step("layers", "slow", python("import time; print('begun', flush=True); time.sleep(60)")),
        Step("layers", "stubborn", python(stubborn)),
    ]
    began = time.monotonic()
    code, record = check(steps, minutes=0.1)
    assert time.monotonic() - began < 30
    assert code == 1
    states = {name: entry["state"] for name, entry in record.items()}
    assert states == {
        "tests: right": "done",
        "tests: wrong": "failed with exit code 3",
        "tests: lacking": "skipped: no GPU",
        "layers: slow": "stopped",
        "layers: stubborn": "stopped",
    }
    page = (tmp_path / "gpu_check.md").read_text()
    assert "| tests | lacking | skipped: no GPU |  |" in page
    assert "A rehearsal on a CPU" in page
    for text in ("seen", "why", "begun"):
        assert f"\n{text}\n" in page
    assert "the same command goes on" in capsys.readouterr().out


def test_it_goes_on_where_it_was_stopped(check, tmp_path):
    def steps(code):
        return [
            Step("tests", "first", python("open('%s', 'a').write('x')" % (tmp_path / "ran"))),
            Step("steps", "second", python(code)),
        ]

    code, record = check(steps("import time; time.sleep(60)"), minutes=0.05)
    assert (code, record["steps: second"]["state"]) == (0, "stopped")
    code, record = check(steps("print('now')"))
    assert (code, record["steps: second"]["state"]) == (0, "done")
    assert (tmp_path / "ran").read_text() == "x"  # the first was done
    assert "now" in (tmp_path / "gpu_check.md").read_text()


def test_without_time_nothing_begins(check, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "LEAST_S", 100)
    code, record = check([Step("tests", "first", python("print()"))])
    assert (code, record) == (0, {})
    assert "| tests | first | not begun |  |" in (tmp_path / "gpu_check.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--minutes", "0"], "--minutes 0 must be above 0"),
        (["--minutes", "nan"], "--minutes nan must be above 0"),
        (["--device", "gpu"], "device=gpu is not a device"),
    ],
)
def test_mistakes_are_one_line(words, message, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *words, "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        gpu_check.main()
    assert message in f"{stopped.value}{capsys.readouterr().err}"
    assert not list(tmp_path.iterdir())


def test_a_folder_of_another_machine_is_left_alone(check, tmp_path, monkeypatch):
    about = {"hardware": "another", "versions": {}, "commit": "", "command": ""}
    (tmp_path / "check.json").write_text(json.dumps({"device": "cuda", "about": about}))
    with pytest.raises(SystemExit, match="holds a check of another; choose another --out"):
        check([Step("tests", "first", python("print()"))])
    assert len(list(tmp_path.iterdir())) == 1


def test_what_is_lacking_is_told(monkeypatch, tmp_path):
    find = gpu_check.importlib.util.find_spec
    gone = ("hydra", "triton")
    monkeypatch.setattr(
        gpu_check.importlib.util, "find_spec", lambda name: None if name in gone else find(name)
    )
    steps = gpu_check.plan(torch.device("cuda"), None, tmp_path)
    lacks = {gpu_check.key(step): step.lacks for step in steps}
    assert lacks["tests: kernels"] == "no package triton, hydra"
    assert lacks["kernels: kernels"] == "no package triton"
    assert lacks["steps: wrn28_10, fused, compiled"] == "no package hydra"
    assert lacks["layers: layer"] is None
    assert lacks["training: aa"] == "no CIFAR-100: name its folder with --data"
    (aa,) = [s for s in gpu_check.plan(torch.device("cuda"), "near", tmp_path) if s.name == "aa"]
    assert aa.environment["CIFAR_ROOT"] == str(Path("near").resolve())
    parts = list(dict.fromkeys(step.part for step in steps))
    assert parts == list(gpu_check.SHARES)
    assert len({gpu_check.folder_of(step) for step in steps}) == len(steps)


@pytest.mark.thorough
def test_a_rehearsal(check, tmp_path):
    wanted = ("layers: attention", "training: aa")
    steps = gpu_check.plan(torch.device("cpu"), None, tmp_path)
    code, record = check([step for step in steps if gpu_check.key(step) in wanted], minutes=5)
    assert code == 0
    assert {name: entry["state"] for name, entry in record.items()} == dict.fromkeys(wanted, "done")
    page = (tmp_path / "gpu_check.md").read_text()
    assert "| 4x4 | yes | 8 | 2 |" in page
    assert "| epoch | train/loss |" in page
