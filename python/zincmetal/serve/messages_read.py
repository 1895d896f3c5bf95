"""Requests of Anthropic's Messages API, read into an Ask. Pure: no model, no HTTP.

What Anthropic's clients send beside the conversation (cache marks, betas, context edits) changes nothing here: the
prefix cache works without marks. Tools that Anthropic's servers run are left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from . import options
from .ask import AnswerFormat, Ask, Thinking, Tool, ToolChoice
from .errors import BadRequest, Unsupported
from .wire import Fields, log_once

Json = dict[str, Any]

API = "messages"
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
#: Fields that change nothing here.
ACCEPTED = (
    "betas",
    "billing_policy",
    "cache_control",
    "context_management",
    "diagnostics",
    "fallbacks",
    "inference_geo",
    "service_tier",
    "speed",
    "user_profile_id",
    "workspace_id",
)
CONTENT = "unsupported_content"
TEXTS = ("text", "search_result")  # blocks that have a text in any case
NOT_SHOWN = "[{}: not shown, this model reads text only]"
#: Blocks of an assistant's message that only Anthropic's servers can make sense of.
FOREIGN = ("redacted_thinking", "server_tool_use", "compaction", "fallback")


class MessagesRequest(NamedTuple):
    """What a client asks for, and whether its answer is streamed."""

    ask: Ask
    stream: bool


def read(body: Mapping[str, Any], headers: Mapping[str, str]) -> MessagesRequest:
    """Read a request. ``headers`` have small letters. Raises BadRequest, which names the field."""
    fields = Fields(body)
    if fields.items("mcp_servers"):
        raise Unsupported("mcp_servers")
    given = fields.items("messages")
    if not given:
        raise BadRequest("messages must have at least one message", "messages", "missing_field")
    tools, deferred = _tools(fields, _referenced(given))
    shown = {tool.name: _definition(tool) for tool in deferred}
    messages = [*_system(fields), *(m for at, one in enumerate(given) for m in _message(one, f"messages[{at}]", shown))]
    continues = _is_prefill(messages[-1]) if messages else False
    if continues and not messages[-1]["content"]:  # nothing to continue
        messages, continues = messages[:-1], False
    config = fields.inner("output_config") or Fields({}, "output_config")
    fields.skip(*ACCEPTED)
    ask = Ask(
        model=fields.text("model"),
        messages=messages,
        tools=(*tools, *deferred),
        choice=_choice(fields, (*tools, *deferred)),
        format=_format(fields, config),
        thinking=_thinking(fields, config),
        sampling=options.sampling(fields),
        max_tokens=fields.integer("max_tokens", low=1),
        stop=_stop(fields),
        continue_final=continues,
        variables=fields.object("chat_template_kwargs") or {},
        affinity=_affinity(fields, headers),
        deadline=options.deadline(fields),
        keep_alive=options.keep_alive(fields),
    )
    stream = fields.flag("stream")
    log_once(API, fields.unknown())
    return MessagesRequest(ask, stream)


# ---- the conversation ---------------------------------------------------------------------------------------


def _system(fields: Fields) -> Iterator[Json]:
    """Yield the system prompt. Its blocks stay apart: canonicalisation drops the one that bills Claude Code."""
    value = fields.given("system")
    if value:
        blocks = _blocks(value, "system")
        yield {"role": "system", "content": value if isinstance(value, str) else _parts(map(_text, blocks))}


def _message(value: Any, path: str, deferred: Mapping[str, str]) -> Iterator[Json]:
    """Yield the messages in OpenAI's form that a message becomes: results of tools are messages of their own.

    ``deferred`` has the definitions of tools that stand where a result refers to them.
    """
    fields = Fields.of(value, path)
    role = fields.choice("role", of=("user", "assistant", "system"), default="")
    if not role:
        raise BadRequest(f"{path}.role is missing", f"{path}.role", "missing_field")
    blocks = _blocks(fields.given("content"), fields.at("content"))
    if role == "assistant":
        yield _answer(blocks)
        return
    results = [block for block in blocks if _kind(block) == "tool_result"]
    others = [block for block in blocks if _kind(block) != "tool_result"]
    yield from (_result(block, deferred) for block in results)  # first: templates want them behind the calls
    if others or not results:
        yield {"role": role, "content": _content(map(_text, others))}


def _answer(blocks: Iterable[Fields]) -> Json:
    """Return the message of an answer, with its reasoning and its calls."""
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[Json] = []
    for block in blocks:
        kind = _kind(block)
        if kind == "thinking":
            thoughts.append(block.text("thinking"))
        elif kind == "tool_use":
            calls.append(_call(block))
        elif kind in FOREIGN or kind.endswith("_tool_result"):
            log_once(API, [kind], "is a block that has no meaning here")
        else:
            texts.append(_text(block))
    answer: Json = {"role": "assistant", "content": "".join(texts)}
    if any(thoughts):
        answer["reasoning_content"] = "".join(thoughts)
    if calls:
        answer["tool_calls"] = calls
    return answer


def _call(block: Fields) -> Json:
    arguments = json.dumps(block.object("input") or {}, ensure_ascii=False)
    return {
        "id": block.text("id"),
        "type": "function",
        "function": {"name": _required(block, "name"), "arguments": arguments},
    }


def _result(block: Fields, deferred: Mapping[str, str]) -> Json:
    """Return the message of a tool's result. A result that is an error says so."""
    value = block.given("content")
    blocks = _blocks(value, block.at("content")) if value is not None else ()
    text = "\n".join(_shown(one, deferred) for one in blocks)
    if block.flag("is_error") and not text.lower().startswith(("error", "<tool_use_error>")):
        text = f"Error: {text}" if text else "Error"
    return {"role": "tool", "tool_call_id": _required(block, "tool_use_id"), "content": text}


