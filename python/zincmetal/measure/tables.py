"""Formats rows as text, as Markdown and as CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

Rows = Sequence[Mapping[str, Any]]
_NUMBER = re.compile(r"([-+]?[\d,.]+(%|x)?( .*)?)?\Z")  # with a unit or a spread behind it, or nothing


def table(rows: Rows) -> list[str]:
    """Format a table: columns as wide as their content, text to the left, numbers to the right."""
    cells, left, widths = _cells(rows)
    return ["  ".join(_aligned(line, left, widths)).rstrip() for line in cells]


def markdown(rows: Rows) -> list[str]:
    """Format a table of Markdown, aligned so that it reads well as it is."""
    cells, left, widths = _cells(rows)
    rule = ["-" * w if a else "-" * (w - 1) + ":" for a, w in zip(left, widths, strict=True)]
    lines = [_aligned(line, left, widths) for line in cells]
    return [f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]]]


def as_csv(rows: Rows) -> str:
    """Format rows as CSV with a heading. A list in a cell is its values with a semicolon between them."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer.writerow(names)
    for row in rows:
        values = (row.get(name, "") for name in names)
        writer.writerow([";".join(map(str, v)) if isinstance(v, (list, tuple)) else v for v in values])
    return out.getvalue()


def _cells(rows: Rows) -> tuple[list[list[str]], list[bool], list[int]]:
    """Return the lines of cells with the heading, which columns stand to the left, and their widths."""
    names = list(rows[0])
    cells = [names, *([str(row[name]).replace("|", "/") for name in names] for row in rows)]
    widths = [max(2, *(len(line[i]) for line in cells)) for i in range(len(names))]
    left = [not all(_NUMBER.match(line[i]) for line in cells[1:]) for i in range(len(names))]
    return cells, left, widths


def _aligned(line: list[str], left: list[bool], widths: list[int]) -> list[str]:
    return [c.ljust(w) if a else c.rjust(w) for c, w, a in zip(line, widths, left, strict=True)]
