"""A model that runs: interrupts at any bytecode, callbacks, other threads, forks, errors in the middle, its end."""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import zincmetal
from support.reference_models import reference_models
from support.running import paused, running_of
from zincmetal.engine.cache_tier import Tier
from zincmetal.errors import ContextFullError, DeviceError, UsageError
from zincmetal.plan import planner
from zincmetal.plan.chunks import ONE_ROW, chunk_shape
from zincmetal.plan.planner import Planner
from zincmetal.plan.target import Target
from zincmetal.plan.tuning import DIVIDE_KEYS_ABOVE

PATH, HYBRID = reference_models("llama")[0], reference_models("qwen35")[0]
PROMPT = [5, 6, 7]
WAIT = 30  # seconds after which a test has failed


@pytest.fixture(params=[1, 2], ids=["inline", "asynchronous"])
def model(request: pytest.FixtureRequest) -> Iterator[Any]:
    with zincmetal.load(PATH, device="cpu", context=64, threads=request.param) as m:
        assert m.device.info["asynchronous"] == (request.param > 1)
        yield m


@pytest.fixture
def hybrid() -> Iterator[Any]:
    with zincmetal.load(HYBRID, device="cpu", context=64, threads=2) as m:
        yield m


@cache
def _fresh(path: Any, prompt: tuple[int, ...], n: int) -> list[int]:
    with zincmetal.load(path, device="cpu", context=64, threads=1) as m:
        return m.generate(prompt, max_tokens=n).tokens


def fresh(prompt: list[int], n: int, path: Any = PATH) -> list[int]:
    """What a new model says."""
    return _fresh(path, tuple(prompt), n)


def follows_like_fresh(model: Any, exactly: bool = True) -> None:
    """What follows on the last sequence equals what a new model says to the same ids, and nothing runs any more.

    ``exactly``: no page is lost. An interrupt between two bytecodes of a session may lose the page that it had taken.
    """
    prompt = [*(model.last or PROMPT)[:50], 17, 18]
    assert model.generate(prompt, max_tokens=8).tokens == fresh(prompt, 8, model.file.path)
    if exactly:
        everything_is_free(model)


def everything_is_free(model: Any) -> None:
    """Pages and slots that the cache does not have are free, and so are all seats."""
    running, engine = running_of(model), model.engine

    def look() -> tuple[int, ...]:
        state = running.scheduler.state()
        running.cache.clear()
        pools = engine.pages.size - engine.pages.free, engine.slots.size - engine.slots.free
        return (*pools, engine.free_seats.free - engine.seats, engine.in_flight, len(state.running), len(state.waiting))

    deadline = time.monotonic() + WAIT
    while any(running.loop.call(look)) and time.monotonic() < deadline:
        time.sleep(0.001)  # a request that was cancelled ends within a step
    assert running.loop.call(look) == (0,) * 6


# ---- interrupts --------------------------------------------------------------------------------------------------

TRACED = tuple(f"{name}.py" for name in ("model", "handle", "step_loop", "session", "engine", "sequence", "scheduler"))


def interrupted(call: Callable[[], object], at: int) -> bool:
    """Runs ``call`` with an interrupt before the ``at``-th bytecode of these files. Returns if there were so many."""
    left = at

    def opcode(frame: Any, event: str, _: object) -> Any:
        nonlocal left
        if event == "opcode":
            left -= 1
            if left == 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return opcode

    def enter(frame: Any, event: str, _: object) -> Any:
        if frame.f_code.co_filename.endswith(TRACED):
            frame.f_trace_opcodes = True
            return opcode
        return None

    sys.settrace(enter)
    try:
        call()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)
    return left <= 0


def started_and_closed(model: Any) -> None:
    stream = model.stream_generate(PROMPT, max_tokens=-1)
    next(stream)
    stream.close()


def stepped(model: Any) -> None:
    with model.session() as session:
        token = session.sync(PROMPT).best
        session.decode(token, ahead=True)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # interrupts of callbacks at an end
@pytest.mark.parametrize("what", ["reset", "generate", "stream", "plan", "session", "save"])
def test_an_interrupt_at_any_bytecode_leaves_a_model_that_works(what: str) -> None:
    with zincmetal.load(PATH, device="cpu", context=64, threads=2) as model:
        calls = {
            "reset": model.reset,
            "generate": lambda: model.generate(PROMPT, max_tokens=2),
            "stream": lambda: started_and_closed(model),
            "plan": lambda: model.plan(1),
            "session": lambda: stepped(model),
            "save": model.save,
        }
        want, at = model.generate(PROMPT, max_tokens=3).tokens, 1
        while interrupted(calls[what], at):
            assert model.generate(PROMPT, max_tokens=3).tokens == want
            at += 1
        assert at > 20
        follows_like_fresh(model, exactly=what not in ("session", "save"))


