"""The report's two files: their contents, names from outside, and where they are written."""

import base64
import errno
import html
import itertools
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from reporting import figures, page, sweep_section, text
from reporting.differences import classes_section
from reporting.text import MINUS

from folders import NASTY, analysis_of, make_run, nasty_runs, report, variants_of
from helpers import ROOT, everything_below

pytestmark = pytest.mark.usefixtures("sketches")


# ---- The files ----------------------------------------------------------------------------------


class Page(HTMLParser):
    """Collect the parts of a page that a browser would interpret."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def sweep(root):
    for dk, dv, heads, seed in itertools.product((8, 16), (4, 8, 12), (2, 4), (0, 1)):
        settings = {"attention__dk": dk, "attention__dv": dv, "attention__Nh": heads}
        top1 = 60.0 + dk / 10 + dv / 100 + heads / 1000 + seed * (1 + dv / 50)
        make_run(root / f"{dk},{dv},{heads},{seed}", top1, seed, "aa", **settings)
    make_run(root / "p0", 60.0, 0)
    make_run(root / "p1", 61.0, 1)


def test_the_page_needs_nothing_but_itself(tmp_path, pictures):
    sweep(tmp_path)
    report([tmp_path], tmp_path / "out")
    written = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    found = Page(written)
    assert found.open == []
    assert not [tag for tag, _ in found.tags if tag in ("script", "iframe", "object")]
    links = [a[k] for _, a in found.tags for k in ("src", "href") if k in a]
    assert len(links) > 6
    assert all(link.startswith("data:") for link in links)
    assert "url(" not in written
    assert "@import" not in written
    pictures = [a for tag, a in found.tags if tag == "img"]
    assert all(len(a["alt"]) > 20 for a in pictures)
    names = re.findall(
        r"!\[.*\]\((.+)\)", (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    )
    for name, picture in zip(names, pictures, strict=True):
        svg = base64.b64decode(picture["src"].partition(",")[2])
        assert svg == (tmp_path / "out" / name).read_bytes()
        assert svg.lstrip().startswith(b"<?xml")
    assert "sweep1.svg" in names


@pytest.mark.slow
def test_the_same_runs_give_the_same_bytes(tmp_path, pictures):
    sweep(tmp_path / "runs")
    for name in "ab":
        report([tmp_path / "runs"], tmp_path / name)
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in "ab")
    assert first == second


def test_a_sweep_is_counted_and_drawn_by_cell(tmp_path, monkeypatch):
    sweep(tmp_path)
    analysis = analysis_of(tmp_path)
    drawn = []
    monkeypatch.setattr(figures, "heatmaps", lambda *given: drawn.append(given))
    (picture,) = sweep_section.pictures(analysis.sweeps)
    assert picture.name == "sweep1"
    ((panels, rows, columns),) = drawn
    assert (rows, columns) == (("dk", ["8", "16"]), ("dv", ["4", "8", "12"]))
    assert list(panels) == ["Nh 2", "Nh 4"]
    assert len(panels["Nh 2"]) == 6
    assert panels["Nh 4"][1, 2] == (pytest.approx(60 + 1.6 + 0.12 + 0.004 + 0.62), 2)
    assert panels["Nh 2"][0, 0][0] == pytest.approx(60 + 0.8 + 0.04 + 0.002 + 0.54)
    head, *_ = page.cards(analysis.nearest)
    assert head.title.startswith("12 augmented variants")
    # Differences by seed: dk / 10 + dv / 100 + heads / 1000, and dv / 50 more at seed 1. With one
    # degree of freedom, t must exceed 12.7, so the mean must exceed 6.35 * dv / 50.
    decided = {
        (dk, dv, heads)
        for dk in (8, 16) for dv in (4, 8, 12) for heads in (2, 4)
        if dk / 10 + dv / 100 + heads / 1000 + dv / 100 > 12.7062 * dv / 100
    }  # fmt: skip
    assert 0 < len(decided) < 12
    assert head.number == f"{len(decided)} better, 0 worse"
    assert head.unit == f"and {12 - len(decided)} undecided"
    assert "12 of them have at least two pairs" in head.details[0]
    assert "about 0.6 of 12 would exclude zero" in head.details[1]
    assert head.verdict == "Mean differences in top-1 range from +0.88 to +1.84 percentage points."


def test_classes_are_compared_by_pair(tmp_path):
    def by_class(*values):
        return {"per_class_top1": [*values, None], "class_names": ["a", "b", "c"]}

    make_run(tmp_path / "p0", 70.0, 0, facts=by_class(10, 20))
    make_run(tmp_path / "p1", 71.0, 1, facts=by_class(30, 40))
    make_run(tmp_path / "a0", 70.0, 0, "aa", facts=by_class(15, 10))
    make_run(tmp_path / "a1", 72.0, 1, "aa", facts=by_class(33, 38))
    # A pair whose class names differ has no class in common.
    make_run(tmp_path / "p2", 70.0, 2, facts=by_class(50, 60) | {"class_names": ["b", "a", "c"]})
    make_run(tmp_path / "a2", 71.0, 2, "aa", facts=by_class(55, 50))
    section = classes_section(analysis_of(tmp_path))
    assert section.folded[1].rows == [  # t = 4 and -1.5 with one degree of freedom
        ["a", "+4.00", "+5.00, +3.00", "0.31"],
        ["b", f"{MINUS}6.00", f"{MINUS}10.00, {MINUS}2.00", "0.37"],
    ]


@pytest.mark.parametrize("attention", ["none", "aa"])
def test_one_run_alone_has_a_page(tmp_path, pictures, attention):
    make_run(tmp_path / "a", 70.0, 0, attention, epochs=1)
    written = report([tmp_path], tmp_path / "out")
    assert "There are no finished runs of both a plain network and one with attention." in written


@pytest.mark.thorough
def test_two_hundred_runs(tmp_path, pictures):
    """The page shows all 64 augmented and two plain variants with three seeds each."""
    for number in range(66):
        for seed in range(3):
            attention = "aa" if number < 64 else "none"
            settings = {"batch_size": 256 if number < 65 else 512}
            if attention == "aa":
                dk, dv, heads = 8 * (1 + number % 4), 4 * (1 + number // 4 % 4), 2 ** (number // 16)
                settings |= {"attention__dk": dk, "attention__dv": dv, "attention__Nh": heads}
            make_run(
                tmp_path / f"{number}/{seed}", 60 + (7 * number + seed * seed) % 13,
                seed, attention, epochs=4, **settings,
            )  # fmt: skip
    make_run(tmp_path / "x/0", 1.0, 3, finished=False)
    make_run(tmp_path / "x/1", 1.0, 0, data__name="cifar10")
    written = report([tmp_path], tmp_path / "out")
    assert "198 finished runs of 66 variants" in written
    assert "2 folders excluded" in written
    assert len(re.findall(r"^\| \d+ \| dk ", written, re.MULTILINE)) == 64
    assert len([*(tmp_path / "out").glob("*.svg")]) == 11
    assert (tmp_path / "out" / "report.html").stat().st_size < 3e6


def test_colors_of_few_and_of_many(tmp_path):
    make_run(tmp_path / "p", 70.0, epochs=4)
    make_run(tmp_path / "q0", 60.0, 0)
    make_run(tmp_path / "q1", 60.0, 1)
    make_run(tmp_path / "se", 71.0, attention="se")
    make_run(tmp_path / "aa", 71.0, attention="aa")
    few = {one.label: color for one, color in figures.colors(variants_of(tmp_path)).items()}
    assert few["plain epochs=3"] == figures.PLAIN
    assert few["AA"] == figures.COLORS[0]
    assert len(set(few.values())) == 4
    for dk in range(10, 20):
        make_run(tmp_path / f"{dk}", 70.0 + dk, attention="aa", attention__dk=dk)
    many = {one.label: color for one, color in figures.colors(variants_of(tmp_path)).items()}
    hued = [label for label, color in many.items() if color in figures.COLORS]
    assert hued == [f"AA dk={dk}" for dk in (16, 17, 18, 19)]
    assert many["plain epochs=3"] == figures.PLAIN
    assert many["plain epochs=4"] == figures.OTHERS


# ---- Names from outside -------------------------------------------------------------------------


def of_markdown(line):
    """Return the visible text of a line of Markdown, after checking that all is escaped."""
    assert not re.search(r"(?<!\\)(?:\\\\)*[`*\[\]~$<>|]", line), line
    assert not re.search(r"://|www\.|^(#|[-+=]+|\d+[.)])( |$)", line), line
    for underscore in re.finditer(r"(?<!\\)_", line):
        around = line[underscore.start() - 1 : underscore.end() + 1]
        assert re.fullmatch(r"[A-Za-z0-9]_[A-Za-z0-9]", around), line
    return html.unescape(re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", line))


@pytest.mark.parametrize("name", [*NASTY, "- item", "+", "1. item", "12)", "# head", "---", "==="])
def test_markdown_shows_a_name_as_it_is(name):
    line = text.markdown(name)
    assert of_markdown(line) == text.single_line(name)
    assert not re.search(r"[\x00-\x1f\x7f\u202a-\u202e\ud800-\udfff]", line)
    # Ordinary names and numbers are not changed.
    for plain in ("wrn16_4", "AA dk=0.2 optim.lr=0.1", "73.00 ± 2.65", "+1.62", "2.5", "a - b, c."):
        assert text.markdown(plain) == plain


def test_bytes_of_another_locale_are_read_as_utf_8():
    assert text.printable("Gr\udcc3\udcb6\udcc3\udc9fe \udcff\ud800") == r"Größe \xff\ud800"


def test_names_are_text_in_both_files(tmp_path, pictures):
    nasty_runs(tmp_path / "runs")
    console = report([tmp_path / "runs"], tmp_path / "out")
    assert "\x1b" not in console
    console.encode()
    written = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    found = Page(written)
    assert found.open == []
    allowed = "html head meta link title style body main h1 h2 h3 p section div article span ul li"
    allowed += " strong figure img figcaption table thead tbody tr th td caption details summary"
    assert {tag for tag, _ in found.tags} <= set(allowed.split())
    assert not any("onerror" in attributes for _, attributes in found.tags)
    assert "{{ title }}{% raw %}" in written
    markdown = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    own = {"<details>", "</details>", "<summary>", "</summary>"}
    assert set(re.findall(r"<[^>\n]*>", markdown)) == own
    width = None
    for line in markdown.splitlines():
        assert re.fullmatch(r"#{1,2} [A-Z].*", line) or not line.startswith("#")
        if not line.startswith("|"):
            width = None
            continue
        cells = line[2:-2].split(" | ")
        width = width or len(cells)
        assert len(cells) == width, line
        if not line.startswith("| ---"):
            for cell in cells:
                of_markdown(cell)


def test_a_column_of_any_name_has_its_picture_beside_the_report(tmp_path):
    folder = make_run(tmp_path / "runs")
    for file in (folder / "metrics.csv", folder / "summary.json"):
        content = file.read_text(encoding="utf-8").replace("train/other", "train/x/../../../a b")
        file.write_text(content, encoding="utf-8")
    report([folder], tmp_path / "out" / "here")
    written = sorted(tmp_path.rglob("*.svg"))
    assert {path.parent for path in written} == {tmp_path / "out" / "here"}
    assert "train-x-a-b" in [path.stem for path in written]


# ---- Where it is written ------------------------------------------------------------------------


def run_report(*arguments):
    """Run scripts/report.py in an ASCII locale, with Python's UTF-8 workarounds disabled."""
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    return subprocess.run(
        [sys.executable, ROOT / "scripts" / "report.py", *map(os.fsencode, arguments)],
        capture_output=True,
        env=os.environ | locale,
        timeout=600,
        check=False,
    )


