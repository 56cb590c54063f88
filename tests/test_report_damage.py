"""Damaged run folders: each is listed with its file and key, and the others are reported."""

import copy
import itertools
import json
import math
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from reporting import page, runs
from reporting.analysis import Analysis
from training.run_folder import RunFolder, UnreadableError

from folders import failed, make_run, report, segment
from helpers import thorough

pytestmark = pytest.mark.usefixtures("sketches")

MISSING = object()
# Replacements for a value. Python's json reads and writes NaN, and reads 1e999 as infinity.
DAMAGES = {
    "missing": MISSING,
    "null": None,
    "text": "rubbish",
    "no text": "",
    "half a character": "\ud800",
    "list": [],
    "nested list": [[1], "x"],
    "object": {},
    "bool": True,
    "nan": math.nan,
    "infinite": math.inf,
    "negative": -3,
    "fraction": 2.5,
    "large": 1e300,
    "huge": 10**400,
}
# Required keys of summary.json; those within config and the segments are below.
PROMISED = {
    *("format", "epochs", "seed", "train/loss", "train/top1", "train/lr"),
    *("test/loss", "test/top1", "test/top5"),
    *("perf/total_seconds", "per_class_top1", "class_names", "model", "attention", "data"),
    *("evaluated_on", "parameters", "flops", "segments", "config"),
}
# If these are not finite, the run has diverged, but the files are not damaged.
SCORED = ("train/loss", "train/top1", "test/loss", "test/top1", "test/top5")
PROMISED_WITHIN = {
    *("config.seed", "config.epochs", "config.attention", "config.data"),
    *(f"segments.{n}.{key}" for n in (0, 1) for key in segment()),
}


def healthy(root):
    make_run(root / "plain")
    return make_run(root / "aa", 72.0, attention="aa")


