"""The command line: where runs go, and users' own settings."""

import json

import pytest

import train
from training import cli
from training.settings import check

from app import run_app
from helpers import ROOT, TINY, call, refused


def test_a_run_that_diverges_leaves_word_of_it_until_it_is_run_again(tmp_path, capsys):
    words = [*TINY, f"out_dir={tmp_path}", f"run_dir='{tmp_path / 'r'}'"]
    failure = tmp_path / "r" / "failed.json"
    assert "the loss is not finite in epoch 1" in refused(capsys, cli.run, *words, "optim.lr=1e30")
    before = failure.read_bytes()
    assert "not finite in epoch 1" in json.loads(before)["error"]
    line = refused(capsys, cli.run, *words, "optim.lr=1e30", "resume=auto")
    assert "has diverged (the loss is " in line
    assert "overwrite=true trains" in line
    assert failure.read_bytes() == before
    call(cli.run, *words, "epochs=1")
    assert not failure.exists()
    assert (tmp_path / "r" / "summary.json").exists()


@pytest.mark.parametrize("out", ["out", "./out", "../out", "x/../out", "out//deep/"])
def test_a_run_has_a_folder_of_its_own_however_out_dir_is_written(
    untrained, monkeypatch, tmp_path, out
):
    (tmp_path / "x").mkdir()
    monkeypatch.chdir(tmp_path / "x" if out.startswith("..") else tmp_path)
    call(cli.run, *TINY, f"out_dir={out}", "seed=3")
    (folder,) = untrained
    assert folder.name == "seed=3"
    assert folder.parent.parent == tmp_path / "out" / ("deep" if "deep" in out else "") / "lookup"


def test_an_interrupted_start_says_so(tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train", interrupted)
    line = refused(capsys, cli.run, *TINY, f"out_dir={tmp_path}", code=130)
    assert line == "train.py: interrupted before training began\n"


def test_a_sweep_makes_a_folder_for_each_variant_and_seed(untrained, tmp_path):
    call(cli.run, "-m", *TINY, "attention=none,aa", "seed=0,1", f"out_dir={tmp_path}")
    assert [p.name for p in untrained] == ["seed=0", "seed=1"] * 2
    aa, none = sorted({p.parent.name for p in untrained})
    assert none.startswith("attention=none,batch_size=32,")
    assert aa.startswith("attention=aa,batch_size=32,")
    assert "tracking" not in aa
    assert max(len(name) for name in (aa, none)) < 200  # a file system's limit is 255


@pytest.mark.slow
@pytest.mark.parametrize("dk", [20, 40])
@pytest.mark.parametrize("dv", [4, 8])
@pytest.mark.parametrize("heads", [2, 4])
def test_the_sweep_of_the_readme_can_be_trained(settings, dk, dv, heads):
    words = ["attention=aa", f"attention.dk={dk}", f"attention.dv={dv}", f"attention.Nh={heads}"]
    check(settings(*words, base=[w for w in TINY if "widths" not in w]))


OWN = {
    "mine.yaml": "defaults: [config, _self_]\nepochs: 1\n",
    "loose.yaml": "epochs: 1\n",
    "damaged.yaml": "epochs: [\n",
    "experiment/fast.yaml": "# @package _global_\nepochs: 1\n",
}


@pytest.fixture
def own_configs(tmp_path):
    for name, text in OWN.items():
        (tmp_path / "own" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "own" / name).write_text(text)
    return tmp_path / "own"


@pytest.mark.parametrize(
    ("words", "folder"),
    [
        (["--config-dir={own}", "--config-name=mine"], "config=mine"),
        (["--config-dir={own}", "experiment=fast"], "experiment=fast"),
        (["hydra.searchpath=[{own}]", "experiment=fast"], "experiment=fast"),
    ],
)
def test_settings_of_ones_own(own_configs, tmp_path, words, folder):
    given = [word.format(own=own_configs) for word in words]
    given += [word for word in TINY if not word.startswith(("experiment", "epochs"))]
    given += ["model=resnet8", "attention=none", "data=lookup", f"out_dir='{tmp_path / 'out'}'"]
    done = run_app([ROOT / "train.py", *given], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (summary,) = (tmp_path / "out").rglob("summary.json")
    assert json.loads(summary.read_text())["epochs"] == 1
    assert folder in str(summary.parent)
    assert str(own_configs) not in str(summary.parent)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--config-dir={own}", "--config-name=loose"], "loose.yaml: begin it with defaults: [co"),
        (["--config-dir={own}", "--config-name=none"], "there is no {own}/none.yaml, and all sett"),
        (["--config-dir={own}", "--config-name=attention/aa"], "group; write attention=aa"),
        (["--config-dir={own}", "--config-name=damaged"], "damaged.yaml"),
        (["--config-dir={own}/nowhere"], "Additional config directory '{own}/nowhere' not found"),
        (["--config-path={own}"], "has no config.yaml; --config-dir={own} adds its files"),
    ],
)
def test_settings_of_ones_own_that_cannot_be_are_one_line(own_configs, tmp_path, words, line):
    given = [word.format(own=own_configs) for word in words]
    done = run_app([ROOT / "train.py", *given], cwd=tmp_path)
    assert done.returncode == 2
    assert line.format(own=own_configs) in done.stderr
    assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["own"]
