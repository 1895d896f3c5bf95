"""Finds by trial what a chat template shows, and which of its variables control reasoning.

A template never says that it drops a message. So small conversations with known words are rendered, all at once, when a
model's first chat needs it. ``canonical.py`` brings messages into the shape that the answers ask for. What concerns one
message alone, such as the type of its content, is found in ``message_forms.py``: it holds for these trials too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from .call_ids import with_named_ids
from .message_forms import mentions

if TYPE_CHECKING:
    from .template import ChatTemplate

__all__ = ["EFFORTS", "Capabilities", "thinking_variables"]

# Words that no template has. No word is a part of another.
_SYSTEM, _ASKED, _SAID, _MORE, _THOUGHT, _RESULT, _NAME, _KEY, _VALUE = (
    f"zink{word}" for word in ("system", "asked", "said", "more", "thought", "result", "name", "key", "value")
)
MOST_KNOWN = 64  # templates
_SECOND = "2nd"  # ends the name and the value of a second call, and its result
SHORT_ID = "call00001"  # of the form that some templates demand: nine letters and digits
_LONG_ID = "call_zinkzinkzinkzinkzinkzink"

PRESERVING = MappingProxyType(
    {
        "preserve_thinking": True,
        "preserved_thinking": True,
        "keep_past_thinking": True,
        "clear_thinking": False,
        "truncate_history_thinking": False,
        "drop_thinking": False,
    }
)
"""Variables with which templates leave the reasoning in earlier answers, and the value for it."""

_SWITCHES: Mapping[str, tuple[Any, Any]] = MappingProxyType(
    {
        "enable_thinking": (True, False),
        "thinking": (True, False),
        "thinking_mode": ("enabled", "disabled"),
        "thinking_option": ("on", "off"),
        "thinking_budget": (-1, 0),
        "reasoning": (True, False),
    }
)
"""Variables that turn reasoning on and off, and their two values."""

_EFFORT_NAMES = ("reasoning_effort", "thinking_effort")
EFFORTS = ("none", "no_think", "minimal", "low", "medium", "high", "xhigh", "max")
"""Values of a variable of effort, least first. The first two mean no reasoning at all."""
_OFF = EFFORTS[:2]
_USUAL = ("low", "medium", "high")  # of templates that show any value


@dataclass(frozen=True)
class Capabilities:
    """What a chat template can show. Plain data, the same for the same template.

    - ``system``: a system message at the begin. ``system_anywhere``: also later, in its place.
    - ``users``: user messages one after another. ``user_after_result``: one right after the result of a tool.
    - ``tools``: the descriptions of tools. ``calls``: tool calls and their results. ``parallel``: several in an answer.
    - ``text_beside_calls``: text and calls of one answer. ``text_before_calls``: in two messages of the assistant.
    - ``short_ids``: ids of calls must be nine letters and digits. ``named_ids``: they must have the names of the tools.
    - ``answers_need_reasoning``: an answer must have a ``reasoning_content``, an empty one if it has none.
    - ``reasoning_in_loop``: reasoning between a call and its result. ``reasoning_kept``: reasoning of earlier turns.
    - ``dated``: the prompt has today's date.
    - ``stable``: a prompt stays as it is when the next question comes. ``stable_in_loop``: when the result of a tool
      does. Both with no other variables than ``preserving``.
    - ``preserving``: variables that keep the reasoning of earlier turns, with their values.
    - ``switches``: variables that turn reasoning on and off, with both values.
    - ``efforts``: variables of effort, with the values that they take, least first.
    """

    system: bool = True
    system_anywhere: bool = True
    users: bool = True
    user_after_result: bool = True
    tools: bool = True
    calls: bool = True
    parallel: bool = True
    text_beside_calls: bool = True
    text_before_calls: bool = True
    short_ids: bool = False
    named_ids: bool = False
    answers_need_reasoning: bool = False
    reasoning_in_loop: bool = False
    reasoning_kept: bool = False
    dated: bool = False
    stable: bool = False
    stable_in_loop: bool = False
    preserving: Mapping[str, Any] = field(default_factory=dict)
    switches: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    efforts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, template: ChatTemplate) -> Capabilities:
        """Find the capabilities of a template, once. Raises ChatTemplateError for one with errors of syntax."""
        key = (template.source, *sorted(template.named.items()))
        if key not in _known:
            while len(_known) >= MOST_KNOWN:
                _known.pop(next(iter(_known)), None)
            _known[key] = cls._found(template)
        return _known[key]

    @classmethod
    def _found(cls, template: ChatTemplate) -> Capabilities:
        variables = template.variables
        trials, needed, named = _Trials(template, variables), False, False
        if not trials.shown("answer"):
            other = _Trials(template, variables, {"reasoning_content": ""})
            trials, needed = (other, True) if other.shown("answer") else (trials, False)
        elif not trials.shown("calls"):
            other = _Trials(template, variables, named_ids=True)
            trials, named = (other, True) if other.shown("calls") else (trials, False)
        shown = trials.shown
        preserving = _preserving(trials, variables)
        stable, in_loop = _stable(template, preserving)
        return cls(
            **{name: shown(name) for name in _CONVERSATIONS if name in cls.__dataclass_fields__},
            short_ids=shown("calls") and not shown("long id"),
            named_ids=named,
            answers_need_reasoning=needed,
            reasoning_kept=shown("reasoning") and shown("reasoning of a loop"),
            dated=trials.dated(),
            stable=stable,
            stable_in_loop=in_loop,
            preserving=preserving,
            switches={
                name: both for name, both in _SWITCHES.items() if name in variables and trials.differ(name, both)
            },
            efforts={name: _efforts(trials, name, template.source) for name in _EFFORT_NAMES if name in variables},
        )

    def data(self) -> dict[str, Any]:
        """Return the capabilities as JSON values."""
        return asdict(self)


_known: dict[tuple[Any, ...], Capabilities] = {}  # by the sources of templates


def thinking_variables(capabilities: Capabilities, effort: str = "", enabled: bool | None = None) -> dict[str, Any]:
    """Return the variables that make a template ask for this much reasoning. None that says so: an empty dict.

    ``effort`` is one of OpenAI's, or "" for the model's own; "none" turns reasoning off. ``enabled`` is as Anthropic's
    "thinking" and ``enable_thinking`` say it; it wins. The variables that keep earlier reasoning are not among these.
    """
    on = enabled if enabled is not None else (effort not in _OFF if effort else None)
    if on is None:
        return {}
    made: dict[str, Any] = {name: both[0 if on else 1] for name, both in capabilities.switches.items()}
    for name, values in capabilities.efforts.items():
        value = _nearest(values, effort if on else _OFF[0], quiet=bool(made))
        if value is not None:
            made[name] = value
    return made


def _nearest(values: tuple[str, ...], effort: str, quiet: bool) -> str | None:
    """Find the value nearest to an effort, the larger of two. None for an effort that another variable turns off."""
    if effort not in EFFORTS:
        return None
    off = [value for value in values if value in _OFF]
    if effort in _OFF:
        return off[0] if off else None if quiet else next(iter(values), None)
    wanted = EFFORTS.index(effort)
    some = [value for value in values if value not in _OFF]
    return min(reversed(some), key=lambda value: abs(EFFORTS.index(value) - wanted), default=None)


# --- conversations, and the words that must be shown in this order


def _message(role: str, content: str | None = None, **keys: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **keys}


def _call(ending: str = "", name: str = SHORT_ID) -> dict[str, Any]:
    function = {"name": _NAME + ending, "arguments": {_KEY: _VALUE + ending}}
    return {"id": name, "type": "function", "function": function}


def _result(ending: str = "", name: str = SHORT_ID) -> dict[str, Any]:
    return _message("tool", _RESULT + ending, tool_call_id=name, name=_NAME + ending)


_PARAMETERS = {"type": "object", "properties": {_KEY: {"type": "string", "description": "x"}}, "required": [_KEY]}
_TOOLS = [
    {"type": "function", "function": {"name": _NAME + ending, "description": "x", "parameters": _PARAMETERS}}
    for ending in ("", _SECOND)
]
_USER, _LAST = _message("user", _ASKED), _message("user", _MORE)
_ANSWER, _RULES = _message("assistant", _SAID), _message("system", _SYSTEM)
_CALLING = _message("assistant", tool_calls=[_call()])
_BOTH_CALLS = _message("assistant", tool_calls=[_call(), _call(_SECOND, "call00002")])
_THINKING = {"reasoning_content": _THOUGHT}
_THOUGHT_CALL = _CALLING | _THINKING

_Conversation = tuple[Sequence[dict[str, Any]], Sequence[str]]
_CONVERSATIONS: Mapping[str, Sequence[_Conversation]] = MappingProxyType(
    {
        "answer": [([_USER, _ANSWER, _LAST], (_ASKED, _SAID, _MORE))],
        "system": [
            ([_RULES, _USER], (_SYSTEM, _ASKED)),
            ([_RULES, _USER, _ANSWER, _LAST], (_SYSTEM, _ASKED, _SAID, _MORE)),  # some move it to the last user message
        ],
        "system_anywhere": [
            ([_USER, _RULES], (_ASKED, _SYSTEM)),
            ([_message("system", "x"), _USER, _RULES, _ANSWER, _LAST], (_ASKED, _SYSTEM, _SAID, _MORE)),
            ([_USER, _ANSWER, _RULES, _LAST], (_ASKED, _SAID, _SYSTEM, _MORE)),
        ],
        "users": [([_USER, _LAST], (_ASKED, _MORE)), ([_message("user", "x"), _ANSWER, _USER, _LAST], (_ASKED, _MORE))],
        "user_after_result": [([_USER, _CALLING, _result(), _LAST], (_RESULT, _MORE))],
        "tools": [([_USER], (_NAME, _KEY))],
        "calls": [([_USER, _CALLING, _result(), _ANSWER, _LAST], (_ASKED, _NAME, _VALUE, _RESULT, _SAID, _MORE))],
        "parallel": [
            (
                [_USER, _BOTH_CALLS, _result(), _result(_SECOND, "call00002"), _ANSWER, _LAST],
                (_NAME, _NAME + _SECOND, _VALUE + _SECOND, _RESULT, _RESULT + _SECOND, _SAID),
            )
        ],
        "text_beside_calls": [([_USER, _CALLING | {"content": _SAID}, _result()], (_SAID, _NAME, _RESULT))],
        "text_before_calls": [
            ([_USER, _ANSWER, _CALLING, _result(), _message("assistant", "x"), _LAST], (_SAID, _NAME, _RESULT, _MORE))
        ],
        "reasoning_in_loop": [([_USER, _THOUGHT_CALL, _result()], (_THOUGHT, _NAME, _RESULT))],
        "reasoning": [([_USER, _ANSWER | _THINKING, _LAST], (_THOUGHT, _SAID, _MORE))],
        "reasoning of a loop": [([_USER, _THOUGHT_CALL, _result(), _ANSWER, _LAST], (_THOUGHT, _RESULT, _MORE))],
        "long id": [
            (
                [_USER, _message("assistant", tool_calls=[_call(name=_LONG_ID)]), _result(name=_LONG_ID)],
                (_RESULT,),
            )
        ],
    }
)
_WITH_TOOLS = frozenset(_CONVERSATIONS) - {"answer", "system", "system_anywhere", "users", "reasoning"}
_NOTHING: Mapping[str, str] = MappingProxyType({})


class _Trials:
    """Renders of all conversations by one template."""

    def __init__(
        self,
        template: ChatTemplate,
        variables: frozenset[str],
        answers: Mapping[str, str] = _NOTHING,
        named_ids: bool = False,
    ) -> None:
        self._template = template
        asked: dict[Any, dict[str, Any]] = {}
        for name, some in _CONVERSATIONS.items():
            for i, (messages, _) in enumerate(some):
                said = [dict(answers) | m if m["role"] == "assistant" else m for m in messages]
                said = with_named_ids(said) if named_ids else said
                tools = _TOOLS if name in _WITH_TOOLS else None
                asked[name, i] = {"messages": said, "tools": tools, "variables": {}}
        on = {name: both[0] for name, both in _SWITCHES.items() if name in variables}
        for name in ("reasoning_in_loop", "reasoning", "reasoning of a loop"):
            asked[name, 0]["variables"].update(on)
        for name in ("reasoning", "reasoning of a loop"):
            for keeping, value in PRESERVING.items():
                if keeping in variables:
                    asked[name, keeping] = asked[name, 0] | {"variables": on | {keeping: value}}
        values = {name: list(both) for name, both in _SWITCHES.items()} | {key: list(EFFORTS) for key in _EFFORT_NAMES}
        for name in values.keys() & variables:
            for value in values[name]:
                asked[name, value] = {"messages": [_USER], "variables": {name: value}}
        self._texts = dict(zip(asked, template.attempts(list(asked.values())), strict=True))

    def shown(self, name: str, which: Any = None) -> bool:
        """Return True if all words of a conversation are shown, in their order."""
        trials = list(enumerate(_CONVERSATIONS[name])) if which is None else [(which, _CONVERSATIONS[name][0])]
        return all(_in_order(self._texts[name, key], words) for key, (_, words) in trials)

    def text(self, name: str, value: Any) -> str | None:
        """Return the prompt with a variable, or None if the template refuses its value."""
        return self._texts.get((name, value))

    def differ(self, name: str, both: tuple[Any, Any]) -> bool:
        """Return True if a variable changes the prompt."""
        on, off = (self.text(name, value) for value in both)
        return on is not None and off is not None and on != off

    def dated(self) -> bool:
        """Return True if the prompt changes with the date."""
        if not mentions(self._template.source, "strftime_now"):
            return False
        trial = [{"messages": [_USER]}]
        return self._template.attempts(trial, now=0.0) != self._template.attempts(trial, now=40 * 86400.0)


def _in_order(text: str | None, words: Sequence[str]) -> bool:
    """Return True if each word stands in the text behind the one before."""
    at = 0
    for word in words:
        found = None if text is None else re.compile(rf"{word}(?!{_SECOND})").search(text, at)
        if found is None:
            return False
        at = found.end()
    return True


def _preserving(trials: _Trials, variables: frozenset[str]) -> dict[str, Any]:
    """Find the variables that keep reasoning which is dropped without them."""
    names = ("reasoning", "reasoning of a loop")
    return {
        variable: value
        for variable, value in PRESERVING.items()
        if variable in variables and any(trials.shown(name, variable) and not trials.shown(name) for name in names)
    }


def _stable(template: ChatTemplate, preserving: Mapping[str, Any]) -> tuple[bool, bool]:
    """Find out whether a prompt stays as it is, when another question follows and when a result does."""
    loop = [_USER, _THOUGHT_CALL, _result()]
    talks = ([_USER], [_USER, _ANSWER | _THINKING, _LAST], loop, [*loop, _ANSWER, _LAST])
    texts = template.attempts([{"messages": talk, "tools": _TOOLS, "variables": preserving} for talk in talks])
    asked, answered, called, after = ("" if text is None else text for text in texts)
    in_loop = bool(asked) and called.startswith(asked)
    return in_loop and answered.startswith(asked) and after.startswith(called), in_loop


def _efforts(trials: _Trials, name: str, source: str) -> tuple[str, ...]:
    """Find the values of a variable of effort: those that the source names, or the usual ones."""
    taken = [value for value in EFFORTS if trials.text(name, value) is not None]
    named = [value for value in taken if f"'{value}'" in source or f'"{value}"' in source]
    if sum(value not in _OFF for value in named) > 1 or any(value in _OFF for value in named):
        return tuple(named)
    return tuple(value for value in _USUAL if value in taken)
