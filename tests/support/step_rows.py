"""Describes steps for kernel tests: the buffers ``step``, ``rows``, ``pages`` and ``out_rows``, as NumPy arrays.

    batch = StepRows(lab, [Run(0, pos=70), Run(2, pos=5, n=9)], rows=16, outs=[0, 9])
    bindings = [batch.input(lab, "step"), batch.input(lab, "rows"), batch.input(lab, "pages"), ...]

Page tables are shuffled over one pool. What no kernel may read is poison: rows past the step's tokens, entries of a
table past its sequence, tables of other sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from support.kernel_lab import Guarded, Lab, tiles
from zincmetal.check.inputs import POISON

Ints = NDArray[np.int64]


class Run(NamedTuple):
    """Run of ``n`` rows of a sequence from position ``pos`` on. It reads state ``slot``, and writes ``slot_out``."""

    sequence: int
    pos: int
    n: int = 1
    slot: int = 0
    slot_out: int = 0

    @property
    def end(self) -> int:
        """The position after the last."""
        return self.pos + self.n


class StepRows:
    """One step of these runs, for a plan of ``rows`` rows (default: as many as there are).

    ``outs``: the rows whose logits are wanted. ``n_single``: runs of one row that count as singles (default: all of
    them, from the first on). ``spare``: pages of the pool that no sequence has. ``pages_each``: entries of a page table
    (default: as many as the longest sequence needs, and one more).
    """

    def __init__(
        self,
        lab: Lab,
        runs: Sequence[Run],
        rows: int | None = None,
        outs: Sequence[int] = (),
        *,
        n_single: int | None = None,
        spare: int = 2,
        pages_each: int | None = None,
    ) -> None:
        self.runs, self.page = tuple(runs), lab.core.shapes()["KV_PAGE"]
        first_long = next((i for i, run in enumerate(runs) if run.n > 1), len(runs))
        self.n_single = first_long if n_single is None else n_single
        self.n_tokens = sum(run.n for run in runs)
        #: The sequence and the position of each row.
        self.sequences: Ints = np.array([run.sequence for run in runs for _ in range(run.n)], np.int64)
        self.positions: Ints = np.array([pos for run in runs for pos in range(run.pos, run.end)], np.int64)
        self._make_pages(lab, spare, pages_each)
        self.rows = _poisoned(rows or max(1, self.n_tokens), lab.core.params_dtype("Row"))
        self._fill_rows(lab)
        self.out_rows = _poisoned(max(1, len(outs)), np.dtype(np.uint32))
        self.out_rows[: len(outs)] = outs
        self.step = np.zeros(1, lab.core.params_dtype("Step"))
        self.step["n_tokens"], self.step["n_single"], self.step["n_out"] = self.n_tokens, self.n_single, len(outs)

    def _make_pages(self, lab: Lab, spare: int, pages_each: int | None) -> None:
        """Gives each sequence a table at a random seat, and random pages of one pool."""
        lengths = {s: max(run.end for run in self.runs if run.sequence == s) for s in set(self.sequences.tolist())}
        counts = {s: tiles(n, self.page) for s, n in lengths.items()}
        each = pages_each or max(counts.values(), default=0) + 1
        n_pages, seats = sum(counts.values()) + spare, lab.rng.permutation(len(counts) + 1)
        pool = lab.rng.permutation(n_pages).astype(np.uint32)
        self.pages = _poisoned((len(counts) + 1) * each, np.dtype(np.uint32)).reshape(-1, each)
        #: Where the page table of each sequence begins in ``pages``, and the table.
        self.table_at = {s: int(seat) * each for s, seat in zip(counts, seats, strict=False)}
        self.tables: dict[int, NDArray[np.uint32]] = {}
        for s, count in counts.items():
            self.tables[s], pool = pool[:count], pool[count:]
            self.pages.reshape(-1)[self.table_at[s] :][:count] = self.tables[s]
        #: Rows of a cache, which is [n_pages * KV_PAGE, ...].
        self.cache_rows = n_pages * self.page

    def _fill_rows(self, lab: Lab) -> None:
        first = 0
        for run in self.runs:
            rows = self.rows[first : first + run.n]
            rows["pos"] = np.arange(run.pos, run.end)
            rows["begin"], rows["end"] = first, first + run.n
            rows["pages"] = self.table_at[run.sequence]
            rows["slot"], rows["slot_out"] = run.slot, run.slot_out
            rows["token"] = lab.rng.integers(0, 1 << 20, run.n)
            rows["drafted"] = 0
            first += run.n

    def places(self, sequence: int, first: int, end: int) -> Ints:
        """Returns the rows of the cache that hold the positions [first, end) of a sequence."""
        position = np.arange(first, end)
        return self.tables[sequence][position // self.page].astype(np.int64) * self.page + position % self.page

    @property
    def new_places(self) -> Ints:
        """The rows of the cache that the step's rows write, in their order."""
        return np.concatenate([self.places(run.sequence, run.pos, run.end) for run in self.runs] or [np.empty(0, int)])

    def input(self, lab: Lab, name: str) -> Guarded:
        """Makes a binding of a buffer: "step", "rows", "pages" or "out_rows"."""
        content: NDArray[Any] = getattr(self, name)
        return lab.input(content, align=16 if name in ("step", "rows") else 4)

    def alone(self, t: int) -> StepRows:
        """Makes the step of row t alone, over the same pages."""
        other: StepRows = object.__new__(StepRows)
        other.__dict__.update(self.__dict__)
        run = next(run for run, row in zip(self.runs, self._firsts, strict=True) if row <= t < row + run.n)
        other.runs = (run._replace(pos=int(self.positions[t]), n=1),)
        other.n_tokens = other.n_single = 1
        other.sequences, other.positions = self.sequences[t : t + 1], self.positions[t : t + 1]
        other.rows, other.step = self.rows[t : t + 1].copy(), self.step.copy()
        other.rows["begin"], other.rows["end"] = 0, 1
        other.step["n_tokens"], other.step["n_single"] = 1, 1
        return other

    @property
    def _firsts(self) -> list[int]:
        return [sum(run.n for run in self.runs[:i]) for i in range(len(self.runs))]


def _poisoned(n: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    return np.full((n, dtype.itemsize), POISON, np.uint8).view(dtype)[:, 0]
