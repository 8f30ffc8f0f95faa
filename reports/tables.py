"""Tables of text and Markdown, as wide as a terminal shows them."""

import unicodedata
from collections.abc import Sequence
from typing import Any

from console import one_line


def table(rows: Sequence[Sequence[Any]], header: Sequence[Any]) -> str:
    """An aligned table: header, a rule, a line per row; columns of numbers to the right, others to the left.

    Floats get four decimals (three digits below 0.001), None is "-". Rows may be shorter than the header. Widths are
    a terminal's: two cells for a CJK character, none for a combining mark. No line ends in spaces or a line break.
    """
    columns = range(len(header))
    numeric = _numeric_columns(rows, len(header))
    cells = [[one_line(cell) for cell in header]] + [_cells(row, len(header)) for row in rows]
    widths = [max(text_width(line[i]) for line in cells) for i in columns]
    cells.insert(1, ["-" * width for width in widths])
    lines = []
    for line in cells:
        padding = [" " * (widths[i] - text_width(line[i])) for i in columns]
        lines.append("  ".join(padding[i] + line[i] if numeric[i] else line[i] + padding[i] for i in columns).rstrip())
    return "\n".join(lines)


def markdown_table(rows: Sequence[Sequence[Any]], header: Sequence[Any]) -> str:
    """The same table in GitHub's Markdown; `|` in a cell is escaped."""
    rule = ["---:" if right else "---" for right in _numeric_columns(rows, len(header))]
    lines = [[one_line(cell) for cell in header], *(_cells(row, len(header)) for row in rows)]
    escaped = [[cell.replace("\\", "\\\\").replace("|", "\\|") for cell in line] for line in lines]
    escaped.insert(1, rule)
    return "\n".join("| " + " | ".join(line) + " |" for line in escaped)


def format_cell(value: Any) -> str:
    """How a table shows one value."""
    if value is None:
        return "-"
    if isinstance(value, float):  # NumPy's float64 is one too
        return f"{value:.4f}" if value == 0 or abs(value) >= 0.001 else f"{value:.3g}"
    return one_line(value)


def text_width(text: str) -> int:
    """The number of terminal cells that `text` takes."""
    composed = unicodedata.normalize("NFC", text)  # Korean letters that follow each other share two cells
    marks = sum(unicodedata.category(c) in ("Mn", "Me") for c in composed)
    return len(composed) + sum(unicodedata.east_asian_width(c) in "WF" for c in composed) - marks


def _cells(row: Sequence[Any], count: int) -> list[str]:
    return [format_cell(row[i]) if i < len(row) else "" for i in range(count)]


def _numeric_columns(rows: Sequence[Sequence[Any]], count: int) -> list[bool]:
    """For each column whether it holds numbers only (None is neither here nor there)."""
    columns = [[row[i] for row in rows if i < len(row) and row[i] is not None] for i in range(count)]
    return [bool(column) and all(hasattr(value, "__float__") for value in column) for column in columns]
