"""Turns: from a request to the events of its answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import pytest

from support.scripted import Reply as Answer
from support.served import USER, Served
from zincmetal.api.generation import Asked
from zincmetal.errors import DeadlineError, DeviceError, QueueFullError
from zincmetal.serve import turn as turns
from zincmetal.serve.ask import Ask
from zincmetal.serve.errors import BadRequest
from zincmetal.serve.turn import Delta, Ended, Matched, Progress, Turn, TurnEvent, merged, opened, run
from zincmetal.text.tools.events import CallBegin, CallEnd, Reasoning, Text
from zincmetal.text.tools.format import Format

ASK = Ask("", USER)


def events(served: Served, **fields: Any) -> list[TurnEvent]:
    return asyncio.run(run(Ask("", **{"messages": USER, **fields}), served.backend))


async def drained(coming: AsyncGenerator[Any, None]) -> None:
    async with aclosing(coming):
        async for _ in coming:
            pass


def texts(found: list[TurnEvent], choice: int = 0) -> list[str]:
    return [e.event.text for e in found if isinstance(e, Delta) and e.choice == choice and isinstance(e.event, Text)]


def test_the_events_of_an_answer(served: Served) -> None:
    found = events(served.says(Answer("Hi", reused=5)))
    assert found[0] == Matched(21, 5)
    assert [(e.done, e.total, e.cached) for e in found if isinstance(e, Progress)] == [(5, 21, 5), (21, 21, 5)]
    assert texts(found) == ["H", "i"]
    assert [e.made for e in found if isinstance(e, Delta)] == [1, 2]
    assert isinstance(found[-1], Ended)
    assert (found[-1].reason, found[-1].result.text, found[-1].reasoning) == ("stop", "Hi", 0)


def test_matched_comes_once_and_first_with_many_answers(served: Served) -> None:
    found = events(served, n=3)
    assert [i for i, e in enumerate(found) if isinstance(e, Matched)] == [0]
    assert sorted(e.choice for e in found if isinstance(e, Ended)) == [0, 1, 2]


def test_the_others_start_when_the_first_has_read_the_prompt(served: Served) -> None:
    async def main() -> None:
        served.says(Answer("Hi", reading=60))
        turn = await Turn.begin(Ask("", USER, n=3), served.backend)
        async with aclosing(turn.events()) as found:
            first = await anext(found)
            assert isinstance(first, Matched)
            await anext(found)
            await asyncio.sleep(0)
            assert len(served.backend.asked) == 1  # the prompt is being read

    asyncio.run(main())


def test_with_a_cached_prompt_the_others_start_at_once(served: Served) -> None:
    found = events(served.says(Answer("Hi", reused=21)), n=2)
    assert [texts(found, i) for i in (0, 1)] == [["H", "i"], ["H", "i"]]
    assert len(served.backend.asked) == 2


def test_a_failure_while_the_prompt_is_read_starts_no_others(served: Served) -> None:
    with pytest.raises(DeviceError, match="lost"):
        events(served.says(Answer("Hi", error=DeviceError("lost"))), n=3)
    assert len(served.backend.ended) == len(served.backend.asked)


@pytest.mark.usefixtures("lines")
def test_a_call_is_the_reason_of_the_end(served: Served) -> None:
    found = events(served.says("call f\nend {}\n"))
    assert [e.event for e in found if isinstance(e, Delta)] == [CallBegin(0, "f"), CallEnd(0, "{}")]
    assert isinstance(found[-1], Ended)
    assert found[-1].reason == "tool_calls"


@pytest.mark.usefixtures("lines")
def test_tokens_of_the_reasoning_are_counted(served: Served) -> None:
    found = events(served.says("think ab\nsay c\nthink d\n"))
    assert [e.event for e in found if isinstance(e, Delta)] == [Reasoning("ab"), Text("c"), Reasoning("d")]
    assert isinstance(found[-1], Ended)
    # The end token is not the reasoning's.
    assert found[-1].reasoning == len("think ab\n") + len("think d\n")


@pytest.mark.usefixtures("lines")
def test_what_the_parser_holds_back_comes_at_the_end(served: Served) -> None:
    found = events(served.says("say a\nsay b"))
    assert texts(found) == ["a", "b"]


def test_cancelled_turns_end_with_what_there_is(served: Served) -> None:
    async def main() -> list[TurnEvent]:
        turn = await Turn.begin(ASK, served.says(Answer("Hello", delay=0.001)).backend)
        found: list[TurnEvent] = []
        async with aclosing(turn.events()) as coming:
            async for event in coming:
                found.append(event)
                if len(texts(found)) == 2:
                    turn.cancel()
        return found

    found = asyncio.run(main())
    assert texts(found) == ["H", "e"]
    assert isinstance(found[-1], Ended)
    assert found[-1].reason == "cancelled"


def test_leaving_the_events_cancels(served: Served) -> None:
    async def main() -> None:
        turn = await Turn.begin(ASK, served.says(Answer("Hello", delay=60)).backend)
        async with aclosing(turn.events()) as coming:
            await anext(coming)
        assert turn.cancelled
        (ended,) = served.backend.ended
        assert ended.cancelled.is_set()

    asyncio.run(main())


def test_cancelling_the_task_cancels(served: Served) -> None:
    async def main() -> None:
        task = asyncio.ensure_future(run(ASK, served.says(Answer("Hello", reading=60)).backend))
        while not served.backend.running:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        (ended,) = served.backend.ended
        assert ended.cancelled.is_set()

    asyncio.run(main())


def test_a_turn_without_patience_waits(served: Served) -> None:
    async def main() -> None:
        turn = await Turn.begin(ASK, served.says(Answer("Hi", reading=60)).backend, patience=0.001)
        with pytest.raises(DeadlineError, match=r"within 0\.001 seconds"):
            await drained(turn.events())
        assert isinstance(turn.error, DeadlineError)

    asyncio.run(main())


def test_patience_is_for_the_first_token(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        timers, call_later = [], loop.call_later

        def note(delay: float, call: Any, *arguments: Any, **keywords: Any) -> asyncio.TimerHandle:
            timer = call_later(delay, call, *arguments, **keywords)
            timers.append((delay, timer))
            return timer

        monkeypatch.setattr(loop, "call_later", note)
        turn = await Turn.begin(ASK, served.backend, patience=1234)
        async with aclosing(turn.events()) as coming:
            async for event in coming:
                if isinstance(event, Delta):
                    break
            (timer,) = [timer for delay, timer in timers if delay == 1234]
            assert timer.cancelled()
        assert turn.first_at is not None

    asyncio.run(main())


def test_a_deadline_reaches_the_engine(served: Served) -> None:
    events(served, deadline=12.5)
    assert served.asked.deadline == 12.5


def test_opened_keeps_turns_under_their_names(served: Served) -> None:
    over: list[Turn] = []
    served.serving.observers.append(over.append)

    async def main() -> None:
        async with opened(served.serving, [ASK], "a", "b") as (turn,):
            assert served.serving.turns == {"a": [turn], "b": [turn]}
            assert served.models.leases == 1
            assert over == []
        assert served.serving.turns == {}
        assert served.models.leases == 0
        assert over == [turn]
        assert turn.cancelled

    asyncio.run(main())


def test_opened_gives_all_back_if_a_request_is_wrong(served: Served) -> None:
    async def main() -> None:
        with pytest.raises(BadRequest):
            async with opened(served.serving, [ASK, Ask("", prompt=[])], "a"):
                pytest.fail("it was refused")
        assert served.serving.turns == {}
        assert served.models.leases == 0

    asyncio.run(main())


def test_a_refused_turn_is_over(served: Served) -> None:
    over: list[Turn] = []
    served.serving.observers.append(over.append)
    served.backend.refusal = QueueFullError("full")

    async def main() -> None:
        with pytest.raises(QueueFullError):
            async with opened(served.serving, [ASK], "a"):
                pytest.fail("it was refused")

    asyncio.run(main())
    assert len(over) == 1


# ---- merged -------------------------------------------------------------------------------------------------------


async def counted(n: int, closed: list[int], fails: bool = False) -> AsyncGenerator[int, None]:
    try:
        for i in range(n):
            await asyncio.sleep(0)
            yield i
        if fails:
            raise ZeroDivisionError
    finally:
        closed.append(n)


@pytest.mark.parametrize("sizes", [[3], [3, 5], [0, 2, 0], [4, 4, 4, 4]])
def test_merged_yields_all_in_the_order_of_each(sizes: list[int]) -> None:
    async def main() -> None:
        closed: list[int] = []
        found = [pair async for pair in merged([counted(n, closed) for n in sizes])]
        for i, n in enumerate(sizes):
            assert [item for number, item in found if number == i] == list(range(n))
        assert sorted(closed) == sorted(sizes)

    asyncio.run(main())


def test_merged_takes_turns() -> None:
    async def main() -> None:
        found = [number async for number, _ in merged([counted(3, []), counted(3, [])])]
        assert found != sorted(found)

    asyncio.run(main())


@pytest.mark.parametrize("others", [[], [100]])
def test_merged_raises_the_first_error_and_closes_the_others(others: list[int]) -> None:
    async def main() -> None:
        closed: list[int] = []
        streams = [counted(2, closed, fails=True), *(counted(n, closed) for n in others)]
        with pytest.raises(ZeroDivisionError):
            await drained(merged(streams))
        assert sorted(closed) == sorted([2, *others])

    asyncio.run(main())


def test_merged_closes_all_if_it_is_left() -> None:
    async def main() -> None:
        closed: list[int] = []
        async with aclosing(merged([counted(50, closed), counted(60, closed)])) as found:
            await anext(found)
        assert sorted(closed) == [50, 60]

    asyncio.run(main())


# ---- prepared -----------------------------------------------------------------------------------------------------


def asked_for(served: Served, **fields: Any) -> Asked:
    events(served, **fields)
    last: Asked = served.asked
    return last


def test_special_tokens_of_a_plain_chat_are_hidden(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zincmetal.serve.prepare.format_of", lambda *_: Format())
    assert asked_for(served).hide_special
    assert not asked_for(served, messages=(), prompt="hi").hide_special


def test_special_tokens_stay_for_a_parser_of_reasoning_and_calls(served: Served) -> None:
    assert not asked_for(served).hide_special


def test_marks_are_for_chats_with_recurrent_models(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not asked_for(served).marks
    monkeypatch.setitem(served.backend.text.__dict__, "recurrent", True)
    assert asked_for(served).marks
    assert asked_for(served, messages=(), prompt="hi").marks is None
    goes_on = [*USER, {"role": "assistant", "content": "a"}]
    assert asked_for(served, messages=goes_on, continue_final=True).marks is None


def test_a_prompt_of_ids_is_taken_as_it_is(served: Served) -> None:
    assert asked_for(served, messages=(), prompt=[257, 104, 105]).ids == [257, 104, 105]


def test_the_makers_advice_counts_field_by_field(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    advice = {"temperature": 0.6, "top_k": 20}
    monkeypatch.setitem(served.backend.text.__dict__, "chat_sampling", advice)
    params = asked_for(served, sampling={"temperature": 0.9}).params
    assert (params.temperature, params.top_k) == (0.9, 20)


def test_all_names_are_exported() -> None:
    assert all(hasattr(turns, name) for name in turns.__all__)
