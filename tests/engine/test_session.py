"""A session: what its steps compute and compute again, how it is copied and forked, and what runs ahead."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import zincmetal
from support.reference_models import reference_models
from support.running import running_of
from zincmetal.engine.engine import SESSION_SEATS, Engine
from zincmetal.engine.session import Session
from zincmetal.errors import ContextFullError, DeviceError, UsageError
from zincmetal.sampling.params import SamplingParams
from zincmetal.sampling.sampler import Sampler

PATHS = [p for p in reference_models("llama", "qwen35", "qwen35moe") if "q5k-q6k" not in p.stem]
LLAMA, HYBRID = reference_models("llama")[0], reference_models("qwen35")[0]
every_kind = pytest.mark.parametrize("path", [LLAMA, HYBRID], ids=["attention", "hybrid"])
every_model = pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)
every_thread = pytest.mark.parametrize("threads", [1, 2], ids=["inline", "asynchronous"])
IDS = [7 * i % 250 + 1 for i in range(50)]
N_MADE = 24


def load(path: Path, **options: object) -> zincmetal.Model:
    usual: dict[str, Any] = {"context": 192, "device": "cpu", "kv": "f32", "threads": 1, "cache": False}
    return zincmetal.load(path, **{**usual, **options})


@pytest.fixture
def session() -> Iterator[Session]:
    with load(LLAMA, context=96) as model, model.session() as made:
        yield made


def fresh_best(path: Path, ids: list[int]) -> int:
    with load(path) as model, model.session() as made:
        return made.prefill(ids)


def taken(model: zincmetal.Model) -> tuple[int, int, int]:
    """Pages and slots that somebody has, and free seats, as the step thread sees them after a session."""
    engine = model.engine
    return running_of(model).loop.call(lambda: _taken(engine))


def _taken(engine: Engine) -> tuple[int, int, int]:
    return engine.pages.size - engine.pages.free, engine.slots.size - engine.slots.free, engine.session_seats.free


# ---- prompts -----------------------------------------------------------------------------------------------------


@every_kind
def test_sync_computes_what_is_new(path: Path) -> None:
    """Whatever the sequence was: the sequence is the prompt then, and the logits are those of a new session."""
    with load(path) as model, load(path) as other, model.session() as session:
        recurrent = model.engine.recurrent
        prompts = [IDS[:20], IDS[:30], IDS[:30], [*IDS[:25], 3, 4], [9], IDS]
        computed = [20, 10, 30 if recurrent else 1, 27 if recurrent else 2, 1, 50]
        for prompt, n in zip(prompts, computed, strict=True):
            before = model.profile()["tokens"]
            synced = session.sync(prompt)
            with other.session() as fresh:
                assert synced.best == fresh.prefill(prompt)
                assert np.abs(session.last_logits() - fresh.last_logits()).max() < 1e-4
            assert (synced.computed, model.profile()["tokens"] - before) == (n, n)
            assert session.ids == prompt


@every_kind
def test_sync_takes_what_the_cache_has(path: Path) -> None:
    """The prompt of a session that has ended, of an answer, or of half of one."""
    with load(path, cache=True) as model:
        answer = model.generate(IDS, max_tokens=5).tokens
        known = [*IDS, *answer]
        with model.session() as session:
            computed = session.sync([*known, 3, 4]).computed
            assert computed <= 3  # the last token of an answer is not computed
            best = session.decode(7)
        with model.session() as session:
            assert session.sync([*known, 3, 4, 7, best]).computed == 1
            assert (session.ids, session.length) == ([*known, 3, 4, 7, best], 59)
        assert model.generate(IDS, max_tokens=5).tokens == answer


def test_sync_refuses_what_is_no_prompt_and_keeps_the_sequence(session: Session) -> None:
    session.sync(IDS[:5])
    for wrong, error in (([], UsageError), ([1, 512], UsageError), ([-1], UsageError), ([1] * 97, ContextFullError)):
        with pytest.raises(error):
            session.sync(wrong)
    assert (session.ids, session.length) == (IDS[:5], 5)


@every_kind
def test_a_prompt_may_come_in_any_steps(path: Path) -> None:
    with load(path) as model, model.session() as session:
        want = session.prefill(IDS)
        logits = session.last_logits().copy()
        session.rewind(0)
        assert session.step(IDS[:30]) == -1
        for token in IDS[30:-1]:
            session.decode(token)
        assert session.step(IDS[-1:]) == want == logits.argmax()
        assert np.abs(session.last_logits() - logits).max() < 1e-4
        assert session.ids == IDS


def test_progress_counts_the_tokens_to_compute(session: Session) -> None:
    session.sync(IDS[:10])
    told: list[tuple[int, int]] = []
    session.sync(IDS, progress=lambda *at: told.append(at))
    assert told == [(0, 40), (39, 40), (40, 40)]


@pytest.mark.parametrize("token", [-1, 512, 2**40, -(2**40)])
def test_a_wrong_id_is_told_as_it_was_given(token: int, session: Session) -> None:
    session.sync(IDS[:5])
    with pytest.raises(UsageError, match=rf"token id {token} is outside the vocabulary of 512"):
        session.decode(token)
    assert session.ids == IDS[:5]


def test_a_sampled_token_is_among_the_best(session: Session) -> None:
    assert session.sync(IDS[:9], "draw").best == -1
    best = set(np.argsort(-session.last_logits())[:3].tolist())
    sampler = Sampler(SamplingParams(temperature=5.0, top_k=3, seed=1))
    drawn = set()
    for _ in range(20):
        token = session.sample(sampler)
        assert token in best
        drawn.add(token)
        session.rewind(8)
        session.decode(IDS[8], output="draw")
    assert len(drawn) > 1


@every_kind
def test_a_sequence_is_shortened(path: Path) -> None:
    """To any length, over the border of a page; the states of a hybrid only to their start."""
    with load(path) as model, model.session() as session:
        session.prefill([*IDS, *IDS])
        for wrong in (-1, 101):
            with pytest.raises(UsageError, match="cannot rewind"):
                session.rewind(wrong)
        session.rewind(100)
        for length in (70, 64, 40):
            if model.engine.recurrent:
                with pytest.raises(UsageError, match="only to 0"):
                    session.rewind(length)
                continue
            session.rewind(length)
            assert (session.ids, session.length) == ([*IDS, *IDS][:length], length)
            assert session.decode(5) == fresh_best(path, [*[*IDS, *IDS][:length], 5])
        session.rewind(0)
        assert session.prefill(IDS[:7]) == fresh_best(path, IDS[:7])


# ---- one step ahead ----------------------------------------------------------------------------------------------


def tokens(session: Session, n: int, ahead: Any) -> list[int]:
    session.rewind(0)
    out = [session.prefill(IDS[:5])]
    for i in range(n):
        out.append(session.decode(out[-1], ahead(i)))
    return out


@every_thread
@every_kind
def test_running_ahead_changes_no_token(threads: int, path: Path) -> None:
    with load(path, threads=threads) as model, model.session() as session:
        assert model.engine.runs_ahead == (threads > 1)
        expected = tokens(session, 20, lambda i: False)
        before = model.profile()
        assert before["max_in_flight"] == 1
        assert tokens(session, 20, lambda i: i < 19) == expected
        assert tokens(session, 20, lambda i: i % 3 == 0 and i < 19) == expected
        after = model.profile()
        assert after["max_in_flight"] == threads
        assert after["command_buffers"] - before["command_buffers"] == 2 * 22
        assert after["tokens"] - before["tokens"] == 2 * 25


def test_a_step_ahead_is_part_of_the_sequence_once_it_is_settled() -> None:
    with load(LLAMA, threads=2) as model, model.session() as session:
        first = session.sync(IDS[:5]).best
        second = session.decode(first, ahead=True)
        assert (session.length, len(session.ids)) == (6, 6)
        session.settle()
        assert (session.ids, session.length) == ([*IDS[:5], first, second], 7)
        session.settle()
        assert session.length == 7
        assert session.decode(44) == fresh_best(LLAMA, [*IDS[:5], first, second, 44])


def test_what_is_in_flight_cannot_be_ignored() -> None:
    with load(LLAMA, threads=2) as model, model.session() as session:
        second = session.decode(session.sync(IDS[:5]).best, ahead=True)
        for call in (
            lambda: session.decode((second + 1) % 512),
            lambda: session.decode(second, output="draw"),
            lambda: session.step([1, 2]),
            lambda: session.rewind(0),
        ):
            with pytest.raises(UsageError, match=rf"a step of token {second} is in flight; call settle\(\)"):
                call()
        assert session.decode(second) == tokens(session, 2, lambda i: False)[-1]


@every_thread
def test_the_context_bounds_what_runs_ahead(threads: int) -> None:
    with load(LLAMA, context=64, threads=threads) as model, model.session() as session:
        token = session.prefill(IDS)
        while session.length < 64:
            token = session.decode(token, ahead=True)
        with pytest.raises(ContextFullError, match="64 used, 1 more"):
            session.decode(token)
        assert session.length == 64


@every_thread
@every_kind
@pytest.mark.parametrize("error", [DeviceError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["submit", "collect"])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_an_error_between_steps_leaves_a_consistent_sequence(
    threads: int, path: Path, error: type[BaseException], where: str, after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ids and states agree. On a hybrid all may be gone: its states may have moved on."""
    with load(path, threads=threads) as model:
        engine, left, call = model.engine, [6], getattr(model.engine, where)
        before = taken(model)

        def failing(*arguments: Any) -> Any:
            left[0] -= 1
            if left[0] == 0 and not after:
                raise error
            result = call(*arguments)
            if left[0] == 0:
                raise error
            return result

        with model.session() as session:
            monkeypatch.setattr(engine, where, failing)
            with pytest.raises(error):
                tokens(session, 20, lambda i: True)
            monkeypatch.undo()
            known = [*IDS[:5], *fresh_tokens(path)]
            assert session.ids == known[: len(session.ids)]
            assert session.length == len(session.ids)
            assert session.length >= 5 or engine.recurrent
            following = [*session.ids, 17, 18]
            assert session.sync(following).best == fresh_best(path, following)
        assert taken(model) == before


