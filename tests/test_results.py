"""results/: the pages' numbers are those of the raw rows, by the command that the pages name."""

import re
import statistics

import pytest

from reporting.render import report
from reporting.runs import group_by_variant, read

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
def tables(tmp_path_factory):
    """The tables of the sections that docs/results.md shows, as report.md has them."""
    out = tmp_path_factory.mktemp("report")
    report([ROOT / "results" / "cpu20"], out)
    sections = re.split(
        r"^## ", (out / "report.md").read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    found = {}
    for section in sections:
        title, _, rest = section.partition("\n")
        if title in SHOWN:
            found[title] = re.findall(r"(?:^\|.*\n)+", rest, re.MULTILINE)
    return found


@pytest.mark.parametrize("section", SHOWN)
def test_the_page_has_the_tables_of_the_report(tables, section):
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert tables[section]
    for table in tables[section]:
        assert table in page


def test_readme_has_the_rows(tables):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    runs, excluded = read([ROOT / "results" / "cpu20"])
    assert excluded == []
    variants, _ = group_by_variant(runs)
    for variant in variants:
        if variant.settings.get("attention.position", "relative") != "relative":
            continue
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
