"""Formats the rows that benches collect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

ROWS = pytest.StashKey[list[Mapping[str, Any]]]()
HEADING = pytest.StashKey[list[str]]()


def best(rows: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Returns for each product the usual split and the fastest two others.

    The outputs of the others were compared with the usual split's.
    """
    shown = []
    for product in dict.fromkeys(row["product"] for row in rows):
        of = [row for row in rows if row["product"] == product]
        usual = [row for row in of if row["outputs"] == "usual"]
        others = sorted((row for row in of if row not in usual), key=lambda row: row["us"])
        shown += [*usual, *others[:2]]
    return shown


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Formats a table: columns as wide as their content, text to the left, numbers to the right."""
    names = list(rows[0])
    cells = [names, *([str(row[name]) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    left = [isinstance(rows[0][name], str) for name in names]

    def line(of: list[str]) -> str:
        aligned = (c.ljust(w) if a else c.rjust(w) for c, w, a in zip(of, widths, left, strict=True))
        return "  ".join(aligned).rstrip()

    return [line(of) for of in cells]
