"""Options of `pytest bench`, and its table of results."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from tables import HEADING, ROWS, best, table
from zincmetal.device import backend
from zincmetal.device.lock import NO_LOCK, lock_device


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("zincmetal")
    group.addoption("--sweep", action="store_true", help="every number of rows that was built, and of threads")
    group.addoption("--no-lock", action="store_true", help=NO_LOCK)
    group.addoption("--table", type=Path, metavar="FILE", help="write the rows of the table as JSON")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS], config.stash[HEADING] = [], []


@pytest.fixture(scope="session", autouse=True)
def device_alone(request: pytest.FixtureRequest) -> Iterator[None]:
    """Holds the lock of the device: what shares it with another process is not measured."""
    with nullcontext() if request.config.getoption("--no-lock") else lock_device(backend.choose()):
        yield


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
