"""State of a server that its routes share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from .backend import Models
from .log import log_turn
from .metrics import Metrics
from .store import ResponseStore
from .turn import Turn


@dataclass(frozen=True)
class Limits:
    """Bounds of a server. Sizes are in bytes, times in seconds."""

    body: int = 32 << 20
    depth: int = 64  # of nested JSON
    headers: int = 32 << 10
    header_seconds: float = 20.0  # of a request's head, from the first byte on
    body_seconds: float = 60.0  # of a request's whole body
    read_seconds: float = 20.0  # between two pieces of a body
    write_seconds: float = 60.0  # that a client may leave an answer unread
    connections: int = 512  # at the same time
    keep_alive: float = 8.0  # between two signs of life of a stream
    patience: float = 5.0  # until the headers of a stream whose model is being loaded
    queue: float = 1800.0  # until a request's first token
    drain: float = 30.0
    choices: int = 16  # the most answers to one request
    answer: int | None = None  # the most tokens of an answer, whatever a client asks for


@dataclass(frozen=True)
class Access:
    """Who may ask.

    ``keys``: any of them, () for everybody. ``hosts``: names in a Host header, "*" for any. ``origins`` of web pages
    that may ask, for CORS.
    """

    keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ("localhost", "127.0.0.1", "[::1]")
    origins: tuple[str, ...] = ()


class Files(Protocol):
    """Files of a server's models, which clients may change."""

    async def pull(self, name: str) -> None:
        """Begin to download a model."""

    async def remove(self, name: str) -> None:
        """Delete the files of a model."""


@dataclass
class Serving:
    """Models, bounds and requests of a server.

    ``turns``: those that run, by the id of their request and by the id of their reply. ``observers`` are called with
    each turn that is over: the metrics and the log are among them. ``files`` is None if clients may not change any.
    """

    models: Models
    limits: Limits = Limits()
    access: Access = Access()
    turns: dict[str, list[Turn]] = field(default_factory=dict)
    observers: list[Callable[[Turn], None]] = field(default_factory=list)
    metrics: Metrics = field(default_factory=Metrics)
    responses: ResponseStore = field(default_factory=ResponseStore)
    files: Files | None = None
    draining: bool = False

    def __post_init__(self) -> None:
        self.observers += [self.metrics.ended, log_turn]
