"""One caller at a time has a model: interrupts at any bytecode, abandoned streams, other threads, forks."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import zincmetal
from support.reference_models import reference_models
from zincmetal.errors import DeviceError, UsageError

PATH = reference_models("llama")[0]
PROMPT = [5, 6, 7]


@pytest.fixture
def model() -> Iterator[Any]:
    with zincmetal.load(PATH, device="cpu", context=64) as m:
        yield m


def interrupted(call: Callable[[], object], at: int) -> bool:
    """Runs ``call`` with an interrupt before the ``at``-th bytecode of turn.py; returns whether there were so many."""
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
        if frame.f_code.co_filename.endswith("turn.py"):
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
    stream = model.stream_generate(PROMPT, max_tokens=9)
    next(stream)
    stream.close()


@pytest.mark.parametrize("what", ["reset", "generate", "stream", "plan"])
def test_an_interrupt_at_any_bytecode_leaves_a_model_that_works(model: Any, what: str) -> None:
    calls = {
        "reset": model.reset,
        "generate": lambda: model.generate(PROMPT, max_tokens=2),
        "stream": lambda: started_and_closed(model),
        "plan": lambda: model.plan(1),
    }
    want, at = model.generate(PROMPT, max_tokens=3).tokens, 1
    while interrupted(calls[what], at):
        assert model.generate(PROMPT, max_tokens=3).tokens == want
        at += 1
    assert at > 20


def test_a_stream_that_only_a_traceback_has_is_ended_by_reset(model: Any) -> None:
    def show() -> None:
        stream = model.stream_generate(PROMPT, max_tokens=20)
        for _ in stream:
            raise RuntimeError("the display fails")

    with pytest.raises(RuntimeError) as kept:
        show()
    with pytest.raises(UsageError, match=r"unfinished stream: end the stream with its close\(\), or with reset\(\)"):
        model.generate(PROMPT)
    model.reset()
    assert model.generate(PROMPT, max_tokens=3).tokens
    assert kept


def test_a_stream_that_was_ended_says_so(model: Any) -> None:
    stream = model.stream_generate(PROMPT, max_tokens=20)
    next(stream)
    model.reset()
    assert model.generate(PROMPT, max_tokens=2).tokens
    with pytest.raises(UsageError, match=r"ended by reset\(\)"):
        next(stream)


def test_close_ends_the_stream_of_another_thread_with_an_error(model: Any) -> None:
    errors, started = [], threading.Event()

    def work() -> None:
        try:
            while True:
                for _ in model.stream_generate(PROMPT, max_tokens=50):
                    started.set()
        except UsageError as error:
            errors.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    started.wait(30)
    model.close()
    thread.join(30)
    assert len(errors) == 1
    assert "close" in errors[0]


def test_a_callback_cannot_close_its_own_model(model: Any) -> None:
    with pytest.raises(UsageError, match="by a callback of its own call"):
        model.generate(PROMPT, progress=lambda done, total: model.close())
    assert model.generate(PROMPT, max_tokens=2).tokens


def test_a_forked_child_is_told(model: Any) -> None:
    stream = model.stream_generate(PROMPT, max_tokens=20)
    next(stream)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            model.generate(PROMPT)
        except DeviceError as error:
            status = 0 if "before a fork" in str(error) else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert len(list(stream)) > 0
