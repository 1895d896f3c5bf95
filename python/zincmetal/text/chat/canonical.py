"""Canonical form of a client's messages: what every client sends becomes what a chat template shows completely.

Clients put system messages anywhere, send contents as strings on one turn and as lists on the next, and repeat roles.
Templates drop or refuse most of that without a word. ``capabilities.py`` knows what a template shows.

All is pure, and no rule looks at what follows. So the canonical form of a longer conversation begins with that of the
shorter one, and its prompt with the same tokens. Only the last message may grow: what follows is then joined to it.
Results of tools are the exception. They take the order of their calls, and all of them belong to one turn.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ...errors import UsageError, quote
from .call_ids import with_named_ids, with_short_ids
from .capabilities import Capabilities
from .message_forms import REASONING
from .messages import TEXT_TYPES

__all__ = ["Message", "canonical", "described", "reasoning_of", "text_of"]

Message = dict[str, Any]

BILLING = "x-anthropic-billing-header:"  # differs in each session, and says nothing to a model
REMINDER = "<system-reminder>\n{}\n</system-reminder>"
BETWEEN = "\n\n"  # two messages that became one
_ROLES = {"developer": "system", "function": "tool"}
_KNOWN = ("system", "developer", "user", "assistant", "tool", "function")
_HIDDEN = ("thinking", "reasoning", "redacted_thinking")  # parts of an answer that are no text


def canonical(messages: Sequence[Mapping[str, Any]], capabilities: Capabilities | None = None) -> list[Message]:
    """Return the messages in their canonical form, for a template with these capabilities.

    ``messages`` are those of OpenAI's chat API. Contents become strings, reasoning becomes ``reasoning_content``, and
    a call is ``{"id", "type", "function": {"name", "arguments"}}``. Arguments stay text or an object, as they were.
    Raises UsageError, which names the message, for an unknown role and for a content that is no text.
    """
    capabilities = capabilities or Capabilities()
    turns = _ordered(_called_and_answered(_one_by_one(messages)))
    written = _with_calls(turns, capabilities) if capabilities.calls else list(map(_as_text, turns))
    return _demanded(_placed(written, capabilities), capabilities)


def text_of(where: str, message: Mapping[str, Any]) -> str:
    """Return the text of a message's content. Raises UsageError for a part that is no text."""
    content = message.get("content")
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, Sequence):
        kind = type(content).__name__
        raise UsageError(f"{where} needs a 'content' that is a string or a list of parts, not of type {kind}")
    texts = [_part(f"{where}.content[{i}]", part, message.get("role")) for i, part in enumerate(content)]
    # Parts of a system prompt are texts of their own. Those of other messages continue each other.
    between = "\n" if _ROLES.get(str(message.get("role")), message.get("role")) == "system" else ""
    return between.join(text for text in texts if text is not None)


def reasoning_of(message: Mapping[str, Any]) -> str:
    """Return the reasoning of an answer, from the keys and the parts that clients use, or ""."""
    for name in (*REASONING, "reasoning_text"):
        if isinstance(said := message.get(name), str) and said:
            return said
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    kinds = [(part, part.get("type")) for part in parts if isinstance(part, dict)]
    thoughts = [part.get(kind, part.get("text")) for part, kind in kinds if kind in _HIDDEN[:2]]
    return "".join(thought for thought in thoughts if isinstance(thought, str))


# --- each message by itself


