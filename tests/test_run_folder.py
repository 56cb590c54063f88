"""A run's folder: locking, what a rejected command leaves behind, and the run's provenance."""

import errno
import fcntl
import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import train
from training import cli, console, distributed, provenance, run_folder, stopping
from training.run_folder import HeldError, claimed, holder
from training.variants import folder_name

from app import App, run_app
from helpers import (
    ROOT,
    TINY,
    await_,
    call,
    everything_below,
    exit_code,
    refused,
    rows,
    slow,
    thorough,
)

LONG = ["epochs=10000", "data.train_size=64"]


def without_the_clock(folder):
    """Return all files below ``folder`` that a training run does not change."""
    kept = everything_below(folder)
    return {p: kept[p] for p in kept if p.name not in CHANGING and ".partial" not in p.name}


CHANGING = ("metrics.csv", "last.pt", "previous.pt", "train.log")


def start(*words, program="train.py", prefix=(), real=False, **options):
    """Start a command as a user would; capture its output unless ``options`` say otherwise."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    options["env"] = os.environ | {"OMP_NUM_THREADS": "1"} | options.get("env", {})
    command = [str(ROOT / program), *words]
    if prefix or real:
        process = subprocess.Popen([*prefix, sys.executable, *command], **options)
    else:
        process = App(command, **options)
    STARTED.append(process)
    return process


STARTED = []


@pytest.fixture(autouse=True)
def none_is_left():
    """Kill processes that a failed test left running, some of which would never end."""
    yield
    for process in STARTED:
        if process.poll() is None:
            process.kill()
            process.wait()
    STARTED.clear()


def tiny(folder, *words):
    """Words for a tiny run in ``folder``."""
    return [*TINY, "device=cpu", f"out_dir={folder.parent}", f"run_dir={folder}", *words]


# ---- The claim ----------------------------------------------------------------------------------


def test_a_claim_is_exclusive_and_names_its_holder(tmp_path):
    path = tmp_path / "a" / "b"
    with claimed(path) as folder:
        folder.keep()
        words = f"{path} is in use by process {os.getpid()} on .*, started 20"
        before = everything_below(tmp_path)
        with pytest.raises(HeldError, match=words), claimed(path):
            pass
        assert everything_below(tmp_path) == before
        assert holder(path).startswith(f"process {os.getpid()} on ")
    assert holder(path) is None
    assert everything_below(tmp_path) == {tmp_path / "a": None, path: None}
    with claimed(path):
        pass


def test_a_claim_of_a_thread_is_one(tmp_path):
    def second():
        with pytest.raises(HeldError), claimed(tmp_path):
            pass

    with ThreadPoolExecutor() as pool, claimed(tmp_path):
        pool.submit(second).result(120)


def test_a_killed_holder_holds_nothing(tmp_path):
    code = "import os, sys; from pathlib import Path; from training.run_folder import claimed\n"
    code += "with claimed(Path(sys.argv[1])): os._exit(9)"
    assert run_app(["-c", code, str(tmp_path)], cwd=ROOT).returncode == 9
    assert {p.name for p in tmp_path.iterdir()} == {".lock", ".holder"}
    assert holder(tmp_path) is None
    with claimed(tmp_path):
        assert f"process {os.getpid()}" in holder(tmp_path)
    assert list(tmp_path.iterdir()) == []


NO_LOCKS = [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, 524]


@pytest.fixture
def flock_fails(monkeypatch):
    """A function that makes every file lock fail with the given errno."""

    def fail(number):
        def flock(*_):
            raise OSError(number, "no locks")

        monkeypatch.setattr(fcntl, "flock", flock)

    return fail


# A warning from filelock.
@pytest.mark.filterwarnings("ignore:flock not supported on this filesystem:UserWarning")
@pytest.mark.parametrize("number", NO_LOCKS)
def test_without_locks_of_the_file_system_a_claim_is_exclusive(tmp_path, flock_fails, number):
    flock_fails(number)
    path = tmp_path / "a" / "b"
    with claimed(path):
        with (
            pytest.raises(HeldError, match=f"is in use by process {os.getpid()} on "),
            claimed(path),
        ):
            pass
        assert holder(path).startswith(f"process {os.getpid()} on ")
        assert "delete" not in holder(path)
    assert holder(path) is None
    assert everything_below(tmp_path) == {}
    with claimed(path) as folder:
        folder.keep()
    assert everything_below(tmp_path) == {path.parent: None, path: None}


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOTRECOVERABLE])
def test_a_lock_that_fails_leaves_no_folder(tmp_path, flock_fails, number):
    flock_fails(number)
    with pytest.raises(OSError, match="no locks"), claimed(tmp_path / "a" / "b"):
        pass
    assert everything_below(tmp_path) == {}


def test_a_claim_that_cannot_name_its_holder_leaves_no_lock(tmp_path):
    """This happens on a full disk, for example."""
    (tmp_path / ".holder").mkdir()
    with pytest.raises(OSError, match=r"\.holder cannot be written"), claimed(tmp_path):
        pass
    assert everything_below(tmp_path) == {tmp_path / ".holder": None}


def test_a_lock_that_cannot_be_let_go_ends_no_run(tmp_path, monkeypatch):
    real = fcntl.flock

    def flock(file, operation):
        if operation == fcntl.LOCK_UN:
            raise OSError(errno.ENOLCK, "no locks")
        real(file, operation)

    with claimed(tmp_path / "run"):
        monkeypatch.setattr(fcntl, "flock", flock)
    assert everything_below(tmp_path) == {}
    monkeypatch.undo()


@pytest.mark.filterwarnings("ignore:flock not supported on this filesystem:UserWarning")
@pytest.mark.parametrize(
    ("number", "name"), [(errno.ENOSYS, ".lock"), (errno.ENOLCK, ".lock-soft"), (None, ".lock")]
)
@pytest.mark.parametrize("known", [True, False])
def test_the_lock_of_a_dead_process_elsewhere_is_named(
    tmp_path, flock_fails, monkeypatch, number, name, known
):
    """Only the other machine knows if the process is alive, so the user may delete the file."""
    if number is None:
        monkeypatch.setattr(run_folder.filelock, "FileLock", run_folder.filelock.SoftFileLock)
    else:
        flock_fails(number)
    (tmp_path / ".lock").touch()
    (tmp_path / name).write_text("12\nelsewhere\n")
    words = "another process"
    facts = ""
    if known:
        words, facts = "process 12 on elsewhere, started then", "train.py; "
        process = {"pid": 12, "host": "elsewhere", "started": "then", "command": "train.py"}
        (tmp_path / ".holder").write_text(json.dumps(process))
    words = f"{words} ({facts}if it has died, delete {tmp_path / name})"
    assert holder(tmp_path) == words
    with pytest.raises(HeldError) as raised, claimed(tmp_path):
        pass
    assert str(raised.value).startswith(f"{tmp_path} is in use by {words}; wait for it")
    (tmp_path / name).unlink()
    with claimed(tmp_path):
        pass


def test_a_process_removes_what_it_made_and_nothing_else(tmp_path, settings):
    (tmp_path / "there").mkdir()
    with claimed(tmp_path / "there" / "new" / "run") as folder:
        folder.start(settings())
        logging.getLogger("train").warning("something")
        (tmp_path / "there" / "new" / "guest").write_text("of somebody else")
        assert (folder.path / "train.log").exists()
        assert (folder.path / ".hydra" / "config.yaml").exists()
    assert everything_below(tmp_path) == {
        tmp_path / "there": None,
        tmp_path / "there" / "new": None,
        tmp_path / "there" / "new" / "guest": b"of somebody else",
    }


def test_an_empty_folder_that_was_there_stays(run, tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(ValueError, match="batch_size=97"):
        run("batch_size=97")
    assert everything_below(tmp_path) == {tmp_path / "run": None}


def test_what_is_kept_is_kept_with_all_that_was_said(tmp_path, settings):
    """This includes messages logged before the run started to write."""

    def fail():
        with claimed(tmp_path / "run") as folder:
            logging.getLogger("train").warning("early")
            assert not (tmp_path / "run" / "train.log").exists()
            folder.start(settings())
            logging.getLogger("train").warning("late")
            folder.keep()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert {p.name for p in (tmp_path / "run").iterdir()} == {".hydra", "train.log"}
    text = (tmp_path / "run" / "train.log").read_text()
    assert text.index("early") < text.index("late")
    logging.getLogger("train").warning("afterwards")
    assert (tmp_path / "run" / "train.log").read_text() == text


def test_a_pipe_in_the_place_of_the_log_is_not_waited_for(tmp_path, settings):
    os.mkfifo(tmp_path / "train.log")
    with (
        claimed(tmp_path) as folder,
        pytest.raises(ValueError, match=r"train\.log is not a regular file; delete it"),
    ):
        folder.start(settings())


def test_a_log_on_a_full_disk_is_one_line(tmp_path, settings, capfd):
    (tmp_path / "train.log").symlink_to("/dev/full")
    with claimed(tmp_path) as folder:
        folder.start(settings())
        for number in range(20):
            logging.getLogger("train").warning("line %d", number)
        folder.keep()
    said = [line for line in capfd.readouterr().err.splitlines() if "cannot be written" in line]
    assert said == [
        f"{tmp_path / 'train.log'} cannot be written ([Errno 28] No space left on device); "
        "training continues without it"
    ]


@pytest.mark.slow
def test_refused_commands_leave_a_running_one_alone(tmp_path):
    """Whatever is wrong with the second command, the first one's folder is unchanged."""
    folder = tmp_path / "run"
    first = start(*tiny(folder, *LONG))
    await_((folder / "metrics.csv").exists, "an epoch", first)
    before = without_the_clock(tmp_path)
    assert folder / ".hydra" / "config.yaml" in before
    for words in (["device=cuda:99"], ["overwrite=true"], ["resume=auto"]):
        second = start(*tiny(folder, *LONG, *words))
        out, err = second.communicate(timeout=240)
        assert (second.returncode, out) == (2, "")
        assert err.startswith("train.py: ")
        assert err.count("\n") == 1
        if words != ["device=cuda:99"]:
            assert f"{folder} is in use by process {first.pid} on " in err
        assert without_the_clock(tmp_path) == before
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=240)
    assert first.returncode == 143
    assert rows(folder)
    assert not (folder / ".lock").exists()


