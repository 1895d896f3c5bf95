"""Options of `pytest bench`, and its table of results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tables import HEADING, ROWS, best, table


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
