"""The core's steps: descriptions in a ring, two in flight, results in order, and what is refused."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from support import metal_double_lane
from support.device_lanes import LANES, opened
from support.metal_double import built
from support.tiny_steps import EACH, SEATS, Run, TinySteps
from zincmetal.device import backend
from zincmetal.errors import DeviceError, UsageError

N = TinySteps.n_vocab


@pytest.fixture(params=LANES)
def model(request: pytest.FixtureRequest) -> Iterator[TinySteps]:
    with opened(request.param) as (core, device):
        yield TinySteps(core, device)


@pytest.fixture
def inline() -> TinySteps:
    core = backend.load("cpu")
    return TinySteps(core, core.Device(threads=1))


# ---- what a step computes ----------------------------------------------------------------------------------------


def test_outputs_are_answered_in_their_order(model: TinySteps) -> None:
    runs = [Run([3], 5, seat=2), Run([9, 10, 11], 60, seat=0), Run([7, 8], 0, seat=1)]
    assert model.submit(runs, outs=[4, 0, 3]) == 1
    assert model.steps.in_flight == 1
    assert model.collect() == [model.after(7), model.after(3), model.after(11)]
    assert model.steps.in_flight == 0
    noted = [model.history(*at) for at in ((2, 5), (0, 60), (0, 61), (0, 62), (1, 0), (1, 1))]
    assert noted == [3, 9, 10, 11, 7, 8]


def test_a_step_may_have_no_output(model: TinySteps) -> None:
    model.submit([Run([5, 6])])
    assert model.collect() == []
    assert model.history(0, 1) == 6


def test_a_plan_that_chooses_nothing_answers_minus_1(model: TinySteps) -> None:
    model.run(1)
    for _ in range(5):  # once around the ring
        model.submit([Run([5, 6])], [0, 1], plan=model.compiled([model.begin()]))
        assert model.collect() == [-1, -1]


def test_a_choice_has_the_fields_of_params_h(model: TinySteps) -> None:
    model.submit([Run([5])], [0])
    choices = model.core.collect_step(model.steps)
    assert choices.dtype == model.core.params_dtype("Choice")
    assert choices.tolist() == [(model.after(5), 0, 0.0, 0, 0)]


def test_steps_go_around_the_ring(model: TinySteps) -> None:
    for i in range(1, 14):
        tokens = [(5 * i + j) % N for j in range(i % 8 + 1)]
        outs = list(range(len(tokens)))[:4]
        assert model.submit([Run(tokens)], outs) == i
        assert model.collect() == [model.after(tokens[j]) for j in outs]


def test_page_writes_come_before_the_rows(model: TinySteps) -> None:
    """The row's token is noted in the page that the same step gives to its sequence."""
    *described, n_single = model.described([Run([5], 70, seat=1)], [0], page_writes=[(EACH + 1, 9), (EACH, 11)])
    model.core.decode_step(model.steps, model.plan, *described, n_single)
    model.collect()
    pages = model.buffers["pages"].read().view(np.uint32).reshape(SEATS, EACH)
    assert pages[1].tolist() == [11, 9, 5]
    assert model.history(3, 6) == 5  # page 9 is the first of seat 3


def test_draws_arrive_and_are_zero_if_there_are_none(model: TinySteps) -> None:
    rows, outs, writes, _, n_single = model.described([Run([5]), Run([6], seat=1)], [0, 1])
    draws = np.zeros(2, model.core.params_dtype("Draw"))
    draws["temperature"], draws["key_low"], draws["pages"] = 0.5, [7, 8], [0, EACH]
    dtype = draws.dtype
    for given, want in ((draws, draws), (None, np.zeros(2, dtype))):
        model.core.decode_step(model.steps, model.plan, rows, outs, writes, given, n_single)
        model.collect()
        assert model.buffers["draws"].read(0, want.nbytes).tobytes() == want.tobytes()


# ---- two in flight -----------------------------------------------------------------------------------------------