def _shown(block: Fields, deferred: Mapping[str, str]) -> str:
    """Return the text of a block of a result. A tool may give an image: the model learns that there was one.

    A refusal would be final. The result stays in the conversation, so each later request would be refused too.
    """
    kind = _kind(block)
    if kind == "tool_reference":
        name = _required(block, "tool_name")
        return deferred.get(name, name)
    plain = kind == "document" and _document(block) is not None
    return _text(block) if plain or kind in TEXTS else NOT_SHOWN.format(kind[:60])


def _blocks(value: Any, path: str) -> list[Fields]:
    """Return the blocks of a content, which may be a text."""
    if isinstance(value, str):
        return [Fields({"type": "text", "text": value}, path)]
    if not isinstance(value, list):
        raise BadRequest(f"{path} must be a string or a list of blocks", path, "invalid_type")
    return [Fields.of(block, f"{path}[{at}]") for at, block in enumerate(value)]


def _text(block: Fields) -> str:
    """Return the text of a block. Raises Unsupported for one that is none."""
    kind = _kind(block)
    if kind == "text":
        return block.text("text")
    if kind == "search_result":
        found = [_text(inner) for inner in _blocks(block.given("content"), block.at("content"))]
        return "\n".join([block.text("title"), block.text("source"), *found])
    if kind == "document":
        text = _document(block)
        if text is not None:
            return text
    raise Unsupported(block.path, f"{block.path}: this model reads text, and no block of type {kind!r:.60}", CONTENT)


def _document(block: Fields) -> str | None:
    """Return the text of a document with its title, or None if it has no plain text."""
    source = block.inner("source") or Fields({})
    kind = source.text("type")
    if kind == "text":
        text = source.text("data")
    elif kind == "content":
        text = "\n".join(map(_text, _blocks(source.given("content"), source.at("content"))))
    else:
        return None
    return "\n".join(part for part in (block.text("title"), block.text("context"), text) if part)


def _kind(block: Fields) -> str:
    return _required(block, "type")


def _required(fields: Fields, name: str) -> str:
    text = fields.text(name)
    if not text:
        raise BadRequest(f"{fields.at(name)} is missing", fields.at(name), "missing_field")
    return text


def _parts(texts: Iterable[str]) -> list[Json]:
    return [{"type": "text", "text": text} for text in texts]


def _content(texts: Iterable[str]) -> str | list[Json]:
    """Return a content that is the same for one block and for its text alone: Claude Code sends both, in turns."""
    parts = _parts(texts)
    return str(parts[0]["text"]) if len(parts) == 1 else parts


def _is_prefill(message: Json) -> bool:
    return message["role"] == "assistant" and "tool_calls" not in message


# ---- tools --------------------------------------------------------------------------------------------------


