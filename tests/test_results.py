"""results/: the pages' numbers are those of the raw rows, by the command that the pages name."""

import re
import statistics

import pytest

from reporting.paired import compare_with_plain
from reporting.render import report
from reporting.runs import group_by_variant, read
from reporting.text import signed

from folders import variants_of
from helpers import ROOT

SHOWN = ("Scores", "Differences from the plain baseline", "At equal cost")
# How README calls the networks.
NAMES = {
    "none": "ResNet-20, plain",
    "ge": "with gather-excite",
    "se": "with squeeze-and-excitation",
    "aa": "with attention in its last two stages",
}


@pytest.fixture(scope="module")
def sections(tmp_path_factory):
    """The sections of report.md by their titles."""
    out = tmp_path_factory.mktemp("report")
    report([ROOT / "results" / "cpu20"], out)
    text = (out / "report.md").read_text(encoding="utf-8")
    parts = (part.partition("\n") for part in re.split(r"^## ", text, flags=re.MULTILINE))
    return {title: rest for title, _, rest in parts}


def unwrapped(file):
    """A page's words, however its lines are broken."""
    return " ".join((ROOT / file).read_text(encoding="utf-8").split())


@pytest.mark.parametrize("section", SHOWN)
def test_the_page_has_the_tables_of_the_report(sections, section):
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    tables = re.findall(r"(?:^\|.*\n)+", sections[section], re.MULTILINE)
    assert tables
    for table in tables:
        assert table in page


def test_the_page_says_how_many_classes_differ(sections):
    (told,) = re.findall(r"corrected by Holm for the .*?\.", sections["Classes"])
    assert told in unwrapped("docs/results.md")


def test_readme_says_how_far_attention_is_from_plain():
    compared = compare_with_plain(variants_of(ROOT / "results" / "cpu20"))
    (found,) = (c.top1 for c in compared if c.variant.attention == "aa")
    where = "below" if found.mean < 0 else "above"
    pairs = {2: "two", 3: "three", 4: "four", 5: "five"}[found.n]
    low, high = signed(found.low, 1), signed(found.high, 1)
    words = (
        f"attention is {abs(found.mean):.1f} points {where} plain ({low} to {high}, {pairs} pairs)"
    )
    assert words in unwrapped("README.md")


def test_readme_has_the_rows():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    runs, excluded = read([ROOT / "results" / "cpu20"])
    assert excluded == []
    variants, _ = group_by_variant(runs)
    for variant in variants:
        scores = [f"{run.last('top1'):.2f}" for run in variant.runs]
        spread = f"{statistics.mean(map(float, scores)):.2f}"
        if len(scores) > 1:
            spread += f" ± {statistics.stdev(map(float, scores)):.2f}"
        (row,) = (line for line in readme.splitlines() if NAMES[variant.attention] in line)
        cells = [cell.strip().replace("*", "") for cell in row.strip("|").split("|")]
        assert cells[2:5] == [str(len(scores)), ", ".join(scores), spread]
        assert cells[5] == f"{variant.first['parameters']:,}"


def test_every_run_is_of_the_planned_commit_and_recipe():
    runs, _ = read([ROOT / "results" / "cpu20"])
    assert {commit for run in runs for commit in run.facts("commit")} == {
        next(iter(runs[0].facts("commit")))
    }
    assert runs[0].facts("commit")[0].startswith("39acecd")
    for key, value in (("epochs", 15), ("optim.lr", 0.2), ("label_smoothing", 0.1)):
        assert {run.settings[key] for run in runs} == {value}
