"""Responses that clients go on from by id. They are kept in memory, the newest within a bound of bytes."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import msgspec

from .errors import HttpError

Json = dict[str, Any]

MOST = 64 << 20  # bytes

_encode, _decode = msgspec.json.encode, msgspec.json.decode


@dataclass(frozen=True)
class Stored:
    """Response as JSON, and the items that it answers. The last ``own`` of them came with its request.

    Both are bytes: so their size is known, and nobody changes them. A conversation of many turns is stored whole in
    each of its responses, so that each can be deleted or forgotten alone.
    """

    response: bytes
    items: bytes
    own: int
    outputs: tuple[str, ...]  # ids of the items of the output

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return len(self.response) + len(self.items)


class ResponseStore:
    """Stored responses, by id. The one that was not used for the longest time is forgotten first."""

    def __init__(self, most: int = MOST) -> None:
        self.most, self.nbytes = most, 0
        self._stored: OrderedDict[str, Stored] = OrderedDict()
        self._holders: dict[str, str] = {}  # the response of each item of an output
        self.running: dict[str, Json] = {}  # responses that are being written, stored or not

    def __len__(self) -> int:
        return len(self._stored)

    def put(self, response: Json, items: list[Json], own: int) -> None:
        """Store a response, if it is within the bound."""
        outputs = tuple(item["id"] for item in response["output"])
        stored = Stored(_encode(response), _encode(items), own, outputs)
        if stored.nbytes > self.most:
            return
        self._stored[response["id"]] = stored
        self._holders |= dict.fromkeys(outputs, response["id"])
        self.nbytes += stored.nbytes
        while self.nbytes > self.most:
            self._forget(next(iter(self._stored)))

    def response(self, known: str) -> Json:
        """Return a response, or what there is of one that is being written. Raises HttpError."""
        if known in self.running:
            return dict(self.running[known])
        found: Json = _decode(self._find(known).response)
        return found

    def inputs(self, known: str) -> list[Json]:
        """Return the items that came with the request of a response. Raises HttpError."""
        stored = self._find(known)
        items: list[Json] = _decode(stored.items)
        return items[len(items) - stored.own :]

    def conversation(self, known: str) -> list[Json]:
        """Return all items up to the end of a response, to go on from. Raises HttpError."""
        stored = self._find(known, "previous_response_id")
        return [*_decode(stored.items), *_decode(stored.response)["output"]]

    def item(self, known: str) -> Json | None:
        """Return an item of a stored output, None if there is none."""
        holder = self._holders.get(known)
        if holder is None:
            return None
        found: Json = next(item for item in self.response(holder)["output"] if item["id"] == known)
        return found

    def delete(self, known: str) -> None:
        """Forget a response. Raises HttpError."""
        self._find(known)
        self._forget(known)

    def _forget(self, known: str) -> None:
        stored = self._stored.pop(known)
        self.nbytes -= stored.nbytes
        for item in stored.outputs:
            self._holders.pop(item, None)

    def _find(self, known: str, param: str | None = None) -> Stored:
        """Return what is stored under an id, and make it the newest."""
        if known not in self._stored:
            code = "previous_response_not_found" if param else "response_not_found"
            words = f"there is no stored response {known!r:.80}; it was not stored, or was forgotten"
            raise HttpError("not_found", words, param=param, code=code)
        self._stored.move_to_end(known)
        return self._stored[known]


__all__ = ["ResponseStore", "Stored"]