def test_running_ahead_changes_no_token(model: TinySteps) -> None:
    want = [model.after(3, n) for n in range(1, 31)]
    one_by_one = [model.run(3)]
    for pos in range(1, 30):
        one_by_one.append(model.run(one_by_one[-1], pos))
    assert one_by_one == want
    assert model.steps.counters["max_in_flight"] == 1
    model.submit([Run([3])], [0])
    ahead = []
    for pos in range(1, 30):
        model.submit([Run([-1], pos)], [0])
        assert model.steps.in_flight == 2
        ahead += model.collect()
    assert ahead + model.collect() == want
    assert [model.history(0, pos) for pos in range(30)] == [3, *want[:-1]]
    counters = model.steps.counters
    assert counters["max_in_flight"] == 2
    assert counters["steps"] == counters["tokens"] == counters["command_buffers"] == 60
    assert counters["dispatches"] == counters["barriers"] == 60 * 5


def test_a_row_takes_the_choice_of_any_output_of_the_step_before(model: TinySteps) -> None:
    model.submit([Run([3]), Run([4], seat=1), Run([5, 6], seat=2)], [0, 1, 3])
    model.submit([Run([-3], 2, seat=2), Run([-1], 1), Run([9], 1, seat=1)], [0, 1, 2])
    assert model.collect() == [model.after(3), model.after(4), model.after(6)]
    model.submit([Run([-2], 2)], [0])  # of a step that still is in flight
    assert model.collect() == [model.after(6, 2), model.after(3, 2), model.after(9)]
    assert model.collect() == [model.after(3, 3)]
    model.submit([Run([-1], 3)], [0])  # of a step that was collected
    assert model.collect() == [model.after(3, 4)]


def test_a_row_behind_a_draft_goes_on_where_it_is_accepted(model: TinySteps) -> None:
    """Its position and its token are those after the tokens that the step before has accepted, whichever there are."""
    plan = model.compiled([model.begin(), *model.body(), model.accept()])
    for right in range(4):
        drafts = [model.after(3, n) if n <= right else (model.after(3, n) + 1) % N for n in range(1, 4)]
        model.submit([Run([3, *drafts], 60)], [0, 1, 2, 3], plan)
        model.submit([Run([-1], 61, drafted=3)], [0])
        choices = model.core.collect_step(model.steps)
        assert choices["accepted"][0] == right
        assert choices["id"][right] == model.after(3, right + 1)
        assert model.collect() == [model.after(3, right + 2)]
        assert model.history(0, 61 + right) == model.after(3, right + 1)


def test_a_row_behind_a_draft_that_is_not_there_is_refused(model: TinySteps) -> None:
    model.submit([Run([3, 4, 5], 60)], [0, 1, 2])
    for run, why in (
        (Run([-1], 61, drafted=3), "behind a draft of 3 tokens after output 0 of the step before, which has 3 outputs"),
        (Run([-2], 61, drafted=2), "after output 1"),
        (Run([-3], 61, drafted=2**32 - 1), "after output 2"),
        (Run([4], 61, drafted=1), "must be a run of its own, and take the token of an output"),
        (Run([-1, -2], 61, drafted=1), "must be a run of its own"),
        (Run([-1], EACH * model.shapes["KV_PAGE"] - 1, seat=SEATS - 1, drafted=1), "has page entry"),
    ):
        with pytest.raises(UsageError, match=why):
            model.submit([run], [0])
    model.collect()


def takes_none(output: int, n: int) -> Any:
    return pytest.raises(UsageError, match=rf"output {output} of the step before, which has {n} output")


def test_a_choice_that_is_not_there_is_refused(model: TinySteps) -> None:
    with takes_none(0, 0):
        model.submit([Run([-1])], [0])
    model.submit([Run([3, 4])], [0, 1])
    with takes_none(2, 2):
        model.submit([Run([-3], 2)], [0])
    model.submit([Run([-2], 2)])
    assert model.collect() == [model.after(3), model.after(4)]
    for token in (-1, -2, -(2**31)):  # the step in flight has no outputs
        with takes_none(-1 - token, 0):
            model.submit([Run([token], 3)], [0])
    assert model.collect() == []


