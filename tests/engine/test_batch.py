"""A batch: its rows as the device reads them, and who owns what its runs write."""

from __future__ import annotations

import numpy as np
import pytest

from support.fake_executor import DTYPES, FakeExecutor
from zincmetal.engine.batch import Builder, Choice, Drawing, describe, id_of, is_finite
from zincmetal.engine.pages import PagePool, PoolEmptyError, StateSlots
from zincmetal.engine.sequence import Sequence
from zincmetal.sampling.params import SamplingParams

GREEDY = Drawing(SamplingParams())
SEEDED = SamplingParams(temperature=1.0, seed=1)


class Bench:
    """Pools, an executor and a builder."""

    def __init__(self, pages: int = 20, slots: int = 4, **options: object) -> None:
        self.executor = FakeExecutor(recurrent=True, pages=pages, **{"max_rows": 320, **options})  # type: ignore[arg-type]
        self.pages, self.slots = PagePool(pages), StateSlots(slots)
        self.renew()

    def renew(self) -> None:
        self.builder = Builder(self.executor, self.pages, self.slots)

    def sequence(self, seat: int, n: int) -> Sequence:
        sequence = Sequence(list(range(n)))
        sequence.sit(seat)
        return sequence


def test_rows_of_singles_come_first_and_outputs_are_the_first_of_them() -> None:
    bench = Bench()
    chunk, plain, output, ahead = (bench.sequence(seat, 300) for seat in range(4))
    assert bench.builder.add(chunk, chunk.ids[:70])
    assert bench.builder.add(plain, [41])
    assert bench.builder.add(output, [42], GREEDY)
    assert bench.builder.add(ahead, [-1], GREEDY)
    batch = bench.builder.batch()
    described = describe(batch, DTYPES)
    table = PagePool.needed(bench.executor.n_ctx)
    assert (batch.n_rows, batch.n_single, described.n_single, batch.output) == (73, 3, 3, "argmax")
    assert described.outs.tolist() == [0, 1]
    assert (len(bench.builder), batch.last_position) == (4, 69)
    rows = described.rows
    assert rows["token"].tolist() == [42, -1, 41, *range(70)]
    assert rows["pos"].tolist() == [0, 0, 0, *range(70)]
    assert rows["begin"].tolist() == [0, 1, 2, *[3] * 70]
    assert rows["end"].tolist() == [1, 2, 3, *[73] * 70]
    assert rows["pages"].tolist() == [2 * table, 3 * table, 1 * table, *[0] * 70]
    assert described.draws is None
    assert [(int(w["at"]), int(w["page"])) for w in described.page_writes] == [
        (0, chunk.pages[0]),
        (1, chunk.pages[1]),
        (table, plain.pages[0]),
        (2 * table, output.pages[0]),
        (3 * table, ahead.pages[0]),
    ]
    assert len({int(row["slot_out"]) for row in rows}) == 4


def test_a_page_is_written_into_the_table_once() -> None:
    bench = Bench()
    sequence = bench.sequence(0, 300)
    writes = []
    for n in (60, 4, 1, 1, 100):
        bench.builder.add(sequence, sequence.ids[sequence.submitted :][:n])
        writes.append(len(bench.builder.batch().page_writes))
        bench.renew()
    assert writes == [1, 0, 1, 0, 1]
    sequence.sit(3)
    bench.builder.add(sequence, [1])
    assert len(bench.builder.batch().page_writes) == 3


