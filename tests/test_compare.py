"""compare.py: its command line, runs that already exist, and being stopped."""

import csv
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager, suppress
from types import SimpleNamespace

import pytest

from scripts import compare
from training import comparison, launch, outcome, run_folder
from training.comparison import PlannedRun
from training.run_folder import claimed

from app import App, run_app
from folders import failed, make_run
from helpers import ROOT, TINY, await_, refused, thorough

SHORT = [word for word in TINY if "epochs" not in word]


# ---- Command line -------------------------------------------------------------------------------


def test_combinations_within_an_entry_and_entries_one_after_the_other():
    vary = [["attention=none"], ["attention=aa", "attention.dk=8,16", "attention.stages=[1,2],[3]"]]
    assert comparison.expand(vary) == [
        ("attention=none",),
        ("attention=aa", "attention.dk=8", "attention.stages=[1,2]"),
        ("attention=aa", "attention.dk=8", "attention.stages=[3]"),
        ("attention=aa", "attention.dk=16", "attention.stages=[1,2]"),
        ("attention=aa", "attention.dk=16", "attention.stages=[3]"),
    ]
    assert comparison.expand([["epochs=1,2"], ["epochs=2,3"]]) == [
        ("epochs=1",),
        ("epochs=2",),
        ("epochs=3",),
    ]
    # Named like Hydra's sweep folders, so that adding a value does not train finished runs again.
    words = ["attention.qk_norm=false", "optim.lr=1e-3", "~freeze", "+attention.x='a b'"]
    kept = ("attention.qk_norm=False", "optim.lr=0.001", "~freeze", "+attention.x='a b'")
    assert comparison.expand([words]) == [kept]
    assert comparison.expand([["attention.qk_norm=false,true"]])[0] == kept[:1]
    assert comparison.expand([["schedule=glob(*st*)"]]) == [
        ("schedule=constant",),
        ("schedule=step",),
    ]


