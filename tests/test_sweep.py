"""Sweeps by ``train.py -m``: a failed job does not end them; a table shows each job's outcome."""

import json
import shutil
from types import SimpleNamespace

import pytest
from hydra import initialize_config_dir
from omegaconf import OmegaConf

from reporting import runs
from training import cli, sweep
from training.assemble import build_model
from training.stopping import Stop

from folders import failed, make_run
from helpers import CONFIGS, TINY, call
from image_folders import write, write_folder

ONE_EPOCH = [*(w for w in TINY if "epochs" not in w), "epochs=1", "attention=none"]
# Three of the twelve are rejected, and one diverges: the clipped ones take steps of 0.1 and 1.
TWELVE = [
    *ONE_EPOCH,
    *("optim=sgd", "optim.weight_decay=0", "optim.momentum=0", "optim.nesterov=false"),
    *("optim.lr=0.01,0.02,1e30", "grad_clip=null,1e-30,1e-31,-1"),
]


@pytest.fixture
def sweeps(tmp_path, capfd, steps):
    """A function that runs ``train.py -m``; it returns exit code, output and number of steps."""

    def go(*words):
        steps.clear()
        code = 0
        try:
            call(cli.run, "-m", *words, f"out_dir={tmp_path}")
        except SystemExit as stopped:
            code = stopped.code
        said = capfd.readouterr()
        return SimpleNamespace(code=code, out=said.out, err=said.err, steps=len(steps))

    return go


def table(said):
    """Return the lines of the final table by job number, and its last line."""
    lines = said.out.splitlines()
    jobs = {int(line[1:].split()[0]): line for line in lines if line.startswith("#")}
    return jobs, lines[-1]


@pytest.mark.thorough
def test_twelve_jobs_of_which_three_cannot_be_trained_and_one_diverges_twice(sweeps, tmp_path):
    said = sweeps(*TWELVE, "resume=auto")
    assert said.code == 1
    jobs, count = table(said)
    assert count == "12 jobs: 8 done, 1 diverged, 3 refused"
    assert sorted(jobs) == list(range(12))
    for number, line in jobs.items():
        expected = "refused: grad_clip=-1.0 must be" if number % 4 == 3 else "done: test top-1 "
        assert ("diverged: the loss is not finite" if number == 8 else expected) in line
        assert f"optim.lr={['0.01', '0.02', '1e+30'][number // 4]} " in line
        assert "batch_size" not in line  # the same for all jobs
    lines = said.err.splitlines()
    assert [line.partition(": g")[0].partition(": the")[0] for line in lines] == [
        f"train.py: job #{number}" for number in (3, 7, 8, 11)
    ]
    assert all("grad_clip=-1.0 must be above 0" in lines[number] for number in (0, 1, 3))
    assert "the loss is not finite" in lines[2]
    assert "job #5 of 12: optim.lr=0.02 grad_clip=1e-30" in said.out
    assert not list(tmp_path.rglob(".sweep-*"))
    assert len(list(tmp_path.rglob("summary.json"))) == 8
    _, excluded = runs.read([tmp_path])
    refused = [one for one in excluded if one.kind == "refused"]
    assert (len(excluded), len(refused)) == (4, 3)
    assert all(one.why.startswith("grad_clip=-1.0 must be above 0") for one in refused)
    assert {one.settings["grad_clip"] for one in refused} == {-1.0}
    before = {p: p.read_bytes() for p in tmp_path.rglob("*.json")}

    again = sweeps(*TWELVE, "resume=auto")
    assert (again.code, again.steps) == (1, 0)
    jobs, count = table(again)
    assert count == "12 jobs: 8 skipped, 1 diverged, 3 refused"
    assert "skipped: finished before: test top-1 " in jobs[0]
    assert "overwrite=true trains it from scratch" in jobs[8]
    assert {p: p.read_bytes() for p in tmp_path.rglob("*.json")} == before

    # Only the missing run is trained again.
    lost = next(p.parent for p in before if p.name == "summary.json" and "1e-31" in str(p))
    shutil.rmtree(lost)
    third = sweeps(*TWELVE, "resume=auto")
    assert (third.code, third.steps) == (1, 3)
    assert table(third)[1] == "12 jobs: 1 done, 7 skipped, 1 diverged, 3 refused"


@pytest.mark.slow
def test_what_diverged_is_trained_again_when_asked_for(sweeps, tmp_path):
    words = [*ONE_EPOCH, "optim.lr=0.002,1e30"]
    assert sweeps(*words).code == 1
    (failure,) = tmp_path.rglob("failed.json")
    said = sweeps(*words, "resume=auto", "overwrite=true")
    assert table(said)[1] == "2 jobs: 1 skipped, 1 diverged"
    assert said.steps > 0
    assert failure.exists()


