"""What runs send to the dashboard, read back from a fake wandb server."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from training.variants import within_length

from app import App, run_app
from helpers import CLOCK, ROOT, TINY, await_, thorough

pytestmark = pytest.mark.slow

GUARD = 240  # seconds after which a process is considered hanging
WANDB = str(Path(sys.executable).parent / "wandb")
ONLINE = [*(w for w in TINY if "epochs" not in w and "tracking" not in w), "wandb.mode=online"]
# Enough steps for a signal to arrive before the end.
LONG = [*ONLINE, "attention=none", "data.train_size=640", "epochs=12"]


@pytest.fixture
def start(server, tmp_path):
    """A function that starts train.py; processes still running at the end are killed."""
    processes = []

    def go(*words, program=(ROOT / "train.py",), **environment):
        process = App(
            [*program, *words, f"out_dir={tmp_path / 'out'}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=server.environment | environment,
            cwd=tmp_path,
        )
        processes.append(process)
        return process

    yield go
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def train(start):
    """A function that runs train.py to its end and returns its exit code and output."""

    def go(*words, **environment):
        process = start(*words, **environment)
        out, _ = process.communicate(timeout=GUARD)
        return process.returncode, out

    return go


def rows_on_disk(folder):
    """Return the number of epochs on disk; the client sends them only every 15 seconds."""
    return sum(len(path.read_text().splitlines()) - 1 for path in folder.rglob("metrics.csv"))


def table(folder):
    (path,) = folder.rglob("metrics.csv")
    with path.open() as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def history(run):
    """Return the epochs' rows in the form of metrics.csv."""
    others = ("step", "train/step_loss", "best/val_top1")
    return [
        {k: v for k, v in row.items() if k[0] not in "_m" and k not in others}
        for row in run["history"]
        if "epoch" in row
    ]


