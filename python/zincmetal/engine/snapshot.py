"""Snapshots: a sequence's tokens, pages of K/V and recurrent states, copied out of an engine and back in."""

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
    """Saved sequence: its ``tokens`` (ids), and the bytes of its ``states`` by name of the buffer, uint8 [n]."""

    tokens: tuple[int, ...]
    states: Mapping[str, NDArray[np.uint8]]

    @property
    def nbytes(self) -> int:
        """Host memory that the states take."""
        return sum(state.nbytes for state in self.states.values())


class States:
    """State of a sequence in device memory: recurrent states, and pages of ``page`` positions of K/V."""

    def __init__(self, buffers: Buffers, addresses: AddressMap, page: int) -> None:
        self._buffers, self._addresses, self._page = buffers, addresses, page

    def take(self, tokens: Sequence[int]) -> Snapshot:
        """Copy out the state of a sequence of these tokens."""
        parts: dict[str, list[NDArray[np.uint8]]] = {}
        for state, offset, nbytes in self._pieces(len(tokens)):
            parts.setdefault(state.name, []).append(self._buffers.buffer(state.name).read(offset, nbytes))
        return Snapshot(tuple(tokens), {name: np.concatenate(found) for name, found in parts.items()})

    def check(self, snapshot: Snapshot) -> None:
        """Raise UsageError if the snapshot is of a model with other states."""
        sizes: dict[str, int] = {}
        for state, _, nbytes in self._pieces(len(snapshot.tokens)):
            sizes[state.name] = sizes.get(state.name, 0) + nbytes
        if sizes != {name: content.nbytes for name, content in snapshot.states.items()}:
            raise UsageError("the snapshot is of another model, or of one with another type of K/V cache")

    def put(self, snapshot: Snapshot) -> None:
        """Copy in a snapshot that :meth:`check` let pass."""
        done = dict.fromkeys(snapshot.states, 0)
        for state, offset, nbytes in self._pieces(len(snapshot.tokens)):
            at = done[state.name]
            self._buffers.buffer(state.name).write(snapshot.states[state.name][at : at + nbytes], offset)
            done[state.name] = at + nbytes

    def overflowed(self, length: int, kv: str) -> list[int]:
        """Return the layers, first to last, whose keys or values are infinite in a cache of type ``kv``.

        Only types with a smaller range than float32 are checked.
        """
        if kv == "f32":
            return []
        found = set[int]()
        for state, offset, nbytes in self._pieces(length):
            if state.kind in KV_CACHES and state.layer is not None:
                held = self._buffers.buffer(state.name).read(offset, nbytes)
                halves = held.view(np.float16) if kv == "f16" else held.reshape(-1, 34)[:, :2].copy().view(np.float16)
                if np.isinf(halves).any():
                    found.add(state.layer)
        return sorted(found)

    def _pieces(self, length: int) -> Iterator[tuple[State, int, int]]:
        """Yield (state, offset, bytes) of all the state of ``length`` tokens, pages in the order of the sequence."""
        if length == 0:  # kernels take every state for zero there
            return
        table = self._buffers.buffer(PAGES.name).read().view(np.uint32)
        for state, nbytes in self._addresses.states.items():
            if state.kind in RECURRENT:
                yield state, 0, nbytes
            elif state.kind in KV_CACHES:
                page_bytes = nbytes // table.size
                for p in table[: -(-length // self._page)].tolist():
                    yield state, p * page_bytes, page_bytes
