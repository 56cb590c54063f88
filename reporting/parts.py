"""What the report is made of: tables, pictures, cards and sections, as plain values."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Table:
    """Cells as text; the first ``texts`` columns are words, the others numbers."""

    head: list[str]
    rows: list[list[str]]
    texts: int = 1
    caption: str = ""

    @property
    def long(self) -> bool:
        """Whether it would push what follows out of sight."""
        return len(self.rows) > 16


@dataclass(frozen=True)
class Picture:
    """An SVG, the name of its file next to report.md, and what it shows in words."""

    name: str
    title: str
    svg: str
    caption: str


@dataclass(frozen=True)
class Card:
    """A comparison's outcome, for the head of the page."""

    title: str
    number: str
    unit: str
    verdict: str
    tone: str  # better, worse or open
    details: list[str]


@dataclass(frozen=True)
class Section:
    """A heading and its contents; ``folded``, a title and a table, is shown on demand."""

    title: str
    text: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    folded: tuple[str, Table] | None = None
