"""The building blocks of the report as plain values: tables, pictures, cards and sections."""

from dataclasses import dataclass, field
from functools import cached_property

from reporting import figures


@dataclass(frozen=True)
class Table:
    """A table of text cells; the first ``texts`` columns are words, the others numbers."""

    head: list[str]
    rows: list[list[str]]
    texts: int = 1
    caption: str = ""


def tables(rows: list[dict[str, str]], texts: int = 1, caption: str = "") -> list[Table]:
    """A table from rows with the same {heading: cell} keys; an empty list if there are no rows."""
    return [Table([*rows[0]], [[*row.values()] for row in rows], texts, caption)] if rows else []


@dataclass(frozen=True)
class Picture:
    """A figure, its file name next to report.md, and a caption."""

    name: str
    title: str
    figure: figures.Figure
    caption: str
    wide: bool = False  # as wide as the page

    @cached_property
    def svg(self) -> str:
        return figures.as_svg(self.figure)


@dataclass(frozen=True)
class Card:
    """The outcome of a comparison, shown at the top of the page."""

    title: str
    number: str
    unit: str
    verdict: str
    details: list[str]
    tone: str = "open"  # or "better" or "worse"


@dataclass(frozen=True)
class Section:
    """A heading and its contents; ``folded`` (a title and a table) is shown on demand."""

    title: str
    text: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    folded: tuple[str, Table] | None = None
