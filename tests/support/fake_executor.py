"""Executor without a device: it runs batches by hashing what a kernel could see.

A row writes (id, position) into its page, and its state. The token after it is a hash of all that it reads: every entry
up to its position through the page table, and the state. So a wrong page, slot, position or order gives another token
than :func:`expected`, which sees the ids alone. Steps run when they are collected, as late as a device may.
"""

from __future__ import annotations

import re
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from support.paths import ROOT
from zincmetal.engine.batch import Batch, Choice, Described, Drawing, describe
from zincmetal.engine.pages import PagePool
from zincmetal.errors import DeviceError
from zincmetal.sampling.draws import unpacked
from zincmetal.sampling.noise import NoiseSource
from zincmetal.sampling.params import SamplingParams

Touched = tuple[object, int, int]  # a sequence, the places (bits) that its run reads, and those that it writes

PAGE = PagePool.PAGE
VOCAB = 1000
NOTHING = -7  # an entry of a page that nobody wrote
NOT_FINITE = -9  # an entry that is damaged: no token follows what sees it
NAMES = {"u32": "<u4", "i32": "<i4", "float": "<f4"}


def params_dtypes() -> dict[str, np.dtype]:
    """Reads the dtypes of Row, PageWrite and Draw from ``kernels/params.h``."""
    text = re.sub(r"//[^\n]*", "", (ROOT / "kernels" / "params.h").read_text("utf-8"))
    found = {}
    for name in ("Row", "PageWrite", "Draw"):
        body = re.search(rf"struct {name} {{(.*?)}};", text, re.DOTALL)
        assert body
        fields = []
        for kind, field, length in re.findall(r"(\w+) (\w+)(?:\[(\d+)\])?;", body[1]):
            fields.append((field, NAMES[kind], (int(length),)) if length else (field, NAMES[kind]))
        found[name] = np.dtype(fields)
    return found


DTYPES = params_dtypes()


def state_after(state: int, token: int, position: int) -> int:
    """State after one more token."""
    return zlib.crc32(b"%d %d %d" % (state, token, position))


def chosen(seen: NDArray[np.int64], state: int, draw: tuple[float, int], damaged: int) -> int:
    """Token after a row that sees these entries (id, position), or -1. One in ``damaged`` is not finite (0: none)."""
    if (seen == NOT_FINITE).any():
        return -1
    hashed = zlib.crc32(np.ascontiguousarray(seen).tobytes() + b"%d %.3f %d" % (state, *draw))
    if damaged and hashed % damaged == 0:
        return -1
    return hashed // 7 % VOCAB


def allowed(token: int, mask: NDArray[np.uint32] | None) -> int:
    """The first token that a mask allows, from this one on and then from 0 on."""
    if mask is None or token < 0:
        return token
    at = np.flatnonzero(unpacked(mask, VOCAB))
    return int(at[np.searchsorted(at, token) % at.size])


def host_logits_of(token: int) -> NDArray[np.float32]:
    """Logits whose arg max is a token."""
    logits = np.zeros(VOCAB, np.float32) if token >= 0 else np.full(VOCAB, np.nan, np.float32)
    logits[token] = 9
    return logits


def expected(
    ids: Sequence[int], n: int, params: SamplingParams, recurrent: bool, damaged: int = 0, eog: Iterable[int] = ()
) -> list[int]:
    """The n tokens after ``ids`` of a sequence that is alone. Ends after an end token, or with -1."""
    made, eog = list(ids), set(eog)
    seen = np.empty((len(made) + n, 2), np.int64)
    seen[: len(made), 0], seen[:, 1] = made, np.arange(len(seen))
    source = NoiseSource(params.seed) if params.temperature else None
    state = 0
    for position, token in enumerate(made[:-1]):
        state = state_after(state, token, position) if recurrent else 0
    for _ in range(n):
        length = len(made)
        state = state_after(state, made[-1], length - 1) if recurrent else 0
        seen[length - 1, 0] = made[-1]
        draw = (float(np.float32(params.temperature)), source.at(length).key if source else 0)
        made.append(chosen(seen[:length], state, draw, damaged))
        if made[-1] < 0 or made[-1] in eog:
            break
    return made[len(ids) :]


