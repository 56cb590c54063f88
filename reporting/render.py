"""Render an analysis as report.html, report.md and its pictures."""

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2

from aaconv.text import markdown_table
from reporting.analysis import Analysis
from reporting.page import contents
from reporting.parts import Picture, Table
from reporting.text import markdown, printable, single_line
from training.files import write_texts


def write(analysis: Analysis, out: Path) -> str:
    """Write report.html, report.md and its pictures to ``out``; return a summary for a terminal.

    An existing report in ``out`` is replaced as a whole or not at all.

    Raises:
        ValueError: if a file next to the runs is damaged; nothing is written.
        OSError: if ``out`` is not writable or the disk is full.
    """
    page = contents(analysis)
    texts = {out / f"{picture.name}.svg": picture.svg for picture in _pictures(page)}
    texts[out / "report.html"] = _fill("report.html", page, str)
    texts[out / "report.md"] = _fill("report.md", page, markdown)
    write_texts(texts)
    return _fill("short.md", page, single_line)


def _pictures(page: dict[str, Any]) -> list[Picture]:
    forest = [page["forest"]] if page["forest"] is not None else []
    return forest + [picture for section in page["sections"] for picture in section.pictures]


def _fill(name: str, page: dict[str, Any], shown: Callable[[str], str]) -> str:
    """Fill the template ``name`` of the folder templates/.

    Text is HTML-escaped in .html templates; .md templates escape it with the filter ``shown``.
    """

    def table(it: Table) -> str:
        rows = [[shown(cell) for cell in cells] for cells in (it.head, *it.rows)]
        align = "".join("l" if column < it.texts else "r" for column in range(len(it.head)))
        return "\n".join(markdown_table(rows, align))

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=jinja2.select_autoescape(),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["base64"] = lambda text: base64.b64encode(text.encode()).decode()
    environment.filters |= {"shown": shown, "table": table}
    return printable(environment.get_template(name).render(page))