def test_runs_go_seed_after_seed_and_know_their_length(tmp_path):
    vary = [["attention=none", "epochs=3"], ["attention=aa"]]
    folder, runs = comparison.plan(vary, [4, 2, 4], TINY, tmp_path)
    assert folder.parent == tmp_path / "compare"
    assert [(r.variant[0], r.seed, r.epochs) for r in runs] == [
        ("attention=none", 4, 3),
        ("attention=aa", 4, 2),
        ("attention=none", 2, 3),
        ("attention=aa", 2, 2),
    ]
    assert runs[0].folder == folder / "attention=none,epochs=3" / "seed=4"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--vary", "attention=none,ab"], "Could not find 'attention/ab'"),
        (["--vary", "attention=none", "attention.dk=3"], "attention.dk: unknown setting dk"),
        (["--vary", "seed=1,2"], "seed=1,2: use --seeds"),
        (["--", "out_dir=here"], "out_dir=here: use --out"),
        (["--", "max_minutes=9"], "max_minutes=9: use --max-minutes"),
        (["--vary", "grad_clip=1,-1"], "grad_clip=-1.0 must be above 0, or null"),
        (["--seeds", "0", "1.5"], "--seeds: 1.5 must be a whole number, at least 0"),
        (["--seeds", "-1"], "--seeds: -1 must be a whole number, at least 0"),
        (["--max-minutes", "inf"], "--max-minutes: inf must be a finite number, above 0"),
        (["--vary"], "--vary: expected at least one argument"),
        (["--seed", "1", "--varies"], "unrecognized arguments: --varies (--help shows all"),
        (["--", "optim.lrr=1"], "optim.lrr: unknown setting lrr"),
        (["--", "optim.lr"], "optim.lr: settings are NAME=VALUE"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_before_any_run(monkeypatch, tmp_path, capsys, words, message):
    monkeypatch.setattr(compare.signal, "signal", lambda *_: None)
    assert message in refused(capsys, compare.main, "--out", tmp_path / "o", *words)
    assert list(tmp_path.iterdir()) == []


# ---- Existing runs ------------------------------------------------------------------------------


@pytest.fixture
def pretend(monkeypatch):
    """A function that replaces train.py by ``act``, and returns a list of the calls.

    ``act`` gets the run's folder and returns an exit code.
    """

    def install(act):
        calls = []

        def start(words, folder, *_, **__):
            limits = [float(w.partition("=")[2]) for w in words if w.startswith("max_minutes=")]
            calls.append((f"{folder.parent.name} {folder.name}", *limits))
            code = act(folder)
            return SimpleNamespace(poll=lambda: code, returncode=code)

        monkeypatch.setattr(launch, "start", start)
        monkeypatch.setattr(compare, "analyze", lambda folders: folders[0])
        monkeypatch.setattr(compare.render, "write", lambda analysis, out: f"report of {out.name}")
        return calls

    return install


def finish(folder):
    make_run(folder, epochs=2)
    return 0


def told(capsys):
    """Return stdout, with runs of spaces collapsed in each line, and stderr."""
    printed = capsys.readouterr()
    return "\n".join(" ".join(line.split()) for line in printed.out.splitlines()), printed.err


@pytest.mark.slow
@pytest.mark.usefixtures("forked_runs")
def test_trains_what_is_missing_and_reports(tmp_path, capfd):
    """The first call has an ASCII locale: files, output and folder names are UTF-8 even so."""
    out = tmp_path / "\u00fc \u2212"
    words = ([["attention=none,aa"]], [0], [*SHORT, "epochs=1"], out)
    ascii_locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "scripts/compare.py", "--out", str(out), "--", *SHORT, "epochs=1"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | ascii_locale, capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")
    folder, runs = comparison.plan(*words)
    assert f"written: {folder / 'report.html'}" in done.stdout.decode()
    assert "AA" in (folder / "report.md").read_text(encoding="utf-8")
    assert out.name in (runs[0].folder / "train.log").read_text(encoding="utf-8")
    _, _, next_ones = done.stdout.decode().partition("next:\n")
    evaluate, visualize, more = (line.partition("  #")[0] for line in next_ones.splitlines())
    for line in (evaluate, visualize):
        python, *command = shlex.split(line)
        assert (ROOT / python).samefile(sys.executable)
        run_app(command, cwd=ROOT, check=True)
    assert len(list((runs[1].folder / "attention").glob("*.png"))) == 2
    vary = ["--vary", "attention=none,aa", "--out", str(out), "--", *SHORT, "epochs=1"]
    assert shlex.split(more)[1:] == ["scripts/compare.py", "--seeds", "0", "1", "2", *vary]
    before = runs[1].folder.joinpath("summary.json").stat().st_mtime_ns
    (runs[0].folder / "summary.json").unlink()
    capfd.readouterr()
    assert compare.compare(*words) == 0
    printed = capfd.readouterr().out
    assert "/report.html\n" in printed
    assert "[1/2] attention=none seed=0: after epoch 1 of 1 (1 finished" in printed
    assert "resumed" in printed
    assert "[2/2] attention=aa seed=0    done: test top-1 " in printed
    assert runs[1].folder.joinpath("summary.json").stat().st_mtime_ns == before


def test_with_enough_seeds_or_without_attention_other_commands_are_named(tmp_path, monkeypatch):
    for seed in (0, 1, 2):
        make_run(tmp_path / f"plain/seed={seed}", seed=seed)
    runs = [PlannedRun((), s, tmp_path / f"plain/seed={s}", 3) for s in (0, 1, 2)]
    monkeypatch.chdir(tmp_path)
    for some, expected in (
        (runs, ["evaluate.py plain/seed=0", "export.py plain/seed=0"]),
        (runs[1:], ["evaluate.py plain/seed=1", "compare.py --seeds 1 2 0", "export.py plain/"]),
    ):
        lines = compare.next_commands(some, [["attention=none"]], ["data.root=D"], ROOT / "outputs")
        assert len(lines) == len(expected)
        assert " data.root=D  # classes" in lines[0]
        for line, words in zip(lines, expected, strict=True):
            assert f"scripts/{words}" in line


@pytest.mark.slow
@pytest.mark.usefixtures("forked_runs")
def test_a_run_that_diverges_does_not_stop_the_others_and_is_not_repeated(tmp_path, capfd):
    words = ([["optim.lr=1e+30,2e-3"]], [0], [*SHORT, "epochs=1"], tmp_path)
    row = "[1/2] optim.lr=1e+30 seed=0 diverged: the loss is not finite in epoch 1"
    assert compare.compare(*words) == 1
    out, err = told(capfd)
    assert "compare.py: optim.lr=1e+30 seed=0: the loss is not finite in epoch 1" in err
    assert row in out
    assert "2 runs: 1 done, 1 diverged\n" in out
    _, (diverged, other) = comparison.plan(*words)
    assert (diverged.outcome.kind, other.outcome.kind) == (outcome.DIVERGED, outcome.DONE)
    before = (diverged.folder / "failed.json").stat().st_mtime_ns
    assert compare.compare(*words) == 1
    out, err = told(capfd)
    assert row in out
    assert f"remove {diverged.folder} to train the run again" in out
    assert "compare.py: optim.lr=1e+30 seed=0" in err
    assert (diverged.folder / "failed.json").stat().st_mtime_ns == before


def test_a_run_that_breaks_does_not_stop_the_others(tmp_path, pretend, capsys):
    calls = pretend(lambda f: -9 if f.parent.name == "attention=none" else finish(f))
    assert compare.compare([["attention=none,aa"]], [0, 1], TINY, tmp_path) == 1
    assert len(calls) == 4
    out, err = told(capsys)
    assert "report of experiment=lookup" in out
    assert "[3/4] attention=none seed=1 failed: train.py was killed by SIGKILL, perhaps" in out
    assert "4 runs: 2 done, 2 failed; the same command trains what is missing" in out
    assert err.splitlines() == [
        f"compare.py: attention=none seed={seed}: train.py was killed by SIGKILL, perhaps for lack "
        "of memory"
        for seed in (0, 1)
    ]


def test_the_time_of_all_runs_is_shared_out(tmp_path, pretend, monkeypatch, capsys):
    clock = [1000.0]
    monkeypatch.setattr(compare.time, "monotonic", lambda: clock[0])

    def act(folder):
        clock[0] += 240
        return finish(folder) if clock[0] < 1700 else 0  # the third run is stopped by its limit

    calls = pretend(act)
    words = ([["attention=none,aa,mean,removed"]], [0], TINY, tmp_path)
    assert compare.compare(*words, max_minutes=11) == 0
    assert [minutes for _, minutes in calls] == [pytest.approx(11 - 4 * i) for i in range(3)]
    out, _ = told(capsys)
    assert "4 runs: 2 done, 1 stopped, 1 not started; the same command trains what is miss" in out
    assert "report of experiment=lookup" in out
    assert "next:" not in out


def test_without_a_finished_run_there_is_no_report(tmp_path, pretend, capsys):
    pretend(lambda folder: 0)
    assert compare.compare([["attention=none,aa"]], [0], TINY, tmp_path, max_minutes=1) == 0
    out, _ = told(capsys)
    assert "2 runs: 1 stopped, 1 not started; the same command trains what is missing" in out
    assert "report" not in out


@pytest.mark.parametrize("code", [1, 2, -9])
def test_a_result_counts_whatever_the_process_that_made_it_ended_with(tmp_path, pretend, code):
    calls = pretend(lambda folder: finish(folder) or code)
    assert compare.compare([["attention=none,aa"]], [0], TINY, tmp_path) == 0
    assert len(calls) == 2


def test_a_run_that_another_process_takes_meanwhile_is_skipped(tmp_path, pretend, capsys):
    """Its train.py exits with 2 as the folder is locked, but the settings are not at fault."""
    words = ([["attention=none,aa"]], [0], TINY, tmp_path)
    _, (taken, _) = comparison.plan(*words)
    with ExitStack() as stack:

        def act(folder):
            if folder != taken.folder:
                return finish(folder)
            stack.enter_context(claimed(folder))
            return 2

        calls = pretend(act)
        assert compare.compare(*words) == 0
    assert len(calls) == 2
    assert "attention=none seed=0 skipped: in progress in process" in told(capsys)[0]


def test_a_finished_run_whose_folder_is_held_is_finished(tmp_path, pretend, capsys):
    calls = pretend(finish)
    words = ([["attention=none"]], [0], TINY, tmp_path)
    assert compare.compare(*words) == 0
    _, (run,) = comparison.plan(*words)
    with claimed(run.folder):
        assert compare.compare(*words) == 0
    assert len(calls) == 1
    assert "[1/1] attention=none seed=0 done: test top-1 " in told(capsys)[0]


@pytest.mark.parametrize("code", [130, 138, 143])
def test_a_run_that_a_signal_stops_stops_the_comparison(tmp_path, pretend, capsys, code):
    calls = pretend(lambda folder: make_run(folder, epochs=1, finished=False) and code)
    assert compare.compare([["attention=none,aa"]], [0], TINY, tmp_path) == code
    assert len(calls) == 1
    out, _ = told(capsys)
    assert "[1/2] attention=none seed=0 stopped: 1 epochs" in out
    assert "2 runs: 1 stopped, 1 not started; the same command trains what is missing" in out


def test_what_changes_no_result_names_no_folder(tmp_path):
    def folder(*words):
        return comparison.plan([["attention=none"]], [0], [*TINY, *words], tmp_path)[0]

    assert folder("tracking=csv", "device=cpu", "eval_batch_size=7") == folder()
    assert folder("label_smoothing=0.1") != folder()


def test_time_to_go_is_that_of_the_variant(tmp_path):
    _, runs = comparison.plan([["attention=none,aa"]], [0, 1, 2], [*SHORT, "epochs=10"], tmp_path)
    assert comparison.seconds_left(runs) is None
    none, aa = runs[0::2], runs[1::2]
    make_run(none[0].folder, epochs=10)
    # aa has no times yet, so it uses those of none: 5 runs of 10 epochs of 12 seconds.
    assert comparison.seconds_left(runs) == pytest.approx(600)
    make_run(aa[0].folder, attention="aa", epochs=4, finished=False)  # 15 seconds per epoch
    assert comparison.seconds_left(runs) == pytest.approx(2 * 10 * 12 + 26 * 15)
    rows = aa[0].folder / "metrics.csv"  # as if suspended for a day during an epoch
    rows.write_text(rows.read_text().replace(",15.0\n", ",86415.0\n", 1))
    assert comparison.seconds_left(runs) == pytest.approx(2 * 10 * 12 + 26 * 15)
    failed(aa[1].folder)
    assert comparison.seconds_left(runs) == pytest.approx(2 * 10 * 12 + 16 * 15)
    assert comparison.status(runs, runs[1]) == (
        "[2/6] attention=aa seed=0: after epoch 4 of 10 (1 finished, about 0:08:00 left)"
    )
    assert "training (1 finished, about" in comparison.status(runs, runs[2])


def test_a_run_gets_its_settings_and_tells_why_it_ends(tmp_path, monkeypatch, capsys):
    """While it runs, the status of all runs is printed whenever it changes."""
    (tmp_path / "train.py").write_text(
        """import os, pathlib, sys, time
here = pathlib.Path(__file__).parent
(here / "words").write_text(chr(10).join(sys.argv[1:]))
guard = time.monotonic() + 240
while not (here / "told").exists() and time.monotonic() < guard:
    time.sleep(0.01)
pathlib.Path(os.environ["AACONV_REASON"]).write_bytes(b"the disk of caf\\xe9 is full")
sys.exit(2)"""
    )
    lines = ["one", "one", "two"]

    def status(runs, run):
        assert runs == [run]
        if len(lines) == 1:
            (tmp_path / "told").touch()
            return lines[0]
        return lines.pop(0)

    monkeypatch.setattr(launch, "TRAIN", tmp_path / "train.py")
    monkeypatch.setattr(compare, "STATUS_EVERY_S", 0)
    monkeypatch.setattr(compare, "status", status)
    run = PlannedRun(("attention=aa", "attention.dk=8"), 3, tmp_path, epochs=5)
    ended = compare.train([run], run, ["epochs=5", "max_minutes=1.500"], tmp_path / "o")
    assert ended == (outcome.FAILED, "the disk of caf\udce9 is full")
    assert capsys.readouterr().out == "one\ntwo\n"
    assert (tmp_path / "words").read_text().splitlines() == [
        "epochs=5",
        "max_minutes=1.500",
        "attention=aa",
        "attention.dk=8",
        "seed=3",
        "resume=auto",
        f"out_dir='{tmp_path / 'o'}'",
        f"run_dir='{tmp_path}'",
    ]


# ---- Being stopped ------------------------------------------------------------------------------


def test_a_run_in_progress_elsewhere_is_left_to_it(tmp_path, pretend, capsys):
    """Two compare.py processes share the work: each skips what the other is training."""
    calls = pretend(finish)
    words = ([["attention=none,aa"]], [0], TINY, tmp_path)
    _, runs = comparison.plan(*words)
    with claimed(runs[0].folder):
        assert compare.compare(*words) == 0
    assert calls == [("attention=aa seed=0",)]
    out, _ = told(capsys)
    row = f"[1/2] attention=none seed=0 skipped: in progress in process {os.getpid()} on "
    assert row in out
    assert "report of experiment=lookup" in out
    assert compare.compare(*words) == 0
    assert calls[1:] == [("attention=none seed=0",)]


@pytest.mark.parametrize("name", ["summary.json", "metrics.csv", "failed.json"])
@pytest.mark.parametrize(
    "content", [b"", *map(thorough, (b"{}", b'{"format": 1}', b"\xff\xfe", b"epoch\nx\n"))]
)
def test_a_damaged_run_is_named_and_the_others_go_on(tmp_path, pretend, capsys, name, content):
    calls = pretend(finish)
    words = ([["attention=none,aa"]], [0], TINY, tmp_path)
    _, (damaged, _) = comparison.plan(*words)
    damaged.folder.mkdir(parents=True)
    (damaged.folder / name).write_bytes(content)
    assert compare.compare(*words) == 1
    assert calls == [("attention=aa seed=0",)]
    out, err = told(capsys)
    assert "2 runs: 1 done, 1 failed" in out
    (line,) = err.splitlines()
    assert line.startswith(f"compare.py: attention=none seed=0: {damaged.folder / name}")
    assert line.endswith("remove that file to train the run again")
    assert (damaged.folder / name).read_bytes() == content


# The first run is short; the second would take minutes.
LONG = ["--vary", "attention=none", "epochs=1", "--vary", "attention=none", "epochs=10000"]


@contextmanager
def started(out):
    """Run compare.py in its own process, killed at the end of the ``with`` block."""
    command = ["scripts/compare.py", "--out", str(out), *LONG, "--", *SHORT]
    with App(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            yield process
        except BaseException:  # its training run would outlive it and never end
            for holder in out.rglob(".holder"):
                with suppress(ProcessLookupError):
                    os.kill(json.loads(holder.read_text())["pid"], signal.SIGKILL)
            raise
        finally:
            process.kill()


@pytest.mark.thorough
def test_killed_started_again_and_interrupted(tmp_path):
    """A run outlives a killed compare.py and keeps its folder locked for the next one."""
    vary = [["attention=none", "epochs=1"], ["attention=none", "epochs=10000"]]
    _, (first, second) = comparison.plan(vary, [0], SHORT, tmp_path)
    with started(tmp_path) as process:
        await_(lambda: len(second.epoch_seconds()) >= 2, "two epochs")
        process.kill()
    pid = json.loads((second.folder / ".holder").read_text())["pid"]
    with started(tmp_path) as process:
        printed = process.communicate(timeout=240)[0]
    assert process.returncode == 0
    assert f"epochs=10000 seed=0  skipped: in progress in process {pid} on" in printed
    os.kill(pid, signal.SIGTERM)
    await_(lambda: run_folder.holder(second.folder) is None, "the end of the run")
    there = len(second.epoch_seconds())
    time.sleep(0.5)
    assert len(second.epoch_seconds()) == there < 10000  # no process writes there anymore
    finished = first.folder / "summary.json"
    summary, written = finished.read_bytes(), finished.stat().st_mtime_ns

    with started(tmp_path) as process:
        await_(lambda: len(second.epoch_seconds()) > there + 1, "two more epochs")
        process.send_signal(signal.SIGINT)
        printed = process.communicate(timeout=240)[0].splitlines()
        assert process.returncode == 130
        assert run_folder.holder(second.folder) is None
    assert any(
        line.startswith("[1/2] attention=none epochs=1 seed=0      done:") for line in printed
    )
    assert finished.read_bytes() == summary
    assert finished.stat().st_mtime_ns == written
    head = f"[2/2] attention=none epochs=10000 seed=0: after epoch {there} of 10000"
    assert any(line.startswith(head) for line in printed)
    # The checkpoint may be one epoch ahead of metrics.csv, but never behind it.
    (resumed,) = (line for line in printed if line.startswith("resumed "))
    assert int(re.search(r"after epoch (\d+)", resumed)[1]) in (there, there + 1)
    with (second.folder / "metrics.csv").open() as file:
        epochs = [int(row["epoch"]) for row in csv.DictReader(file)]
    assert epochs == list(range(1, len(epochs) + 1))
    assert printed[-1] == "2 runs: 1 done, 1 stopped; the same command trains what is missing"
    assert not any("Traceback" in line for line in printed)


def test_a_run_that_ignores_ctrl_c_is_asked_to_save_all_the_same():
    """Every process that a shell starts in the background ignores it."""
    code = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n"
        "print('ready', flush=True)\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as run:
        assert run.stdout.readline() == b"ready\n"
        launch.interrupt(run)
        assert run.wait() == 7