def _one_by_one(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
        raise UsageError(f"messages is of type {type(messages).__name__}; a list of dicts is needed")
    made = [_message(f"messages[{i}]", message) for i, message in enumerate(messages)]
    some = [message for message in made if message["role"] != "system" or message["content"]]
    if not some:
        raise UsageError("messages is empty: a chat needs at least one message")
    return some


def _message(where: str, given: Mapping[str, Any]) -> Message:
    if not isinstance(given, Mapping):
        raise UsageError(f"{where} is of type {type(given).__name__}; a dict is needed")
    role = given.get("role")
    if role not in _KNOWN:
        raise UsageError(f"{where} has the role {quote(str(role))}; known roles: {', '.join(_KNOWN)}")
    assert isinstance(role, str)
    role = _ROLES.get(role, role)
    if role == "system":
        return {"role": role, "content": _without_billing(where, given)}
    if role == "assistant":
        return _answer(where, given)
    message: Message = {"role": role, "content": text_of(where, given)}
    if role == "tool":
        return message | {key: given[key] for key in ("tool_call_id", "name") if isinstance(given.get(key), str)}
    return message | ({"name": given["name"]} if isinstance(given.get("name"), str) else {})


def _answer(where: str, given: Mapping[str, Any]) -> Message:
    calls = given.get("tool_calls")
    if not calls and given.get("function_call") is not None:  # the older key, with one call
        calls = [given["function_call"]]
    if calls is not None and (not isinstance(calls, Sequence) or isinstance(calls, str)):
        raise UsageError(f"{where}.tool_calls is of type {type(calls).__name__}; a list is needed")
    message: Message = {"role": "assistant", "content": text_of(where, given)}
    if reasoning := reasoning_of(given):
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = [_call(f"{where}.tool_calls[{i}]", call) for i, call in enumerate(calls)]
    return message


def _call(where: str, given: Any) -> Message:
    function = given.get("function", given) if isinstance(given, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise UsageError(f"{where} needs a 'function' with a 'name' and 'arguments'")
    return {
        "id": given["id"] if isinstance(given.get("id"), str) else "",
        "type": "function",
        "function": {"name": function["name"], "arguments": _arguments(where, function.get("arguments"))},
    }


def _arguments(where: str, given: Any) -> str | dict[str, Any]:
    """Return arguments as an object, or as the text of one. Other text becomes the argument "input" of a call.

    A model may have written arguments that are no JSON. The conversation must go on.
    """
    if given is None or (isinstance(given, str) and not given.strip()):
        return {}
    if isinstance(given, Mapping):
        return dict(given)
    if not isinstance(given, str):
        raise UsageError(f"{where}.arguments must be an object or a text, not of type {type(given).__name__}")
    try:
        return given if isinstance(json.loads(given), dict) else {"input": given}
    except (ValueError, RecursionError):
        return {"input": given}


def _part(where: str, part: Any, role: Any) -> str | None:
    """Return the text of a part, or None for a part that is not shown."""
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise UsageError(f"{where} is of type {type(part).__name__}; a part is a dict such as {{'type': 'text', …}}")
    kind = part.get("type", "text" if "text" in part else None)
    if kind in _HIDDEN and role == "assistant":
        return None
    text = part.get("refusal" if kind == "refusal" else "text")
    if isinstance(text, str) and kind in (*TEXT_TYPES, "refusal"):
        return text
    if role in ("tool", "function") and isinstance(kind, str) and kind not in TEXT_TYPES:
        return f"[{kind}: not shown, this model reads text only]"  # the conversation of an agent must go on
    if kind in TEXT_TYPES:
        raise UsageError(f"{where} needs a 'text' that is a string")
    raise UsageError(f"{where} is of type {quote(str(kind))}: this model reads text only")


def _without_billing(where: str, given: Mapping[str, Any]) -> str:
    content = given.get("content")
    if isinstance(content, list):
        parts = [part for part in content if not _begins_with_billing(part)]
        return text_of(where, {**given, "content": parts})
    text = text_of(where, given)
    return text.partition("\n")[2].lstrip("\n") if _begins_with_billing(text) else text


def _begins_with_billing(part: Any) -> bool:
    text = part.get("text") if isinstance(part, Mapping) else part
    return isinstance(text, str) and text.lstrip().startswith(BILLING)


# --- calls and their results


def _called_and_answered(messages: Iterable[Message]) -> list[Message]:
    """Give ids to calls that have none, and to their results, which have their order or their name."""
    made: list[Message] = []
    waiting: list[tuple[str, str]] = []  # names and ids of the calls without a result
    n = 0
    for message in messages:
        calls = message.get("tool_calls", ())
        for call in calls:
            call["id"], n = call["id"] or f"call_{n}", n + 1
        if calls:
            waiting = [*waiting, *((call["function"]["name"], call["id"]) for call in calls)]
        if message["role"] == "tool":
            message = _with_call(message, waiting)
            waiting = [call for call in waiting if call[1] != message.get("tool_call_id")]
        elif message["role"] == "user":
            waiting = []
        made.append(message)
    return made


def _with_call(result: Message, waiting: Sequence[tuple[str, str]]) -> Message:
    by_id, by_name = result.get("tool_call_id"), result.get("name")
    found = next((call for call in waiting if call[1] == by_id), None)
    if by_id is None:
        found = next((call for call in waiting if call[0] == by_name), waiting[0] if waiting else None)
    if found is None:
        return result
    return result | {"name": by_name or found[0], "tool_call_id": found[1]}


def _ordered(messages: Iterable[Message]) -> list[Message]:
    """Join the answers of one turn, and put results of tools into the order of their calls."""
    made: list[Message] = []
    order: dict[str, int] = {}
    for message in messages:
        last = made[-1] if made else {"role": ""}
        if message["role"] == "assistant" == last["role"] and _continues(last, message):
            made[-1] = message = _joined_answer(last, message)
        else:
            made.append(message)
        if message["role"] == "assistant":
            order = {call["id"]: i for i, call in enumerate(message.get("tool_calls", ()))}
        elif message["role"] == "tool":
            first = next(i for i in range(len(made), 0, -1) if i == 1 or made[i - 2]["role"] != "tool") - 1
            made[first:] = sorted(made[first:], key=lambda m: order.get(m.get("tool_call_id", ""), len(order)))
    return made


def _continues(last: Message, message: Message) -> bool:
    """Return True if two messages are one answer: its reasoning, its text and its calls, in this order."""
    if "tool_calls" in last:
        return "tool_calls" in message and not message["content"] and "reasoning_content" not in message
    return not last["content"] or ("tool_calls" in message and not message["content"])


def _joined_answer(first: Message, second: Message) -> Message:
    thoughts = [m["reasoning_content"] for m in (first, second) if "reasoning_content" in m]
    calls = [*first.get("tool_calls", ()), *second.get("tool_calls", ())]
    made: Message = {"role": "assistant", "content": first["content"] + second["content"]}
    return (
        made
        | ({"reasoning_content": BETWEEN.join(thoughts)} if thoughts else {})
        | ({"tool_calls": calls} if calls else {})
    )


# --- places of messages


def _placed(messages: Iterable[Message], can: Capabilities) -> list[Message]:
    """Put each message where the template shows it."""
    made: list[Message] = []
    leading = True  # only system messages so far
    for message in messages:
        last = made[-1] if made else None
        if message["role"] != "system":
            leading = False
        elif leading and can.system:
            if last:
                made[-1] = _joined(last, message["content"])
                continue
        elif leading:
            message = {"role": "user", "content": message["content"]}
        elif not can.system_anywhere:
            message = {"role": "user", "content": REMINDER.format(message["content"])}
            if last and last["role"] in ("user", "tool"):
                made[-1] = _joined(last, message["content"])
                continue
        if last and _must_join(last, message, can):
            made[-1] = _joined(last, message["content"])
        else:
            made.append(message)
    return made


def _must_join(last: Message, message: Message, can: Capabilities) -> bool:
    pair = (last["role"], message["role"])
    if pair == ("assistant", "assistant"):  # templates that count turns refuse them
        return not can.users and "tool_calls" not in last and "tool_calls" not in message
    return (pair == ("user", "user") and not can.users) or (pair == ("tool", "user") and not can.user_after_result)


def _joined(message: Message, text: str) -> Message:
    between = BETWEEN if message["content"] and text else ""
    return message | {"content": message["content"] + between + text}


# --- tool calls


def _with_calls(messages: list[Message], can: Capabilities) -> list[Message]:
    """Write calls in the way that the template shows."""
    made: list[Message] = []
    for message in messages:
        if "tool_calls" not in message:
            made.append(message)
            continue
        if message["content"] and not can.text_beside_calls and can.text_before_calls:
            made.append({"role": "assistant", "content": message["content"]})
            message = message | {"content": ""}
        made.append(message)
    return made if can.parallel else _one_call_each(made)


def _one_call_each(messages: list[Message]) -> list[Message]:
    """Split an answer with several calls: each call comes before its own result."""
    made: list[Message] = []
    later: list[Message] = []
    for message in messages:
        if message["role"] == "tool":
            wanted = message.get("tool_call_id")
            while any(m["tool_calls"][0]["id"] == wanted for m in later):
                made.append(later.pop(0))
        else:
            made, later = [*made, *later], []
        calls = message.get("tool_calls", ())
        if len(calls) > 1:
            later = [{"role": "assistant", "content": "", "tool_calls": [call]} for call in calls[1:]]
            message = message | {"tool_calls": calls[:1]}
        made.append(message)
    return [*made, *later]


def _as_text(message: Message) -> Message:
    """Write calls and results as text, in the form that ``described`` asks for."""
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    if "tool_calls" not in message:
        return message
    texts = [message["content"], *map(_written, message["tool_calls"])]
    rest = {key: value for key, value in message.items() if key != "tool_calls"}
    return rest | {"content": "\n".join(text for text in texts if text)}


def _written(call: Message) -> str:
    function = call["function"]
    arguments = function["arguments"]
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return f'<tool_call>\n{{"name": {json.dumps(function["name"])}, "arguments": {text}}}\n</tool_call>'


def described(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Describe tools in a system message, for a template that has no place for them. The result is not canonical."""
    lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    text = (
        f"You may call these functions:\n<tools>\n{lines}\n</tools>\n"
        "Write a call as a JSON object with the function's name and its arguments, like this:\n"
        '<tool_call>\n{"name": "NAME", "arguments": {"ARGUMENT": "VALUE"}}\n</tool_call>'
    )
    leading = next((i for i, m in enumerate(messages) if m.get("role") not in ("system", "developer")), len(messages))
    some = [dict(message) for message in messages]
    return [*some[:leading], {"role": "system", "content": text}, *some[leading:]]


def _demanded(messages: list[Message], can: Capabilities) -> list[Message]:
    """Write ids of calls, and what is empty, as the template demands."""
    made = []
    for message in messages:
        if "tool_calls" in message and not message["content"]:
            message = message | {"content": None}  # templates have their own ways to write it: ``message_forms.py``
        if can.answers_need_reasoning and message["role"] == "assistant":
            message = {"reasoning_content": ""} | message
        made.append(message)
    if can.named_ids:
        return with_named_ids(made)
    return with_short_ids(made) if can.short_ids else made
