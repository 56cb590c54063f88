"""Results belong to their images: a run is not reused if its data set has changed since."""

import json
import shutil

import pytest
import torch
from omegaconf import OmegaConf

from data import folder, folder_digest, load_folder
from models.fields import FORMAT
from reporting import runs
from scripts.publish import publish
from training.comparison import plan
from training.compose import compose_config

from folders import make_run, report
from helpers import everything_below, rows
from image_folders import RUN, write


def words(root):
    return ["data=folder", f"data.root='{root}'", "data.name=mine", *RUN]


def replace_all(root):
    for number, path in enumerate(sorted(root.rglob("*.png"))):
        write(path, seed=1000 + number)


def replace_validation(root):
    shutil.rmtree(root / "val")
    write(root / "val" / "ant" / "other.png", seed=7)


# Some of the changes that the digest detects (see test_data_layout.py).
CHANGES = {
    "all others": replace_all,
    "one added": lambda root: write(root / "train" / "ant" / "3.png", seed=3),
    "one corrected": lambda root: write(root / "train" / "ant" / "0.png", seed=500),
    "another label": lambda root: (root / "train/ant/0.png").rename(root / "train/Bee/9.png"),
    "another class": lambda root: [
        path.rename(path.with_name("ox")) for path in root.glob("*/ant")
    ],
    "others to evaluate on": replace_validation,
}
SAME = {
    "as it was": lambda root: None,
    "files of other kinds": lambda root: (root / "notes.txt").write_text("mine"),
    "other times": lambda root: [path.touch() for path in root.rglob("*.png")],
}


def test_a_run_is_neither_finished_nor_continued_on_other_images(run, root, tmp_path):
    run(base=words(root), folder="finished")
    with pytest.raises(SystemExit):
        run("max_minutes=1e-9", base=words(root), folder="stopped")
    folders = [tmp_path / "finished", tmp_path / "stopped"]
    before = [everything_below(folder) for folder in folders]
    unchanged = shutil.copytree(root, tmp_path / "unchanged")
    taken = []
    for name, change in CHANGES.items():
        shutil.rmtree(root)
        change(shutil.copytree(unchanged, root))
        for where in ("finished", "stopped"):
            line = rf"{where}/last\.pt is from a run on other images that are also called mine; "
            try:
                with pytest.raises(ValueError, match=line):
                    run("resume=auto", base=words(root), folder=where)
            except pytest.fail.Exception:
                taken.append((name, where))
    assert taken == []
    assert [everything_below(folder) for folder in folders] == before


@pytest.mark.parametrize("name", SAME)
def test_a_finished_run_is_that_of_the_same_images(run, root, tmp_path, monkeypatch, name):
    summary = run(base=words(root))
    copy = shutil.copytree(root, tmp_path / "elsewhere")
    SAME[name](copy)
    monkeypatch.setattr(folder, "decode", None)  # must not be called
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    again = run("resume=auto", base=words(copy))
    assert again == json.loads(json.dumps(summary))
    shutil.rmtree(copy)  # the result needs no images
    assert run("resume=auto", base=words(copy)) == again


def test_a_run_that_diverged_did_so_on_its_images(run, root, tmp_path):
    """Other images of the same name may be trained on; a failure of older code has no digest."""
    with pytest.raises(FloatingPointError):
        run("optim.lr=1e30", base=words(root))
    failure = tmp_path / "run" / "failed.json"
    assert json.loads(failure.read_text())["data_digest"] == folder_digest(str(root), 8)
    with pytest.raises(ValueError, match="this run has diverged"):
        run("optim.lr=1e30", "resume=auto", base=words(root))
    kept = failure.read_text()
    replace_all(root)
    with pytest.raises(ValueError, match=r"failed\.json is from a run on other images .* mine; "):
        run("optim.lr=1e30", "resume=auto", base=words(root))
    assert failure.read_text() == kept
    failure.write_text(json.dumps({**json.loads(kept), "data_digest": None}))
    with pytest.raises(ValueError, match="data_digest"):
        run("optim.lr=1e30", "resume=auto", base=words(root))
    failure.write_text(json.dumps({k: v for k, v in json.loads(kept).items() if k[0] != "d"}))
    with pytest.raises(ValueError, match="this run has diverged"):
        run("optim.lr=1e30", "resume=auto", base=words(root))


def test_what_a_run_says_of_its_images(run, root, tmp_path):
    summary = run(base=words(root))
    dataset = load_folder(str(root), "mine", 8)
    described = json.loads((tmp_path / "run" / "config.json").read_text())
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    digests = {d["data_digest"] for d in (summary, described, state["description"])}
    assert digests == {dataset.digest}
    assert summary["notes"] == ["mine: 12 images to train on, 3 to evaluate on"]


def test_a_run_on_other_images_begins_anew_where_it_may(run, root, tmp_path):
    old = run(base=words(root))
    replace_all(root)
    new = run("resume=auto", "overwrite=true", base=words(root))
    assert new["data_digest"] != old["data_digest"]
    assert len(rows(tmp_path / "run")) == 1
    assert run("resume=auto", "overwrite=true", base=words(root)) == json.loads(json.dumps(new))


def test_a_run_of_older_code_is_finished_as_before(run, root, tmp_path):
    """Its summary does not record the digest of its images."""
    run(base=words(root))
    summary = tmp_path / "run" / "summary.json"
    older = {k: v for k, v in json.loads(summary.read_text()).items() if k != "data_digest"}
    summary.write_text(json.dumps(older))
    assert run("resume=auto", base=words(root)) == older