@pytest.mark.slow
def test_of_two_at_once_one_trains(tmp_path):
    both = [start(*tiny(tmp_path / "run", "resume=auto", *LONG)) for _ in range(2)]
    await_(lambda: any(process.poll() is not None for process in both), "the end of one")
    refused, training = sorted(both, key=lambda process: process.poll() is None)
    _, err = refused.communicate(timeout=240)
    assert refused.returncode == 2
    assert f"is in use by process {training.pid} on" in err
    assert err.count("\n") == 1
    await_((tmp_path / "run" / "metrics.csv").exists, "an epoch", training)
    training.send_signal(signal.SIGTERM)
    training.communicate(timeout=240)
    assert training.returncode == 143
    table = rows(tmp_path / "run")
    assert [row["epoch"] for row in table] == [str(n) for n in range(1, len(table) + 1)]


# ---- Unrelated processes ------------------------------------------------------------------------


RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS")


@pytest.fixture
def ranks(monkeypatch, environment):
    """Set the environment variables for several processes to ``environment`` only."""
    for name in RANKS:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("ranks")
@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"RANK": "a"}, "RANK=a in the environment must be a number"),
        ({"RANK": "-1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK=-1 in the environment must"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK=2, LOCAL_RANK=0 and WORLD_SIZ"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, "contradict each other"),
        ({"WORLD_SIZE": "2", "RANK": "1"}, "WORLD_SIZE=2 in the environment, but not LOCAL_RANK"),
        ({"SLURM_PROCID": "1"}, "this is task 1 of a Slurm step.*torchrun --nproc_per_node"),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}, "this is task 0 of 2 of a Slurm step"),
    ],
)
def test_ranks_that_torchrun_did_not_set(capsys, words):
    with pytest.raises(ValueError, match=words):
        distributed.world()
    refused(capsys, cli.run)


