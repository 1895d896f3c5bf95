"""Handles of generations: every way to read one, to end one, and many at once."""

from __future__ import annotations

import asyncio
import gc
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pytest

import zincmetal
from support.reference_models import reference_models
from support.running import TIMEOUT, running_of, until
from zincmetal.errors import DeadlineError, QueueFullError, UsageError

PATHS = [reference_models("llama")[0], reference_models("qwen35")[0]]
PROMPT = [5, 6, 7]
LONG = 400  # tokens: a generation that a test ends


def opened(path: Any = PATHS[0], **options: Any) -> Any:
    model = zincmetal.load(path, device="cpu", **{"context": 512, "threads": 1, **options})
    model.text.id_tokenizer.eog_ids = frozenset()
    return model


@pytest.fixture(scope="module")
def shared() -> Iterator[Any]:
    with opened() as m:
        yield m


@pytest.fixture
def model() -> Iterator[Any]:
    with opened() as m:
        yield m


class Held:
    """Logits processor that waits on the step thread until the test lets it go on."""

    def __init__(self, free: int = 0) -> None:
        self.reached, self.go, self._free = threading.Event(), threading.Event(), free

    def __call__(self, ids: Any, logits: Any) -> Any:
        if self._free > 0:
            self._free -= 1
            return logits
        self.reached.set()
        assert self.go.wait(TIMEOUT)
        return logits


# ---- reading --------------------------------------------------------------------------------------------------


def test_a_handle_is_read_by_chunks_and_as_a_whole(shared: Any) -> None:
    whole = shared.generate(PROMPT, 12)
    handle = shared.submit(PROMPT, 12)
    chunks = list(handle)
    result = handle.result()
    assert [c.token for c in chunks] == result.tokens == whole.tokens
    assert "".join(c.text for c in chunks) == result.text == whole.text
    assert (chunks[-1].finish_reason, result.finish_reason, handle.done) == ("length", "length", True)
    assert handle.result().tokens == result.tokens
    assert list(handle) == []
    shown: list[Any] = []
    assert shared.submit(PROMPT, 12).result(show=shown.append).tokens == [c.token for c in shown] == whole.tokens


def test_a_handle_is_read_by_a_loop_of_asyncio(shared: Any) -> None:
    prompts = [PROMPT, [9, 8], list(range(1, 80))]
    alone = [shared.generate(p, 15).tokens for p in prompts]

    async def read(prompt: list[int]) -> list[int]:
        return [chunk.token async for chunk in shared.submit(prompt, 15)]

    async def read_all() -> Any:
        return await asyncio.gather(*map(read, prompts))

    assert asyncio.run(read_all()) == alone


def test_a_loop_of_asyncio_goes_on_while_a_handle_waits(model: Any) -> None:
    held = Held(1)

    async def read() -> list[int]:
        handle = model.submit(PROMPT, 3, logits_processors=[held])
        first = await anext(handle)
        rest = asyncio.ensure_future(anext(handle))
        while not held.reached.is_set():
            await asyncio.sleep(0)
        assert not rest.done()
        held.go.set()
        return [first.token, (await rest).token, *[chunk.token async for chunk in handle]]

    assert asyncio.run(read()) == model.generate(PROMPT, 3).tokens


def test_an_error_reaches_a_loop_of_asyncio(shared: Any) -> None:
    async def read() -> None:
        async for _ in shared.submit(PROMPT, 9, logits_processors=[lambda ids, x: x[:3]]):
            pass

    with pytest.raises(UsageError, match="returned shape"):
        asyncio.run(read())