@pytest.mark.slow
def test_a_mistake_of_the_program_in_one_job_is_shown_and_ends_no_other(
    sweeps, monkeypatch, tmp_path
):
    def breaking(cfg, **sizes):
        if cfg.seed == 1:
            raise RuntimeError("a bug")
        return build_model(cfg, **sizes)

    monkeypatch.setattr("training.assemble.build_model", breaking)
    said = sweeps(*ONE_EPOCH, "seed=0,1,2")
    jobs, count = table(said)
    assert said.code == 1
    assert count.startswith("3 jobs: 2 done, 1 failed; the same command with resume=auto trains")
    assert "seed=1  failed: RuntimeError: a bug" in jobs[1]
    assert "Traceback" in said.err
    (reason,) = tmp_path.rglob("no_run.json")
    assert json.loads(reason.read_text())["outcome"] == "failed"
    monkeypatch.setattr("training.assemble.build_model", build_model)
    assert table(sweeps(*ONE_EPOCH, "seed=0,1,2", "resume=auto"))[1] == "3 jobs: 1 done, 2 skipped"
    assert not reason.exists()


@pytest.mark.slow
def test_a_signal_after_a_jobs_last_epoch_ends_the_sweep_and_the_job_is_done(sweeps, monkeypatch):
    def leave(self, finished):
        assert finished
        raise SystemExit(143)

    monkeypatch.setattr(Stop, "leave", leave)
    said = sweeps(*ONE_EPOCH, "seed=0,1,2")
    assert said.code == 143
    jobs, count = table(said)
    assert count.startswith("3 jobs: 1 done, 2 not started; the same command with resume=auto")
    assert "done: test top-1 " in jobs[0]


def test_a_finished_job_needs_its_summary_alone_and_that_of_its_settings(sweeps, tmp_path):
    """A default may have changed in the meantime, which the folder's name does not show."""
    sweeps(*ONE_EPOCH, "seed=0,1")
    (path,) = tmp_path.rglob("seed=0/metrics.csv")
    path.write_text("damaged")
    (path,) = tmp_path.rglob("seed=1/summary.json")
    summary = json.loads(path.read_text())
    summary["config"]["label_smoothing"] = 0.25
    path.write_text(json.dumps(summary))
    said = sweeps(*ONE_EPOCH, "seed=0,1", "resume=auto")
    jobs, count = table(said)
    assert (said.code, said.steps, count) == (0, 0, "2 jobs: 1 done, 1 skipped")
    assert "done: test top-1" in jobs[1]  # the checkpoint has the job's settings


@pytest.mark.slow
def test_a_result_on_other_images_is_not_taken_for_the_jobs(sweeps, tmp_path, monkeypatch):
    root = write_folder(tmp_path, monkeypatch)
    words = ["data=folder", f"data.root='{root}'", "data.size=8", "augmentation.crop_pad=2"]
    words += ["batch_size=4", "epochs=1", "model=resnet8", "model.widths=[4,8,8]", "model.stem=4"]
    words += ["tracking=csv", "precision=fp32", "optim.lr=0.1,1e30", "resume=auto"]
    sweeps(*words)
    assert table(sweeps(*words))[1] == "2 jobs: 1 skipped, 1 diverged"
    write(root / "train" / "ant" / "0.png", seed=500)
    said = sweeps(*words)
    jobs, count = table(said)
    assert (said.code, said.steps) == (1, 0)
    assert count.startswith("2 jobs: 2 failed")
    assert all(
        "is from a run on other images that are also called my images" in jobs[n] for n in (0, 1)
    )
    assert table(sweeps(*words, "overwrite=true"))[1] == "2 jobs: 1 done, 1 diverged"


@pytest.mark.parametrize(
    ("words", "reasons"),
    [
        (["grad_clip=-1,-2"], ["grad_clip=-1.0 must be above 0", "grad_clip=-2.0 must be above 0"]),
        (["optim.lr=inf,nan"], ["optim.lr=inf must be finite", "optim.lr=nan must be finite"]),
        (["augmentation.policy=foo,bar"], ["policy=foo is unknown", "policy=bar is unknown"]),
        # With Hydra's glob patterns, and with keys that override earlier ones.
        (["schedule=glob(*st*)", "grad_clip=-1"], ["grad_clip=-1.0 must be above 0"] * 2),
        (["seed=0,1,2", "seed=4,5", "grad_clip=-1,-2", "grad_clip=-3"], ["must be above 0"] * 2),
        (["data=folder", "seed=0,1"], ["data.root has no value; give data.root=..."] * 2),
    ],
)
def test_a_sweep_of_which_no_job_can_be_trained(sweeps, tmp_path, words, reasons):
    """It keeps the record of the previous sweep."""
    record = tmp_path / "lookup" / "multirun.yaml"
    record.parent.mkdir()
    record.write_text("of the one before")
    own = [w for w in ONE_EPOCH if not w.startswith("data.") or words[0] != "data=folder"]
    said = sweeps(*own, *words)
    assert (said.code, said.steps) == (2, 0)
    jobs, count = table(said)
    assert count == "2 jobs: 2 refused"
    assert all(reason in jobs[number] for number, reason in enumerate(reasons))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [record]
    assert record.read_text() == "of the one before"