def test_a_third_step_is_refused_and_a_result_that_is_not_there(model: TinySteps) -> None:
    with pytest.raises(UsageError, match="no step is in flight"):
        model.collect()
    model.submit([Run([3])], [0])
    model.submit([Run([4])], [0])
    for call in (
        lambda: model.submit([Run([5])], [0]),
        lambda: model.core.describe(model.steps, *model.described([Run([5])])),
    ):
        with pytest.raises(UsageError, match="two steps are in flight"):
            call()
    assert [model.collect(), model.collect()] == [[model.after(3)], [model.after(4)]]


# ---- drop and close ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, 2])
def test_what_is_dropped_is_forgotten(n: int, model: TinySteps) -> None:
    for n_before in range(5):  # at every place of the ring
        for _ in range(n):
            model.submit([Run([3])], [0])
        model.steps.drop()
        assert model.steps.in_flight == 0
        with pytest.raises(UsageError, match="no step is in flight"):
            model.collect()
        if n:
            with pytest.raises(UsageError, match="of the step before"):
                model.submit([Run([-1], 1)], [0])
        assert model.run(7 + n_before) == model.after(7 + n_before)
    assert model.steps.counters["steps"] == 5


def test_after_close_no_step_begins_and_those_in_flight_can_be_collected(model: TinySteps) -> None:
    model.submit([Run([3])], [0])
    model.steps.close()
    with pytest.raises(UsageError, match="closed"):
        model.submit([Run([4])], [0])
    assert model.collect() == [model.after(3)]
    model.steps.drop()


@pytest.mark.parametrize("keep", ["steps", "plan", "device", "none"])
def test_what_is_in_flight_outlives_its_owners(keep: str, model: TinySteps) -> None:
    model.submit([Run([3])], [0])
    model.submit([Run([-1], 1)], [0])
    steps, core, want = model.steps, model.core, model.after(3)
    kept = {"steps": steps, "plan": model.plan, "device": model.device, "none": None}[keep]
    vars(model).clear()
    gc.collect()
    if keep == "steps":
        assert core.collect_step(steps)["id"].tolist() == [want]
    del steps, kept


# ---- steps in sections -------------------------------------------------------------------------------------------


def test_a_described_step_runs_in_sections(model: TinySteps) -> None:
    last = model.compiled(model.body())
    for i in range(6):
        model.core.describe(model.steps, *model.described([Run([i, i + 1])], [1, 0]))
        assert model.steps.in_flight == 0
        model.device.run([model.begin()])
        assert model.core.submit_described(model.steps, last) == i + 1
        assert model.collect() == [model.after(i + 1), model.after(i)]
    with pytest.raises(UsageError, match="no step is described"):
        model.core.submit_described(model.steps, last)


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("then", ["describe", "decode", "drop"])
def test_a_described_step_can_be_given_up(then: str, begun: bool, model: TinySteps) -> None:
    """Whether its first section has run or not."""
    model.run(1)
    model.core.describe(model.steps, *model.described([Run([5])], [0]))
    if begun:
        model.device.run([model.begin()])
    if then == "drop":
        model.steps.drop()
    if then == "describe":
        model.core.describe(model.steps, *model.described([Run([6])], [0]))
        assert model.core.submit_described(model.steps, model.plan) == 2
        assert model.collect() == [model.after(6)]
    else:
        assert model.run(7) == model.after(7)


def test_a_described_step_must_fit_the_plan(model: TinySteps) -> None:
    model.core.describe(model.steps, *model.described([Run([5, 6])], [0, 1]))
    for rows, outs, said in ((1, 4, "2 rows in a plan for 1"), (8, 1, "2 outputs in a plan for 1")):
        small = model.core.Plan(model.device, [model.begin()], rows, outs)
        with pytest.raises(UsageError, match=said):
            model.core.submit_described(model.steps, small)
    model.core.submit_described(model.steps, model.plan)
    assert model.collect() == [model.after(5), model.after(6)]


# ---- what is refused ---------------------------------------------------------------------------------------------


