"""Makes the events of a turn by hand, for tests of what writes them."""

from __future__ import annotations

from collections.abc import Iterable

from zincmetal.api.result import CacheUse, Result
from zincmetal.serve.turn import Delta, Ended, Matched, TurnEvent
from zincmetal.text.tools.events import CallArguments, CallBegin, CallEnd, Event, Reasoning, Text

PROMPT, CACHED = 100, 60

THOUGHT = (Reasoning("Let me "), Reasoning("see."))
WORDS = (Text("It is "), Text("sunny."))


def call(number: int, name: str, *fragments: str, repaired: bool = False) -> tuple[Event, ...]:
    """Makes the events of a tool call whose arguments are the fragments."""
    pieces = [CallArguments(number, fragment) for fragment in fragments]
    return (CallBegin(number, name), *pieces, CallEnd(number, "".join(fragments), repaired))


def ended(reason: str = "stop", made: int = 7, stop: str | None = None, reasoning: int = 0) -> Ended:
    """Makes the end of an answer of ``made`` tokens."""
    finish = "stop" if reason == "tool_calls" else reason
    use = CacheUse(CACHED, "memory")
    result = Result("", list(range(made)), finish, PROMPT, 1.0, 1.0, 0, stop_string=stop, cache=use)
    return Ended(0, reason, result, reasoning)


def turn(events: Iterable[Event], end: Ended | None = None) -> list[TurnEvent]:
    """Makes a whole turn."""
    return [Matched(PROMPT, CACHED), *(Delta(0, event) for event in events), end or ended()]
