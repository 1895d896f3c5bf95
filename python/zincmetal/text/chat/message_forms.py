"""Finds by trial the forms of messages that a template needs, so that it shows everything in them.

Templates disagree. A content is a string for some, and a list of parts for others. The arguments of a tool call are an
object or JSON text. A missing content must be absent, None, or an empty string. No template declares its choice.

So a small conversation with known words is rendered in each form. The first form that shows most of the words is
used. Each question is asked once for a template, and only when it matters.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ...errors import UsageError, quote
from . import messages as chat_messages
from .messages import Message

Renders = Callable[[list[dict[str, Any]]], list[str | None]]
"""Renders the template with each set of variables. A failure gives None."""

# Words that no template has. No word is a part of another.
_ASKED, _SAID, _MORE, _THOUGHT, _RESULT, _NAME, _KEY, _VALUE, _PAYLOAD = (
    f"zinc{word}" for word in ("asked", "said", "more", "thought", "result", "name", "key", "value", "payload")
)
REASONING = ("reasoning_content", "thinking", "reasoning")  # keys for the same text; the first one present counts
_CALL_ID = "call00001"  # of the length that Mistral's templates want
_PARAMETERS = {"type": "object", "properties": {_KEY: {"type": "string", "description": "x"}}, "required": [_KEY]}
_TOOLS = [{"type": "function", "function": {"name": _NAME, "description": "x", "parameters": _PARAMETERS}}]
# Ways to write a missing content.
_ABSENT: list[dict[str, Any]] = [
    {},
    {"content": ""},
    {"content": None},
    {"content": [{"type": "text", "text": ""}]},
]

_PARTS_SHOWN = ("'type': 'text'", '"type": "text"')  # the template printed the list instead of reading it
_ARGUMENTS_SHOWN = ("{'" + _KEY, f'\\"{_KEY}')  # it printed the object, or quoted the text once more
_NONE_SHOWN = ("None", "null")


class Forms:
    """Forms of messages that one template needs."""

    def __init__(self, source: str, renders: Renders) -> None:
        self._renders = renders
        self._reasoning = [name for name in REASONING if mentions(source, name)]
        self._reads_parts = mentions(source, "text")
        self._source = source
        self._answers: dict[Any, Any] = {}

    def prepared(self, messages: list[Message]) -> list[Message]:
        """Bring messages into the form that this template needs. Raises UsageError for parts without a place in it."""
        return [self._prepared(f"messages[{i}]", dict(message)) for i, message in enumerate(messages)]

    def _prepared(self, where: str, message: Message) -> Message:
        message = self._with_reasoning(where, message)
        content, calls = message.get("content"), message.get("tool_calls")
        absent: dict[str, Any] = {}
        if content is not None:
            message["content"] = self._content(where, message["role"], content)
        else:
            message.pop("content", None)
            absent = _ABSENT[self._absent_beside_calls() if calls else self._absent()]
        if calls:
            message["tool_calls"] = self._calls(f"{where}.tool_calls", calls)
        said = {key: value for key, value in message.items() if value is not None or self._keeps(message, key)}
        return said | absent

    # --- contents

    def _content(self, where: str, role: str, content: str | list[dict[str, Any]]) -> str | list[dict[str, Any]]:
        if isinstance(content, str):
            text_only = not self._reads_parts or self._parts(role)[0] >= self._parts(role)[1]
            return content if text_only else [{"type": "text", "text": content}]
        for i, part in enumerate(content):
            if part.get("type", "text") != "text" and not self._has_place(role, part):
                kind = quote(part["type"])
                raise UsageError(f"{where}.content[{i}] is of type {kind}, for which this template has no place")
        if any(part.get("type", "text") != "text" for part in content):
            return content
        as_text, as_parts = self._parts(role)
        return content if as_parts >= as_text else chat_messages.joined(content)

    def _parts(self, role: str) -> tuple[float, ...]:
        """Score how well a content of this role is shown as one string, and as parts."""
        parts = [{"type": "text", "text": text} for text in (_SAID, _MORE)]
        return self._asked(
            ("parts", role),
            [self._around({"role": role, "content": content}) for content in (_SAID + _MORE, parts)],
            (_SAID, _MORE),
            _PARTS_SHOWN,
        )

    def _has_place(self, role: str, part: dict[str, Any]) -> bool:
        """Return True if the template shows parts of this type."""
        payload = {key: _PAYLOAD if isinstance(v, str) and key != "type" else v for key, v in part.items()}
        content = [payload, {"type": "text", "text": _SAID}]
        conversation = self._around({"role": role, "content": content})
        shown = (f"'type': {part['type']!r}", f'"type": {json.dumps(part["type"])}')
        (score,) = self._asked(("type", role, part["type"], *sorted(part)), [conversation], (_SAID, _PAYLOAD), shown)
        return score == 2

    def _around(self, message: Message) -> list[Message]:
        """Make a conversation in which a message of that role may stand."""
        role, user = message["role"], {"role": "user", "content": _ASKED}
        if role in ("user", "system", "developer"):
            return [message] if role == "user" else [message, user]
        if role in ("tool", "function"):
            named = {"tool_call_id": _CALL_ID, "name": _NAME}
            return [user, self._calling(), named | message]
        return [user, message, user]

    # --- tool calls

    def _calls(self, where: str, calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [self._call(f"{where}[{i}]", self._wrapped(call)) for i, call in enumerate(calls)]

    def _wrapped(self, call: dict[str, Any]) -> dict[str, Any]:
        """Put the name and arguments of a call under "function", or bare, as the template expects them."""
        bare = self._calling_scores()[0]
        if "function" in call:
            return {key: v for key, v in call.items() if key != "function"} | call["function"] if bare else call
        if bare or "name" not in call:
            return call
        function = {key: call[key] for key in ("name", "arguments") if key in call}
        rest = {key: value for key, value in call.items() if key not in function}
        return rest | {"type": "function", "function": function}

    def _call(self, where: str, call: dict[str, Any]) -> dict[str, Any]:
        if "function" in call:
            return call | {"function": self._call(f"{where}.function", call["function"])}
        arguments = call.get("arguments")
        as_object, as_text = self._arguments()
        unknown = max(as_object, as_text) < 0  # all trials failed; most templates want an object
        if isinstance(arguments, str) and (as_object > as_text or unknown):
            return call | {"arguments": chat_messages.arguments_as_object(where, arguments)}
        if isinstance(arguments, dict) and as_text > as_object:
            return call | {"arguments": json.dumps(arguments, ensure_ascii=False)}
        return call

    def _calling_scores(self) -> tuple[bool, tuple[float, ...]]:
        """Decide if calls must be bare, and score how well a call is shown in the chosen form.

        The first half of the scores has the arguments as an object, the second half as text. Each half has one score
        for each of _ABSENT.
        """
        user = {"role": "user", "content": _ASKED}
        result = {"role": "tool", "content": _RESULT, "tool_call_id": _CALL_ID, "name": _NAME}
        said = {"role": "assistant", "content": _SAID}
        trials = [
            [user, _calling(arguments, bare) | absent, result, said, user]
            for bare in (False, True)
            for arguments in ({_KEY: _VALUE}, json.dumps({_KEY: _VALUE}))
            for absent in _ABSENT
        ]
        wanted = (_ASKED, _NAME, _KEY, _VALUE, _RESULT, _SAID)
        scores = self._asked("calls", trials, wanted, _ARGUMENTS_SHOWN + _NONE_SHOWN)
        usual, bare = scores[: len(scores) // 2], scores[len(scores) // 2 :]
        return (True, bare) if max(bare) > max(usual) else (False, usual)

    def _arguments(self) -> tuple[float, float]:
        (_, scores), n = self._calling_scores(), len(_ABSENT)
        return max(scores[:n]), max(scores[n:])

    def _absent_beside_calls(self) -> int:
        """Index of the form in _ABSENT that shows a tool call without a content best."""
        (_, scores), n = self._calling_scores(), len(_ABSENT)
        return _best(max(pair) for pair in zip(scores[:n], scores[n:], strict=True))

    def _calling(self) -> Message:
        """Make an answer that calls a tool, in the form that the template needs."""
        as_object, as_text = self._arguments()
        arguments = {_KEY: _VALUE} if as_object >= as_text else json.dumps({_KEY: _VALUE})
        return _calling(arguments, self._calling_scores()[0]) | _ABSENT[self._absent_beside_calls()]

    # --- missing values, and reasoning

    def _absent(self) -> int:
        """Find the index in _ABSENT for an answer without a content."""
        user, thoughts = {"role": "user", "content": _ASKED}, dict.fromkeys(self._reasoning, _THOUGHT)
        trials = [[user, {"role": "assistant"} | thoughts | absent, user] for absent in _ABSENT]
        return _best(self._asked("absent", trials, (_ASKED, _THOUGHT), _NONE_SHOWN))

    def _keeps(self, message: Message, key: str) -> bool:
        """Return True if a key with the value None must be present."""
        if not mentions(self._source, key):
            return False
        said = {"role": message["role"], "content": _SAID}
        trials = [self._around(said), self._around(said | {key: None})]
        return _best(self._asked(("none", message["role"], key), trials, (_ASKED, _SAID), _NONE_SHOWN)) == 1

    def _with_reasoning(self, where: str, message: Message) -> Message:
        """Put the reasoning of a message under the names that the template reads."""
        content = message.get("content")
        if isinstance(content, list) and not all(self._understood(message["role"], part) for part in content):
            thoughts = [t for part in content if (t := _thought(part)) is not None]
            message["content"] = [part for part in content if _thought(part) is None] or None
            if thoughts:
                message.setdefault("reasoning_content", "".join(thoughts))
        said = next((message[name] for name in REASONING if message.get(name) is not None), None)
        given = {name: message.pop(name) for name in REASONING if name in message}
        if said is None:
            return message
        if not isinstance(said, str):
            raise UsageError(f"{where}: its reasoning is of type {type(said).__name__}; a string is needed")
        names = self._reasoning or [name for name, value in given.items() if value is not None]
        return message | dict.fromkeys(names, said)

    def _understood(self, role: str, part: dict[str, Any]) -> bool:
        return _thought(part) is None or self._has_place(role, part)

    # --- asking

    def _asked(
        self, question: Any, trials: Sequence[list[Message]], wanted: Sequence[str], unwanted: Sequence[str]
    ) -> tuple[float, ...]:
        """Score each trial: -1 if it fails, else the number of shown words, less 0.5 if it shows unwanted words."""
        if question not in self._answers:
            self._answers[question] = _scores(self._texts(trials), wanted, unwanted)
        answers: tuple[float, ...] = self._answers[question]
        return answers

    def _texts(self, trials: Sequence[list[Message]]) -> list[str | None]:
        """Render the trials. If all fail, repeat them without tools, and then with the first three messages only.

        The failure may have a cause beside the question.
        """
        calls = any("tool_calls" in message for message in trials[0])
        texts: list[str | None] = []
        for tools, length in ((_TOOLS, None), (None, None), (_TOOLS, 3), (None, 3)) if calls else ((None, None),):
            texts = self._renders([{"messages": trial[:length], "tools": tools} for trial in trials])
            if any(text is not None for text in texts):
                break
        return texts


def _scores(texts: Sequence[str | None], wanted: Sequence[str], unwanted: Sequence[str]) -> tuple[float, ...]:
    found = [-1 if text is None else sum(word in text for word in wanted) for text in texts]
    # A template may have an unwanted word itself. It counts only if one form shows it more often than another.
    faults = [sum(map((text or "").count, unwanted)) for text in texts]
    usual = min((f for f, text in zip(faults, texts, strict=True) if text is not None), default=0)
    least = 0 if len(texts) == 1 else usual
    return tuple(n - (0.5 if fault > least else 0) for n, fault in zip(found, faults, strict=True))


def _calling(arguments: Any, bare: bool) -> Message:
    function = {"name": _NAME, "arguments": arguments}
    call = {"id": _CALL_ID, **function} if bare else {"id": _CALL_ID, "type": "function", "function": function}
    return {"role": "assistant", "tool_calls": [call]}


def _thought(part: dict[str, Any]) -> str | None:
    """Read the text of a part that is reasoning. None for other parts."""
    kind = part.get("type")
    text = part.get(kind, part.get("text")) if kind in ("thinking", "reasoning") else None
    return text if isinstance(text, str) else None


def mentions(source: str, name: str) -> bool:
    """Return True if the source of a template has ``name`` as a whole word."""
    return re.search(rf"(?<![\w]){re.escape(name)}(?![\w])", source) is not None


def _best(scores: Iterable[float]) -> int:
    """Find the index of the best score, and the first one of equal scores."""
    ranked = list(scores)
    return ranked.index(max(ranked))