def places(pages: Sequence[int], begin: int, end: int) -> int:
    """Places of these positions in a pool of pages: a bit for each, PAGE bits for a page."""
    found = 0
    for i in range(begin // PAGE, PagePool.needed(end)):
        first, last = max(begin - i * PAGE, 0), min(end - i * PAGE, PAGE)
        found |= ((1 << last) - (1 << first)) << pages[i] * PAGE
    return found


class FakeExecutor:
    """Executor for tests of the scheduler.

    ``now`` is a clock that steps move on. ``fail`` makes the next call of that name fail. ``conflicts``: what a step
    in flight reads must not be written by another sequence. A step of the block that drafts finds the greedy token
    after what its row sees, but for the share ``spoils`` of rows. It writes to pages as others do, and to no state.
    """

    page = PAGE
    n_vocab = VOCAB
    ran_at_once = False

    def __init__(
        self,
        n_ctx: int = 1024,
        pages: int = 64,
        pages_most: int = 64,
        slots: int = 16,
        slots_most: int = 16,
        seats: int = 8,
        max_rows: int = 64,
        max_singles: int = 8,
        recurrent: bool = False,
        runs_ahead: bool = True,
        draws: bool = True,
        damaged: int = 0,
        spoils: float = 0.0,
        seconds: Callable[[int], float] = lambda rows: 0.01 + 0.001 * rows,
    ) -> None:
        self.n_ctx, self.max_rows, self.max_singles, self.max_outs = n_ctx, max_rows, max_singles, max_singles
        self.recurrent, self.runs_ahead, self.draws, self.seats = recurrent, runs_ahead, draws, seats
        self.pages_now, self.pages_most = pages, pages_most
        self.slots_now, self.slots_most = (slots, slots_most) if recurrent else (0, 0)
        self.max_page_writes = PagePool.needed(n_ctx)
        self.max_biases = 8
        self.damaged, self.spoils, self.seconds = damaged, spoils, seconds
        self.keys = np.full((pages, PAGE, 2), NOTHING, np.int64)
        self.states = [NOTHING] * self.slots_now
        self.tables = np.full(seats * self.max_page_writes, -1, np.int64)
        self.todo: deque[tuple[str, tuple[Any, ...]]] = deque()  # in the order of the device: steps and copies
        self.last: list[int] = []  # outputs of the step before
        self.accepted: list[int] = []  # and the rows after each that are right
        self.now = 0.0
        self.fail = ""
        self.in_flight = 0
        self.batches: list[Batch] = []
        self.depth_seen = 0
        self._touched_then: dict[int, list[Touched]] = {}

    # ---- steps ---------------------------------------------------------------------------------------------------

    def submit(self, batch: Batch) -> None:
        self._may_fail("submit")
        assert self.in_flight < (2 if self.runs_ahead else 1)
        assert batch.n_rows <= self.max_rows
        assert batch.n_single <= self.max_singles
        assert len(batch.page_writes) <= self.max_page_writes
        described = describe(batch, DTYPES)
        self._check_tokens(batch, described)
        self._check_conflicts(batch)
        self.in_flight += 1
        self.depth_seen = max(self.depth_seen, self.in_flight)
        self.batches.append(batch)
        self.todo.append(("step", (described, [*batch.drawings], batch)))

    def collect(self) -> list[Choice]:
        assert self.in_flight
        self._may_fail("collect")
        while True:
            name, args = self.todo.popleft()
            getattr(self, f"_{name}")(*args)
            if name == "step":
                break
        self._flush()
        self.in_flight -= 1
        found = zip(self.last, self.accepted, strict=True)
        return [Choice(token, int(token < 0), accepted=n) for token, n in found]

    def drop(self) -> None:
        self.todo.clear()
        self.in_flight = 0
        self.fail = ""

    def host_logits(self, output: int) -> NDArray[np.float32]:
        assert not self.in_flight, "the next step overwrites the logits"
        return host_logits_of(self.last[output])

    def _may_fail(self, name: str) -> None:
        if self.fail == name:
            raise DeviceError(f"{name} was told to fail")

    def _check_tokens(self, batch: Batch, described: Described) -> None:
        """A row refers to an output of the step before, which is in flight, and runs of one row come first."""
        outputs = len(self.batches[-1].drawings) if self.in_flight else 0
        drafted = described.rows["drafted"].astype(np.int64)
        assert (described.rows["token"] - drafted >= -outputs)[described.rows["token"] < 0].all()
        assert not drafted.any() or self.batches[-1].verifies
        assert not drafted[described.rows["token"] >= 0].any()
        lengths = [len(run.tokens) for run in batch.runs]
        assert all(n == 1 for n in lengths[: described.n_single])
        assert all(n > 1 for n in lengths[described.n_single :])
        assert len({run.sequence for run in batch.runs}) == len(lengths)

    def _touched(self, batch: Batch) -> list[Touched]:
        """By run: its sequence, the places that it reads, and those that it writes."""
        found = list[Touched]()
        slots = self.pages_most * PAGE  # their bits stand above those of pages
        for run in batch.runs:
            pages = run.sequence.pages
            end = run.end + run.drafted
            reads, writes = places(pages, 0, end), places(pages, run.begin, end)
            if self.recurrent and not batch.drafts:
                reads |= 1 << slots + run.slot if run.begin else 0
                writes |= 1 << slots + run.slot_out
            found.append((run.sequence, reads, writes))
        return found

    def _check_conflicts(self, batch: Batch) -> None:
        before = [t for name, args in self.todo if name == "step" for t in self._touched_then[id(args[-1])]]
        mine = self._touched(batch)
        if not self.in_flight:
            self._touched_then.clear()
        self._touched_then[id(batch)] = mine
        for sequence, reads, writes in mine:
            for other, other_reads, other_writes in [*before, *mine]:
                if other is not sequence:
                    assert not writes & other_reads, "a row writes what another sequence reads"
                    assert not reads & other_writes, "a row reads what another sequence writes"

    def _step(self, described: Described, drawings: list[Drawing], batch: Batch) -> None:
        rows, before, outs = described.rows, self.last, {int(out) for out in described.outs}
        self.now += self.seconds(len(rows))
        self.tables[described.page_writes["at"]] = described.page_writes["page"]
        if batch.drafts:
            self._draft(rows)
            return
        old_states = list(self.states)
        ends: dict[int, tuple[NDArray[np.int64], int]] = {}
        tokens = [before[-1 - token] if token < 0 else token for token in rows["token"].tolist()]
        positions, tables, slots = rows["pos"].tolist(), rows["pages"].tolist(), rows["slot"].tolist()
        numbers = self.tables[rows["pages"] + rows["pos"] // PAGE]
        entries = np.stack([np.array(tokens, np.int64), rows["pos"]], 1)
        at = 0
        while at < len(rows):
            end = int(rows["end"][at])
            assert rows["begin"][at] == at
            self.keys[numbers[at:end], rows["pos"][at:end] % PAGE] = entries[at:end]
            state = 0 if positions[at] == 0 or not self.recurrent else old_states[slots[at]]
            for t in range(at, end):
                state = state_after(state, tokens[t], positions[t]) if self.recurrent else 0
                if t in outs:
                    length = positions[t] + 1
                    table = self.tables[tables[t] : tables[t] + PagePool.needed(length)]
                    ends[t] = self.keys[table].reshape(-1, 2)[:length].copy(), state
            if self.recurrent:
                self.states[int(rows["slot_out"][at])] = state
            at = end
        self.last = []
        for i, out in enumerate(described.outs):
            seen, state = ends[int(out)]
            drawing = drawings[i]
            draw = (0.0, 0)
            if not drawing.argmax:
                assert described.draws is not None
                record = described.draws[i]
                draw = float(record["temperature"]), int(record["key_low"]) | int(record["key_high"]) << 32
            self.last.append(allowed(chosen(seen, state, draw, self.damaged), drawing.mask))
        self.accepted = [self._right(rows, tokens, described.outs.tolist(), i) for i in range(len(described.outs))]

    def _right(self, rows: NDArray[Any], tokens: list[int], outs: list[int], output: int) -> int:
        """Count the rows after an output's, in its run, up to the first whose token is not the one drawn there."""
        n, first = 0, outs[output] + 1
        while first + n < rows["end"][outs[output]] and tokens[first + n] == self.last[output + n] >= 0:
            n += 1
        return n

    def _draft(self, rows: NDArray[Any]) -> None:
        """Run a step of the block that drafts. It may write where rows are, so that a wrong place shows."""
        found = []
        for row in rows:
            token, later = int(row["token"]), 0
            if token < 0:
                later = min(self.accepted[-1 - token], int(row["drafted"])) if row["drafted"] else 0
                token = self.last[-1 - token + later]
            length = int(row["pos"]) + later + 1
            table = self.tables[row["pages"] : row["pages"] + PagePool.needed(length)]
            self.keys[table[-1], (length - 1) % PAGE] = token, length - 1
            seen = self.keys[table].reshape(-1, 2)[:length].copy()
            state = 0
            for id, position in seen.tolist() if self.recurrent else ():
                state = state_after(state, id, position)
            guess = chosen(seen, state, (0.0, 0), 0)
            spoilt = guess >= 0 and zlib.crc32(b"%d %d" % (guess, length)) % 1000 < 1000 * self.spoils
            found.append((guess + 1) % VOCAB if spoilt else guess)
        self.last, self.accepted = found, [0] * len(found)

    # ---- pools ---------------------------------------------------------------------------------------------------

    def copy_page(self, source: int, to: int) -> None:
        self._may_fail("copy_page")
        self.todo.append(("copy_page_now", (source, to)))
        self._flush()

    def copy_slot(self, source: int, to: int) -> None:
        self.todo.append(("copy_slot_now", (source, to)))
        self._flush()

    def _flush(self) -> None:
        while self.todo and self.todo[0][0] != "step":
            name, args = self.todo.popleft()
            getattr(self, f"_{name}")(*args)

    def _copy_page_now(self, source: int, to: int) -> None:
        self.keys[to] = self.keys[source]

    def _copy_slot_now(self, source: int, to: int) -> None:
        self.states[to] = self.states[source]

    def read_page(self, page: int) -> bytes:
        assert not self.in_flight
        self._may_fail("read_page")
        data: bytes = self.keys[page].tobytes()
        return data

    def write_page(self, page: int, data: bytes) -> None:
        assert not self.in_flight
        self.keys[page] = np.frombuffer(data, np.int64).reshape(PAGE, 2)

    def read_slot(self, slot: int) -> bytes:
        assert not self.in_flight
        return b"%d" % self.states[slot]

    def write_slot(self, slot: int, data: bytes) -> None:
        assert not self.in_flight
        self.states[slot] = int(data)

    def grow(self, pages: int, slots: int) -> bool:
        assert not self.in_flight
        assert pages <= self.pages_most
        assert slots <= self.slots_most
        if self.fail == "grow":
            return False
        added = np.full((pages - self.pages_now, PAGE, 2), NOTHING, np.int64)
        self.keys = np.concatenate([self.keys, added])
        self.states += [NOTHING] * (slots - self.slots_now)
        self.pages_now, self.slots_now = pages, slots
        return True
