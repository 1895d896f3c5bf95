"""Plugin of pytest that leaves few cases of each test: ``-p support.few_cases --cases N``. They are spread over all."""

from __future__ import annotations

import math
from collections import defaultdict

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the option."""
    parser.addoption("--cases", type=int, default=4, help="most cases of a test with parameters")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves every n-th case of a test that has too many."""
    tests = defaultdict[str, list[pytest.Item]](list)
    for item in items:
        tests[item.nodeid.partition("[")[0]].append(item)
    most = config.getoption("cases")
    kept = {item for cases in tests.values() for item in cases[:: max(1, math.ceil(len(cases) / most))]}
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]
