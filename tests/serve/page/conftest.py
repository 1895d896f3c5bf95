"""Chat page in a real browser, against a real server whose models are scripted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from support.page_lab import BROWSER, FLAGS, Page, Server


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Returns a server that runs."""
    made = Server(tmp_path_factory.mktemp("page"))
    yield made
    made.close()


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Returns a browser. Skips the test where none is installed."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: make test-page")
    if not BROWSER:
        pytest.skip("needs chromium: on Debian, apt install chromium")
    with sync_api.sync_playwright() as play:
        opened = play.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Any, server: Server) -> Iterator[Page]:
    """Returns the page, in a browser without a history."""
    made = Page(browser, server.url)
    yield made
    made.context.close()
    assert made.faults == []