def whole_summary(root):
    """Return a summary that has every possible key."""
    segments = {"segments": [segment(), segment(2, commit="f" * 40)]}
    folder = make_run(root, 71.0, 1, "aa", facts=segments, grad_clip=None, compile=False)
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def keys_of(value, prefix=()):
    """Yield the paths of all values in an object, including nested ones."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in pairs:
        yield (*prefix, key)
        if isinstance(inner, (dict, list)):
            yield from keys_of(inner, (*prefix, key))


def damaged(value, key, damage):
    value = copy.deepcopy(value)
    inner = value
    for name in key[:-1]:
        inner = inner[name]
    if damage is MISSING:
        del inner[key[-1]]
    else:
        inner[key[-1]] = damage
    return value


def all_damages(root, names):
    """Make a folder for each damage of each value in a summary; yield (key, damage, folder)."""
    summary = whole_summary(root / "whole")
    for (number, key), name in itertools.product(enumerate(keys_of(summary)), names):
        folder = root / "damaged" / f"{number} {name}"
        shutil.copytree(root / "whole", folder)
        text = json.dumps(damaged(summary, key, DAMAGES[name]))
        (folder / "summary.json").write_text(text, encoding="utf-8")
        yield ".".join(map(str, key)), name, folder


def result_of(folder):
    """Return the `Run` or `Excluded` of a folder."""
    found, excluded = runs.read([folder])
    (result,) = [*found, *excluded]
    return result


def one_by_one(root):
    """Yield the result of each damage: (key, damage's name, result)."""
    for key, name, folder in all_damages(root, DAMAGES):
        yield key, name, result_of(folder)


def test_every_damaged_key_of_a_summary_is_named(tmp_path):
    unnoticed = set()
    for key, name, result in one_by_one(tmp_path):
        if isinstance(result, runs.Run):
            unnoticed.add((key, name))
            continue
        assert "\n" not in result.why
        if result.kind == "diverged":
            assert (key, name) in {
                (score, damage) for score in SCORED for damage in ("nan", "infinite", "large")
            }
        else:
            assert result.kind == "unreadable"
            assert result.why.startswith("summary.json")
            # Damage may be noticed because two values disagree; a list is named as a whole.
            names = [part for part in key.split(".") if not part.isdigit()]
            assert any(part in result.why for part in names), (key, name, result.why)
    # Settings may be anything finite. Required keys may have any valid value.
    assert not {(k, n) for k, n in unnoticed if n in ("nan", "infinite", "large", "huge")}
    assert {(k, n) for k, n in unnoticed if k in PROMISED | PROMISED_WITHIN} == {
        *((key, "text") for key in ("model", "data")),
        *((key, "half a character") for key in ("model", "data")),
        *((key, damage) for key in ("train/loss", "test/loss") for damage in ("negative",)),
        *((key, "fraction") for key in ("train/loss", "test/loss", "train/lr", "test/top1")),
        ("train/top1", "fraction"),
        *((key, "fraction") for key in ("test/top5", "perf/total_seconds")),
        ("config.attention", "object"),
        ("config.data", "object"),
        *(
            (f"segments.{n}.{key}", damage)
            for n in (0, 1)
            for key in ("commit", "hardware", "precision")
            for damage in ("text", "half a character")
        ),
        *((f"segments.{n}.versions", "object") for n in (0, 1)),
    }


@pytest.mark.parametrize(
    "names",
    [["missing"], thorough([*DAMAGES])],
    ids=["missing", "all"],
)
def test_no_damage_of_a_summary_ends_the_report(tmp_path, names):
    """All damages at once; folders that still count as runs are reported by data set."""
    healthy(tmp_path)
    folders = [folder for *_, folder in all_damages(tmp_path, names)]
    found, excluded = runs.read([tmp_path])
    assert len(found) + len(excluded) == len(folders) + 3
    for data in {run.data for run in found}:
        report([tmp_path], tmp_path / "out", data)
    assert len(found) > 20


@pytest.mark.thorough
def test_what_is_a_run_in_spite_of_damage_has_a_page(tmp_path):
    healthy(tmp_path / "rest")
    rest, _ = runs.read([tmp_path / "rest"])
    pages = 0
    for _, _, result in one_by_one(tmp_path):
        if isinstance(result, runs.Run):
            variants, _ = runs.group_by_variant([result, *rest])
            page.contents(Analysis(rest[0].data, variants, []))
            pages += 1
    assert pages > 100


@pytest.mark.parametrize("key", sorted(PROMISED - {"format"}))
def test_what_could_not_be_read_is_not_written(tmp_path, key):
    summary = whole_summary(tmp_path / "whole")
    folder = RunFolder(tmp_path)
    with pytest.raises(UnreadableError, match=f"summary.json: {key} is null"):
        folder.write_summary(summary | {key: None})
    assert not (tmp_path / "summary.json").exists()
    folder.write_summary(summary)
    assert json.loads((tmp_path / "summary.json").read_text(encoding="utf-8")) == summary


@pytest.mark.parametrize("where", ["segments", "config"])
def test_a_key_with_a_line_break_is_named_in_one_line(tmp_path, where):
    whole = whole_summary(tmp_path / "whole")
    inner = whole["segments"][0]["versions"] if where == "segments" else whole["config"]["data"]
    inner["torch\nof today"] = math.nan
    (tmp_path / "whole" / "summary.json").write_text(json.dumps(whole), encoding="utf-8")
    result = result_of(tmp_path / "whole")
    assert result.kind == "unreadable"
    assert f"{where}" in result.why
    assert "torch of today is NaN" in result.why
    assert "\n" not in result.why


# ---- metrics.csv --------------------------------------------------------------------------------


def csv_damages(lines):
    """Yield damaged versions of a CSV's lines: (what is wrong, the column it names, cells)."""
    header = lines[0].split(",")
    cells = [line.split(",") for line in lines]
    for place, column in enumerate(header):
        without = [row[:place] + row[place + 1 :] for row in cells]
        yield "missing", column, without
        renamed = [[*header[:place], "x", *header[place + 1 :]], *cells[1:]]
        yield "missing", column, renamed
        yield "twice", column, [[*row, row[place]] for row in cells]
        for row in range(1, len(cells)):
            for value in ("", "x", "None", "True", "[]", "-1", "nan", "inf", "1e300", "1;2"):
                changed = copy.deepcopy(cells)
                changed[row][place] = value
                yield value, column, changed


@pytest.mark.parametrize("finished", [True, False])
def test_every_damaged_column_of_the_metrics_is_named(tmp_path, finished):
    folder = make_run(tmp_path / "a", finished=finished)
    path = folder / "metrics.csv"
    lines = path.read_text(encoding="utf-8").splitlines()
    unused = ("train/other", "perf/images_per_s", "perf/peak_memory_mib")
    for value, column, cells in csv_damages(lines):
        path.write_text("\n".join(",".join(row) for row in cells) + "\n", encoding="utf-8")
        result = result_of(folder)
        if column in unused and value in ("missing", "twice"):
            continue
        if value == "-1" and column in ("train/loss", "test/loss"):
            continue
        if value in ("nan", "inf", "1e300") and column in SCORED:
            assert result.kind == ("diverged" if finished else "unfinished"), (value, column)
            continue
        assert isinstance(result, runs.Excluded), (value, column)
        assert result.kind == "unreadable", (value, column, result)
        assert result.why.startswith("metrics.csv")
        assert column in result.why or column.partition("/")[0] + "/" in result.why


@pytest.mark.parametrize("step", [11, thorough(1)])
def test_a_cut_file_is_never_a_result(tmp_path, step):
    """The cut may be inside a line or after one."""
    folder = make_run(tmp_path / "a", 71.0, 1, "aa")
    for name in ("metrics.csv", "summary.json"):
        content = (folder / name).read_bytes()
        for length in [*range(0, len(content), step), len(content) - 1]:
            (folder / name).write_bytes(content[:length])
            result = result_of(folder)
            assert isinstance(result, runs.Excluded), (name, length)
            assert result.kind == "unreadable"
            assert name in result.why
        (folder / name).write_bytes(content)
    assert isinstance(result_of(folder), runs.Run)


def test_a_row_too_many_or_too_few_is_no_result(tmp_path):
    folder = make_run(tmp_path / "a")
    path = folder / "metrics.csv"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    for changed, why in (
        (lines[:1], "metrics.csv has 0 epochs, but summary.json says epochs is 3"),
        (lines[:3], "metrics.csv has 2 epochs, but summary.json says epochs is 3"),
        ([*lines, lines[3].replace("3,", "4,", 1)], "metrics.csv has 4 epochs"),
        ([*lines[:3], lines[2]], "metrics.csv, row 3: epoch is 2, not 3"),
        ([*lines[:2], lines[3], lines[2]], "metrics.csv, row 2: epoch is 3, not 2"),
        (["test" + line if line is lines[0] else line for line in lines], "no column epoch"),
        ([line.replace("test/", "val/") for line in lines], "has no column test/top1"),
        ([lines[0], "1,2,3,4,5\n"], "row 1: test/loss is null"),
        ([lines[0], lines[1].rstrip() + ",7\n"], "row 1 has more values than"),
    ):
        path.write_text("".join(changed), encoding="utf-8")
        result = result_of(folder)
        assert result.kind == "unreadable"
        assert why in result.why
    path.unlink()
    assert "metrics.csv is missing" in result_of(folder).why


def test_a_header_alone_is_an_unfinished_run(tmp_path):
    folder = make_run(tmp_path / "a", finished=False)
    header = (folder / "metrics.csv").read_text(encoding="utf-8").splitlines(keepends=True)[0]
    (folder / "metrics.csv").write_text(header, encoding="utf-8")
    assert (result_of(folder).kind, result_of(folder).why) == ("unfinished", "0 epochs")


# ---- Paths that are not regular files -----------------------------------------------------------


def as_loop(path):
    path.symlink_to(path)


def of_bytes(content):
    return lambda path: path.write_bytes(content)


def as_another_format(path):
    path.write_text('{"format": 4}' if path.suffix == ".json" else "epoch,train_loss\n1,2.0\n")


@pytest.mark.parametrize("name", ["summary.json", "metrics.csv", "failed.json"])
@pytest.mark.parametrize(
    "damage",
    [
        Path.mkdir,
        as_loop,
        os.mkfifo,
        of_bytes(b""),
        of_bytes(bytes(range(256)) * 4),
        of_bytes(b"\0" * 5000),
        of_bytes(b"[" * 100_000),
        of_bytes(b'{"format": 3, "config": ' + b'{"a": ' * 400 + b"1" + b"}" * 401),
        of_bytes(b'{"format": ' + b"1" * 5000 + b"}"),
        as_another_format,
    ],
)
def test_a_file_that_is_none_of_a_runs_is_named(tmp_path, name, damage):
    folder = make_run(tmp_path / "a")
    (folder / name).unlink(missing_ok=True)
    damage(folder / name)
    result = result_of(folder)
    assert result.kind == "unreadable"
    assert result.why.startswith(name)
    assert "\n" not in result.why


@pytest.mark.parametrize("damage", [None, [], {}, "", 7, True, math.nan, MISSING])
def test_a_damaged_failure_is_named(tmp_path, damage):
    folder = failed(make_run(tmp_path / "a", finished=False))
    value = damaged({"format": 3, "error": "x"}, ["error"], damage)
    (folder / "failed.json").write_text(json.dumps(value), encoding="utf-8")
    result = result_of(folder)
    assert result.kind == "unreadable"
    assert result.why.startswith("failed.json: error is ")


@pytest.mark.parametrize("name", ["config.yaml", "a folder", "bytes", "digits", "aliases"])
def test_damaged_settings_of_an_unfinished_run_leave_out_its_length(tmp_path, name):
    folder = make_run(tmp_path / "a", finished=False)
    path = folder / ".hydra" / "config.yaml"
    path.parent.mkdir()
    if name == "a folder":
        path.mkdir()
    elif name == "bytes":
        path.write_bytes(b"\xff\xfe")
    elif name == "digits":
        path.write_text("epochs: " + "9" * 5000 + "\n")
    elif name == "aliases":  # expand to 10^8 words
        names = "abcdefgh"
        lines = [f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]" for a, b in itertools.pairwise(names)]
        path.write_text("\n".join(["a: &a [x, x, x, x, x, x, x, x, x, x]", *lines, "epochs: 5"]))
    else:
        path.write_text("epochs: many\n")
    assert (result_of(folder).kind, result_of(folder).why) == ("unfinished", "3 epochs")


def test_a_file_or_folder_without_permission_is_named():
    nobody = 65534
    if os.geteuid() not in (0, nobody):
        nobody = os.geteuid()
    root = Path(tempfile.mkdtemp())  # unlike pytest's folder, it can be opened to other users
    try:
        root.chmod(0o755)
        make_run(root / "a")
        closed = make_run(root / "b") / "summary.json"
        closed.chmod(0)
        make_run(root / "c" / "d")
        (root / "c").chmod(0)
        owner = os.geteuid()
        os.seteuid(nobody)
        try:
            found, excluded = runs.read([root])
        finally:
            os.seteuid(owner)
        assert [run.folder for run in found] == [root / "a"]
        assert {(e.folder.name, e.kind, e.why) for e in excluded} == {
            ("b", "unreadable", "summary.json cannot be read (Permission denied)"),
            ("c", "unreadable", "the folder cannot be read (Permission denied)"),
        }
    finally:
        (root / "c").chmod(0o755)
        shutil.rmtree(root)
