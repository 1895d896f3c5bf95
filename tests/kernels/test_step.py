"""begin_step: what the host has described becomes what kernels read. accept_drafts: how many drafts are right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from support.kernel_lab import Guarded, Lab, assert_untouched, every_lane
from support.step_rows import Run, StepRows
from zincmetal.check.inputs import POISON

SEVERAL = [Run(3, 130, slot=2, slot_out=4), Run(1, 0), Run(0, 63, 5, slot=1), Run(2, 0, 70)]


class Begin:
    """One dispatch of begin_step after step ``number - 1``. The other places of the ring are poison.

    ``chosen``: rows whose token is an output of the step before, by row. ``behind``: of these, rows
    behind a draft: (its tokens, those that were accepted). Their runs begin at the position after those. Where all
    were, the step before counts more, as after a longer draft. ``in_table``: pages of the tables that are there before
    the step; the step writes the others.
    """

    def __init__(
        self,
        lab: Lab,
        runs: Sequence[Run],
        number: int = 1,
        *,
        max_rows: int | None = None,
        max_page_writes: int | None = None,
        outs: Sequence[int] = (),
        chosen: dict[int, int] | None = None,
        behind: dict[int, tuple[int, int]] | None = None,
        in_table: int = 0,
    ) -> None:
        self.lab, self.number = lab, number % 2**32
        self.batch = batch = StepRows(lab, runs, outs=outs)
        self.ring, self.max_out = (lab.core.shapes()[name] for name in ("STEP_RING", "MAX_OUT"))
        self.place = self.number % self.ring
        self.max_rows = max_rows or batch.n_tokens + 3
        self.chosen = lab.rng.integers(0, 1000, 8).astype(np.int32)
        self.accepted = np.full(8, 0xFFFFFFFF, np.uint32)
        self.tokens, self.given = batch.rows["token"].copy(), batch.rows.copy()
        for t, output in (chosen or {}).items():
            drafted, accepted = (behind or {}).get(t, (0, 0))
            self.given["drafted"][t] = batch.rows["drafted"][t] = drafted
            self.given["pos"][t] = batch.rows["pos"][t] - accepted
            if drafted:
                self.accepted[output] = accepted + 5 * (accepted == drafted)
            self.given["token"][t] = batch.rows["token"][t] = -1 - output
            self.tokens[t] = self.chosen[output + accepted]
        self.writes = self._page_writes(in_table)
        self.max_page_writes = max_page_writes or len(self.writes) + 1
        batch.step["n_page_writes"], batch.step["number"] = len(self.writes), 77
        self.draws = self._poison(len(outs), "Draw")
        self.draws.view(np.uint8)[:] = lab.rng.integers(0, 256, self.draws.nbytes)

    def _page_writes(self, in_table: int) -> NDArray[Any]:
        """Returns writes of each entry of the tables, shuffled, except the first ``in_table`` of each table."""
        entries = [
            (self.batch.table_at[s] + i, page)
            for s, table in self.batch.tables.items()
            for i, page in enumerate(table.tolist())
            if i >= in_table
        ]
        writes = np.array(entries, np.uint32).reshape(-1, 2)
        return self.lab.rng.permutation(writes).astype(np.uint32).view(self.lab.core.params_dtype("PageWrite"))[:, 0]

    def _poison(self, n: int, struct: str) -> NDArray[Any]:
        dtype = self.lab.core.params_dtype(struct)
        return np.full((n, dtype.itemsize), POISON, np.uint8).view(dtype)[:, 0]

    def _ring(self, content: NDArray[Any], each: int) -> Guarded:
        """Makes a ring whose place of this step begins with ``content``, an array of structs or integers."""
        ring = np.full((self.ring, each, content.dtype.itemsize), POISON, np.uint8).view(content.dtype)[..., 0]
        ring[self.place, : len(content)] = content
        return self.lab.input(ring, align=4)

    def run(self, threads: int | None = None) -> Begin:
        lab, batch = self.lab, self.batch
        step, pages = batch.step.copy(), np.full_like(batch.pages, 0xFFFFFFFF)
        step["number"], step["n_tokens"] = (self.number - 1) % 2**32, 3
        written = self.writes["at"]
        pages.reshape(-1)[:] = batch.pages.reshape(-1)
        pages.reshape(-1)[written] = 0xFFFFFFFF
        inputs = [
            self._ring(batch.step, 1),
            self._ring(self.given[: batch.n_tokens], self.max_rows),
            self._ring(batch.out_rows[: len(self.draws)], self.max_out),
            self._ring(self.writes, self.max_page_writes),
            self._ring(self.draws, self.max_out),
            lab.input(self.chosen, align=4),
            lab.input(self.accepted, align=4),
        ]
        self.step, self.pages = lab.in_out(step), lab.in_out(pages, align=4)
        self.rows = lab.output(self.max_rows, dtype=batch.rows.dtype, align=4)
        self.ids = lab.output(self.max_rows, dtype=np.int32, align=4)
        self.out_rows = lab.output(self.max_out, dtype=np.uint32, align=4)
        self.drawn = lab.output(self.max_out, dtype=self.draws.dtype, align=4)
        self.history = lab.output(batch.cache_rows, dtype=np.int32, align=4)
        outputs = [self.step, self.rows, self.ids, self.out_rows, self.pages, self.drawn, self.history]
        params = {"max_rows": self.max_rows, "max_page_writes": self.max_page_writes}
        threads = threads or lab.core.shapes()["BEGIN_THREADS"]
        lab.run("begin_step", params, "BeginParams", [*inputs, *outputs], (1,), threads)
        return self

    def check(self) -> None:
        batch, n, outs = self.batch, self.batch.n_tokens, len(self.draws)
        want = batch.step.copy()
        want["number"] = self.number
        assert self.step.array.tobytes() == want.tobytes()
        assert self.rows.array[:n].tobytes() == batch.rows[:n].tobytes()
        assert np.array_equal(self.ids.array[:n], self.tokens[:n])
        assert np.array_equal(self.out_rows.array[:outs], batch.out_rows[:outs])
        assert self.drawn.array[:outs].tobytes() == self.draws.tobytes()
        assert np.array_equal(self.pages.array, batch.pages)
        assert np.array_equal(self.history.array[batch.new_places], self.tokens[:n])
        assert_untouched(np.delete(self.history.array, batch.new_places))
        for array, end in ((self.rows, n), (self.ids, n), (self.out_rows, outs), (self.drawn, outs)):
            assert_untouched(array.array[end:])


@every_lane
@pytest.mark.parametrize("number", [1, 2, 3, 4, 7, 2**31, 2**32 - 1, 2**32])
def test_the_place_of_a_number(lane: str, number: int) -> None:
    """The number wraps at 2^32, and the ring goes on."""
    Begin(Lab(lane), SEVERAL, number, outs=[0, 6, 76]).run().check()


@every_lane
@pytest.mark.parametrize("in_table", [0, 1, 9])
def test_pages_are_written_before_they_are_used(lane: str, in_table: int) -> None:
    """All entries of the tables, all but the first of each, and none."""
    Begin(Lab(lane), SEVERAL, in_table=in_table).run().check()


@every_lane
def test_one_row(lane: str) -> None:
    """As many rows as there is room for, in the last place of the ring."""
    Begin(Lab(lane), [Run(0, 200)], 7, outs=[0], chosen={0: 0}, in_table=9, max_rows=1, max_page_writes=1).run().check()


@every_lane
def test_tokens_that_the_step_before_has_chosen(lane: str) -> None:
    """Outputs in another order, one twice, and one that has no id."""
    lab = Lab(lane)
    begin = Begin(lab, [Run(s, 60 + s) for s in range(6)], outs=range(6), chosen={0: 3, 1: 0, 2: 7, 4: 3})
    begin.chosen[7] = begin.tokens[2] = -1
    begin.given["token"][3] = begin.batch.rows["token"][3] = begin.tokens[3] = 0  # an id as any other
    begin.run().check()


@every_lane
def test_rows_behind_drafts(lane: str) -> None:
    """Of them all, some and none are accepted, on both sides of the end of a page."""
    runs = [Run(0, 62), Run(1, 64), Run(2, 70), Run(3, 9), Run(4, 65)]
    behind = {0: (3, 2), 1: (3, 3), 2: (2, 0), 4: (1, 1)}
    Begin(Lab(lane), runs, outs=range(5), chosen={0: 4, 1: 0, 2: 2, 3: 5, 4: 6}, behind=behind).run().check()


@every_lane
@pytest.mark.parametrize("threads", [32, 256])
def test_more_rows_and_pages_than_threads(lane: str, threads: int) -> None:
    """As many rows as there is room for."""
    lab = Lab(lane)
    most = lab.core.shapes()["MAX_OUT"]
    runs = [Run(0, 20_000), Run(1, 3, 300), Run(2, 1000, 290)]
    outs, chosen = range(0, 590, 10)[:most], {0: 5, 300: 2}
    Begin(lab, runs, outs=outs, chosen=chosen, max_rows=sum(run.n for run in runs)).run(threads).check()


@every_lane
def test_a_step_without_rows_counts(lane: str) -> None:
    Begin(Lab(lane), [], 9).run().check()


# ---- accept_drafts --------------------------------------------------------------------------------------------------


def accepted(lab: Lab, batch: StepRows, chosen: Sequence[int], outs: int, number: int) -> list[int]:
    """Runs accept_drafts in a plan of ``outs`` outputs; returns its counts, which are the same in both places."""
    shapes, n = lab.core.shapes(), min(len(chosen), outs)
    batch.step["number"] = number
    dtype = lab.core.params_dtype("Choice")
    found = lab.output(outs, dtype=np.uint32, align=4)
    before = np.zeros((shapes["STEP_RING"], shapes["MAX_OUT"]), dtype)
    before.view(np.uint8)[:] = lab.rng.integers(0, 256, before.view(np.uint8).shape)
    results = lab.in_out(before, align=4)
    out_rows, ids = lab.input(batch.out_rows[: len(chosen)], align=4), lab.input(np.array(chosen, np.int32), align=4)
    tokens = lab.input(batch.rows["token"].copy(), align=4)
    inputs = [batch.input(lab, "step"), batch.input(lab, "rows"), tokens, out_rows, ids]
    lab.run("accept_drafts", {"outs": outs}, "AcceptParams", [*inputs, found, results], (1,), shapes["ACCEPT_THREADS"])
    want = before.copy()
    want["accepted"][number % shapes["STEP_RING"], :n] = found.array[:n]
    assert results.array.tobytes() == want.tobytes(), "one field of the step's own results"
    assert_untouched(found.array[n:])
    counts: list[int] = found.array[:n].tolist()
    return counts


def drafts_of(lab: Lab, lengths: Sequence[int], known: Sequence[int]) -> StepRows:
    """Makes a step of runs with drafts of these lengths after ``known`` tokens each.

    From the last of those on, rows are outputs. A plain row comes first, and the last run has no output.
    """
    runs, outs, first = [Run(9, 3)], [0], 1
    for s, (drafted, n) in enumerate(zip(lengths, known, strict=True)):
        runs.append(Run(s, 60 + s, n + drafted))
        outs += range(first + n - 1, first + n + drafted)
        first += n + drafted
    return StepRows(lab, [*runs, Run(8, 0, 2)], rows=first + 5, outs=outs)


@every_lane
@pytest.mark.parametrize("number", [1, 2**31 + 3, 2**32 - 1])
def test_drafts_that_are_right_up_to_the_first_that_is_wrong(lane: str, number: int) -> None:
    """The counts are those of a loop over each run, whatever is right: all, some with gaps, and none."""
    lab = Lab(lane)
    for share in (1.0, 0.7, 0.0):
        batch = drafts_of(lab, [7, 1, 3, 15], [1, 4, 2, 1])
        chosen, want = [], []
        for row in batch.out_rows.tolist():
            end = int(batch.rows["end"][row])
            right = lab.rng.random() < share and row + 1 < end
            chosen.append(int(batch.rows["token"][row + 1]) if right else 1 << 21)
        for i, row in enumerate(batch.out_rows.tolist()):
            drafts = batch.rows["token"][row + 1 : int(batch.rows["end"][row])].tolist()
            wrong = [j for j, token in enumerate(drafts) if token != chosen[i + j]]
            want.append(wrong[0] if wrong else len(drafts))
        assert accepted(lab, batch, chosen, 40, number) == want
        assert sum(want) > 0 or share == 0


@every_lane
def test_as_many_outputs_as_there_can_be(lane: str) -> None:
    lab = Lab(lane)
    most = lab.core.shapes()["MAX_OUT"]
    batch = StepRows(lab, [Run(0, 5, most)], outs=range(most))
    chosen = [*batch.rows["token"][1:most].tolist(), 7]
    assert accepted(lab, batch, chosen, most, 2) == [*range(most - 1, -1, -1)]


@every_lane
def test_no_token_is_no_right_one(lane: str) -> None:
    """An output without a token, before a row whose token the step before could not choose either."""
    lab = Lab(lane)
    batch = StepRows(lab, [Run(0, 5, 3)], outs=range(3))
    batch.rows["token"][1] = -1
    assert accepted(lab, batch, [-1, int(batch.rows["token"][2]), 4], 4, 3) == [0, 1, 0]


@every_lane
def test_a_plan_of_fewer_outputs_counts_no_more(lane: str) -> None:
    """The last row that it counts has the right token, and so has the row behind it."""
    lab = Lab(lane)
    batch = StepRows(lab, [Run(0, 5, 6)], outs=range(6))
    assert accepted(lab, batch, [*batch.rows["token"][1:6].tolist(), 7], 4, 5) == [4, 3, 2, 1]


@every_lane
def test_the_first_id_is_one_as_any_other(lane: str) -> None:
    lab = Lab(lane)
    batch = StepRows(lab, [Run(0, 5, 3)], outs=range(3))
    batch.rows["token"][1:] = 0
    assert accepted(lab, batch, [0, 0, 0], 4, 3) == [2, 1, 0]
