"""Fixtures of the tests of chat templates."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from zincmetal import chat, rendering


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[rendering.Renderer]:
    """A renderer of the test's own, with no process yet; its process ends with the test."""
    renderer = rendering.Renderer()
    monkeypatch.setattr(chat, "_renderer", renderer)
    yield renderer
    renderer._stop()