def test_an_interrupt_of_one_caller_leaves_others_alone(model: Any) -> None:
    """The one who waits is interrupted, as by Ctrl-C; the request of another thread goes on."""
    prompt, got = [9, 8, 7], []
    other = threading.Thread(target=lambda: got.append(model.generate(prompt, max_tokens=30).tokens))

    def shown(chunk: Any) -> None:
        other.start()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), model.submit(PROMPT, max_tokens=-1) as handle:
        handle.result(show=shown)
    other.join(WAIT)
    assert got == [fresh(prompt, 30)]
    follows_like_fresh(model)


# ---- streams that end --------------------------------------------------------------------------------------------


def test_greedy_and_drawn_tokens_run_ahead_where_that_helps(model: Any) -> None:
    """One step a token, and none for nothing; the prompt's last token is a step of its own."""
    expected = fresh(PROMPT, 20)
    assert model.generate(PROMPT, max_tokens=20).tokens == expected
    counters = model.profile()
    assert counters["max_in_flight"] == (2 if model.device.info["asynchronous"] else 1)
    assert counters["command_buffers"] == 2 + len(expected) - 1
    drawn = model.generate([1, 2], max_tokens=10, temperature=1.0, seed=1).tokens
    assert len(drawn) == 10
    assert model.profile()["command_buffers"] - counters["command_buffers"] == 2 + 10 - 1


def test_tokens_that_the_host_chooses_do_not(model: Any) -> None:
    seen: list[int] = []

    def processor(ids: Any, logits: np.ndarray) -> np.ndarray:
        seen.append(len(ids))
        return logits

    assert model.generate([8], max_tokens=10, logits_processors=[processor]).tokens == fresh([8], 10)
    assert model.profile()["max_in_flight"] == 1
    assert seen == list(range(1, 11))


def test_an_end_token_stops_within_one_step(model: Any) -> None:
    """A step may be in flight when the host learns of the end token: it is one too many, and nothing of it is left."""
    tokens = fresh(PROMPT, 10)
    at = next(i for i in range(3, 10) if tokens[i] not in tokens[:i])
    model.tokenizer.eog_ids = frozenset([tokens[at]])
    result = model.generate(PROMPT, max_tokens=20)
    assert result.tokens == tokens[: at + 1]
    assert result.finish_reason == "stop"
    assert model.profile()["steps"] <= 2 + at + 1
    assert model.last == PROMPT + tokens[: at + 1]
    model.tokenizer.eog_ids = frozenset()
    follows_like_fresh(model)


@pytest.mark.parametrize("end", ["close", "drop", "throw", "cancel"])
def test_an_abandoned_stream_ends(model: Any, end: str) -> None:
    stream = model.stream_generate(PROMPT, max_tokens=-1)
    tokens = [next(stream).token for _ in range(4)]
    assert tokens == fresh(PROMPT, 4)
    if end == "close":
        stream.close()
        assert list(stream) == []
    elif end == "drop":
        del stream
        gc.collect()
    elif end == "throw":
        with pytest.raises(KeyError):
            stream.throw(KeyError("the caller's"))
    else:
        stream.cancel()
        made = [*tokens, *(chunk.token for chunk in stream)]
        assert made == fresh(PROMPT, -1)[: len(made)]
    follows_like_fresh(model)


@pytest.mark.parametrize("threads", [1, 2], ids=["inline", "asynchronous"])
@pytest.mark.parametrize("end", ["reset", "close"])
def test_a_stream_learns_of_the_end_of_its_model(threads: int, end: str) -> None:
    """The context is so long that the stream cannot be at its end before."""
    with zincmetal.load(PATH, device="cpu", context=8192, threads=threads) as model:
        stream = model.stream_generate(PROMPT, max_tokens=-1)
        assert [next(stream).token for _ in range(4)] == fresh(PROMPT, 4)
        getattr(model, end)()
        with pytest.raises(UsageError, match=r"ended by reset\(\)" if end == "reset" else r"close"):
            list(stream)
        if end == "reset":
            follows_like_fresh(model)