def start_sweep(folder):
    """Call the callback that starts a sweep of three jobs."""
    settings = {
        "sweep": {"dir": str(folder)},
        "sweeper": {"_target_": "a.BasicSweeper", "params": {"grad_clip": "1"}},
        "overrides": {"task": ["epochs=1", "seed=0,1,2"]},
    }
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        sweep.StartSweep().on_multirun_start(OmegaConf.create({"hydra": settings}))


@pytest.fixture
def started(tmp_path):
    """A function that records a job of a sweep of three jobs, which has started."""
    start_sweep(tmp_path)

    def note(number, outcome="", why=""):
        folder = str(tmp_path / str(number))
        sweep.Record(number, f"seed={number}", folder).write(outcome, why)

    yield note
    sweep.end(None)


def test_what_a_killed_sweep_has_left_is_removed(started, tmp_path):
    """Files of a sweep that is still running are kept."""
    started(0)
    (running,) = tmp_path.glob(".sweep-*")
    killed = tmp_path / ".sweep-killed"
    killed.mkdir()
    (killed / "lock").touch()
    start_sweep(tmp_path)
    assert not killed.exists()
    assert (running / "0.json").exists()
    sweep.end(None)
    assert [*tmp_path.glob(".sweep-*")] == [running]


def test_a_process_that_dies_leaves_what_its_folder_says(started, tmp_path, capsys):
    """A process of Slurm or joblib may be killed, and then the launcher returns nothing."""
    make_run(tmp_path / "0", 61.25, seed=0)
    failed(tmp_path / "1", "the loss is not finite in epoch 1")
    for number in range(3):
        started(number)
    assert sweep.end(RuntimeError("job 7 was killed")) == 1
    assert capsys.readouterr().out.splitlines()[1:] == [
        "#0    seed=0  done: test top-1 61.25, top-5 81.25",
        "#1    seed=1  diverged: the loss is not finite in epoch 1",
        "#2    seed=2  failed: job 7 was killed",
        "3 jobs: 1 done, 1 diverged, 1 failed; the same command with resume=auto trains what is "
        "missing",
    ]


@pytest.mark.parametrize(
    ("outcomes", "error", "code"),
    [
        (["done", "skipped", "done"], None, 0),
        (["done", "diverged", "done"], None, 1),
        (["refused"] * 3, None, 2),
        (["done", "stopped"], SystemExit(138), 138),
        (["done", "stopped"], SystemExit(0), 0),
        (["failed", "stopped"], SystemExit(0), 1),
        (["done"], KeyboardInterrupt(), 130),
        ([], KeyboardInterrupt(), 130),
        ([], ValueError("of Hydra's own"), None),
    ],
)
def test_the_exit_code_of_a_sweep(started, outcomes, error, code, capsys):
    for number, outcome in enumerate(outcomes):
        started(number, outcome)
    assert sweep.end(error) == code
    missing = 3 - len(outcomes)
    if code is not None and missing:
        assert f"{missing} not started" in capsys.readouterr().out


def test_a_run_of_an_agent_has_a_folder_by_its_ids(untrained, monkeypatch, tmp_path):
    """wandb may try the same settings twice, and resumes a preempted run under its old id."""
    monkeypatch.setenv("WANDB_SWEEP_ID", "s1")
    for run_id, words in (("r1", []), ("r2", []), ("r1", ["seed=5"])):
        monkeypatch.setenv("WANDB_RUN_ID", run_id)
        call(cli.run, *TINY, *words, f"out_dir={tmp_path}")
    call(cli.run, *TINY, f"hydra.run.dir={tmp_path / 'x'}")
    top = tmp_path / "lookup" / "sweep=s1"
    assert untrained == [top / "run=r1", top / "run=r2", top / "run=r1", tmp_path / "x"]
    monkeypatch.delenv("WANDB_SWEEP_ID")  # WANDB_RUN_ID alone names no folder
    call(cli.run, *TINY, f"out_dir={tmp_path}")
    assert untrained[-1].name == "seed=0"


def test_a_run_of_an_agent_that_is_refused_leaves_its_reason(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_SWEEP_ID", "s1")
    monkeypatch.setenv("WANDB_RUN_ID", "r1")
    words = [*TINY, "attention.dk=7"]
    with pytest.raises(SystemExit):
        call(cli.run, *words, f"out_dir={tmp_path / 'out'}")
    _, (refused,) = runs.read([tmp_path])
    assert (refused.kind, refused.folder.name) == ("refused", "run=r1")
    assert "dk=7 must be divisible by Nh=4" in refused.why
    assert refused.settings["attention.dk"] == 7
    monkeypatch.delenv("WANDB_SWEEP_ID")  # without a sweep, the printed error is enough
    with pytest.raises(SystemExit):
        call(cli.run, *words, f"out_dir={tmp_path / 'alone'}")
    assert not [path for path in (tmp_path / "alone").rglob("*") if path.is_file()]
