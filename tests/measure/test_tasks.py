"""Tasks of a bench, and their runs on a tiny model by a scripted clock. No time is asserted."""

from __future__ import annotations

import itertools

import pytest

from support.paths import DATA
from zincmetal.engine.session import Session
from zincmetal.errors import ContextFullError, UsageError
from zincmetal.measure.choices import GREEDY, SAMPLED
from zincmetal.measure.running import Bench
from zincmetal.measure.tasks import Task, Timed, tasks
from zincmetal.measure.whole import Asked, loaded

DENSE, HYBRID = DATA / "qwen3-q8_0.gguf", DATA / "qwen35moe-q4k-q5k-q8.gguf"


def test_names_are_those_of_llama_bench():
    assert Task(n_prompt=512).name == "pp512"
    assert Task(n_gen=128, depth=4096).name == "tg128 @ d4096"
    assert Task(n_gen=64, sequences=8, sampling=SAMPLED).name == "tg64 x8, sampled"


def test_all_combinations_are_made_once():
    found = tasks([64, 0, 64], [8], [0, 32], [1, 4], [GREEDY, SAMPLED])
    assert [t.name for t in found if t.n_prompt] == ["pp64", "pp64 @ d32"]
    assert sorted(t.name for t in found if t.n_gen and not t.depth) == [
        "tg8",
        "tg8 x4",
        "tg8 x4, sampled",
        "tg8, sampled",
    ]
    assert len(found) == len(set(found)) == 10


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        (([0], [0], [0], [1]), "both 0"),
        (([1], [1], [0], [33]), "1 to 32"),
        (([1], [1], [0], [0]), "1 to 32"),
        (([-1], [1], [0], [1]), "0 or more"),
        (([1], [1], [-5], [1]), "0 or more"),
    ],
)
def test_numbers_without_sense_are_refused(numbers, said):
    with pytest.raises(UsageError, match=said):
        tasks(*numbers, [GREEDY])


def test_the_contexts_of_tasks_hold_them():
    assert Asked((Task(n_prompt=100, depth=50),)).context == 152
    assert Asked((Task(n_gen=3),)).context == 64  # of the fixed prompt
    assert Asked((Task(n_gen=3),), profile=True).context == 513


def test_figures_have_the_median_and_half_the_range():
    facts = Timed(Task(n_prompt=10), (10, 10, 10), (1.0, 2.0, 5.0), "d").facts()
    assert facts["samples_ts"] == [10.0, 5.0, 2.0]
    assert (facts["median_ts"], facts["spread_ts"]) == (5.0, 4.0)
    assert facts["samples_ns"] == [10**9, 2 * 10**9, 5 * 10**9]
    assert facts["avg_ts"] == pytest.approx(17 / 3)
    assert {"n_prompt", "n_gen", "n_depth", "samples_ns", "samples_ts", "avg_ts"} <= facts.keys()


# ---- on a model -------------------------------------------------------------------------------------------------


@pytest.fixture(params=[DENSE, HYBRID], ids=lambda path: path.stem)
def running(request):
    asked = Asked((Task(n_gen=16, depth=64, sequences=4),), device="cpu", threads=1)
    with loaded(request.param, asked) as running:
        yield running


def ticking():
    """Returns a clock that goes on by a second at each look."""
    ticks = itertools.count()
    return lambda: float(next(ticks))


def test_a_prompt_ends_with_its_first_token(running):
    bench = Bench(running, ticking())
    ran = bench.run(Task(n_prompt=20))
    assert (ran.tokens, ran.seconds) == (20, 1.0)
    assert [len(ids) for ids in ran.ids] == [1]


def test_the_first_token_of_an_answer_does_not_count(running):
    ran = Bench(running, ticking()).run(Task(n_gen=6))
    assert (ran.tokens, ran.seconds) == (6, 6.0)
    assert len(ran.ids[0]) == 7


def test_many_sequences_count_while_all_decode(running):
    """Each look at the clock is one token, so that as many tokens as seconds lie between two of them."""
    ran = Bench(running, ticking()).run(Task(n_gen=8, sequences=4))
    assert ran.tokens == ran.seconds == 7 * 4 + 1  # from the last first token to the first last one
    assert len({tuple(ids) for ids in ran.ids}) > 1
    assert {len(ids) for ids in ran.ids} == {9}


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
def test_runs_make_the_same_tokens(running, sampling):
    task = Task(n_gen=8, depth=40, sequences=2, sampling=sampling)
    first = Bench(running).measure(task, 2)
    assert first.digest not in ("", "varies")
    assert Bench(running).measure(task, 1).digest == first.digest


def test_a_depth_is_computed_once_and_is_the_context(running):
    """The tokens after a depth are those after the same prompt in one piece, and its tokens are not computed again."""
    bench = Bench(running)
    bench.run(Task(n_gen=2, depth=48))
    before = running.engine.profile()["tokens"]
    ran = bench.run(Task(n_gen=5, depth=48))
    assert running.engine.profile()["tokens"] - before <= 1 + 5 + 1
    whole = bench.ids(48, 0) + bench.ids(1, 0, 49)
    session = Session(running.engine)
    with running.loop.exclusive(session.end):
        token = session.prefill(whole)
        found = [token]
        for _ in range(5):
            token = session.decode(token)
            found.append(token)
    assert ran.ids[0] == found


def test_nothing_is_kept_after_the_bench(running):
    bench, pages = Bench(running), running.engine.pages
    bench.run(Task(n_gen=2, depth=64, sequences=3))
    running.loop.call(lambda: None)
    assert pages.size - pages.free == 3
    bench.forget()
    running.loop.call(lambda: None)
    assert pages.size == pages.free


def test_the_reference_is_repeatable(running):
    bench = Bench(running)
    found = bench.reference()
    assert found == bench.reference()
    assert len(found) == 63
    assert all(value <= 0 for value in found)


def test_a_task_that_is_too_long_is_an_error(running):
    with pytest.raises(ContextFullError, match="10000 tokens"):
        Bench(running).run(Task(n_prompt=10_000))