def test_a_stream_that_only_a_traceback_has_is_ended_by_reset(model: Any) -> None:
    """Until then it holds up nobody."""

    def show() -> None:
        stream = model.stream_generate(PROMPT, max_tokens=-1)
        for _ in stream:
            raise RuntimeError("the display fails")

    with pytest.raises(RuntimeError) as kept:
        show()
    assert model.generate(PROMPT, max_tokens=3).tokens == fresh(PROMPT, 3)
    model.reset()
    follows_like_fresh(model)
    assert kept


def test_a_stream_that_nobody_reads_holds_up_nobody(model: Any) -> None:
    unread = [model.stream_generate([i], max_tokens=30) for i in range(1, 4)]
    assert model.generate(PROMPT, max_tokens=9).tokens == fresh(PROMPT, 9)
    for i, stream in enumerate(unread, 1):
        assert [chunk.token for chunk in stream] == fresh([i], 30)
    follows_like_fresh(model)


# ---- other threads, callbacks ------------------------------------------------------------------------------------


def test_close_ends_the_streams_of_other_threads_with_an_error(model: Any) -> None:
    errors, started = [], threading.Barrier(4)

    def work() -> None:
        try:
            first = True
            while True:
                for _ in model.stream_generate(PROMPT, max_tokens=50):
                    if first:
                        started.wait(WAIT)
                    first = False
        except UsageError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    started.wait(WAIT)
    model.close()
    for thread in threads:
        thread.join(WAIT)
    assert len(errors) == 3
    assert all("close" in error for error in errors)


def test_close_waits_for_nobody_who_waits_for_the_engine(model: Any) -> None:
    """A session in one thread; a call of another one is told of the close that comes first."""
    told: list[str] = []

    def wait() -> None:
        try:
            model.logits(PROMPT)
        except UsageError as error:
            told.append(str(error))

    with model.session() as session:
        session.prefill(PROMPT)
        waiting = threading.Thread(target=wait)
        waiting.start()
        closing = threading.Thread(target=model.close)
        closing.start()
        waiting.join(WAIT)
        assert len(told) == 1
        assert "closed" in told[0]
    closing.join(WAIT)
    assert not closing.is_alive()


@pytest.mark.parametrize("callback", ["progress", "show"])
def test_a_callback_may_close_its_model(model: Any, callback: str) -> None:
    """Its own call is told."""

    def close(*_: Any) -> Any:
        model.close()
        return _[-1]

    options: dict[str, Any] = {"progress": close} if callback == "progress" else {}
    with pytest.raises(UsageError, match="close"):
        model.submit(PROMPT, **options).result(show=close if callback == "show" else None)
    with pytest.raises(UsageError, match="closed"):
        model.generate(PROMPT)


def test_a_callback_of_the_readers_thread_may_ask_for_more(model: Any) -> None:
    more: list[int] = []
    result = model.generate(PROMPT, 5, progress=lambda done, total: more.extend(model.generate([1, 2], 3).tokens))
    assert result.tokens == fresh(PROMPT, 5)
    assert more[:3] == fresh([1, 2], 3)


