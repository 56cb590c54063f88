"""Format tables in plain text and Markdown, and errors as one line."""

from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]], align: str) -> list[str]:
    """Return ``rows`` as lines with aligned columns, two spaces apart.

    Args:
        rows: lists of cells, all of the same length.
        align: one letter per column, ``l`` (left) or ``r`` (right).
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
    """Return `table` in Markdown; the first row is the header, and cells are Markdown."""
    header, *body = rows
    marks = ["---" if side == "l" else "---:" for side in align]
    return [f"| {' | '.join(cells)} |" for cells in (header, marks, *body)]


def one_line(error: BaseException) -> str:
    """Return the error's message without line breaks, or the name of its type if it is empty."""
    return " ".join(str(error).split()) or type(error).__name__
