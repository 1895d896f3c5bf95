"""A sequence copied out of a model, and back in: its tokens, the pages of K/V that they fill, the recurrent states."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..device.buffers import Buffers
from ..errors import UsageError
from ..graph.ops import KV_CACHES, PAGES, RECURRENT, State
from ..plan.addresses import AddressMap


@dataclass(frozen=True)
class Snapshot:
    """What :meth:`Model.save` gives: ``tokens`` (ids) and, by name of the buffer, the bytes of their state."""

    tokens: tuple[int, ...]
    states: Mapping[str, NDArray[np.uint8]]

    @property
    def nbytes(self) -> int:
        """Host memory that the states take."""
        return sum(state.nbytes for state in self.states.values())


def take(memory: Buffers, addresses: AddressMap, page: int, tokens: Sequence[int]) -> Snapshot:
    """Copy out the state of ``tokens``; a page has ``page`` positions."""
    pieces = _pieces(memory, addresses, page, len(tokens))
    parts: dict[str, list[NDArray[np.uint8]]] = {}
    for state, offset, nbytes in pieces:
        parts.setdefault(state.name, []).append(memory.buffer(state.name).read(offset, nbytes))
    return Snapshot(tuple(tokens), {name: np.concatenate(found) for name, found in parts.items()})


def check(memory: Buffers, addresses: AddressMap, page: int, snapshot: Snapshot) -> None:
    """Raises UsageError where a snapshot is of a model with other states."""
    sizes: dict[str, int] = {}
    for state, _, nbytes in _pieces(memory, addresses, page, len(snapshot.tokens)):
        sizes[state.name] = sizes.get(state.name, 0) + nbytes
    if sizes != {name: content.nbytes for name, content in snapshot.states.items()}:
        raise UsageError("the snapshot is of another model, or of one with another type of K/V cache")


def put(memory: Buffers, addresses: AddressMap, page: int, snapshot: Snapshot) -> None:
    """Copy a snapshot in that :func:`check` let pass."""
    done = dict.fromkeys(snapshot.states, 0)
    for state, offset, nbytes in _pieces(memory, addresses, page, len(snapshot.tokens)):
        at = done[state.name]
        memory.buffer(state.name).write(snapshot.states[state.name][at : at + nbytes], offset)
        done[state.name] = at + nbytes


def _pieces(memory: Buffers, addresses: AddressMap, page: int, length: int) -> Iterator[tuple[State, int, int]]:
    """(state, offset, bytes) of all that a sequence of this length has: recurrent states, and pages in its order."""
    if length == 0:  # kernels take every state for zero there
        return
    table = memory.buffer(PAGES.name).read().view(np.uint32)
    for state, nbytes in addresses.states.items():
        if state.kind in RECURRENT:
            yield state, 0, nbytes
        elif state.kind in KV_CACHES:
            page_bytes = nbytes // table.size
            for p in table[: -(-length // page)].tolist():
                yield state, p * page_bytes, page_bytes


def overflowed(memory: Buffers, addresses: AddressMap, page: int, length: int, kv: str) -> list[int]:
    """The layers, first to last, whose keys or values are infinite as ``kv`` holds them, though not in float32."""
    if kv == "f32":
        return []
    found = set[int]()
    for state, offset, nbytes in _pieces(memory, addresses, page, length):
        if state.kind in KV_CACHES and state.layer is not None:
            held = memory.buffer(state.name).read(offset, nbytes)
            halves = held.view(np.float16) if kv == "f16" else held.reshape(-1, 34)[:, :2].copy().view(np.float16)
            if np.isinf(halves).any():
                found.add(state.layer)
    return sorted(found)