def test_two_threads_read_one_handle(shared: Any) -> None:
    handle, read = shared.submit(PROMPT, 60), list[int]()
    threads = [threading.Thread(target=lambda: read.extend([c.token for c in handle])) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
        assert not thread.is_alive()
    assert sorted(read) == sorted(handle.result().tokens)
    assert len(read) == 60


def test_a_result_that_does_not_come_in_time(model: Any) -> None:
    held = Held()
    for options in ({}, {"progress": lambda done, total: None}):
        handle = model.submit(PROMPT, 3, logits_processors=[held], **options)
        with pytest.raises(TimeoutError):
            handle.result(timeout=0.01)
        assert not handle._answer._waiters  # noqa: SLF001  # a caller may ask a thousand times
        assert not handle.done
        held.go.set()
        assert len(handle.result(timeout=TIMEOUT).tokens) == 3
        held.go.clear()
        held.reached.clear()


def test_progress_runs_in_the_thread_of_the_reader(shared: Any) -> None:
    seen: list[tuple[int, int, Any]] = []
    prompt = [i % 200 + 3 for i in range(300)]
    handle = shared.submit(
        prompt, 2, progress=lambda done, total: seen.append((done, total, threading.current_thread()))
    )
    until(lambda: handle.done)
    assert seen == []
    handle.result()
    assert {thread for _, _, thread in seen} == {threading.current_thread()}
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
    assert (seen[0][0], seen[-1][0]) == (0, 300)
    assert {total for _, total, _ in seen} == {300}


def test_an_error_of_progress_goes_to_the_reader_and_ends_the_request(shared: Any) -> None:
    def fails(done: int, total: int) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        shared.generate(PROMPT * 9, LONG, progress=fails)
    assert shared.generate(PROMPT, 2).tokens


def test_an_error_of_a_processor_goes_to_the_caller_alone(shared: Any) -> None:
    def fails(ids: Any, logits: Any) -> Any:
        raise KeyError("mine")

    other = shared.submit(PROMPT, 20)
    with pytest.raises(KeyError, match="mine"):
        shared.generate(PROMPT, 9, logits_processors=[fails])
    assert other.result().tokens == shared.generate(PROMPT, 20).tokens


# ---- the end --------------------------------------------------------------------------------------------------


def test_cancel_ends_within_a_step(model: Any) -> None:
    held = Held(4)
    handle = model.submit(PROMPT, LONG, logits_processors=[held])
    assert held.reached.wait(TIMEOUT)
    handle.cancel()
    handle.cancel()
    held.go.set()
    result = handle.result(TIMEOUT)
    assert (len(result.tokens), result.finish_reason) == (5, "cancelled")
    assert [c.token for c in handle] == result.tokens
    assert model.last == PROMPT + result.tokens


def all_free(model: Any) -> bool:
    free: bool = model.engine.pages.free == model.engine.pages_now
    return free


def test_a_handle_that_is_dropped_is_cancelled() -> None:
    held, calls = Held(2), list[int]()
    with opened(cache=False) as model:
        handle = model.submit(PROMPT, LONG, logits_processors=[held, lambda ids, x: (calls.append(1), x)[1]])
        assert held.reached.wait(TIMEOUT)
        assert not all_free(model)
        del handle
        gc.collect()
        held.go.set()
        until(lambda: all_free(model))
        assert len(calls) == 3


def test_a_loop_that_is_left_cancels() -> None:
    with opened(cache=False) as model:
        for chunk in model.submit(PROMPT, -1):
            assert chunk.token >= 0
            break
        gc.collect()
        until(lambda: all_free(model))


def test_a_closed_handle_gives_no_more_chunks(shared: Any) -> None:
    held = Held(1)
    with shared.submit(PROMPT, LONG, logits_processors=[held]) as handle:
        next(handle)
    held.go.set()
    assert list(handle) == []
    assert handle.result(TIMEOUT).finish_reason == "cancelled"
    with pytest.raises(KeyError):
        shared.submit(PROMPT, LONG).throw(KeyError("mine"))


def test_reset_ends_what_is_unfinished(shared: Any) -> None:
    done, held = shared.submit(PROMPT, 3), Held(1)
    done.result()
    handle = shared.submit(PROMPT, LONG, logits_processors=[held])
    next(handle)
    shared.reset()
    held.go.set()
    with pytest.raises(UsageError, match=r"ended by reset\(\)"):
        list(handle)
    assert len(list(done)) == 3
    assert (shared.last, shared.generate(PROMPT, 2).finish_reason) == ([], "length")


def test_a_deadline_that_passes(model: Any) -> None:
    held = Held(2)
    model.generate(PROMPT, 3)  # makes the plans, so that decoding begins long before the deadline
    handle = model.submit(PROMPT, LONG, deadline=0.8, logits_processors=[held])
    assert held.reached.wait(TIMEOUT)
    time.sleep(0.81)
    held.go.set()
    with pytest.raises(DeadlineError, match=r"after 0.8 seconds: it was while decoding"):
        handle.result(TIMEOUT)
    assert len(model.generate(PROMPT, 3, deadline=TIMEOUT).tokens) == 3
    for wrong in (-1, "x", float("nan")):
        with pytest.raises(UsageError, match="deadline"):
            model.submit(PROMPT, deadline=wrong)


def test_a_model_that_closes_ends_all_that_wait(model: Any) -> None:
    held = Held(1)
    handles = [model.submit(PROMPT, LONG, logits_processors=[held]), *(model.submit([i], LONG) for i in range(40))]
    errors: list[BaseException] = []

    def wait(handle: Any) -> None:
        try:
            handle.result()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=wait, args=(handle,)) for handle in handles]
    for thread in threads:
        thread.start()
    assert held.reached.wait(TIMEOUT)
    goes_on = threading.Thread(target=lambda: (until(lambda: running_of(model).loop.closed), held.go.set()))
    goes_on.start()
    model.close()
    goes_on.join(TIMEOUT)
    for thread in threads:
        thread.join(TIMEOUT)
        assert not thread.is_alive()
    assert {type(error) for error in errors} == {UsageError}
    assert len(errors) == len(handles)


def test_an_interrupt_while_a_result_is_waited_for(model: Any) -> None:
    held = Held(1)

    def interrupt() -> None:
        held.reached.wait(TIMEOUT)
        signal.pthread_kill(main, signal.SIGINT)

    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    main = threading.main_thread().ident or 0
    sender = threading.Thread(target=interrupt)
    sender.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            model.generate(PROMPT, LONG, logits_processors=[held])
    finally:
        signal.signal(signal.SIGINT, previous)
        held.go.set()
        sender.join(TIMEOUT)
    assert len(model.generate(PROMPT, 4).tokens) == 4


