"""Weights & Biases as the runs use it, and all the ways in which it may fail."""

import errno
import http.server
import json
import math
import os
import socket
import sys
import threading
from contextlib import contextmanager

import pytest
import torch
import wandb as real_wandb
from wandb.sdk.lib.config_util import save_config_file_from_dict

import train
from training import cli, dashboard, launch, tracking, variants
from training.progress import EpochState, Progress

from app import run_app
from helpers import ROOT, TINY, call

DONE = ("update", {"outcome": "done", "reason": ""})
# Seconds after which a hanging call is released; then the expected timeout warning is missing.
GUARD = 240


class FakeRun:
    def __init__(self, fails=(), hangs=()):
        self.id, self.url, self.calls = "abc", "somewhere", []
        self.fails, self.hangs, self.released = fails, hangs, threading.Event()
        self.summary, self.metrics, self.starting_step = self, {}, 0
        self.settings = type("Settings", (), {"sync_dir": "kept"})

    def _call(self, name, *values):
        self.calls.append((name, *values))
        if name in self.fails:
            raise OSError(errno.ENOSPC, "No space left on device")
        if name in self.hangs:
            self.released.wait(GUARD)

    def define_metric(self, name, **how):
        self.metrics[name] = how

    def log(self, row, step, commit):
        assert commit
        self._call("log", row, step)

    def update(self, values):
        self._call("update", values)

    def finish(self, exit_code):
        self._call("finish", exit_code)


@pytest.fixture
def wandb(monkeypatch):
    """A function that replaces wandb's login and init, and returns the modes passed to init."""
    seen = []

    def install(*, credentials, runs):
        def init(mode, **arguments):
            seen.append(mode)
            assert arguments["settings"].init_timeout == tracking.INIT_TIMEOUT
            outcome = runs[mode]
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        monkeypatch.delenv("WANDB_MODE", raising=False)
        monkeypatch.setattr(real_wandb, "login", lambda **_: credentials)
        monkeypatch.setattr(real_wandb, "init", init)
        return seen

    return install


def start(mode, folder, run_id=None, rows=()):
    return tracking.track(
        mode,
        folder=folder,
        project="p",
        entity=None,
        group="g",
        name="n",
        job_type="train",
        tags=["t"],
        config={},
        run_id=run_id,
        rows=rows,
    )


@pytest.mark.parametrize(
    ("mode", "credentials", "expected"),
    [
        ("auto", True, ["online"]),
        ("auto", False, ["offline"]),
        ("online", True, ["online"]),
        ("online", False, ["offline"]),
        ("offline", True, ["offline"]),
        ("disabled", True, []),
    ],
)
def test_modes(wandb, tmp_path, mode, credentials, expected):
    run = FakeRun()
    seen = wandb(credentials=credentials, runs={"online": run, "offline": run})
    with start(mode, tmp_path) as tracker:
        tracker.log({"step": 1})
        tracker.summarize({"top1": 1.0})
    assert seen == expected
    calls = [("log", {"step": 1}, 1), ("update", {"top1": 1.0}), DONE, ("finish", 0)]
    assert run.calls == (calls if expected else [])


@pytest.mark.parametrize(
    ("given", "expected", "warns"),
    [
        ("disabled", [], False),
        ("dryrun", ["offline"], False),  # wandb's former name for it
        ("Offline", ["offline"], False),
        ("offlien", ["offline"], True),  # a typo must not cause an upload
    ],
)
def test_auto_listens_to_the_environment(
    wandb, tmp_path, monkeypatch, caplog, given, expected, warns
):
    seen = wandb(credentials=True, runs={"online": FakeRun(), "offline": FakeRun()})
    monkeypatch.setenv("WANDB_MODE", given)
    with start("auto", tmp_path):
        pass
    assert seen == expected
    assert ("WANDB_MODE=offlien is not one of online, offline, disabled" in caplog.text) == warns


def warnings(caplog):
    return [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]


