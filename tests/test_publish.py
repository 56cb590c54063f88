"""scripts/publish.py: results to commit, without paths or checkpoints, never overwritten."""

import json
import shutil

import pytest

from reporting import runs
from scripts.publish import main, publish

from folders import make_run
from helpers import everything_below, refused


def make(folder):
    """Make three finished runs, one that diverged, and an unfinished one."""
    for seed in (0, 1):
        make_run(folder / "aa" / f"seed={seed}", 71.25 + seed, seed, "aa")
    make_run(folder / "none" / "seed=0", 70.5)
    (folder / "none" / "seed=0" / "last.pt").write_bytes(b"weights")
    make_run(folder / "none" / "seed=1", seed=1, finished=False)
    (folder / "none" / "seed=2").mkdir()
    (folder / "none" / "seed=2" / "failed.json").write_text('{"format": 3, "error": "loss is NaN"}')
    settings = "optim: {lr: 9.0}\nwandb: {entity: somebody}\n"
    (folder / "none" / "seed=2" / ".hydra").mkdir()
    (folder / "none" / "seed=2" / ".hydra" / "config.yaml").write_text(settings)


def files(folder):
    found = everything_below(folder)
    return {f"{path.relative_to(folder)}": found[path] for path in found if path.is_file()}


def test_what_the_report_reads_is_published_and_nothing_else(tmp_path):
    make(tmp_path / "out")
    said = publish(tmp_path / "out", tmp_path / "kept")
    assert sorted(files(tmp_path / "kept")) == sorted(
        [
            *(f"aa/seed={s}/{name}" for s in (0, 1) for name in ("metrics.csv", "summary.json")),
            *(f"none/seed=0/{name}" for name in ("metrics.csv", "summary.json")),
            "none/seed=2/failed.json",
            "none/seed=2/.hydra/config.yaml",
        ]
    )
    assert "4 runs added" in said
    assert f"left out, unfinished: {tmp_path / 'out' / 'none' / 'seed=1'}" in said
    before, excluded_before = runs.read([tmp_path / "out"])
    after, excluded_after = runs.read([tmp_path / "kept"])
    assert [run.settings for run in after] == [run.settings for run in before]
    assert [run.rows for run in after] == [run.rows for run in before]
    assert [e.kind for e in excluded_after] == ["diverged"]
    (diverged,) = (e for e in excluded_before if e.kind == "diverged")
    assert excluded_after[0].settings == diverged.settings
    assert b"somebody" not in b"".join(files(tmp_path / "kept").values())
    assert sorted(e.kind for e in excluded_before) == ["diverged", "unfinished"]


def test_nothing_published_names_a_folder_or_an_account(tmp_path):
    settings = {"wandb__entity": "somebody", "resume": "/home/somebody/last.pt"}
    make_run(tmp_path / "out" / "seed=0", data__root="/home/somebody/data", **settings)
    publish(tmp_path / "out", tmp_path / "kept")
    for text in files(tmp_path / "kept").values():
        assert b"somebody" not in text
        assert str(tmp_path).encode() not in text
    config = json.loads((tmp_path / "kept" / "seed=0" / "summary.json").read_text())["config"]
    assert config["optim"] == {"_target_": "torch.optim.SGD", "lr": 0.2, "weight_decay": 5e-4}
    assert "wandb" not in config


def test_a_second_time_adds_what_has_finished_since(tmp_path):
    make(tmp_path / "out")
    publish(tmp_path / "out", tmp_path / "kept")
    before = files(tmp_path / "kept")
    shutil.rmtree(tmp_path / "out" / "none" / "seed=1")
    make_run(tmp_path / "out" / "none" / "seed=1", 70.0, 1)
    said = publish(tmp_path / "out", tmp_path / "kept")
    assert "1 run added, 4 runs already there" in said
    after = files(tmp_path / "kept")
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {
        f"none/seed=1/{name}" for name in ("metrics.csv", "summary.json")
    }


def test_other_numbers_are_not_replaced_and_nothing_is_written(tmp_path):
    make(tmp_path / "out")
    publish(tmp_path / "out", tmp_path / "kept")
    before = files(tmp_path / "kept")
    shutil.rmtree(tmp_path / "out" / "aa" / "seed=1")
    make_run(tmp_path / "out" / "aa" / "seed=1", 99.0, 1, "aa")
    with pytest.raises(ValueError, match=r"aa/seed=1/(summary.json|metrics.csv) holds other"):
        publish(tmp_path / "out", tmp_path / "kept")
    assert files(tmp_path / "kept") == before


@pytest.mark.parametrize("target", ["out", "out/below", "."])
def test_folders_that_overlap_are_refused(tmp_path, target):
    make(tmp_path / "out")
    before = files(tmp_path)
    with pytest.raises(ValueError, match="overlap"):
        publish(tmp_path / "out", tmp_path / target)
    assert files(tmp_path) == before


def test_the_command_names_what_is_wrong(tmp_path, capsys):
    line = refused(capsys, main, tmp_path / "nowhere", tmp_path / "kept")
    assert line == f"publish.py: there is no {tmp_path / 'nowhere'}\n"
    assert not (tmp_path / "kept").exists()