def test_draws_say_how_each_output_is_chosen() -> None:
    bench = Bench()
    params = SamplingParams(temperature=0.5, top_k=-1, top_p=0.9, presence_penalty=0.25, repeat_last_n=-1)
    first, second, third = (bench.sequence(seat, 9) for seat in range(3))
    mask = np.ones(4, np.uint32)
    bench.builder.add(first, [1], Drawing(params, key=(5 << 32) + 7, mask=mask, n_logprobs=3))
    bench.builder.add(
        second, [2], Drawing(SamplingParams(temperature=2.0, logits_processors=[lambda i, x: x]), host=True)
    )
    bench.builder.add(third, [3], GREEDY)
    batch = bench.builder.batch()
    draws = describe(batch, DTYPES, lambda i, drawing: (10 * i, 100 if drawing.mask is mask else None)).draws
    assert draws is not None
    assert (batch.output, batch.by_host) == ("draw", True)
    assert draws["temperature"].tolist() == [0.5, 0, 0]
    assert draws["top_k"].tolist() == [0, 0, 0]
    assert draws["top_p"].tolist() == [np.float32(0.9), 1, 1]
    assert draws["repeat_last_n"].tolist() == [2**32 - 1, 0, 0]
    assert (draws[0]["key_low"], draws[0]["key_high"]) == (7, 5)
    assert draws["bias_at"].tolist() == [0, 0, 20]
    assert (draws["mask_at"].tolist(), draws["has_mask"].tolist()) == ([100, 0, 0], [1, 0, 0])
    assert draws["n_logprobs"].tolist() == [3, 0, 0]
    assert draws["pages"].tolist() == [0, 16, 32]


def test_the_rows_of_a_draft_are_outputs_of_one_run() -> None:
    bench = Bench()
    single, other, drafted = (bench.sequence(seat, 9) for seat in range(3))
    bench.builder.add(drafted, drafted.ids[:6])
    bench.renew()
    drafted.computed, old = 6, drafted.slot
    bench.builder.add(other, other.ids)
    bench.builder.add(drafted, [7, 8, 9], *(Drawing(SEEDED, key=key) for key in (5, 6)), keep_states=True)
    bench.builder.add(single, [1], GREEDY)
    batch = bench.builder.batch()
    assert batch.verifies
    assert bench.builder.outs_left == bench.executor.max_outs - 3
    described = describe(batch, DTYPES)
    assert described.draws is not None
    assert described.outs.tolist() == [0, 11, 12], "the single row, and the last two of the draft's run"
    assert described.draws["pos"].tolist() == [0, 7, 8]
    assert described.draws["key_low"].tolist() == [0, 5, 6]
    run = batch.runs[-1]
    assert (run.slot, run.slot_out) == (old, drafted.slot)
    assert run.slot != run.slot_out
    assert run.slot not in batch.slots, "the caller has the old slot"


def test_a_shared_page_and_a_shared_slot_are_read_and_not_written() -> None:
    bench = Bench()
    first = bench.sequence(0, 100)
    bench.builder.add(first, first.ids)
    first.computed = first.submitted
    second = first.fork(bench.pages, bench.slots)
    second.sit(1)
    old_pages, old_slot = list(first.pages), first.slot
    bench.renew()
    bench.builder.add(first, [7])
    bench.builder.add(second, [8])
    batch = bench.builder.batch()
    mine, other = batch.runs
    assert (mine.slot, other.slot) == (old_slot, old_slot)
    assert len({mine.slot_out, other.slot_out, old_slot}) == 3
    assert first.pages[0] == second.pages[0] == old_pages[0]
    assert len({first.pages[1], second.pages[1], old_pages[1]}) == 3
    # What a run has left has its owner until the step is collected. So the second run could not write there either.
    assert (batch.pages, batch.slots) == ([old_pages[1]] * 2, [old_slot] * 2)
    assert (bench.pages.count(old_pages[1]), bench.slots.count(old_slot)) == (2, 2)  # type: ignore[arg-type]


def test_a_fork_at_the_end_of_a_page_copies_nothing() -> None:
    bench = Bench()
    first = bench.sequence(0, 128)
    bench.builder.add(first, first.ids)
    first.computed = first.submitted
    second = first.fork(bench.pages, bench.slots)
    second.sit(1)
    bench.renew()
    bench.builder.add(second, [8])
    assert (bench.builder.batch().pages, second.pages[:2], len(second.pages)) == ([], first.pages, 3)