def track_three_epochs(folder):
    with start("auto", folder) as tracker:
        for epoch in (1, 2, 3):
            tracker.log({"step": epoch})
        tracker.summarize({})
    return tracker


@pytest.mark.parametrize("call", ["log", "update", "finish"])
@pytest.mark.parametrize("hangs", [False, True])
def test_a_call_that_fails_or_hangs_is_one_warning_and_the_last(
    wandb, tmp_path, caplog, monkeypatch, call, hangs
):
    run = FakeRun(hangs=[call]) if hangs else FakeRun(fails=[call])
    wandb(credentials=False, runs={"offline": run})
    if hangs:
        monkeypatch.setattr(tracking, "LOG_TIMEOUT", 0.2)
        monkeypatch.setattr(tracking, "CLOSE_TIMEOUT", 0.2)
    assert track_three_epochs(tmp_path).id == "abc"
    run.released.set()
    fault = "no answer within 0.2 s" if hangs else "[Errno 28] No space left on device"
    assert warnings(caplog) == [f"wandb logging stopped: {fault}; metrics.csv is complete"]
    names = [c[0] for c in run.calls]
    assert names.index(call) == len(names) - 1


def test_a_start_that_hangs_is_given_up(wandb, tmp_path, caplog, monkeypatch):
    released = threading.Event()
    wandb(credentials=True, runs={})
    monkeypatch.setattr(real_wandb, "init", lambda **_: released.wait(GUARD))
    monkeypatch.setattr(tracking, "INIT_TIMEOUT", 0.1)
    monkeypatch.setattr(tracking, "_MARGIN", 0.1)
    with start("auto", tmp_path, run_id="before") as tracker:
        assert tracker.id == "before"
    released.set()
    assert warnings(caplog) == ["wandb: no answer within 0.2 s; this run is only in metrics.csv"]


def test_a_file_in_place_of_the_folder_is_one_warning(wandb, tmp_path, caplog):
    (tmp_path / "wandb").write_bytes(b"")
    seen = wandb(credentials=True, runs={})
    with start("online", tmp_path) as tracker:
        tracker.log({"step": 1})
    assert seen == []
    (warning,) = warnings(caplog)
    assert "File exists" in warning
    assert warning.endswith("this run is only in metrics.csv")


def test_a_run_without_tracking_keeps_the_id_it_was_given(wandb, tmp_path):
    wandb(credentials=False, runs={"offline": OSError("no")})
    for mode in ("offline", "disabled"):
        with start(mode, tmp_path, run_id="before") as tracker:
            assert tracker.id == "before"
        with start(mode, tmp_path) as tracker:
            assert tracker.id is None


class WithoutFolder(FakeRun):
    """A run of a possible future wandb, which lacks attributes that exist today."""

    def __init__(self, **how):
        super().__init__(**how)
        del self.settings, self.url


@pytest.mark.parametrize("mode", ["online", "offline"])
@pytest.mark.parametrize("fails", [(), ("log",)])
def test_attributes_that_are_missing_end_nothing(wandb, tmp_path, mode, fails):
    run = WithoutFolder(fails=fails)
    wandb(credentials=True, runs={mode: run})
    with start(mode, tmp_path) as tracker:
        tracker.log({"step": 1})
    assert tracker.id == "abc"


@pytest.mark.parametrize("where", ["login", "init", "log", "summary", "finish"])
def test_a_call_that_wants_to_end_the_process_does_not(wandb, tmp_path, monkeypatch, caplog, where):
    run = FakeRun()
    wandb(credentials=True, runs={"online": run, "offline": run})

    def leave(*_, **__):
        raise SystemExit(3)

    if where in ("login", "init"):
        monkeypatch.setattr(real_wandb, where, leave)
    else:
        monkeypatch.setattr(run, "update" if where == "summary" else where, leave)
    assert track_three_epochs(tmp_path).id == (None if where == "init" else "abc")
    assert len(warnings(caplog)) == (0 if where == "login" else 1)