@pytest.mark.thorough
def test_utf_8_whatever_the_locale_says(tmp_path):
    names = ["Äpfel", "大きさ", "ñ"]
    root = tmp_path / "Läufe"
    for seed in (0, 1):
        make_run(root / f"p{seed}", 70.0, seed, classes=names, data__name="größe")
        make_run(root / f"ä{seed}", 71.0 + seed, seed, "aa", classes=names, data__name="größe")
    make_run(root / "unfertig ü", 1.0, 2, finished=False)
    make_run(Path(os.fsdecode(os.fsencode(root) + b"/\xff")) / "x", 1.0, 2, finished=False)
    done = run_report(root, "--data", "größe")
    assert done.returncode == 0, done.stderr
    assert done.stderr == b""
    assert f"written: {root}/report.html" in done.stdout.decode()
    assert "on größe, evaluated" in done.stdout.decode()
    for name in ("report.md", "report.html"):
        written = (root / name).read_text(encoding="utf-8")
        assert all(word in written for word in [*names, f"{root}/unfertig ü", "±", MINUS])
        assert ("/\\xff/x" if name.endswith("html") else "/\\\\xff/x") in written
    done = run_report(tmp_path / "fehlt ß")
    assert done.returncode == 2
    assert done.stderr.decode() == f"report.py: there is no {tmp_path}/fehlt ß\n"


def test_a_full_disk_leaves_the_report_that_was_there(tmp_path, monkeypatch):
    make_run(tmp_path / "p", 70.0)
    report([tmp_path], tmp_path / "out")
    before = everything_below(tmp_path / "out")
    make_run(tmp_path / "a", 71.0, attention="aa")
    written = len(before) + 2  # including the pictures of a comparison
    for number in range(written):
        left = iter([True] * number + [False])

        def fsync(handle, left=left):
            if not next(left, True):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match=r"cannot be written \(No space left on device\)"):
            report([tmp_path], tmp_path / "out")
        assert everything_below(tmp_path / "out") == before
