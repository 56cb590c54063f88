"""Tables in plain text and in Markdown, and errors in one line."""

from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]], align: str) -> list[str]:
    """``rows`` as lines of aligned columns, two spaces apart.

    Args:
        rows: cells, equally many in each row.
        align: for each column ``l`` (left) or ``r`` (right).
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = [str.ljust if side == "l" else str.rjust for side in align]
    return [
        "  ".join(
            side(cell, width) for side, cell, width in zip(sides, row, widths, strict=True)
        ).rstrip()
        for row in rows
    ]


def markdown_table(rows: Sequence[Sequence[str]], align: str) -> list[str]:
    """`table` in Markdown; the first of ``rows`` is the header, and cells are Markdown."""
    header, *body = rows
    marks = ["---" if side == "l" else "---:" for side in align]
    return [f"| {' | '.join(cells)} |" for cells in (header, marks, *body)]


def one_line(error: BaseException) -> str:
    """What the error says, without line breaks; its type's name where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__
