"""Connections of clients, bounded: in number, in the time of a head, and in the time that a reply lies unread.

An application sees none of this: before the head is complete there is no request, and while the client does not read,
the reply waits in the socket's buffer. ``guard.py`` bounds what comes between.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import h11
import msgspec
from uvicorn.protocols.http.h11_impl import H11Protocol

from .serving import Limits

_log = logging.getLogger("zincmetal.serve")

IDLE_SECONDS = 75  # that a connection stays open without a request: agents think between two


class BoundedConnection(H11Protocol):
    """Connection of one client. A subclass made by ``bounded`` knows the limits."""

    limits = Limits()

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self._head_timer: asyncio.TimerHandle | None = None
        self._unread_timer: asyncio.TimerHandle | None = None
        self._lost = False

    # ---- beginning: how many there are, and how long a head takes ------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection, or refuse one too many."""
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            self._end(503, "there are too many connections; ask again in some seconds", "Retry-After: 2\r\n")
        else:
            self._watch_head()

    def data_received(self, data: bytes) -> None:
        """Take bytes, and watch how long the head of a request is incomplete."""
        if self.transport.is_closing():
            return
        super().data_received(data)
        self._watch_head()

    def _watch_head(self) -> None:
        incomplete = self.conn.their_state is h11.IDLE and not self.transport.is_closing()
        if incomplete and self._head_timer is None:
            self._head_timer = self.loop.call_later(self.limits.header_seconds, self._head_is_late)
        elif not incomplete and self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self.conn.their_state is not h11.IDLE or self.transport.is_closing():
            return
        begun = bool(self.conn.trailing_data[0])
        if begun:
            self._end(408, f"the head of the request took longer than {self.limits.header_seconds:g} s")
        else:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP. A reply that has begun is cut off."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self._end(400, msg)
        else:
            self.transport.abort()

    def _end(self, status: int, message: str, header: str = "") -> None:
        """Refuse in plain HTTP, without an application, and close."""
        _log.info("a connection is refused with status %d: %s", status, message)
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
        body = msgspec.json.encode({"error": error})
        head = f"HTTP/1.1 {status} Refused\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        self.transport.write(f"{head}{header}Connection: close\r\n\r\n".encode() + body)
        self.transport.close()
        self._watch_unread()

    # ---- end: how long a reply lies unread -----------------------------------------------------------------------

    def pause_writing(self) -> None:
        """Note that the client does not read as fast as the server writes."""
        super().pause_writing()
        self._watch_unread()

    def resume_writing(self) -> None:
        """Note that the client reads again."""
        super().resume_writing()
        if not self.transport.is_closing():
            self._forget_unread()

    def on_response_complete(self) -> None:
        """Watch the rest of a reply after which the connection is closed, or the head that has begun meanwhile."""
        super().on_response_complete()
        if self.transport.is_closing():
            self._watch_unread()
        elif self.conn.trailing_data[0]:
            self._watch_head()

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection."""
        super().timeout_keep_alive_handler()
        self._watch_unread()

    def _watch_unread(self) -> None:
        if self._unread_timer is None and not self._lost:
            self._unread_timer = self.loop.call_later(self.limits.write_seconds, self.transport.abort)

    def _forget_unread(self) -> None:
        if self._unread_timer is not None:
            self._unread_timer.cancel()
            self._unread_timer = None

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection. No timer may hold it: uvicorn's own would, for as long as an idle one is kept."""
        super().connection_lost(exc)
        self._lost = True
        self._unset_keepalive_if_required()
        self._forget_unread()
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


def bounded(limits: Limits) -> type[BoundedConnection]:
    """Return the class of connections with these limits."""
    return type("Connection", (BoundedConnection,), {"limits": limits})


def uvicorn_options(limits: Limits) -> dict[str, Any]:
    """Return what ``uvicorn.Config`` must be told, so that nothing goes round the bounds."""
    return {
        "http": bounded(limits),
        "ws": "none",
        "h11_max_incomplete_event_size": limits.headers,
        "timeout_keep_alive": IDLE_SECONDS,
        "log_config": None,
        "log_level": "error",  # it warns of each byte that is no HTTP; the log at level INFO has these too
        "access_log": False,  # the guard writes a line without the query
        "proxy_headers": False,  # nobody may say that he is someone else
        "server_header": False,
    }


__all__ = ["BoundedConnection", "bounded", "uvicorn_options"]
