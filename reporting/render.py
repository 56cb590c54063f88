"""Run folders in, report.html, report.md and its pictures out."""

import base64
from pathlib import Path
from typing import Any

import jinja2

from reporting.page import contents
from reporting.runs import group, of_one_data, read


def report(folders: list[Path], out: Path, data: str | None = None) -> str:
    """Write report.html, report.md and its pictures to ``out``; return the Markdown's head.

    ``data`` is the data set that the report is about, by default the one of most runs.

    Raises:
        ValueError: no finished run; nothing is written.
    """
    runs, left = read(folders)
    if not runs:
        reasons = "; ".join(f"{one.folder.name} {one.kind} ({one.why})" for one in left[:3])
        raise ValueError(f"no finished run in {', '.join(map(str, folders))}: {reasons}")
    data, runs, others = of_one_data(runs, data)
    groups, repeated = group(runs)
    page = contents(data, groups, left + others + repeated)
    out.mkdir(parents=True, exist_ok=True)
    for picture in _pictures(page):
        (out / f"{picture.name}.svg").write_text(picture.svg)
    (out / "report.html").write_text(_fill("report.html", page))
    (out / "report.md").write_text(_fill("report.md", page))
    return _fill("short.md", page)


def _pictures(page: dict[str, Any]) -> list[Any]:
    forest = [page["forest"]] if page["forest"] is not None else []
    return forest + [picture for section in page["sections"] for picture in section.pictures]


def _fill(name: str, page: dict[str, Any]) -> str:
    """The template ``name`` of the folder templates/, filled; HTML is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=jinja2.select_autoescape(),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["base64"] = lambda text: base64.b64encode(text.encode()).decode()
    environment.filters["cell"] = lambda text: text.replace("|", "\\|").replace("\n", " ")
    return environment.get_template(name).render(page)