def changed(what: str, **fields: Any) -> Callable[[list[Any]], None]:
    """Changes fields of a row, "rows 1", before the step is submitted."""
    _, _, at = what.partition(" ")

    def change(step: list[Any]) -> None:
        for name, value in fields.items():
            step[0][name][int(at)] = value

    return change


def put(i: int, value: Callable[[TinySteps, Any], Any]) -> Callable[[list[Any], TinySteps], None]:
    def change(step: list[Any], model: TinySteps) -> None:
        step[i] = value(model, step[i])

    return change


def draws(n: int, **fields: Any) -> Callable[[list[Any], TinySteps], None]:
    def make(model: TinySteps, _: Any) -> Any:
        made = np.zeros(n, model.core.params_dtype("Draw"))
        for name, value in fields.items():
            made[name] = value
        return made

    return put(3, make)


ROWS = [Run([3], 5), Run([4], 6, seat=1), Run([5, 6, 7], 7, seat=2)]
WRONG: list[tuple[Any, str]] = [
    (changed("rows 0", token=N), rf"token id {N} is outside the vocabulary of {N}"),
    (changed("rows 4", token=2**31 - 1), "outside the vocabulary"),
    (changed("rows 0", begin=1), "row 0 begins a run"),
    (changed("rows 0", end=0), "row 0 begins a run"),
    (changed("rows 1", end=9), "row 1 begins a run, which it says has rows 1 to 9 of 5"),
    (changed("rows 2", begin=0), "row 2 begins a run"),
    (changed("rows 3", begin=3), "row 3 does not continue the run"),
    (changed("rows 3", end=4), "row 3 does not continue the run"),
    (changed("rows 4", pos=8), "row 4 does not continue the run"),
    (changed("rows 3", pages=0), "row 3 does not continue the run"),
    (changed("rows 4", slot=1), "row 4 does not continue the run"),
    (changed("rows 3", slot_out=1), "row 3 does not continue the run"),
    (changed("rows 4", end=6), "row 4 does not continue the run"),
    (changed("rows 1", pages=SEATS * EACH), "page entry 12 of 12"),
    (changed("rows 1", pages=2**32 - 1), "page entry 4294967295 of 12"),
    (changed("rows 1", pos=64 * (SEATS * EACH - EACH)), "page entry 12 of 12"),
    (put(0, lambda _, rows: rows[:0]), "at least one row"),
    (put(0, lambda _, rows: np.repeat(rows, 2)), "a step of 10 rows in a plan for 8"),
    (put(0, lambda _, rows: rows[::2]), "rows must be a contiguous array"),
    (put(0, lambda _, rows: rows.view(np.uint8)), "rows must be a contiguous array"),
    (put(0, lambda _, rows: rows[None]), "rows must be a contiguous array"),
    (put(1, lambda *_: np.array([0, 5], np.uint32)), "row 5 is an output of a step of 5 rows"),
    (put(1, lambda *_: np.arange(5, dtype=np.uint32)), "5 outputs in a plan for 4"),
    (put(1, lambda *_: np.array([0], np.int64)), "outs must be a contiguous array"),
    (put(2, lambda model, _: np.array([(12, 0)], model.core.params_dtype("PageWrite"))), "a page write at 12 of 12"),
    (put(2, lambda model, _: np.zeros(5, model.core.params_dtype("PageWrite"))), "5 page writes, where there is room"),
    (put(2, lambda _, writes: writes.view(np.uint32)), "page_writes must be a contiguous array"),
    (draws(1), "one draw for each output"),
    (draws(2, pages=12), "page entry 12 of 12"),
    (draws(2, pos=64 * 12), "page entry 12 of 12"),
    (put(3, lambda *_: np.zeros(2, np.float32)), "draws must be a contiguous array"),
    (put(4, lambda *_: 3), "row 2 begins a longer run, but is among the 3 single rows"),
    (put(4, lambda *_: 6), "a step of 5 rows has no 6 single rows"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "said"), WRONG)