def fresh_tokens(path: Path) -> list[int]:
    with load(path) as model, model.session() as session:
        return tokens(session, 20, lambda i: False)


# ---- copies ------------------------------------------------------------------------------------------------------


def prompt(path: Path, n: int = 70) -> list[int]:
    """More than a page of K/V."""
    ids: list[int] = np.load(path.with_suffix(".npz"))["tokens"][:n].tolist()
    return ids


def go_on(session: Session, n: int = N_MADE) -> list[int]:
    """Greedy tokens from the end of the sequence, whatever they are."""
    best, made = int(session.last_logits().argmax()), []
    for _ in range(n):
        made.append(best)
        best = session.decode(best)
    return made


@every_model
@pytest.mark.parametrize("kv", ["f32", "f16", "q8_0"])
def test_saved_and_restored_it_continues_identically(path: Path, kv: str) -> None:
    with load(path, kv=kv) as model, model.session() as session:
        session.prefill(prompt(path))
        saved, first_logits = session.save(), session.last_logits().copy()
        made = go_on(session)
        session.rewind(0)
        assert session.prefill(prompt(path, 9)) >= 0
        session.restore(saved)
        assert (session.length, session.ids) == (70, prompt(path))
        # The logits are not part of a sequence: the next token is what was made first.
        again = [int(first_logits.argmax())]
        while len(again) < N_MADE:
            again.append(session.decode(again[-1]))
    assert again == made