def assert_whole(run, folder, but=()):
    """Check that the history equals metrics.csv except for ``but``, without gaps or repeats."""
    rows = table(folder)
    seen = history(run)
    for column in but:
        for row in (*rows, *seen):
            del row[column]
    assert seen == [pytest.approx(row) for row in rows]
    readings = [row["step"] for row in run["history"] if "train/step_loss" in row]
    steps = [row["step"] for row in run["history"] if "epoch" in row]
    every = [row["_step"] for row in run["history"] if "step" in row]
    assert every == readings == sorted({*readings})
    # Each epoch's row has a reading of the loss, and all epochs have equally many readings.
    assert steps == readings[len(readings) // len(rows) - 1 :: len(readings) // len(rows)]
    assert len({b - a for a, b in zip([0, *readings], readings, strict=False)}) == 1


def call_wandb(server, *words):
    command = [WANDB, *words]
    subprocess.run(command, env=server.environment, check=True, timeout=GUARD, capture_output=True)


def config(run):
    return {k: v["value"] for k, v in run["config"].items() if k != "_wandb"}


def test_a_run_has_all_that_was_promised(train, server, tmp_path):
    words = [
        "epochs=2",
        "data.val_size=8",
        "attention.dk=1.0",
        "attention.dv=4",
        "++grad_accum=1",
        "name=" + "n" * 99,
    ]
    code, _ = train(*ONLINE, *words, "wandb.tags=[mine,two words]", "wandb.notes=why not")
    assert code == 0
    _, run = server.only
    assert run["exitcode"] == 0
    assert_whole(run, tmp_path / "out")

    seen = config(run)
    (path,) = tmp_path.rglob("summary.json")
    summary = json.loads(path.read_text())
    assert not [key for key, value in seen.items() if isinstance(value, dict)]
    assert not [key for key in seen if "_target_" in key or "_partial_" in key]
    for name, expected in {
        "attention": "aa",
        "model": "resnet8",
        "data": "lookup",
        "optim": "adamw",
        "schedule": "one_cycle",
        # 1.0 and 1 are the same number on the dashboard.
        "attention.dk": 1,
        "attention.dk_unit": "fraction",
        "attention.dv": 4,
        "attention.dv_unit": "channels",
        "optim.lr": 0.002,
        "data.val_size": 8,
        "precision": "fp32",  # a setting that rarely differs, present because it was overridden
        "grad_accum": 1,
        "model.widths": [4, 8, 8],
        "env.precision": "float32",
        "env.torch": summary["segments"][0]["versions"]["torch"],
        "network.parameters": summary["parameters"],
        "network.flops": summary["flops"],
        "data.evaluated_on": "val",
        "data.digest": summary["data_digest"],
        "seed": 0,
    }.items():
        assert seen[name] == expected, name
    assert not {"model.depths", "attention.init", "out_dir", "wandb.mode"} & seen.keys()
    assert len(seen) < 55
    assert "settings.json" in dict(run["files"])
    assert seen["variant"].startswith("resnet8 aa dk=1.0 dv=4 Nh=4 ")

    facts = run["facts"]
    assert facts["jobType"] == "train"
    assert facts["tags"] == ["resnet8", "aa", "lookup", "mine", "two words"]
    assert facts["notes"] == "why not"
    assert facts["groupName"] == "n" * 99
    assert len(facts["displayName"]) == 128
    assert facts["displayName"].startswith("aa experiment=lookup train_size=96 ")
    assert facts["displayName"].endswith(" seed=0")
    # Every metric has the axis epoch except for the loss within an epoch; "5" is a 1-based index.
    metrics = run["config"]["_wandb"]["value"]["m"]
    names = [metric.get("1") or metric["2"] for metric in metrics]
    axes = {name: metric.get("5") for name, metric in zip(names, metrics, strict=True)}
    found = {name: axis and names[axis - 1] for name, axis in axes.items()}
    assert found == {"epoch": None, "step": None, "train/step_loss": "step", "*": "epoch"}

    seen = [key for key in run["summary"] if key.startswith("media/")]
    charts = run["config"]["_wandb"]["value"]["visualize"]
    assert set(charts) == {"media/classes", "media/confusion_matrix"}
    tables = {"media/predictions", "media/confusion", *(f"{name}_table" for name in charts)}
    assert tables < set(seen)
    assert [f"media/attention/stages.{n}.0.conv1" in seen for n in (0, 1, 2)] == [False, True, True]
    told = {k: v for k, v in run["summary"].items() if k[0] != "_" and k not in seen}
    assert not [key for key, value in told.items() if isinstance(value, dict)]
    for name in ("train/loss", "train/top1", "train/grad_norm", "val/loss", "val/top1", "val/top5"):
        assert told[name] == pytest.approx(summary[name]), name
    best = max(table(tmp_path / "out"), key=lambda row: row["val/top1"])
    assert told["best/val_top1"] == best["val/top1"]
    assert told["best/epoch"] == best["epoch"]


def test_wandbs_environment_names_what_no_setting_does(train, server, tmp_path):
    names = ("PROJECT", "NAME", "NOTES", "RUN_GROUP", "JOB_TYPE")
    environment = {f"WANDB_{name}": f"my {name}" for name in names} | {"WANDB_TAGS": "one, two"}
    assert train(*ONLINE, "epochs=1", **environment)[0] == 0
    _, run = server.only
    facts = run["facts"]
    keys = ("project", "displayName", "notes", "groupName", "jobType")
    assert [facts[key] for key in keys] == [f"my {name}" for name in names]
    assert facts["tags"] == ["resnet8", "aa", "lookup", "one", "two"]
    assert run["summary"]["outcome"] == "done"
    (log,) = tmp_path.rglob("seed=0/train.log")
    assert dict(run["files"])["train.log"] == len(log.read_bytes()) > 0

    own = ["wandb.project=p", "wandb.group=g", "wandb.notes=n", "wandb.tags=[t]"]
    assert train(*ONLINE, "epochs=1", "seed=1", *own, **environment)[0] == 0
    facts = list(server.runs.values())[1]["facts"]
    assert [facts[key] for key in ("project", "notes", "groupName")] == ["p", "n", "g"]
    assert facts["tags"] == ["resnet8", "aa", "lookup", "t"]


def test_runs_that_differ_in_the_seed_alone_are_of_one_variant(train, server):
    words = ("epochs=1", "attention=none", "seed=0,1", "optim.lr=0.1,0.2")
    assert train("-m", *ONLINE, *words)[0] == 0
    runs = [config(run) for run in server.runs.values()]
    assert len(runs) == 4
    assert len({run["variant"] for run in runs}) == 2
    assert len({(run["variant"], run["optim.lr"]) for run in runs}) == 2
    assert all("best/val_top1" not in run["summary"] for run in server.runs.values())
    assert {run["facts"]["groupName"] for run in server.runs.values()} == {"lookup"}
    names = {run["facts"]["displayName"] for run in server.runs.values()}
    assert names == {f"none lr={lr} seed={seed}" for lr in (0.1, 0.2) for seed in (0, 1)}


@pytest.mark.thorough
def test_after_a_kill_and_resume_the_history_is_that_of_the_folder(start, train, server, tmp_path):
    """Kill it before anything was sent, and again when the server is ahead of the checkpoint."""
    words = [*(w for w in LONG if w != "epochs=12"), "epochs=70", "resume=auto", "log_every=5"]
    for killed, interval in (
        (lambda: rows_on_disk(tmp_path) >= 2, 60),
        # The first epoch is in the first checkpoint, the second in that of the second start.
        (lambda: server.runs and len(history(server.only[1])) > 2, 1),
    ):
        process = start(*words, WANDB__FILE_STREAM_TRANSMIT_INTERVAL=str(interval))
        await_(killed, "the time to kill it")
        process.kill()
        process.communicate()
    assert server.only[1]["exitcode"] is None
    (path,) = tmp_path.rglob("last.pt")
    saved = len(torch.load(path, weights_only=True)["rows"])
    assert saved < len(history(server.only[1])) <= rows_on_disk(tmp_path) < 70
    code, _ = train(*words)
    assert code == 0
    assert_whole(server.only[1], tmp_path / "out", but=CLOCK)
    assert [row["step"] for row in server.only[1]["history"]] == list(range(5, 1401, 5))
    assert server.only[1]["exitcode"] == 0


@pytest.mark.thorough
def test_a_run_that_was_kept_offline_and_resumed_is_uploaded_whole(train, server, tmp_path):
    offline = [w for w in LONG if "wandb" not in w]
    for limit in ("0.001", "null"):
        code, _ = train(*offline, "wandb.mode=offline", f"max_minutes={limit}", "resume=auto")
        assert code == 0
        time.sleep(1)  # wandb names its folders by time with a resolution of one second
    folders = sorted((tmp_path / "out" / "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    assert server.runs == {}
    call_wandb(server, "sync", *map(str, folders))
    assert_whole(server.only[1], tmp_path / "out")


# train.py with shorter waits for wandb at its end.
IMPATIENT = """
import sys
sys.path.insert(0, {root!r})
sys.argv[0] = "train.py"
import train
from training import cli, tracking
tracking.CLOSE_TIMEOUT = 3
cli.run()
"""


@pytest.mark.thorough
def test_a_server_that_dies_costs_one_warning_and_no_row(start, server, tmp_path):
    process = start(*LONG, program=("-c", IMPATIENT.format(root=str(ROOT))))
    await_(lambda: rows_on_disk(tmp_path) >= 2, "two epochs")
    server.kill()
    out, err = process.communicate(timeout=GUARD)
    assert (process.returncode, err) == (0, "")
    assert len(table(tmp_path / "out")) == 12
    lines = [line for line in out.splitlines() if line.startswith("wandb")]
    (warning,) = [line for line in lines if "http://" not in line]
    command = warning.split("`")[1]
    assert command.startswith("wandb sync --no-skip-online ")
    assert len(server.only[1]["history"]) < 12
    server.start()
    call_wandb(server, *command.split()[1:])
    assert_whole(server.only[1], tmp_path / "out")


@pytest.mark.parametrize(
    ("how", "code", "exitcode", "preempting", "outcome", "reason"),
    [
        ("diverges", 2, 1, False, "diverged", "the loss is not finite in epoch 1, step "),
        thorough(signal.SIGTERM, 143, 255, False, "stopped", "SIGTERM"),
        thorough(signal.SIGUSR1, 138, 1, True, "stopped", "SIGUSR1"),
        ("time", 0, 1, True, "stopped", "max_minutes=0.001"),
    ],
    ids=str,
)
def test_the_state_of_a_run_without_a_result(
    start, server, tmp_path, how, code, exitcode, preempting, outcome, reason
):
    extra = {"diverges": ["optim.lr=1e30"], "time": ["max_minutes=0.001"]}.get(how, ["epochs=200"])
    process = start(*LONG, *extra)
    if isinstance(how, signal.Signals):
        await_(lambda: rows_on_disk(tmp_path), "an epoch")
        process.send_signal(how)
    process.communicate(timeout=GUARD)
    assert process.returncode == code
    _, run = server.only
    assert (run["exitcode"], run["preempting"]) == (exitcode, preempting)
    assert run["summary"]["outcome"] == outcome
    assert run["summary"]["reason"].startswith(reason)
    assert "train.log" in dict(run["files"])
    if how == signal.SIGTERM:  # the outcome is cleared once the run is resumed
        start(*LONG, *extra, "resume=auto", WANDB__FILE_STREAM_TRANSMIT_INTERVAL="1")
        await_(lambda: server.only[1]["summary"].get("outcome") != "stopped", "its end")
        assert server.only[1]["summary"]["outcome"] == ""


@pytest.fixture
def agent(server, tmp_path):
    """A function that creates a sweep and starts its agent, using wandb's own commands.

    The fake server supplies the parameter values of the runs.
    """
    agents = []

    def wandb(*words, **environment):
        return subprocess.Popen(
            [WANDB, *words],
            env=server.environment | environment,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def go(*all_values, **environment):
        tiny = [w for w in LONG if "attention=" not in w and w != "epochs=12"]
        program = str(ROOT / "train.py")
        command = ["${env}", sys.executable, program, *tiny, f"out_dir={tmp_path / 'out'}"]
        sweep = {
            "program": program,
            "method": "grid",
            "command": [*command, "resume=auto", "${args_no_hyphens}"],
            "parameters": {"attention": {"values": ["none", "aa"]}},
        }
        (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
        (server.folder / "sweep.json").write_text(json.dumps(all_values))
        said, _ = wandb("sweep", "--project", "p", "sweep.yaml").communicate(timeout=GUARD)
        assert "wandb agent me/p/sweep1" in said
        agents.append(wandb("agent", "me/p/sweep1", **environment))
        return agents[-1]

    yield go
    for process in agents:
        process.kill()
        process.communicate()


@pytest.mark.thorough
def test_a_sweep_by_an_agent_of_which_one_run_fails_and_one_is_stopped(agent, server, tmp_path):
    process = agent(
        {"attention": "none", "epochs": 1},
        {"attention": "aa", "attention.dk": 7, "epochs": 1},  # Nh does not divide it
        {"attention": "aa", "attention.dk": 1.0, "attention.Nh": 2, "epochs": 3000},
        {"attention": "none", "epochs": 1},  # the same as the first
    )
    await_(lambda: [*tmp_path.rglob("run=run2/**/metrics.csv")], "an epoch of the third run")
    (server.folder / "stop").write_text("run2")
    said, _ = process.communicate(timeout=GUARD)
    assert process.returncode == 0, said

    runs = server.runs
    assert runs.keys() == {"run0", "run2", "run3"}
    assert runs["run0"]["exitcode"] == runs["run3"]["exitcode"] == 0
    assert runs["run2"]["exitcode"] == 255
    assert "dk=7 must be divisible by Nh=4" in said
    folders = {
        path.parent.name: path.name for path in tmp_path.rglob("*.pt") if "last" in path.name
    }
    assert folders.keys() == {"run=run0", "run=run2", "run=run3"}
    assert {p.parent.parent.name for p in tmp_path.rglob("last.pt")} == {"sweep=sweep1"}
    seen = {name: config(runs[name]) for name in ("run0", "run2", "run3")}
    assert [c["attention"] for c in seen.values()] == ["none", "aa", "none"]
    names = [runs[name]["facts"]["displayName"] for name in seen]
    assert names == ["none epochs=1 seed=0", "aa dk=1.0 Nh=2 epochs=3000 seed=0", names[0]]
    assert seen["run2"]["attention.dk"] == 1
    assert seen["run2"]["attention.dk_unit"] == "fraction"
    for values in seen.values():
        assert not [key for key, value in values.items() if isinstance(value, dict)]
        assert values["optim.lr"] == 0.002  # settings that the sweep does not set are kept
        assert values["optim"] == "adamw"
    assert seen["run0"]["variant"] == seen["run3"]["variant"]
    for name in ("run0", "run3"):
        assert len(runs[name]["history"]) == 1


def of_agent(process):
    """Return the process id of the train.py that an agent started."""
    for number in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        if "train.py" in Path(f"/proc/{number}/cmdline").read_text():
            return int(number)
    raise AssertionError("the agent trains nothing")


@pytest.mark.thorough
def test_an_agent_goes_on_after_runs_that_diverge_and_a_preempted_run_comes_back(
    agent, server, tmp_path
):
    """wandb's agent ends after three failures in its first minute; diverged runs must not count."""
    diverging = {"attention": "none", "epochs": 1, "optim.lr": 1e30}
    process = agent(diverging, diverging, diverging, {"attention": "none", "epochs": 12})
    await_(lambda: [*tmp_path.rglob("run=run3/**/metrics.csv")], "an epoch of the fourth run")
    os.kill(of_agent(process), signal.SIGUSR1)
    said, _ = process.communicate(timeout=GUARD)
    assert process.returncode == 0, said
    runs = server.runs
    assert [runs[f"run{number}"]["exitcode"] for number in range(4)] == [1, 1, 1, 0]
    assert said.count("Agent received command: resume") == 1
    assert runs["run3"]["preempting"]
    (folder,) = tmp_path.rglob("run=run3")
    assert_whole(runs["run3"], folder)
    assert len(runs["run3"]["history"]) == 12


@pytest.mark.thorough
def test_a_comparison_closes_with_a_run_of_its_own(server, tmp_path):
    def call(script, *words):
        environment = server.environment | {"WANDB_RUN_ID": "shared"}
        command = [ROOT / "scripts" / script, *words]
        return run_app(command, env=environment, check=True, cwd=tmp_path).stdout

    words = ["--out", str(tmp_path / "out"), "--seeds", "0", "1", "--", *ONLINE, "epochs=1"]
    assert "wandb: http://" in call("compare.py", *words)
    (name,) = [name for name in server.runs if name.startswith("compare-")]
    compared = server.runs[name]
    assert compared["exitcode"] == 0
    assert compared["facts"]["jobType"] == "compare"
    assert config(compared)["runs"] == 4
    assert config(compared)["variants"] == ["plain", "AA"]
    (folder,) = (tmp_path / "out" / "compare").iterdir()
    groups = {run["facts"]["groupName"] for run in server.runs.values()}
    names = {run["facts"]["displayName"] for run in server.runs.values()} - {
        compared["facts"]["displayName"]
    }
    assert names == {f"{one} seed={seed}" for one in ("none", "aa") for seed in (0, 1)}
    assert config(compared)["data"] == "lookup"
    assert len(server.runs) == 5
    assert groups == {within_length(folder.name, 128)}
    (entry,) = compared["history"]
    assert entry["compare/table"]["_type"] == "table-file"
    assert entry["compare/table"]["nrows"] == 2
    assert entry["compare/differences"]["_type"] == "image-file"
    assert entry["compare/curves"]["_type"] == "image-file"

    # The same command trains nothing, so it posts nothing; report.py --wandb updates the same run.
    assert "wandb: " not in call("compare.py", *words)
    assert len(server.runs[name]["history"]) == 1
    call("report.py", str(folder), "--wandb")
    assert len(server.runs) == 5
    assert len(server.runs[name]["history"]) == 2
