"""Plain-text tables."""

from aaconv.text import table


def test_columns_are_aligned_and_lines_end_with_their_last_letter():
    rows = [["name", "n", "why"], ["a", "12", ""], ["longer", "3", "it is"]]
    assert table(rows, "lrl") == ["name     n  why", "a       12", "longer   3  it is"]
    assert table(rows, "rll")[1] == "     a  12"


def test_no_rows_are_no_lines():
    assert table([], "lr") == []
