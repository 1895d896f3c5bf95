"""Options of `pytest bench`, and the table that it ends with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

ROWS = pytest.StashKey[list[Mapping[str, Any]]]()
HEADING = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("zincmetal")
    group.addoption("--sweep", action="store_true", help="every number of rows that was built, and of threads")
    group.addoption("--table", type=Path, metavar="FILE", help="write the rows of the table as JSON")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS], config.stash[HEADING] = [], []


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows, heading = config.stash[ROWS], config.stash[HEADING]
    if not rows:
        return
    terminalreporter.section("cold products")
    shown = best(rows) if config.getoption("--sweep") else rows
    for line in [*heading, *table(shown)]:
        terminalreporter.write_line(line)
    path = config.getoption("--table")
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"measured": heading, "rows": rows}, indent=1))


def best(rows: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Of each product the usual split (its outputs are what others are compared with) and the fastest two others."""
    shown = []
    for product in dict.fromkeys(row["product"] for row in rows):
        of = [row for row in rows if row["product"] == product]
        usual = [row for row in of if row["outputs"] == "usual"]
        others = sorted((row for row in of if row not in usual), key=lambda row: row["us"])
        shown += [*usual, *others[:2]]
    return shown


def table(rows: list[Mapping[str, Any]]) -> list[str]:
    """Columns as wide as what stands in them; text to the left, numbers to the right."""
    names = list(rows[0])
    cells = [names, *([str(row[name]) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    left = [isinstance(rows[0][name], str) for name in names]

    def line(of: list[str]) -> str:
        aligned = (c.ljust(w) if a else c.rjust(w) for c, w, a in zip(of, widths, left, strict=True))
        return "  ".join(aligned).rstrip()

    return [line(of) for of in cells]
