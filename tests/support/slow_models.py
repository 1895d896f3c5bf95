"""Models that take their time to load."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from support.served import Served


def slow(served: Served, monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Keeps the models of a server from being loaded until the event is set."""
    loaded, lease = asyncio.Event(), served.models.lease

    @asynccontextmanager
    async def later(*asked: Any) -> AsyncIterator[Any]:
        await loaded.wait()
        async with lease(*asked) as backend:
            yield backend

    monkeypatch.setattr(served.models, "lease", later)
    return loaded
