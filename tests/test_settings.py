"""Environment variables: the table has all of them, and nothing else reads them."""

from __future__ import annotations

import os
import re
from contextlib import suppress

import pytest

from support.paths import ROOT
from zincmetal import settings
from zincmetal.errors import UsageError

PACKAGE = ROOT / "python" / "zincmetal"
NAME = re.compile(r"\bZINCMETAL_[A-Z0-9_]*[A-Z0-9]")
BUILD_OPTIONS = {"ZINCMETAL_SWEEP"}  # of CMake, in messages that say how to build
READ = re.compile(r'(?:getenv|seconds_from)\("(\w+)"')


def test_the_table_has_the_variables_that_the_core_reads():
    sources = [f for f in (ROOT / "csrc").rglob("*") if f.suffix in {".h", ".cpp", ".mm", ".cu"}]
    read = {name for f in sources for name in READ.findall(f.read_text("utf-8"))} - {"HOME"}
    assert read == {v.name for v in settings.ALL if v.reader != "python"}


def test_no_other_module_reads_a_variable_of_ours():
    """Messages name them through the table, but for those of the core's options of the build."""
    elsewhere = {}
    for file in PACKAGE.rglob("*.py"):
        code = re.sub(r'""".*?"""|#[^\n]*', "", file.read_text("utf-8"), flags=re.DOTALL)
        names = set(NAME.findall(code)) - BUILD_OPTIONS
        if names and file.name not in ("settings.py", "watchdog.py"):
            elsewhere[file.name] = names
    assert elsewhere == {}


def test_every_variable_is_once_in_the_table():
    names = [v.name for v in settings.ALL]
    assert len(names) == len(set(names))
    declared = {v for v in vars(settings).values() if isinstance(v, settings.Variable)}
    assert declared == set(settings.ALL)


def test_values(monkeypatch: pytest.MonkeyPatch):
    for variable in settings.ALL:
        monkeypatch.delenv(variable.name, raising=False)
    assert (settings.device(), settings.native(), settings.memory_limit()) == (None, True, None)
    assert settings.in_force() == {}
    monkeypatch.setenv("ZINCMETAL_DEVICE", "cpu")
    monkeypatch.setenv("ZINCMETAL_NATIVE", "0")
    monkeypatch.setenv("ZINCMETAL_MEMORY_LIMIT", "1024")
    assert (settings.device(), settings.native(), settings.memory_limit()) == ("cpu", False, 1024)
    assert settings.in_force() == {
        "ZINCMETAL_DEVICE": "cpu",
        "ZINCMETAL_MEMORY_LIMIT": "1024",
        "ZINCMETAL_NATIVE": "0",
    }
    monkeypatch.setenv("ZINCMETAL_MEMORY_LIMIT", "1 GB")
    with pytest.raises(UsageError, match="number of bytes"):
        settings.memory_limit()


@pytest.mark.parametrize("before", [None, "1"])
def test_an_override_ends(monkeypatch: pytest.MonkeyPatch, before: str | None):
    monkeypatch.delenv("ZINCMETAL_NATIVE", raising=False)
    if before is not None:
        monkeypatch.setenv("ZINCMETAL_NATIVE", before)
    with suppress(KeyError), settings.override(settings.NATIVE, "0"):
        assert not settings.native()
        raise KeyError
    assert os.environ.get("ZINCMETAL_NATIVE") == before