def test_a_step_without_room_takes_no_run() -> None:
    bench = Bench(max_singles=2, max_rows=20)
    sequences = [bench.sequence(seat, 99) for seat in range(4)]
    assert not bench.builder.add(sequences[0], sequences[0].ids[:21])
    assert [bench.builder.add(s, [1]) for s in sequences[:3]] == [True, True, False]
    assert bench.builder.add(sequences[3], sequences[3].ids[:18])
    assert not bench.builder.add(sequences[2], sequences[2].ids[:2])
    assert (sequences[2].submitted, sequences[2].slot, bench.builder.batch().n_rows) == (0, None, 20)


@pytest.mark.parametrize(("pages", "slots"), [(1, 4), (20, 0)])
def test_an_empty_pool_adds_no_run_and_loses_nothing(pages: int, slots: int) -> None:
    bench = Bench(pages=pages, slots=slots)
    sequence = bench.sequence(0, 99)
    with pytest.raises(PoolEmptyError):
        bench.builder.add(sequence, sequence.ids)
    assert (sequence.submitted, sequence.slot, bench.builder.batch().runs) == (0, None, [])
    sequence.release(bench.pages, bench.slots)
    assert (bench.pages.free, bench.slots.free) == (pages, slots)


def test_rows_of_the_block_that_drafts_change_nothing_of_their_sequences() -> None:
    bench = Bench(max_singles=2)
    first, second = bench.sequence(0, 99), bench.sequence(1, 99)
    bench.builder.add(first, first.ids[:70])
    bench.renew()
    before = first.submitted, first.computed, first.slot
    assert bench.builder.add_draft(first, 130, 5)
    assert bench.builder.add_draft(second, 7, 6)
    assert not bench.builder.add_draft(second, 8, 7), "each row is an output"
    assert (first.submitted, first.computed, first.slot) == before
    assert (len(first.pages), second.pages != [], second.slot) == (3, True, None)
    batch = bench.builder.batch()
    assert (batch.output, batch.n_rows, batch.n_single) == ("draft", 2, 2)
    described = describe(batch, DTYPES)
    assert described.outs.tolist() == [0, 1]
    assert [described.rows[name].tolist() for name in ("pos", "token")] == [[130, 7], [5, 6]]
    assert len(described.page_writes) == 2  # the third page of the first, and the first of the second


@pytest.mark.parametrize("draft", [False, True])
@pytest.mark.parametrize(("most", "fits"), [(3, True), (2, False)])
def test_a_step_writes_so_many_entries_of_page_tables(draft: bool, most: int, fits: bool) -> None:
    bench = Bench()
    bench.executor.max_page_writes = most
    first, second = bench.sequence(0, 300), bench.sequence(1, 300)
    assert bench.builder.add(first, first.ids[:64])
    assert (bench.builder.add_draft(second, 127, 5) if draft else bench.builder.add(second, second.ids[:128])) is fits
    assert len(bench.builder) == 1 + fits
    assert len(bench.builder.batch().page_writes) == (3 if fits else 1)


def test_a_step_has_so_many_outputs() -> None:
    bench = Bench()
    bench.executor.max_outs = 5
    bench.renew()
    first, second, third = (bench.sequence(seat, 300) for seat in range(3))
    assert bench.builder.add(first, [1, 2, 3], GREEDY, GREEDY, GREEDY)
    assert not bench.builder.add(second, [1, 2, 3], GREEDY, GREEDY, GREEDY)
    assert bench.builder.add(second, [1, 2], GREEDY, GREEDY)
    assert not bench.builder.add(third, [1], GREEDY)
    assert bench.builder.add(third, [1])


def test_an_id_is_that_of_a_record_and_of_a_tuple() -> None:
    record = np.array([(5, 1)], [("id", "<i4"), ("n_not_finite", "<u4")])[0]
    assert (id_of(record), id_of(Choice(6))) == (5, 6)
    assert (is_finite(record), is_finite(Choice(6)), is_finite(Choice(-1, 3))) == (False, True, False)