def test_without_the_package_a_run_is_tracked_in_its_folder_alone(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it raises ModuleNotFoundError
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for mode in ("auto", "online", "offline"):
        with start(mode, tmp_path) as tracker:
            tracker.log({"step": 1})
        assert tracker.id is None
        (warning,) = warnings(caplog)
        assert "not installed (pip install wandb, or set tracking=csv)" in warning
        caplog.clear()


def test_training_without_tracking_does_not_import_the_package(tmp_path):
    code = "import sys; sys.modules['wandb'] = None; sys.argv[0] = 'train.py'; import train; "
    code += "from training import cli; cli.run()"
    done = run_app(["-c", code, *TINY, "epochs=1", f"out_dir={tmp_path}"], cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert list(tmp_path.rglob("summary.json"))


def test_what_was_not_sent_is_sent_again_and_nothing_twice(wandb, tmp_path):
    """This covers the rows of the checkpoint and those of epochs that are trained again."""
    run = FakeRun()
    run.starting_step = 3
    wandb(credentials=True, runs={"online": run})
    before, trained = ([{"step": n} for n in steps] for steps in ((1, 2, 3), (1, 2, 4, 5)))
    with start("online", tmp_path, run_id="abc", rows=before) as tracker:
        for row in trained:
            tracker.log(row)
    assert run.calls == [*(("log", {"step": n}, n) for n in (3, 4, 5)), DONE, ("finish", 0)]
    assert run.metrics == {
        "epoch": {"hidden": True},
        "step": {"hidden": True},
        "*": {"step_metric": "epoch"},
        "train/step_loss": {"step_metric": "step"},
    }


def test_the_loss_within_an_epoch_is_the_mean_since_the_reading_before():
    progress = Progress.begin(5)
    losses, sent = iter((4.0, 2.0, 3.0, 1.0, 6.0, 7.0, 5.0, math.nan, math.nan, 8.0)), {}
    for epoch in range(2):
        state = EpochState.begin(5)
        for step in range(1, 6):
            state = state.after_step({"loss": torch.tensor(next(losses))}, 0.1)
            if step % 2 == 0 or step == 5:
                sent |= progress.read_loss(state, 5)
        row = {"epoch": epoch + 1, "val/top1": 50.0 - epoch}
        progress.finish_epoch(row, [], 5)
    expected = {2: 3.0, 4: 2.0, 5: 6.0, 7: 6.0, 10: 8.0}  # from 7 to 9 no loss was finite
    assert sent == progress.step_losses(5) == expected
    rows = dashboard.history(progress, 5)
    assert [row["step"] for row in rows] == [2, 4, 5, 7, 10]
    assert {row["step"]: row["train/step_loss"] for row in rows} == expected
    assert [row.get("best/val_top1") for row in rows] == [None, None, 50.0, None, 50.0]
    assert (
        "best/val_top1"
        not in dashboard.history(
            Progress(progress.epoch_state, [{"test/top1": 1.0}], None, [], None), 5
        )[0]
    )


@pytest.mark.parametrize(
    ("error", "outcome", "reason", "code"),
    [
        (FloatingPointError("the loss"), "diverged", "the loss", 1),
        (ValueError(), "failed", "ValueError", 1),
        (SystemExit(3), "stopped", "SystemExit", 255),
        (KeyboardInterrupt(), "stopped", "KeyboardInterrupt", 255),
    ],
)
def test_the_dashboard_is_told_how_a_run_ended(wandb, tmp_path, error, outcome, reason, code):
    run = FakeRun()
    wandb(credentials=True, runs={"online": run})
    with pytest.raises(type(error)), start("online", tmp_path):
        raise error
    assert run.calls == [("update", {"outcome": outcome, "reason": reason}), ("finish", code)]


def test_names_that_are_too_long_keep_apart():
    assert variants.within_length("x" * 128, 128) == "x" * 128
    long = [variants.within_length("x" * 128 + end, 128) for end in "ab"]
    assert len({*long}) == 2
    assert {len(name) for name in long} == {128}


@pytest.mark.parametrize(
    ("words", "more", "expected"),
    [
        ("", {}, "aa seed=3"),
        ("attention=aa attention.dk=0.5 attention.Nh=4 seed=3", {}, "aa dk=0.5 Nh=4 seed=3"),
        ("model=resnet8 optim.lr=0.1", {}, "resnet8 aa lr=0.1 seed=3"),
        ("model=resnet8 optim.lr=0.1", {"fixed": ["model"]}, "aa lr=0.1 seed=3"),
        ("experiment=cpu ++ema=0.9", {"group": "cpu"}, "aa ema=0.9 seed=3"),
        ("experiment=cpu ++ema=0.9", {"group": "g"}, "aa experiment=cpu ema=0.9 seed=3"),
        ("++ema=0.9 ++optim.lr=0.1", {"fixed": ["++ema"]}, "aa lr=0.1 seed=3"),
        ("attention.dk=8 model.aa.dk=4", {}, "aa attention.dk=8 model.aa.dk=4 seed=3"),
        ("out_dir=x wandb.group=y hydra.verbose=true tracking=csv", {}, "aa seed=3"),
        ("optim.lr=0.06273819045551 ema=0.9995", {}, "aa lr=0.06274 ema=0.9995 seed=3"),
        (
            "optim.lr=1.2345678e-05 optim.weight_decay=0.00005",
            {},
            "aa lr=1.235e-05 weight_decay=0.00005 seed=3",
        ),
    ],
)
def test_a_name_says_what_differs(words, more, expected):
    assert variants.run_name(words.split(), "aa", 3, **more) == expected


def test_a_long_name_keeps_network_attention_and_seed():
    words = ["model=resnet8", f"freeze=[{'x' * 200}]", "optim.lr=0.1"]
    names = {variants.run_name([*words, f"ema=0.{n}"], "aa", n) for n in (1, 2)}
    assert {len(name) for name in names} == {128}
    assert all(name.startswith("resnet8 aa freeze=[xxx") for name in names)
    assert {name.rpartition(" ")[2] for name in names} == {"seed=1", "seed=2"}
    assert len({name.rpartition(" ")[0] for name in names}) == 2


def test_under_an_agent_the_sweeps_settings_are_the_ones_that_differ(monkeypatch, tmp_path):
    assert tracking.agent_parameters() is None
    monkeypatch.setenv("WANDB_SWEEP_ID", "s")
    assert tracking.agent_parameters() is None
    monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", str(tmp_path / "none.yaml"))
    assert tracking.agent_parameters() is None
    parameters = tmp_path / "config.yaml"
    save_config_file_from_dict(str(parameters), {"attention.dk": {"value": 0.5}})
    monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", str(parameters))
    assert "attention.dk" in tracking.agent_parameters()


def test_an_id_of_the_environment_reaches_no_job_of_a_sweep(monkeypatch, tmp_path):
    """Nor does it reach the runs of compare.py, which are separate processes."""
    names = {"WANDB_RUN_ID", "WANDB_RESUME", "WANDB_NAME"}
    names |= {"WANDB_SWEEP_ID", "WANDB_SWEEP_PARAM_PATH"}
    for name in names:
        monkeypatch.setenv(name, "shared")
    seen, processes = [], []
    score = {"evaluated_on": "test", "test/top1": 1.0, "test/top5": 2.0}
    monkeypatch.setattr(train, "train", lambda *_: seen.append(names & os.environ.keys()) or score)
    monkeypatch.setattr(launch.subprocess, "Popen", lambda *_, env, **__: processes.append(env))
    launch.start([], tmp_path, tmp_path, os.environ)
    assert processes[0].keys().isdisjoint(names)
    call(cli.run, "-m", *TINY, "seed=0,1", f"out_dir={tmp_path}")
    assert seen == [set(), set()]


# ---- the real wandb -----------------------------------------------------------------------------


# train.py whose wandb process is killed after the first epoch of the first run has been sent. The
# time limits are raised: they are not tested here, and a busy machine may exceed them.
KILLER = """
import os, signal, sys
sys.argv[0] = "train.py"
import train
from training import cli, tracking
tracking.INIT_TIMEOUT = tracking.LOG_TIMEOUT = tracking.CLOSE_TIMEOUT = 120
log = tracking.Tracker.log
def log_and_kill(tracker, row, pictures):
    log(tracker, row, pictures)
    tracking.Tracker.log = log
    (service,) = tracking._services()
    os.kill(service, signal.SIGKILL)
    while tracking._services():
        pass
    print("service killed", flush=True)
tracking.Tracker.log = log_and_kill
cli.run()
"""


@pytest.mark.slow
def test_a_run_whose_wandb_process_is_killed_ends_as_if_nothing_was(tmp_path):
    """Two runs in one process; the first one's wandb process dies after an epoch."""
    tiny = [w for w in TINY if "tracking" not in w and "epochs" not in w]
    words = [*tiny, "epochs=3", "seed=0,1", f"out_dir={tmp_path}", "wandb.mode=offline"]
    done = run_app(["-c", KILLER, "-m", *words], cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert done.stdout.count("service killed\n") == 1
    assert done.stdout.count("wandb: offline; `wandb sync") == 2
    lines = [line for line in done.stdout.splitlines() if line.startswith("wandb")]
    (warning,) = [line for line in lines if "wandb: offline" not in line]
    assert warning.startswith(
        "wandb logging stopped: Connection lost; metrics.csv is complete; `wandb sync "
    )
    tables = sorted(tmp_path.rglob("metrics.csv"))
    assert len(tables) == 2
    for table in tables:
        lines = table.read_text().splitlines()
        assert [line.split(",")[0] for line in lines] == ["epoch", *map(str, range(1, 4))]
        assert json.loads((table.parent / "summary.json").read_text())["epochs"] == 3
    # The second run had its own wandb process.
    assert len(list(tmp_path.glob("wandb/offline-run-*/*.wandb"))) == 2


# Tracks one short run for each server, differing only in the server's address, and prints the run's
# id.
DRIVER = """
import logging, os, sys
from pathlib import Path
from training import tracking
logging.basicConfig(format="%(levelname)s %(message)s", level=logging.WARNING, stream=sys.stdout)
tracking.INIT_TIMEOUT, tracking.LOG_TIMEOUT, tracking.CLOSE_TIMEOUT = 3, 2, 2
os.environ["WANDB_API_KEY"] = "0123456789" * 4
folder = Path(sys.argv[1])
for address in sys.argv[2:]:
    os.environ["WANDB_BASE_URL"] = address
    with tracking.track("online", folder=folder, project="p", entity=None, group="g", name="n",
                        config={}, run_id=None, job_type="train", tags=[]) as tracker:
        tracker.log({"step": 1})
    print(tracker.id, flush=True)
"""


@contextmanager
def answering(status):
    """The address of a web server that answers all requests with this status."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b"{}")

        do_GET = do_POST  # noqa: N815

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{httpd.server_port}"
        finally:
            httpd.shutdown()
            thread.join()


@pytest.mark.slow
def test_servers_that_refuse_fail_hang_or_are_not_there_are_given_up(tmp_path):
    with (
        answering(401) as refusing,
        answering(500) as failing,
        socket.create_server(("127.0.0.1", 0)) as silent,
    ):
        hanging = f"http://127.0.0.1:{silent.getsockname()[1]}"
        addresses = [refusing, failing, hanging, "http://127.0.0.1:9"]
        done = run_app(["-c", DRIVER, str(tmp_path), *addresses], cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert len(lines) == 2 * len(addresses), done.stdout
    for warning, run_id in zip(lines[::2], lines[1::2], strict=True):
        assert warning.startswith("WARNING wandb: ")
        assert warning.endswith("; keeping the run on disk instead")
        assert list(tmp_path.glob(f"wandb/offline-run-*-{run_id}/*.wandb"))
