"""The order of the tests: a folder for each room, helpers in support/, and no test that imports a test."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest

from support.paths import ROOT, SUPPORT, TESTS

FILES = sorted(TESTS.rglob("test_*.py"))
#: The families of kernels: each has tests of its own.
FAMILIES = ("attention", "draw", "experts", "mamba2", "output", "products", "recurrent", "rows", "step")


def imported(path: Path) -> set[str]:
    """Returns the modules that a file imports."""
    nodes = list(ast.walk(ast.parse(path.read_text("utf-8"))))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}


@pytest.mark.parametrize("path", [*FILES, *sorted(SUPPORT.rglob("*.py"))], ids=lambda p: str(p.relative_to(TESTS)))
def test_no_test_is_imported(path: Path) -> None:
    tests = {file.stem for file in FILES} | {"conftest"}
    assert not {name for name in imported(path) if name.rpartition(".")[2] in tests}


def test_names_of_files_are_unique() -> None:
    """Rooms are no packages, since tests/gguf must not hide the package gguf: a file's name is its module's."""
    names = Counter(path.name for path in [*FILES, *(ROOT / "bench").glob("test_*.py")])
    assert [name for name, n in names.items() if n > 1] == []
    assert [p for p in TESTS.rglob("__init__.py") if SUPPORT not in p.parents] == []


def test_kernel_tests_are_named_by_family() -> None:
    families = {path.stem.split("_")[1] for path in (TESTS / "kernels").glob("test_*.py")}
    assert families == set(FAMILIES)
