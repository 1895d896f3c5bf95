"""Requests of OpenAI's Responses API, read into an Ask. Pure: no model, no HTTP."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import options
from .ask import AnswerFormat, Ask, Thinking, Tool, ToolChoice
from .errors import BadRequest, HttpError, Unsupported
from .responses_input import API, items_of, kind_of, messages_of
from .wire import Fields, log_once

Json = dict[str, Any]

#: Fields that change nothing here.
ACCEPTED = (
    *("access_programs", "background_options", "context_management", "image", "moderation", "service_tier"),
    *("client_metadata", "prompt_cache_options", "prompt_cache_retention", "stream_options"),
)
LOGPROBS = "message.output_text.logprobs"


@dataclass(frozen=True)
class ResponsesRequest:
    """What a client asks for.

    - ``about``: the fields of the response that repeat the request.
    - ``items``: the whole conversation, ``inputs`` what this request adds to it.
    - ``summary``: reasoning is to be written as a summary.
    """

    ask: Ask
    about: Json
    items: list[Json]
    inputs: list[Json]
    stream: bool = False
    store: bool = True
    summary: bool = False

    @property
    def tools(self) -> dict[str, Tool]:
        """Tools by the name that the model sees."""
        return {tool.seen: tool for tool in self.ask.tools}


#: Gives the conversation of a stored response, by its id.
Conversation = Callable[[str], list[Json]]
#: Gives an item of a stored response, by its id; None for one that is not stored.
StoredItem = Callable[[str], Json | None]


def read(
    body: Mapping[str, Any], headers: Mapping[str, str], conversation: Conversation, stored_item: StoredItem
) -> ResponsesRequest:
    """Read a request. ``headers`` have small letters. Raises BadRequest, which names the field."""
    fields = Fields(body)
    _refuse(fields)
    previous = fields.text("previous_response_id")
    inputs = [_resolved(item, at, stored_item) for at, item in enumerate(items_of(fields.given("input")))]
    items = [*(conversation(previous) if previous else ()), *inputs]
    messages = [*_instructions(fields), *messages_of(items)]
    if not messages:
        raise BadRequest("input must have at least one item", "input", "missing_required_parameter")
    tools = _tools(fields)
    parallel = fields.flag("parallel_tool_calls", default=True)
    reasoning, text = fields.inner("reasoning") or Fields({}), fields.inner("text") or Fields({})
    summary = reasoning.choice("summary", "generate_summary", of=("auto", "concise", "detailed", "none"))
    top = fields.integer("top_logprobs", low=0, high=20)
    wants_logprobs = bool(top) or LOGPROBS in fields.texts("include")
    ask = Ask(
        model=fields.text("model"),
        messages=messages,
        tools=tuple(tools.values()),
        choice=_choice(fields, tools, parallel),
        format=_format(text),
        thinking=Thinking(reasoning.text("effort")),
        sampling=options.sampling(fields),
        max_tokens=fields.integer("max_output_tokens", low=1),
        stop=options.stop(fields),
        logprobs=(top or 0) if wants_logprobs else None,
        variables=fields.object("chat_template_kwargs") or {},
        affinity=_affinity(fields, headers),
        deadline=options.deadline(fields),
        keep_alive=options.keep_alive(fields),
    )
    request = ResponsesRequest(
        ask,
        _about(fields, ask, text, summary),
        items,
        inputs,
        fields.flag("stream"),
        fields.flag("store", default=True),
        summary not in ("", "none"),
    )
    log_once(API, fields.unknown())
    return request


def _refuse(fields: Fields) -> None:
    """Raise Unsupported for what would change the answer and is not done here."""
    if fields.flag("background"):
        raise Unsupported("background", "background: responses are only made while the client waits; set it to false")
    if fields.choice("truncation", of=("auto", "disabled")) == "auto":
        raise Unsupported("truncation", 'truncation: the input is never cut; set it to "disabled"')
    for name in ("conversation", "prompt"):
        if fields.given(name) is not None:
            raise Unsupported(name)
    fields.skip(*ACCEPTED)


def _instructions(fields: Fields) -> list[Json]:
    value = fields.given("instructions")
    if isinstance(value, list):  # items, as a prompt template makes them
        return messages_of(items_of(value))
    return [{"role": "system", "content": fields.text("instructions")}] if value else []


def _resolved(item: Json, at: int, stored_item: StoredItem) -> Json:
    """Return an item, for a reference the one that it names."""
    if kind_of(item) != "item_reference":
        return item
    found = stored_item(str(item.get("id")))
    if found is None:
        words = f"input[{at}]: there is no stored item {str(item.get('id'))!r:.80}; send the item itself"
        raise HttpError("not_found", words, param=f"input[{at}].id", code="item_not_found")
    return found


# ---- tools --------------------------------------------------------------------------------------------------


def _tools(fields: Fields) -> dict[str, Tool]:
    """Return the tools by the name that the model sees. Those of OpenAI's servers are left out."""
    tools: dict[str, Tool] = {}
    for at, value in enumerate(fields.items("tools") or ()):
        for tool in _flat(Fields.of(value, f"tools[{at}]")):
            if tool.seen in tools:
                raise BadRequest(f"tools[{at}]: two tools have the name {tool.seen!r:.80}", f"tools[{at}].name")
            tools[tool.seen] = tool
    return tools


