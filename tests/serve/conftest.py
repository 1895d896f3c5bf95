"""Fixtures of the server's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.lines import LinesFormat
from support.served import Served


@pytest.fixture(scope="module")
def one_server(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return Served(tmp_path_factory.mktemp("served"))


@pytest.fixture
def served(one_server: Served) -> Iterator[Served]:
    """Server of one scripted model. After a test nothing of it is left: no lease, no turn, no generation."""
    yield one_server.reset()
    assert one_server.models.leases == 0
    assert one_server.serving.turns == {}
    assert one_server.backend.running == []


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers are lines of events: ``support/lines.py``."""
    monkeypatch.setattr("zincmetal.serve.prepare.format_of", lambda *_: LinesFormat())