@pytest.mark.usefixtures("ranks")
@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"RANK": "0"},
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"SLURM_PROCID": "0"},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"},  # the batch script of a larger job
        {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},
    ],
)
def test_one_process_is_one():
    assert distributed.world() == (0, 1, 0)


# ---- Streams and signals ------------------------------------------------------------------------


def broken_pipe():
    """Return the write end of a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize("streams", [slow("gone"), thorough("stderr-full"), thorough("all-closed")])
def test_ctrl_c_saves_whoever_reads_what_is_printed(tmp_path, streams):
    """The cases are `| tee log` whose tee has died, a full disk, and `2>&-`."""
    folder, prefix = tmp_path / "run", []
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    if streams == "gone":
        pipe = broken_pipe()
        options = {"stdout": pipe, "stderr": pipe}
    elif streams == "stderr-full":
        options["stderr"] = os.open("/dev/full", os.O_WRONLY)
    else:
        prefix = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"]
    process = start(*tiny(folder, *LONG), prefix=prefix, **options)
    await_((folder / "last.pt").exists, "an epoch", process)
    process.send_signal(signal.SIGINT)
    assert process.wait(240) == 130
    saved = torch.load(folder / "last.pt", weights_only=True)
    assert len(saved["rows"]) == len(rows(folder)) > 0
    with (folder / "train.log").open() as file:
        assert "stopped (SIGINT) after epoch" in file.read()


@pytest.mark.slow
def test_an_ignored_interrupt_stays_ignored(tmp_path):
    """SIGINT is ignored in a background job of a script, for example."""
    folder = tmp_path / "run"
    ignoring = ["sh", "-c", "trap '' INT; exec \"$@\"", "sh"]
    process = start(*tiny(folder, "epochs=12"), prefix=ignoring)
    await_((folder / "metrics.csv").exists, "an epoch", process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0
    assert "SIGINT" not in err
    assert len(rows(folder)) == 12


@pytest.mark.parametrize(
    "program", ["train.py", slow("scripts/compare.py"), slow("scripts/report.py")]
)
def test_ctrl_c_while_torch_is_imported_is_one_line(tmp_path, program):
    """A fake package (torch or another that is imported) sends SIGINT during its import."""
    for name in ("torch", "hydra", "jinja2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(
            "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n"
        )
    process = start("x", program=program, env={"PYTHONPATH": str(tmp_path)}, real=True)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 130
    assert err == f"{Path(program).name}: interrupted while starting\n"


def test_training_outside_of_the_main_thread(run, tmp_path):
    """Signal handlers can only be set in the main thread."""
    before = [signal.getsignal(number) for number in stopping.SIGNALS]
    results = []
    thread = threading.Thread(target=lambda: results.append(run("epochs=1")))
    thread.start()
    thread.join(240)
    assert results[0]["epochs"] == 1
    assert [signal.getsignal(number) for number in stopping.SIGNALS] == before


HIDDEN = """
import signal, sys
for name in ("fcntl", "resource", "termios"):
    sys.modules[name] = None