def _flat(fields: Fields, space: str = "") -> Iterator[Tool]:
    """Yield the tools of an entry: a namespace has several."""
    kind = fields.text("type")
    if kind == "namespace" and not space:
        name = _name(fields)
        for at, inner in enumerate(fields.items("tools") or ()):
            yield from _flat(Fields.of(inner, f"{fields.at('tools')}[{at}]"), name)
    elif kind == "function":
        function = fields.inner("function") or fields  # the chat API's form, which some clients send
        schema = function.object("parameters") or {"type": "object", "properties": {}}
        yield Tool(_name(function), function.text("description"), schema, function.flag("strict"), space)
    elif kind == "custom":
        schema = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}
        yield Tool(_name(fields), _free_description(fields), schema, False, space, free=True)
    else:
        log_once(API, [kind], "is a tool of OpenAI's servers, which is left out here")


def _name(fields: Fields) -> str:
    name = fields.text("name")
    if not name:
        raise BadRequest(f"{fields.at('name')} is missing", fields.at("name"), "missing_required_parameter")
    return name


def _free_description(fields: Fields) -> str:
    """Return the description of a tool that takes a text, with the grammar that the text is meant to follow."""
    form = fields.inner("format")
    grammar = form.text("definition") if form else ""
    told = f"The input follows this grammar:\n{grammar}" if grammar else ""
    return "\n\n".join(part for part in (fields.text("description"), told) if part)


def _choice(fields: Fields, tools: Mapping[str, Tool], parallel: bool) -> ToolChoice:
    value = fields.given("tool_choice")
    if value is None or isinstance(value, str):
        mode = fields.choice("tool_choice", of=("auto", "none", "required"), default="auto")
        if mode == "required" and not tools:
            raise BadRequest("tool_choice: a tool must be called, and tools has none", "tool_choice")
        return ToolChoice("required" if mode == "required" else "none" if mode == "none" else "auto", (), parallel)
    choice = Fields.of(value, "tool_choice")
    kind = choice.text("type")
    if kind in ("function", "custom"):
        return ToolChoice("required", tuple(_named(choice, tools)), parallel)
    if kind == "allowed_tools":
        mode = choice.choice("mode", of=("auto", "required"), default="auto")
        names = _allowed(choice, tools)
        return ToolChoice("required" if mode == "required" else "auto", tuple(names), parallel)
    raise Unsupported("tool_choice", f"tool_choice: {kind!r:.60} is no tool of this server")


def _named(choice: Fields, tools: Mapping[str, Tool]) -> list[str]:
    """Return the names, as the model sees them, of the tool that a choice names."""
    inner = choice.inner("function") or choice
    name, space = _name(inner), inner.text("namespace")
    found = [tool.seen for tool in tools.values() if name in (tool.seen, tool.name) and space in ("", tool.space)]
    if not found:
        raise BadRequest(f"{inner.at('name')}: there is no tool {name!r:.80} in tools", inner.at("name"))
    return found


def _allowed(choice: Fields, tools: Mapping[str, Tool]) -> list[str]:
    names = []
    for at, value in enumerate(choice.items("tools") or ()):
        one = Fields.of(value, f"tool_choice.tools[{at}]")
        if one.text("type") in ("function", "custom"):
            names += _named(one, tools)
    if not names:
        raise BadRequest("tool_choice.tools names no tool of this server", "tool_choice.tools")
    return names


# ---- the rest -----------------------------------------------------------------------------------------------


def _format(text: Fields) -> AnswerFormat:
    form = text.inner("format")
    kind = form.choice("type", of=("text", "json_object", "json_schema"), default="text") if form else "text"
    if form is None or kind == "text":
        return AnswerFormat()
    if kind == "json_object":
        return AnswerFormat("json_object")
    schema = form.object("schema")
    if schema is None:
        raise BadRequest("text.format.schema is missing", "text.format.schema", "missing_required_parameter")
    return AnswerFormat("json_schema", schema, form.flag("strict", default=True))


def _affinity(fields: Fields, headers: Mapping[str, str]) -> str:
    key = fields.text("prompt_cache_key")
    return (key or next((headers[name] for name in options.SESSION_HEADERS if headers.get(name)), ""))[:256]


def _about(fields: Fields, ask: Ask, text: Fields, summary: str) -> Json:
    """Return the fields of a response that repeat the request."""
    reasoning = {"effort": ask.thinking.effort or None, "summary": summary or None}
    shown = {"format": text.object("format") or {"type": "text"}, "verbosity": text.text("verbosity") or "medium"}
    return {
        "background": False,
        "instructions": fields.given("instructions"),
        "max_output_tokens": ask.max_tokens,
        "max_tool_calls": fields.integer("max_tool_calls"),
        "metadata": fields.object("metadata") or {},
        "model": ask.model,
        "parallel_tool_calls": ask.choice.parallel,
        "previous_response_id": fields.text("previous_response_id") or None,
        "prompt_cache_key": fields.text("prompt_cache_key") or None,
        "reasoning": reasoning,
        "safety_identifier": fields.text("safety_identifier") or None,
        "service_tier": "default",
        "store": fields.flag("store", default=True),
        "text": shown,
        "tool_choice": fields.given("tool_choice") or "auto",
        "tools": [_echo(tool) for tool in fields.items("tools") or ()],
        "top_logprobs": ask.logprobs or 0,
        "truncation": "disabled",
        "user": fields.text("user") or None,
    }


def _echo(tool: Sequence[Any] | Json) -> Any:
    """Return a tool as a response shows it: a function has all its fields."""
    if isinstance(tool, dict) and tool.get("type") == "function":
        return {"description": None, "parameters": None, "strict": None, **tool}
    return tool


__all__ = ["ResponsesRequest", "read"]