def _tools(fields: Fields, referenced: frozenset[str]) -> tuple[tuple[Tool, ...], tuple[Tool, ...]]:
    """Return the tools of the prompt, and the deferred ones that a result refers to. Others are left out.

    A search of tools finds deferred ones in the middle of a conversation. Their definitions stand in its result: among
    the prompt's tools, they would change the beginning of the prompt, and all that follows would be computed again.
    """
    tools: dict[str, Tool] = {}
    for at, value in enumerate(fields.items("tools") or ()):
        tool = Fields.of(value, f"tools[{at}]")
        kind = tool.text("type")
        if kind not in ("", "custom"):
            log_once(API, [kind], "is a tool of Anthropic's servers, which is left out here")
            continue
        name = _required(tool, "name")
        deferred = tool.flag("defer_loading")
        if deferred and name not in referenced:
            continue
        if name in tools:
            raise BadRequest(f"tools: two tools have the name {name!r:.80}", tool.at("name"))
        schema = tool.object("input_schema") or {"type": "object"}
        tools[name] = Tool(name, tool.text("description"), schema, tool.flag("strict"), listed=not deferred)
    found = tuple(tools.values())
    return tuple(tool for tool in found if tool.listed), tuple(tool for tool in found if not tool.listed)


def _definition(tool: Tool) -> str:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.schema}
    return json.dumps({"type": "function", "function": function}, ensure_ascii=False)


def _referenced(messages: Sequence[Any]) -> frozenset[str]:
    """Return the names of the tools that results of tools refer to: a search of tools found them."""
    names = set()
    for message in messages:
        for block in _dicts(message.get("content") if isinstance(message, dict) else None):
            for inner in _dicts(block.get("content")):
                if inner.get("type") == "tool_reference":
                    names.add(str(inner.get("tool_name")))
    return frozenset(names)


def _dicts(value: Any) -> list[Json]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


MODES: Mapping[str, Literal["auto", "none", "required"]] = {
    "auto": "auto",
    "any": "required",
    "tool": "required",
    "none": "none",
}


def _choice(fields: Fields, tools: Sequence[Tool]) -> ToolChoice:
    choice = fields.inner("tool_choice")
    if choice is None:
        return ToolChoice()
    kind = choice.choice("type", of=tuple(MODES), default="auto")
    names = (_required(choice, "name"),) if kind == "tool" else ()
    if names and names[0] not in {tool.name for tool in tools}:
        raise BadRequest(f"tool_choice.name: there is no tool {names[0]!r:.80} in tools", "tool_choice.name")
    if kind == "any" and not tools:
        raise BadRequest("tool_choice: a tool must be called, and tools has none", "tool_choice")
    return ToolChoice(MODES[kind], names, not choice.flag("disable_parallel_tool_use"))


# ---- the rest -----------------------------------------------------------------------------------------------


def _thinking(fields: Fields, config: Fields) -> Thinking:
    """Return how the model thinks. Without a word of the client it thinks in its own way."""
    effort = config.choice("effort", of=EFFORTS)
    thinking = fields.inner("thinking")
    if thinking is None:
        return Thinking(effort)
    kind = thinking.choice("type", of=("enabled", "adaptive", "disabled", "between_tools"), default="adaptive")
    if kind == "disabled":
        return Thinking("none")
    if kind == "enabled":
        budget = thinking.integer("budget_tokens", low=0)
        return Thinking(effort or "medium", -1 if budget is None else budget)
    return Thinking(effort)


def _format(fields: Fields, config: Fields) -> AnswerFormat:
    """Return the form of the answer, which a beta had as ``output_format``."""
    form = config.inner("format") or fields.inner("output_format")
    if form is None:
        return AnswerFormat()
    form.choice("type", of=("json_schema",))
    schema = form.object("schema")
    if schema is None:
        raise BadRequest(f"{form.at('schema')} is missing", form.at("schema"), "missing_field")
    return AnswerFormat("json_schema", schema)


def _stop(fields: Fields) -> tuple[str, ...]:
    stop = fields.texts("stop_sequences", most=16)
    if "" in stop:
        raise BadRequest("stop_sequences: a stop sequence must not be empty", "stop_sequences")
    return stop


def _affinity(fields: Fields, headers: Mapping[str, str]) -> str:
    """Return the client's session, by the header of Claude Code or by the session in its user id."""
    metadata = fields.inner("metadata")
    user = metadata.text("user_id") if metadata else ""
    try:
        session = json.loads(user).get("session_id") if user.startswith("{") else user
    except (ValueError, RecursionError):
        session = user
    return (headers.get("x-claude-code-session-id") or str(session or ""))[:200]


__all__ = ["MessagesRequest", "read"]