for name in ("SIGUSR1", "SIGHUP", "SIGKILL"):
    delattr(signal, name)
sys.argv[0] = "train.py"
import train
from scripts import compare
from training import cli, device, stopping
import torch
assert [s.name for s in stopping.SIGNALS] == ["SIGTERM", "SIGINT"]
compare.handle_signals()
signal.signal(signal.SIGINT, signal.default_int_handler)
device.peak_memory_mib(torch.device("cpu"))
cli.run()
"""


@pytest.mark.thorough
def test_without_the_modules_and_signals_that_windows_lacks(tmp_path):
    """The lock is then filelock's own lock file."""
    words = tiny(tmp_path / "run", "epochs=1")
    done = subprocess.run(
        [sys.executable, "-c", HIDDEN, *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert run_folder.read_summary(tmp_path / "run")["epochs"] == 1


@pytest.mark.slow
def test_a_symlink_to_the_program_finds_its_settings(tmp_path):
    (tmp_path / "link.py").symlink_to(ROOT / "train.py")
    process = start("--cfg", "job", program=tmp_path / "link.py", cwd=tmp_path, real=True)
    out, err = process.communicate(timeout=240)
    assert (process.returncode, err) == (0, "")
    assert "epochs: 200" in out


@pytest.mark.parametrize("option", ["--version", "--help"])
def test_what_the_program_is(capsys, option):
    assert exit_code(cli.run, option) == 0
    text = capsys.readouterr().out
    if option == "--version":
        assert text.startswith("train.py 0.1.0, hydra-core 1.3.")
        return
    assert text.startswith("Train a ResNet for CIFAR whose convolutions are plain, attention-augm")
    commands = [line.split() for line in text.splitlines() if line.startswith("  python train.py")]
    assert len(commands) == 3
    assert "\n  attention     aa ge mean none pointwise removed se\n" in text
    assert "schema" not in text
    assert "epochs: 200" in text


def test_streams_that_are_closed_are_opened_and_faults_are_dropped():
    code = "import os; os.close(1); os.close(2)\n"
    code += "from training import console; console.prepare('x')\n"
    code += "assert os.open(os.devnull, os.O_RDONLY) == 3, 'would be taken for stderr'\n"
    code += "import sys; print('x' * 10**6); print('y', file=sys.stderr)\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)
    assert done.returncode == 0


def test_text_is_utf8_whatever_the_locale_says():
    code = "from training import console; console.prepare('x'); print('\\u2212 \\udcff')"
    environment = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | environment, capture_output=True,
        check=True,
    )  # fmt: skip
    assert done.stdout == "\u2212 ".encode() + b"\xff\n"


@pytest.mark.parametrize(
    ("said", "line"),
    [
        ("a\nb", "a"),
        ("  a  b \r\nc", "a  b"),
        ("\n\na\n", "a"),
        ("", "OSError"),
        (" \n", "OSError"),
    ],
)
def test_the_first_line_of_an_error(said, line):
    assert console.first_line(OSError(said)) == line


# ---- Results ------------------------------------------------------------------------------------


def failure_of(folder):
    return json.loads((folder / "failed.json").read_text())


@pytest.mark.parametrize("broken", ["ema", slow("evaluation"), slow("inf")])
def test_scores_that_are_not_finite_are_no_result(run, tmp_path, monkeypatch, broken):
    evaluate = train.evaluate

    def breaking(model, *arguments):
        if broken == "ema" and len(list((tmp_path / "run").glob("last.pt"))):
            next(model.parameters()).data.fill_(torch.nan)
        scores, by_class = evaluate(model, *arguments)
        if broken != "ema" and (tmp_path / "run" / "last.pt").exists():
            scores["loss"] = float("inf" if broken == "inf" else "nan")
        return scores, by_class

    monkeypatch.setattr(train, "evaluate", breaking)
    with pytest.raises(
        FloatingPointError, match=r"test/loss is (nan|inf) after epoch 2; a lower optim"
    ):
        run("ema=0.9")
    assert "after epoch 2" in failure_of(tmp_path / "run")["error"]
    assert len(rows(tmp_path / "run")) == 1  # the last one that was finite
    assert not (tmp_path / "run" / "summary.json").exists()


@pytest.mark.slow
def test_a_continued_run_names_all_that_it_was_trained_on(run, tmp_path, monkeypatch):
    """Each segment has its commit and hardware, and the epoch in which it started."""
    for commit in ("first", "first", "second"):
        monkeypatch.setattr(provenance, "commit", lambda commit=commit: commit)
        with pytest.raises(SystemExit):
            run("max_minutes=1e-9", "resume=auto", "data.train_size=64", "epochs=3")
    monkeypatch.setattr(provenance, "hardware", lambda _: "elsewhere")
    summary = run("resume=auto", "data.train_size=64", "epochs=3")
    segments = summary["segments"]
    assert [(s["commit"], s["first_epoch"]) for s in segments] == [
        ("first", 1),
        ("second", 1),  # this segment started with the evaluation of epoch 1
        ("second", 2),
    ]
    assert [s["hardware"] == "elsewhere" for s in segments] == [False, False, True]
    assert run_folder.read_summary(tmp_path / "run")["segments"] == segments


@pytest.mark.parametrize(
    ("here", "there", "word"), [slow("bf16", "auto", "fp32"), slow("fp32", "bf16", "bf16")]
)
def test_another_precision_is_refused_with_the_override_that_continues(
    run, settings, tmp_path, monkeypatch, here, there, word
):
    """`auto` may choose another precision on another machine."""
    monkeypatch.setattr("training.device.cpu_has_bf16", lambda: False)
    folder = tmp_path / "run, odd='x'"
    base = [*TINY, f"precision={there}"]
    with pytest.raises(SystemExit):
        run("max_minutes=1e-9", folder=folder.name, base=base)
    before = everything_below(folder)
    choose = train.choose_dtype
    asked = {"auto": here, "bf16": here, "fp32": "fp32"}
    with monkeypatch.context() as patch:
        patch.setattr(train, "choose_dtype", lambda name, device: choose(asked[name], device))
        with pytest.raises(ValueError, match=f"precision={there} is .* here, but the run") as told:
            run("resume=auto", folder=folder.name, base=base)
    assert everything_below(folder) == before
    pasted = str(told.value).removesuffix(" continues it").split("; ")[1]
    override, where, resume = shlex.split(pasted)  # as a shell reads it
    assert override == f"precision={word}"
    call(cli.run, *TINY, override, where, resume)
    assert run_folder.read_summary(folder)["epochs"] == 2


# ---- Names --------------------------------------------------------------------------------------


def test_names_of_any_overrides_fit_a_file_system(tmp_path):
    """This includes characters that take several bytes."""
    short = "attention=none,epochs=3,model.widths=[4,8,8]"
    assert folder_name([short]) == short
    odd = [
        "a={b:1}",
        "a={b;1}",
        "a/b=1",
        "a-b=1",
        "a" * 400,
        "a" * 401,
        "\u00fc" * 300,
        "..",
        "/",
        "data.name=\udcff",
        "",
    ]
    names = [folder_name([text]) for text in odd]
    assert len(set(names)) == len(odd)
    for name in names:
        (tmp_path / name).resolve().relative_to(tmp_path)
        assert len(name.encode()) < 180
        assert "/" not in name
        assert name not in ("", ".", "..")
