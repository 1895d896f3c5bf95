"""Events of OpenAI's Responses API, made of a turn's events. A plain reply is the response of the last event."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ..api.result import Logprob
from ..text.tools.events import CallArguments, CallBegin, CallEnd, Reasoning, Text
from .ask import Tool
from .responses_items import MESSAGE, REASONING, SUMMARY, Call, Form, FreeCall, Passage, new_id
from .turn import Delta, Ended, Matched, TurnEvent

Json = dict[str, Any]


class ResponseWriter:
    """Writes one answer as items. An item is done before the next one begins; events are numbered from 0.

    - ``about``: the fields of the response that repeat the request.
    - ``tools``: the tools by the name that the model sees.
    - ``summary``: reasoning is written as its own summary, for clients that show summaries alone.
    - ``logprob``: writes the log-probabilities of a token, None if nobody asked for them.

    ``response`` is the response as far as it is known.
    """

    logprob: Callable[[Logprob], Json] | None = None

    def __init__(self, about: Mapping[str, Any], tools: Mapping[str, Tool], summary: bool = False) -> None:
        self.id = new_id("resp")
        self._tools, self._reasoning = tools, SUMMARY if summary else REASONING
        self._sequence = 0  # of the next event
        self._cached = 0
        self._open: Passage | Call | None = None
        self.response: Json = {
            "id": self.id,
            "object": "response",
            "created_at": int(time.time()),
            "completed_at": None,
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            **about,
            "output": [],
            "usage": None,
        }

    def begin(self) -> Iterator[Json]:
        """Yield the first events, once. A sign of life may have been before."""
        if not self._sequence:
            yield self._lifecycle("response.created")
            yield self._lifecycle("response.in_progress")

    def alive(self) -> Iterator[Json]:
        """Yield what keeps a client waiting: Codex takes nothing but this event for a sign of life."""
        if self._sequence:
            yield self._lifecycle("response.in_progress")
        else:
            yield from self.begin()

    def write(self, event: TurnEvent) -> Iterator[Json]:
        """Yield the wire events of an event."""
        if isinstance(event, Matched):
            self._cached = event.cached
        elif isinstance(event, Delta):
            yield from map(self._numbered, self._delta(event))
        elif isinstance(event, Ended):
            yield from map(self._numbered, self._close("completed" if event.reason in _WHOLE else "incomplete"))
            yield self._ended(event)

    def failed(self, code: str, message: str) -> Iterator[Json]:
        """Yield the events of an answer that an error ended."""
        yield from self.begin()
        yield from map(self._numbered, self._close("incomplete"))
        self.response |= {"status": "failed", "error": {"code": code, "message": message}}
        yield self._lifecycle("response.failed")

    # ---- items ----------------------------------------------------------------------------------------------

    def _delta(self, delta: Delta) -> Iterator[Json]:
        event = delta.event
        if isinstance(event, Reasoning):
            yield from self._text(self._reasoning, event.text)
        elif isinstance(event, Text):
            shown = [self.logprob(logprob) for logprob in delta.logprobs] if self.logprob else []
            yield from self._text(MESSAGE, event.text, shown)
        elif isinstance(event, CallBegin):
            tool = self._tools.get(event.name) or Tool(event.name)
            index = len(self.response["output"]) + (self._open is not None)
            yield from self._begin((FreeCall if tool.free else Call)(tool, index))
        elif isinstance(self._open, Call):
            if isinstance(event, CallArguments):
                yield from self._open.more(event.text)
            elif isinstance(event, CallEnd):
                yield from self._open.whole(event.arguments)
                # Whether a call without its end was cut is known when the answer ends.
                if not event.repaired:
                    yield from self._close("completed")

    def _text(self, form: Form, text: str, logprobs: list[Json] | None = None) -> Iterator[Json]:
        passage = self._open
        if not isinstance(passage, Passage) or passage.form is not form:
            passage = Passage(form, len(self.response["output"]) + (passage is not None))
            yield from self._begin(passage)
        yield from passage.more(text, logprobs or [])

    def _begin(self, item: Passage | Call) -> Iterator[Json]:
        yield from self._close("completed")
        self._open = item
        yield from item.begin()

    def _close(self, status: str) -> Iterator[Json]:
        item, self._open = self._open, None
        if item is not None:
            yield from item.end(status)
            self.response["output"].append(item.item)

    # ---- the response ---------------------------------------------------------------------------------------

    def _ended(self, event: Ended) -> Json:
        result = event.result
        made = len(result.tokens)
        self.response["completed_at"] = int(time.time())
        self.response["usage"] = {
            "input_tokens": result.prompt_tokens,
            "input_tokens_details": {"cached_tokens": self._cached, "cache_write_tokens": 0},
            "output_tokens": made,
            "output_tokens_details": {"reasoning_tokens": event.reasoning},
            "total_tokens": result.prompt_tokens + made,
        }
        if event.reason in _WHOLE:
            self.response["status"] = "completed"
            return self._lifecycle("response.completed")
        if event.reason == "cancelled":
            self.response["status"] = "cancelled"
        else:
            self.response |= {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
        return self._lifecycle("response.incomplete")

    def _lifecycle(self, kind: str) -> Json:
        """Return an event with the response as it is now. What is written later does not change it."""
        return self._numbered({"type": kind, "response": {**self.response, "output": [*self.response["output"]]}})

    def _numbered(self, event: Json) -> Json:
        self._sequence += 1
        return {"type": event["type"], "sequence_number": self._sequence - 1, **event}


_WHOLE = ("stop", "tool_calls")  # reasons of an answer that is complete

__all__ = ["ResponseWriter"]