@pytest.mark.parametrize("settings", [{}, {"val_size": 5}, {"skip_damaged": True}])
def test_the_digest_is_had_without_the_images(root, monkeypatch, settings):
    if "skip_damaged" in settings:
        (root / "train" / "ant" / "0.png").write_bytes(b"no image")
    expected = load_folder(str(root), "mine", 8, **settings).digest
    monkeypatch.setattr(folder, "decode", None)  # must not be called
    assert folder_digest(str(root), 8, **settings) == expected


def test_a_file_that_cannot_be_read_is_named_instead(root):
    (root / "train" / "ant" / "0.png").unlink()
    (root / "train" / "ant" / "0.png").symlink_to("nowhere")
    with pytest.raises(ValueError, match=r"1 of 12 images cannot be read.*ant/0\.png"):
        folder_digest(str(root), 8)


# ---- Comparisons, reports, published results ----------------------------------------------------


def made(folder, digest, *, seed=0, data=None, **options):
    """Make a finished run on images with this digest (None as in older code)."""
    known = {} if digest is None else {"data_digest": digest}
    settings = {"_target_": "data.load_folder", "name": "mine", "val_size": 0} | (data or {})
    return make_run(
        folder, 70.0 + seed, seed, evaluated_on="val", known=known, data=settings, **options
    )


def test_a_comparison_is_not_finished_by_runs_on_other_images(root, tmp_path):
    def planned(*more):
        given = ["data=folder", f"data.root='{root}'", "data.name=mine", "data.size=8", *more]
        return plan([["attention=none"]], [0, 1], given, tmp_path / "out")

    _, (first, second) = planned()
    digest = folder_digest(str(root), 8)
    settings = {"size": 16, "white": None, "skip_damaged": False, "max_pixels": 268435456}
    for run, known in ((first, digest), (second, None)):
        made(run.folder, known, seed=run.seed, data=settings)
    assert not any(run.missing for run in planned()[1])
    write(root / "train" / "ant" / "0.png", seed=500)
    with pytest.raises(ValueError, match=r"0 is from a run on other images.* another data\.nam"):
        planned()
    assert len(planned("data.val_size=3")[1]) == 2  # a separate comparison
    shutil.rmtree(first.folder)
    assert [run.missing for run in planned()[1]] == [True, False]
    first.folder.mkdir()
    failure = {"format": FORMAT, "error": "the loss is nan", "data_digest": digest}
    (first.folder / "failed.json").write_text(json.dumps(failure))
    assert [run.missing for run in planned()[1]] == [False, False]  # its settings are unknown
    cfg = compose_config(["data=folder", f"data.root='{root}'", "data.name=mine", "data.size=8"])
    (first.folder / ".hydra").mkdir()
    (first.folder / ".hydra" / "config.yaml").write_text(OmegaConf.to_yaml(cfg))
    with pytest.raises(ValueError, match=r"0 is from a run on other images.* also called mine"):
        planned()


@pytest.mark.parametrize(
    ("digests", "kept"),
    [
        (["a", "a", "b", "b", "b"], [2, 3, 4]),
        (["a", "b"], [0]),
        ([None, "a", None], [0, 1, 2]),  # those without a digest may be the same
        ([None, "a", None, "b", "b"], [3, 4]),
        ([None, None], [0, 1]),
    ],
)
def test_a_report_is_of_one_data_set(tmp_path, digests, kept):
    for seed, digest in enumerate(digests):
        made(tmp_path / f"{seed}", digest, seed=seed)
    found, _ = runs.read([tmp_path])
    (variant,), excluded = runs.group_by_variant(found)
    assert [run.seed for run in variant.runs] == kept
    assert {e.folder.name for e in excluded} == {f"{n}" for n in range(len(digests))} - {
        f"{seed}" for seed in kept
    }
    assert {e.kind for e in excluded} <= {"of another data set"}
    assert all("other images that are called mine val, too: digest " in e.why for e in excluded)


def test_images_that_settings_tell_apart_are_variants(tmp_path):
    for seed, (digest, data) in enumerate(
        [
            ("a", {"val_size": 5}),
            ("b", {"val_size": 6}),
            ("b", {"val_size": 6, "size": 16}),
            ("c", {"val_size": 6, "size": 32}),
        ]
    ):
        made(tmp_path / f"{seed}", digest, seed=seed, data=data)
    variants, excluded = runs.group_by_variant(runs.read([tmp_path])[0])
    assert sorted(run.seed for variant in variants for run in variant.runs) == [0, 1, 2]
    assert [e.folder.name for e in excluded] == ["3"]


def test_results_of_other_images_are_not_published_together(tmp_path):
    made(tmp_path / "out" / "0", "a", seed=0)
    made(tmp_path / "out" / "1", None, seed=1)
    publish(tmp_path / "out", tmp_path / "kept")
    published = everything_below(tmp_path / "kept")
    made(tmp_path / "new" / "2", "b", seed=2)
    with pytest.raises(ValueError, match=r"other images that are called mine val, too.*of its own"):
        publish(tmp_path / "new", tmp_path / "kept")
    assert everything_below(tmp_path / "kept") == published
    made(tmp_path / "out" / "2", "b", seed=2)
    with pytest.raises(ValueError, match=r"not a as of 1 run; publish"):
        publish(tmp_path / "out", tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.usefixtures("sketches")
def test_a_report_says_that_the_validation_images_are_a_folders_own(tmp_path):
    """For held-out images, this is tested in test_report.py."""
    made(tmp_path / "0", "a")
    written = report([tmp_path], tmp_path / "out")
    assert "evaluated on its own validation images. Network" in written
