"""The command line: what it makes of wrong input, where runs go, and the two scripts."""

import json
import subprocess
import sys

import pytest

import train
from training import cli

from conftest import CONFIGS, TINY

ROOT = CONFIGS.parent


@pytest.fixture
def command(monkeypatch, tmp_path):
    """A function that runs train.py's command line in this process."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["train.py", *words, f"out_dir={tmp_path}"])
        cli.run(train.main)

    return call


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["optim.lrr=1"], "optim.lrr: there is no setting lrr; optim has lr, betas, weight_decay"),
        (["epoch=3"], "epoch: there is no setting epoch; there are model, attention"),
        (["attention=se", "attention.dk=3"], "there is no setting dk; attention has ratio"),
        (["model.depht=3"], "there is no setting depht; model has name, block, depths"),
        (["epochs=ten"], "epochs: Value 'ten' of type 'str' could not be converted to Integer"),
        (["attention.dk=many"], "attention.dk: Value 'many' of type 'str' is incompatible"),
        (["precision=fp8"], "precision: Invalid value 'fp8', expected one of [auto, fp32, bf16"),
        (["model=resnet9"], "Could not find 'model/resnet9' Available options in 'model': resnet"),
        (["attention"], "Error parsing override 'attention'"),
        (["epochs=0"], "epochs=0 must be at least 1"),
        (["attention.Nh=3"], "dv=8 must be divisible by Nh=3"),
        (["attention.dk=0.2", "attention.dv=2.0"], "attention.dv=2.0 as a fraction must not"),
        (["resume=nowhere"], "resume=nowhere: there is no checkpoint"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_leaves_nothing(command, tmp_path, capsys, words, message):
    given = [*TINY, "attention.dk=12", "attention.dv=8", *words]
    with pytest.raises(SystemExit) as stopped:
        command(*(given if words[0] not in ("attention=se", "attention") else [*TINY, *words]))
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("train.py: ")
    assert message in error
    assert list(tmp_path.iterdir()) == []


def test_absent_data_is_one_line(command, tmp_path, capsys):
    with pytest.raises(SystemExit):
        command("data=cifar100", "data.download=false", f"data.root={tmp_path}")
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"no CIFAR100 in {tmp_path}" in error
    assert "set data.root=..." in error
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_does_not_touch_a_finished_run(command, tmp_path, capsys):
    command(*TINY)
    (summary,) = tmp_path.rglob("summary.json")
    assert summary.parent.name == "seed=0"
    with pytest.raises(SystemExit):
        command(*TINY)
    assert "already holds a run" in capsys.readouterr().err
    assert summary.exists()


def test_a_run_that_diverges_leaves_word_of_it_until_it_is_run_again(command, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        command(*TINY, "optim.lr=1e30", "hydra.run.dir='" + str(tmp_path / "r'"))
    assert stopped.value.code == 2
    assert "the loss is not finite at epoch 1" in capsys.readouterr().err
    written = json.loads((tmp_path / "r" / "failed.json").read_text())
    assert "not finite at epoch 1" in written["error"]
    command(*TINY, "epochs=1", "hydra.run.dir='" + str(tmp_path / "r'"))
    assert not (tmp_path / "r" / "failed.json").exists()
    assert (tmp_path / "r" / "summary.json").exists()


def test_an_interrupted_start_says_so(command, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train", interrupted)
    with pytest.raises(SystemExit) as stopped:
        command(*TINY)
    assert stopped.value.code == 130
    assert capsys.readouterr().err == ("train.py: interrupted before training began\n")


def test_a_full_traceback_on_request(tmp_path):
    done = subprocess.run(
        [sys.executable, "train.py", "epochs=0", f"out_dir={tmp_path}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={"HYDRA_FULL_ERROR": "1", "PATH": ""},
        check=False,
    )
    assert done.returncode != 0
    assert "Traceback" in done.stderr
    assert "epochs=0 must be at least 1" in done.stderr


def test_a_sweep_makes_a_folder_for_each_variant_and_seed(command, tmp_path):
    small = [w for w in TINY if "epochs" not in w]
    command("-m", *small, "epochs=1", "attention=none,aa", "seed=0,1")
    folders = sorted(p.parent for p in tmp_path.rglob("summary.json"))
    assert [p.name for p in folders] == ["seed=0", "seed=1"] * 2
    none, aa = sorted({p.parent.name for p in folders}, reverse=True)
    assert "attention=none" in none
    assert "attention=aa" in aa
    assert "seed" not in aa.replace("data_seed", "")
    assert aa.replace("attention=aa", "attention=none") == none


def test_the_sweep_of_the_readme_composes(command, tmp_path):
    command(
        "-m",
        *[w for w in TINY if "epochs" not in w and "widths" not in w],
        "epochs=1",
        "attention=aa",
        "attention.dk=20,40",
        "attention.dv=4,8",
        "attention.Nh=2,4",
    )
    assert len(list(tmp_path.rglob("summary.json"))) == 8


def test_offline_tracking_goes_to_one_folder_in_separate_runs(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    tiny = [w for w in TINY if "tracking" not in w and "epochs" not in w]
    words = [*tiny, "epochs=1", "seed=0,1", f"out_dir={tmp_path}", "wandb.mode=offline"]
    done = subprocess.run(
        [sys.executable, "train.py", "-m", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.count("wandb: kept offline; `wandb sync") == 2
    kept = [p for p in (tmp_path / "wandb").iterdir() if p.name.startswith("offline-run-")]
    assert len({p.name for p in kept}) == 2
    for folder in kept:
        assert list(folder.glob("*.wandb"))
