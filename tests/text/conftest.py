"""Fixtures of the tests of chat templates."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from zincmetal.text.chat import renderer, template


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[renderer.Renderer]:
    """A renderer of the test's own, with no process yet; its process ends with the test."""
    made = renderer.Renderer()
    monkeypatch.setattr(template, "_renderer", made)
    yield made
    made.stop()