@every_model
def test_restored_in_another_model_with_its_pages_elsewhere(path: Path) -> None:
    with load(path) as one, load(path) as two, one.session() as mine, two.session() as its:
        mine.prefill(prompt(path))
        saved = mine.save()
        taken = [two.engine.pages.take() for _ in range(2)]
        its.restore(saved)
        assert not set(its.sequence.pages) & {*taken, *mine.sequence.pages}
        assert its.decode(5) == mine.decode(5)
        assert np.array_equal(its.last_logits(), mine.last_logits())
        two.engine.pages.release_all(taken)


@every_model
def test_a_fork_goes_its_own_way(path: Path) -> None:
    """It shares pages, the last of them not full, and states, until one of the two writes."""
    ids = prompt(path)
    with load(path) as model:
        before = taken(model)
        with model.session() as session:
            session.prefill(ids)
            with session.fork() as twin:
                assert twin.sequence.pages == session.sequence.pages
                session.decode(5)
                mine = session.last_logits().copy()
                twin.decode(6)
                its = twin.last_logits().copy()
                assert (twin.ids, session.ids) == ([*ids, 6], [*ids, 5])
                assert twin.sequence.pages[0] == session.sequence.pages[0]
                assert twin.sequence.pages[1] != session.sequence.pages[1]
            assert not np.array_equal(mine, its)
            for token, want in ((5, mine), (6, its)):
                session.rewind(0)
                session.prefill([*ids, token])
                assert np.abs(session.last_logits() - want).max() < 1e-4
        assert taken(model) == before


@every_kind
def test_forks_that_nobody_closes_end_with_their_session(path: Path) -> None:
    """Each has a seat once it steps, and there are so many."""
    with load(path) as model:
        before = taken(model)
        for _ in range(3):
            with model.session() as session:
                session.prefill(IDS)
                forks = [session.fork() for _ in range(SESSION_SEATS)]
                forks[0].fork()  # a fork of a fork
                for fork in forks[1:]:
                    fork.decode(5)
                with pytest.raises(UsageError, match="close a fork first"):
                    forks[0].decode(5)
                forks[1].close()
                forks[0].decode(5)
                forks[2].decode(6, ahead=True)
        model.generate([1], max_tokens=1)  # the step thread has ended the session
        model.clear_cache()
        assert taken(model) == before