def test_a_wrong_description_is_refused_and_changes_nothing(change: Any, said: str, inline: TinySteps) -> None:
    inline.run(2)
    for call in ("decode_step", "describe"):
        step: list[Any] = list(inline.described(ROWS, [0, 4]))
        change(step, inline) if change.__code__.co_argcount == 2 else change(step)
        before = [inline.buffers[name].read().tobytes() for name in inline.buffers]
        where = (inline.steps, inline.plan) if call == "decode_step" else (inline.steps,)
        if call == "describe" and "in a plan for" in said:
            said = "where there is room for 8|is an output|does not continue|begins a run"
            if len(step[0]) <= inline.rows:
                continue
        with pytest.raises(UsageError, match=said):
            getattr(inline.core, call)(*where, *step)
        assert inline.steps.in_flight == 0
        assert before == [inline.buffers[name].read().tobytes() for name in inline.buffers]
    assert inline.run(9) == inline.after(9)


def test_more_outputs_than_rows_are_refused(inline: TinySteps) -> None:
    """Kernels of outputs look at the number of rows alone."""
    with pytest.raises(UsageError, match="a step of 1 row has no 2 outputs"):
        inline.submit([Run([3])], [0, 0])


def test_the_plan_and_the_buffers_must_fit(inline: TinySteps) -> None:
    other = TinySteps(inline.core, inline.core.Device(threads=1))
    with pytest.raises(UsageError, match="compiled for another device"):
        inline.submit([Run([3])], [0], plan=other.plan)
    for name, said in (("next_rows", "next_rows must be shared"), ("results", "results must be shared")):
        kept = inline.buffers[name]
        inline.buffers[name] = inline.device.alloc(kept.nbytes - 4)
        with pytest.raises(UsageError, match=said):
            inline.new_steps()
        inline.buffers[name] = kept
    inline.buffers["step"] = inline.device.alloc(16)
    with pytest.raises(UsageError, match="step must have"):
        inline.new_steps()
    with pytest.raises(TypeError):
        inline.core.decode_step(inline.steps, inline.plan, [1], [2], [3])


def test_a_second_queue_goes_on_from_its_own_start(model: TinySteps) -> None:
    """It tells the device its own numbers, whatever steps were before."""
    for _ in range(3):
        model.run(1)
    model.steps = model.new_steps()
    assert model.submit([Run([4])], [0]) == 1
    assert model.collect() == [model.after(4)]


def test_counters_can_be_read_at_any_time(model: TinySteps) -> None:
    stop, seen = threading.Event(), set()

    def look() -> None:
        while not stop.is_set():
            seen.add((model.steps.in_flight, model.steps.counters["tokens"]))

    reader = threading.Thread(target=look)
    reader.start()
    for _ in range(50):
        model.run(3)
    stop.set()
    reader.join()
    assert all(in_flight in (0, 1) and 0 <= tokens <= 50 for in_flight, tokens in seen)


# ---- failures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nth", [1, 2])
@pytest.mark.parametrize("code", ["victim", "display", "8"])
def test_a_failure_that_passes(code: str, nth: int) -> None:
    """Metal can go on: what was in flight is dropped, and the next steps have their places in the ring."""
    with metal_double_lane.installed(built()):
        double, core = metal_double_lane.Double(), backend.load("metal")
        model = TinySteps(core, core.Device(kernel_folder=backend.kernel_folder(core)))
        for i in range(5):
            model.run(i)
            double.set(f"gpu={nth}:{code};slow=20")
            model.submit([Run([3])], [0])
            model.submit([Run([-1], 1)], [0])
            if nth == 2:
                assert model.collect() == [model.after(3)]
            with pytest.raises(DeviceError):
                model.collect()
            double.set("")
            assert model.steps.in_flight == 0
            with pytest.raises(UsageError, match="no step is in flight"):
                model.collect()
            with pytest.raises(UsageError, match="of the step before, which has 0"):
                model.submit([Run([-1], 1)], [0])
            assert model.run(10 + i) == model.after(10 + i)
        assert model.steps.counters["steps"] == 5 * (2 if nth == 1 else 3)
        del model
        gc.collect()