@pytest.mark.parametrize("call", ["generate", "close", "session"])
def test_a_processor_cannot_wait_for_its_own_thread(model: Any, call: str) -> None:
    """It runs on the thread that steps."""
    calls = {"generate": lambda: model.generate([1]), "close": model.close, "session": lambda: model.logits([1])}
    with pytest.raises(UsageError, match="cannot come from a callback"):
        model.generate(PROMPT, 5, logits_processors=[lambda ids, logits: calls[call]()])
    follows_like_fresh(model)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_is_told(model: Any) -> None:
    stream = model.stream_generate(PROMPT, max_tokens=40)
    first = [next(stream).token]
    child = os.fork()
    if child == 0:
        told = 0
        for call in (lambda: model.generate(PROMPT), lambda: model.logits(PROMPT), model.save, lambda: model.plan(1)):
            try:
                call()
            except DeviceError as error:
                told += "before a fork" in str(error)
        model.close()
        os._exit(0 if told == 4 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert [*first, *(chunk.token for chunk in stream)] == fresh(PROMPT, 40)


# ---- errors in the middle ----------------------------------------------------------------------------------------


class Failing:
    """Method of the engine that raises an error at its ``n``-th call, before or after the call itself."""

    def __init__(self, call: Callable[..., Any], n: int, error: BaseException, after: bool) -> None:
        self.call, self.left, self.error, self.after = call, n, error, after

    def __call__(self, *arguments: Any) -> Any:
        self.left -= 1
        if self.left == 0 and not self.after:
            raise self.error
        result = self.call(*arguments)
        if self.left == 0:
            raise self.error
        return result


@pytest.mark.parametrize("error", [DeviceError("lost"), MemoryError("none"), ZeroDivisionError("a fault")])
@pytest.mark.parametrize("where", ["submit", "collect"])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("kind", ["model", "hybrid"])
def test_an_error_of_a_step_ends_all_and_the_next_call_works(
    kind: str, error: Exception, where: str, after: bool, request: pytest.FixtureRequest, monkeypatch: Any
) -> None:
    if kind == "model":
        with zincmetal.load(PATH, device="cpu", context=64, threads=2) as m:
            an_error_ends_all(m, error, where, after, monkeypatch)
    else:
        an_error_ends_all(request.getfixturevalue("hybrid"), error, where, after, monkeypatch)


def an_error_ends_all(model: Any, error: Exception, where: str, after: bool, monkeypatch: Any) -> None:
    path = model.file.path
    assert model.generate(PROMPT, max_tokens=4).tokens == fresh(PROMPT, 4, path)
    monkeypatch.setattr(model.engine, where, Failing(getattr(model.engine, where), 6, error, after))
    with paused(model):  # all have begun when it fails
        streams = [model.stream_generate([i, *PROMPT], max_tokens=30) for i in range(3)]
    for i, stream in enumerate(streams):
        made = []
        with pytest.raises(zincmetal.errors.ZincError) as told:
            made += [chunk.token for chunk in stream]
        assert str(error) in str(told.value)
        assert made == fresh([i, *PROMPT], 30, path)[: len(made)]
    monkeypatch.undo()
    assert model.generate([*PROMPT, 9], max_tokens=8).tokens == fresh([*PROMPT, 9], 8, path)
    follows_like_fresh(model)


def test_an_error_of_a_processor_ends_its_request_alone(model: Any) -> None:
    def fail(ids: Any, logits: np.ndarray) -> np.ndarray:
        if len(ids) == 8:
            raise LookupError("the caller's own")
        return logits

    other = model.submit([1, 2], max_tokens=30)
    stream = model.stream_generate(PROMPT, max_tokens=20, logits_processors=[fail])
    assert [next(stream).token for _ in range(5)] == fresh(PROMPT, 5)
    with pytest.raises(LookupError, match="the caller's own"):
        next(stream)
    assert other.result().tokens == fresh([1, 2], 30)
    follows_like_fresh(model)


# ---- models that share an engine ---------------------------------------------------------------------------------


def test_models_share_what_was_loaded_and_the_last_one_closes_it(model: Any) -> None:
    loaded = model.engine.loaded
    tokens = model.generate(PROMPT, max_tokens=4).tokens
    twin = model.fork()
    assert twin.engine is model.engine
    assert twin.last == model.last == [*PROMPT, *tokens]
    model.generate([1, 2], max_tokens=4)
    assert twin.last != model.last
    weights = len(loaded.weights)
    model.close()
    model.close()
    assert (len(loaded.weights), bool(loaded.file.parts)) == (weights, True)
    with pytest.raises(UsageError, match="closed"):
        model.generate(PROMPT)
    assert twin.generate(PROMPT, max_tokens=4).tokens == tokens
    twin.close()
    assert (len(loaded.weights), bool(loaded.file.parts)) == (0, False)
    for call in (twin.save, lambda: twin.generate([1]), lambda: twin.logits([1]), twin.fork, twin.reset):
        with pytest.raises(UsageError, match="closed"):
            call()


def test_a_model_that_was_dropped_does_not_count(model: Any) -> None:
    loaded = model.engine.loaded
    twin = model.fork()
    del twin
    gc.collect()
    model.close()
    assert not loaded.weights


@pytest.mark.parametrize("path", [PATH, HYBRID], ids=["attention", "hybrid"])
def test_a_conversation_continues_where_it_was_left(path: Any) -> None:
    """The second prompt holds the first and its answer; one that departs early takes what it shares."""
    ids = np.load(path.with_suffix(".npz"))["tokens"][:40].tolist()

    def load(cache: bool) -> zincmetal.Model:
        return zincmetal.load(path, device="cpu", context=192, kv="f32", cache=cache)

    with load(True) as model, load(False) as without:
        answer = model.generate(ids, max_tokens=9).tokens
        longer = [*ids, *answer, 7, 8, 9]
        first = model.profile()["tokens"]
        assert model.generate(longer, max_tokens=9).tokens == without.generate(longer, max_tokens=9).tokens
        assert model.profile()["tokens"] - first <= 1 + 3 + 9
        departed = [*ids[:20], 3, 4]
        assert model.generate(departed, max_tokens=9).tokens == without.generate(departed, max_tokens=9).tokens
        again = model.generate(ids, max_tokens=9)
        assert again.tokens == answer
        model.reset()
        assert model.generate(ids, max_tokens=9).tokens == answer


@pytest.mark.parametrize("path", [PATH, HYBRID], ids=["attention", "hybrid"])
def test_the_last_sequence_is_saved_and_restored(path: Any) -> None:
    with zincmetal.load(path, device="cpu", context=64) as model, zincmetal.load(path, device="cpu", context=64) as two:
        assert model.save().nbytes == 0
        tokens = model.generate(PROMPT, max_tokens=9).tokens
        saved = model.save()
        assert saved.tokens == (*PROMPT, *tokens)
        two.restore(saved)
        assert two.last == [*PROMPT, *tokens]
        before = two.profile()["tokens"]
        assert two.generate([*two.last, 4], max_tokens=5).tokens == fresh([*PROMPT, *tokens, 4], 5, path)
        assert two.profile()["tokens"] - before == 1 + 4
        follows_like_fresh(model)


def test_a_context_that_is_full_ends_the_text(model: Any) -> None:
    result = model.generate(PROMPT, max_tokens=-1)
    assert (len(result.tokens), result.finish_reason) == (64 - 3 + 1, "length")
    with pytest.raises(ContextFullError):
        model.generate([1] * 65)
    assert len(model.generate([1] * 64, max_tokens=5).tokens) == 1
    follows_like_fresh(model)


# ---- plans by context --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2], ids=["inline", "asynchronous"])
def test_a_sequence_outgrows_its_plans(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans for short contexts hand over to plans for longer ones, in the middle of a stream."""
    want = fresh(PROMPT, 40)
    monkeypatch.setattr(planner, "MAX_POSITIONS", (8, 9, 16))
    monkeypatch.setitem(DIVIDE_KEYS_ABOVE, "cpu", 1024)  # above the context: all plans have the same kernels
    with zincmetal.load(PATH, device="cpu", context=64, threads=threads) as model:
        assert model.generate(PROMPT, max_tokens=40).tokens == want
        assert model.profile()["steps"] == 41  # two of the prompt; none was run in vain
        made = {max_position for shape, max_position in model.engine.programs.made if shape.only_singles}
        assert made == {8, 9, 16, 64}


@pytest.mark.parametrize(("backend", "above"), DIVIDE_KEYS_ABOVE.items())
def test_attention_is_divided_only_where_keys_are_many(model: Any, backend: str, above: int) -> None:
    with zincmetal.gguf.open(PATH) as file:
        target = Target.of(model.engine.core, {**model.device.info, "backend": backend})
        longer = Planner(file, target, context=8192)
    first, *others = reaches = sorted({above, 1024, 4096, 8192})
    dispatches = [len(longer.plan(ONE_ROW, reach).dispatches) for reach in reaches]
    merges = longer.config.n_layer
    assert dispatches == [dispatches[0], *(dispatches[0] + merges for _ in others)]
    assert longer.max_positions == (first, *others)


def test_every_dispatch_of_a_step_is_timed(model: Any) -> None:
    want = model.generate(PROMPT, max_tokens=5).tokens
    for n, position in ((1, 0), (1, 63), (20, 44)):
        timed = model.time_dispatches(range(n), position)
        shape = ONE_ROW if n == 1 else chunk_shape(n, 0, 0, "none")
        assert [d for d, _ in timed] == list(model.engine.planner.plan(shape).dispatches)
        assert all(seconds > 0 for _, seconds in timed)
    assert model.generate(PROMPT, max_tokens=5).tokens == want
    for n, position in ((20, 45), (1, -1), (1, 64)):
        with pytest.raises(UsageError, match="of a context of 64"):
            model.time_dispatches(range(n), position)
    follows_like_fresh(model)


def test_the_devices_memory_is_given_back_before_a_disk_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    freed = list[bool]()
    with zincmetal.load(PATH, device="cpu", cache_dir=tmp_path) as model:
        close, engine = Tier.close, model.engine

        def noted(tier: Tier) -> None:
            freed.append(engine._freed)  # noqa: SLF001
            close(tier)

        monkeypatch.setattr(Tier, "close", noted)
        model.generate(PROMPT, 2)
    assert freed == [True]
