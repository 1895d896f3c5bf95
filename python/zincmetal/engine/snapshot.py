"""Snapshot: a sequence's tokens, pages of K/V and recurrent states, copied out of an engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import UsageError

if TYPE_CHECKING:
    from .engine import Engine


@dataclass(frozen=True)
class Snapshot:
    """Saved sequence: its ``tokens`` (ids), the contents of its ``pages``, its recurrent ``state``, its K/V type."""

    tokens: tuple[int, ...]
    pages: tuple[bytes, ...]
    state: bytes
    kv: str

    @property
    def nbytes(self) -> int:
        """Host memory that the states take."""
        return sum(map(len, self.pages)) + len(self.state)

    def check(self, engine: Engine) -> None:
        """Raise UsageError if the snapshot is of a model with other states."""
        n_pages = engine.pages.needed(len(self.tokens))
        pages = [engine.page_bytes] * n_pages
        state = engine.slot_bytes if self.tokens else 0
        if [*map(len, self.pages)] != pages or len(self.state) != state or (pages and self.kv != engine.loaded.kv):
            raise UsageError(
                "the snapshot is of another model, of another type of K/V cache, or of a time before the block "
                "that drafts was loaded; make it again"
            )