# ---- calls that would wait for themselves -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["generate", "submit", "logits", "session", "save", "plan", "close"])
def test_a_call_from_a_processor_that_would_wait_for_itself_is_refused(model: Any, name: str) -> None:
    def session() -> None:
        with model.session():
            pass

    calls: dict[str, Callable[[], Any]] = {
        "generate": lambda: model.generate(PROMPT, 1),
        "submit": lambda: model.submit(PROMPT, 1),
        "logits": lambda: model.logits(PROMPT),
        "session": session,
        "save": model.save,
        "plan": lambda: model.plan(1),
        "close": model.close,
    }

    def process(ids: Any, logits: Any) -> Any:
        calls[name]()
        return logits

    with pytest.raises(UsageError, match="step thread"):
        model.submit(PROMPT, 2, logits_processors=[process]).result(TIMEOUT)
    assert len(model.generate(PROMPT, 2).tokens) == 2


def test_a_call_within_a_session_of_the_same_thread_is_refused(model: Any) -> None:
    with model.session() as session:
        session.prefill(PROMPT)
        for call in (lambda: model.generate(PROMPT, 1), model.close, lambda: model.plan(1)):
            with pytest.raises(UsageError, match="end the session first"):
                call()
        assert session.ids == PROMPT
    assert len(model.generate(PROMPT, 2).tokens) == 2


def test_a_model_that_nobody_uses_is_closed_on_any_thread() -> None:
    """Garbage may be collected on the thread that steps: it frees nothing under its own feet."""
    first, other = opened(), opened()
    file, collected = first.file, threading.Event()

    def process(ids: Any, logits: Any) -> Any:
        models.clear()
        collected.set()
        return logits

    models = [first]
    handle = first.submit(PROMPT, 5, logits_processors=[process])
    del first
    with suppress(UsageError):
        handle.result(TIMEOUT)
    assert collected.is_set()
    until(lambda: not file.parts)
    assert len(other.generate(PROMPT, 2).tokens) == 2
    other.close()


# ---- many at once -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS, ids=["attention", "hybrid"])
def test_many_threads_have_what_each_has_alone(path: Any) -> None:
    prompts = [[(7 * i + j) % 250 + 1 for j in range(3 + 9 * i)] for i in range(8)]
    options: list[dict[str, Any]] = [
        {"temperature": 1.0, "seed": i, "top_p": 0.9} if i % 2 else {} for i in range(len(prompts))
    ]
    with opened(path, cache=False) as model:
        alone = [model.generate(p, 12, **o).tokens for p, o in zip(prompts, options, strict=True)]
        together: list[Any] = [None] * len(prompts)

        def work(i: int) -> None:
            together[i] = model.generate(prompts[i], 12, **options[i]).tokens

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert together == alone
        assert [r.tokens for r in model.generate(prompts[:2], 12)] == [
            model.generate(p, 12).tokens for p in prompts[:2]
        ]


def test_a_list_of_prompts_gives_results_in_its_order(shared: Any) -> None:
    prompts = [[4], [5, 6], [7, 8, 9]]
    alone = [shared.generate(p, 6).tokens for p in prompts]
    for given in (prompts, tuple(prompts), iter(prompts), [np.array(p) for p in prompts], (p for p in prompts)):
        assert [r.tokens for r in shared.generate(given, 6)] == alone
    assert shared.generate(iter(prompts[2]), 6).tokens == alone[2]
    assert shared.generate(np.array(prompts[1]), 6).tokens == alone[1]
    with pytest.raises(UsageError, match="no tokens"):
        shared.generate([[4], []], 3)
    with pytest.raises(UsageError, match="outside the vocabulary"):
        shared.generate([[4], [10**6]], LONG)


def test_a_list_longer_than_the_queue_waits_for_room() -> None:
    with opened(max_sequences=1, queue_limit=2) as model:
        results = model.generate([[i + 1] for i in range(12)], 3)
        assert [r.prompt_tokens for r in results] == [1] * 12
        held = Held()
        handles = [model.submit(PROMPT, 2, logits_processors=[held])]
        assert held.reached.wait(TIMEOUT)
        handles += [model.submit(PROMPT, 2) for _ in range(2)]
        with pytest.raises(QueueFullError, match="2 requests are waiting"):
            model.submit(PROMPT, 2)
        with pytest.raises(QueueFullError):
            model.generate([PROMPT, PROMPT], 2)
        held.go.set()
        assert all(len(handle.result(TIMEOUT).tokens) == 2 for handle in handles)
        assert len(model.generate(PROMPT, 2).tokens) == 2


def test_times_of_a_result(shared: Any) -> None:
    result = shared.generate([3] * 100, 10)
    assert min(result.queue_seconds, result.prefill_seconds, result.decode_seconds) >= 0
    assert result.decode_seconds > 0
