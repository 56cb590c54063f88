"""`make gpu`: outcomes of steps, continuing, the order of steps, and a rehearsal."""

import json
import re
import shlex
import time

import pytest

from benchmarks import bench, gpu
from benchmarks.gpu import Step
from training.compose import compose_config

from helpers import ROOT, call, exit_code


def python(name, code, minutes=1.0):
    return Step(name, minutes, "", f"-c {shlex.quote(code)}")


@pytest.fixture
def check(monkeypatch, tmp_path):
    """A function that runs a test's steps; it returns the exit code and the record."""

    def go(steps, minutes=1.0):
        monkeypatch.setattr(gpu, "plan", lambda fused_failed: steps)
        code = call(gpu.main, "--rehearse", "--minutes", minutes, "--out", tmp_path)
        file = tmp_path / "record.json"
        return code, json.loads(file.read_text())["steps"] if file.exists() else {}

    monkeypatch.setattr(gpu, "MIN_S", 0.01)
    monkeypatch.setattr(gpu, "GRACE_S", 0.5)
    return go


def test_what_becomes_of_steps(check, tmp_path, capsys):
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    slow = "import time; print('begun', flush=True); time.sleep(60)"
    steps = [
        python("right", "print('seen')"),
        python("wrong", "print('why'); raise SystemExit(3)"),
        python("slow", slow, minutes=0.05),
        python("stubborn", stubborn, minutes=0.05),
    ]
    began = time.monotonic()
    code, record = check(steps)
    assert time.monotonic() - began < 30
    assert code == 1
    states = {"right": "done", "wrong": "failed", "slow": "stopped", "stubborn": "stopped"}
    assert {name: entry["state"] for name, entry in record.items()} == states
    for name, text in (("right", "seen"), ("wrong", "why"), ("slow", "begun")):
        assert (tmp_path / f"{name}.log").read_text() == f"{text}\n"
    printed = capsys.readouterr().out
    assert all(f"{name} " in printed for name in states)
    assert str(tmp_path) in printed


def test_it_continues_and_what_was_stopped_goes_last(check, tmp_path):
    def add(letter):
        return f"open('{tmp_path}/ran', 'a').write('{letter}')"

    def steps(first, minutes):
        return [
            python("tests", f"{first}\n{add('t')}", minutes),
            python("done", add("d")),
            python("training", f"{add('T')}; import time; time.sleep({60 if first else 0})"),
            python("after", add("a")),
        ]

    _, record = check(steps("import time; time.sleep(60)", 0.02), minutes=0.1)
    assert {name: entry["state"] for name, entry in record.items()} == {
        "tests": "stopped", "done": "done", "training": "stopped"
    }  # fmt: skip
    assert (tmp_path / "ran").read_text() == "dT"  # no time was left
    code, record = check(steps("", 1))
    assert (tmp_path / "ran").read_text() == "dTTat"
    assert (code, {entry["state"] for entry in record.values()}) == (0, {"done"})
    check(steps("", 1))  # training runs again: compare.py finds out if anything is left to train
    assert (tmp_path / "ran").read_text() == "dTTatT"


def test_without_time_nothing_begins(check, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "MIN_S", 100)
    assert check([python("tests", "print()")]) == (0, {})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--minutes", "0"], "--minutes 0 must be above 0"),
        (["--minutes", "nan"], "--minutes nan must be above 0"),
        ([], "torch finds no GPU here"),
    ],
)
def test_mistakes_are_one_line(words, message, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    assert exit_code(gpu.main, *words, "--out", tmp_path) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_a_folder_of_another_machine_is_left_alone(check, tmp_path, capsys):
    (tmp_path / "record.json").write_text(json.dumps({"about": {"hardware": "another"}}))
    with pytest.raises(SystemExit):
        check([python("tests", "print()")])
    assert "is of another; choose another --out" in capsys.readouterr().err
    assert len(list(tmp_path.iterdir())) == 1


def test_the_plan():
    names = [step.name for step in gpu.plan(False)]
    assert names[0] == "fused-tests"
    assert names.index("training") > names.index("step-sdpa")
    assert sum(step.minutes for step in gpu.plan(False) if "tests" in step.name) <= 4
    mark = "pytest.mark." + "gpu"  # split so that this file does not match
    files = (ROOT / "tests").glob("test_*.py")
    marked = {f"tests/{file.name}" for file in files if mark in file.read_text()}
    (on_gpu,) = (step.words for step in gpu.plan(False) if step.name == "gpu-tests")
    assert marked == set(re.findall("tests/[a-z_]+.py", on_gpu))
    assert "attention.backend=sdpa" not in gpu.plan(False)[4].words
    (after_failure,) = (s for s in gpu.remaining({"fused-tests": "failed"}) if s.name == "training")
    assert "attention.backend=sdpa" in after_failure.words


def test_training_gets_what_is_left_but_for_its_report(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "REPORT_S", 30)
    step = python("training", "print('{minutes}', '{out}')")
    entry = gpu.run(step, 90, tmp_path, rehearse=True, data=None)
    assert entry["state"] == "done"
    assert (tmp_path / "training.log").read_text() == f"1.00 {tmp_path / 'training'}\n"


@pytest.mark.thorough
def test_a_rehearsal(check, tmp_path):
    wanted = {"attention": "done", "training": "done"}
    code, record = check([s for s in gpu.plan(False) if s.name in wanted], minutes=5)
    assert {name: entry["state"] for name, entry in record.items()} == wanted
    assert code == 0
    assert "| 4x4 |" in (tmp_path / "attention" / "attention.md").read_text()
    (report,) = tmp_path.glob("training/compare/*/report.html")
    assert len(list(report.parent.glob("*/*/metrics.csv"))) == 2


@pytest.mark.parametrize("fused_failed", [False, True])
def test_the_words_of_every_step_are_understood(fused_failed):
    for step in gpu.plan(fused_failed):
        words = shlex.split(step.words.format(out="out", minutes="1"))
        if "benchmarks.bench" in words:
            bench.parse(words[words.index("benchmarks.bench") + 1 :])
        elif "scripts/compare.py" in words:
            cfg = compose_config(words[words.index("--") + 1 :])
            assert (cfg.epochs, cfg.compile) == (30, False)
        else:
            files = [word for word in words if word.startswith("tests/")]
            assert files
            assert all((ROOT / file).is_file() for file in files)