def test_a_session_that_has_ended_takes_no_step() -> None:
    with load(LLAMA) as model:
        with model.session() as session:
            session.prefill([5, 6, 7])
            saved, fork = session.save(), session.fork()
        model.generate([1], max_tokens=1)
        before = taken(model)
        for each in (session, fork):
            for call in (
                lambda s: s.decode(5),
                lambda s: s.step([5]),
                lambda s: s.sync([5, 6]),
                lambda s: s.prefill([5, 6]),
                lambda s: s.rewind(0),
                lambda s: s.settle(),
                lambda s: s.fork(),
                lambda s: s.save(),
                lambda s: s.restore(saved),
                lambda s: s.logits([5, 6]),
                lambda s: s.pretend(5),
                lambda s: s.program(),
            ):
                with pytest.raises(UsageError, match="the session has ended"):
                    call(each)
            each.close()
        assert taken(model) == before


def test_what_does_not_fit_is_refused() -> None:
    llama, hybrid = PATHS[0], PATHS[-1]
    with load(llama) as model, load(hybrid) as other, load(llama, kv="f16") as half:
        with model.session() as session:
            session.prefill(prompt(llama))
            saved = session.save()
        for wrong in (other, half):
            with wrong.session() as session:
                session.prefill([1, 2, 3, 4])
                with pytest.raises(UsageError, match="another model, of another type"):
                    session.restore(saved)
                assert session.ids == [1, 2, 3, 4]
                assert session.decode(5) >= 0
    with load(llama, context=64) as short, short.session() as session, pytest.raises(ContextFullError):
        session.restore(saved)


@every_kind
def test_an_empty_sequence_can_be_saved(path: Path) -> None:
    with load(path) as model, model.session() as session:
        saved = session.save()
        assert saved.nbytes == 0
        session.prefill([1, 2, 3])
        session.restore(saved)
        assert session.length == 0
        assert session.prefill([1, 2, 3]) == fresh_best(path, [1, 2, 3])


# ---- memory ------------------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("cache", [False, True])
def test_a_session_gives_everything_back(path: Path, cache: bool) -> None:
    with load(path, cache=cache) as model:
        before = taken(model)
        for end in ("sync", "ahead", "fork", "restore", "error"):
            with model.session() as session:
                token = session.sync(IDS).best
                if end == "ahead":
                    session.decode(token, ahead=True)
                elif end == "fork":
                    session.fork().close()
                elif end == "restore":
                    session.restore(session.save())
                elif end == "error":
                    with pytest.raises(UsageError):
                        session.decode(-5)
        running = running_of(model)
        if running.cache:
            running.loop.call(running.cache.clear)
        assert taken(model) == before


@every_kind
def test_pools_grow_under_a_session_that_goes_on(path: Path) -> None:
    """What is computed moves to the larger pool, a step in flight included."""
    with load(path, threads=2) as model, model.session() as session:
        engine = model.engine
        pages = engine.pages_now
        taken = [engine.pages.take() for _ in range(engine.pages.free - 1)]
        known = prompt(path, 60)
        best = session.prefill(known)
        for _ in range(20):
            known.append(best)
            best = session.decode(best, ahead=True)
        assert engine.pages_now > pages
        session.settle()
        assert session.ids == [*known, best]
        want = session.last_logits().copy()
        session.rewind(0)
        session.prefill([*known, best])
        assert np.abs(session.last_logits() - want).max() < 1e-3
        engine.pages.release_all(taken)


# ---- the engine is the session's ---------------------------------------------------------------------------------


def test_calls_of_the_thread_that_has_the_engine_are_refused() -> None:
    with load(LLAMA) as model:
        with model.session() as session:
            session.prefill(IDS)
            for call in (lambda: model.generate([1]), lambda: model.logits([1]), lambda: model.plan(1), model.save):
                with pytest.raises(UsageError, match="end the session first"):
                    call()
            assert session.decode(5) >= 0
        assert model.generate([1], max_tokens=1).tokens


def test_a_closed_engine_takes_no_step() -> None:
    model = load(LLAMA)
    with model.session() as session:
        session.sync(IDS[:5])
    model.close()
    for call in (lambda: session.decode(1), lambda: session.sync(IDS), lambda: session.prefill([1])):
        with pytest.raises(UsageError, match="closed"):
            call()
    with pytest.raises(UsageError, match="closed"), model.session():
        pass
