"""Requests of OpenAI's chat API: their messages and tools, read from a body."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from starlette.requests import Request

from ..errors import abbreviate
from . import options
from .ask import AnswerFormat, Ask, Tool, ToolChoice
from .errors import BadRequest, Unsupported
from .serving import Limits
from .wire import Fields, Json, log_once

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
TEXT_PARTS = ("text", "input_text", "output_text", "refusal", "thinking", "reasoning")
MOST_LOGPROBS = 20
LONGEST_NAME = 256
EMPTY_SCHEMA: Json = {"type": "object", "properties": {}}


@dataclass(frozen=True)
class ChatRequest:
    """Request for an answer, and how it is to be written."""

    ask: Ask
    stream: bool = False
    usage: bool = False  # a last chunk with it
    progress: bool = False
    timings: bool = False  # in every chunk


def chat_request(request: Request, body: Json, limits: Limits) -> ChatRequest:
    """Read a body. Raises BadRequest that names the field which is wrong."""
    fields = Fields(body)
    options.refuse_unsupported(fields)
    thinking, variables = options.thinking(fields)
    tools = read_tools(fields)
    messages = read_messages(fields)
    ask = Ask(
        model=fields.text("model"),
        messages=messages,
        tools=tools,
        choice=read_choice(fields, tools),
        format=options.answer_format(fields),
        thinking=thinking,
        sampling=options.sampling(fields),
        max_tokens=options.max_tokens(fields),
        stop=options.stop(fields),
        n=fields.integer("n", "n_cmpl", low=1, high=limits.choices) or 1,
        logprobs=_logprobs(fields),
        continue_final=_continues(fields, messages),
        variables=variables,
        affinity=options.affinity(request, fields),
        deadline=options.deadline(fields),
        keep_alive=options.keep_alive(fields),
    )
    if ask.format != AnswerFormat() and ask.choice.mode == "required" and tools:
        raise BadRequest("response_format and a tool call cannot both be required", "tool_choice")
    streamed = fields.inner("stream_options")
    read = ChatRequest(
        ask,
        fields.flag("stream"),
        streamed is not None and streamed.flag("include_usage"),
        fields.flag("return_progress"),
        fields.flag("timings_per_token"),
    )
    log_once("chat/completions", fields.unknown())
    return read


def _logprobs(fields: Fields) -> int | None:
    """Read ``logprobs``, which llama-server's clients also give as a number, and ``top_logprobs``."""
    top = fields.integer("top_logprobs", low=0, high=MOST_LOGPROBS)
    value = fields.given("logprobs")
    if type(value) is int:
        return fields.integer("logprobs", low=0, high=MOST_LOGPROBS)
    if not fields.flag("logprobs"):
        if top:
            raise BadRequest("top_logprobs needs logprobs: true", "top_logprobs")
        return None
    return top or 0


def _continues(fields: Fields, messages: list[Json]) -> bool:
    """Read whether the last message, an assistant's, is the beginning of the answer."""
    continues = fields.flag("continue_final_message")
    opens = fields.flag("add_generation_prompt", default=not continues)
    if continues and opens:
        raise BadRequest("continue_final_message needs add_generation_prompt: false", "continue_final_message")
    if opens:
        return False
    if messages[-1]["role"] != "assistant":
        field = "continue_final_message" if continues else "add_generation_prompt"
        raise BadRequest(f"{field}: the last message must be the assistant's", field)
    return True


# ---- messages ---------------------------------------------------------------------------------------------------


def read_messages(fields: Fields) -> list[Json]:
    """Read the messages. Their parts must be text; nothing else changes here."""
    found = fields.items("messages")
    if not found:
        raise BadRequest("messages must have at least one message", "messages", "missing_required_parameter")
    for i, message in enumerate(found):
        _check_message(Fields.of(message, f"messages[{i}]"))
    return found


def _check_message(message: Fields) -> None:
    role = message.choice("role", of=ROLES)
    if not role:
        path = message.at("role")
        raise BadRequest(f"{path} is missing", path, "missing_required_parameter")
    content, path = message.given("content"), message.at("content")
    if isinstance(content, list):
        for i, part in enumerate(content):
            _check_part(part, f"{path}[{i}]")
    elif content is not None and not isinstance(content, str):
        raise BadRequest(f"{path} must be a string or a list of parts, not {abbreviate(content)}", path, "invalid_type")
    calls = message.items("tool_calls") or []
    for i, call in enumerate(calls):
        _check_call(Fields.of(call, f"{message.at('tool_calls')}[{i}]"))
    for name in ("reasoning_content", "reasoning_text", "name", "tool_call_id"):
        message.text(name)
    if content is None and role not in ("assistant",):
        raise BadRequest(f"{path} is missing", path, "missing_required_parameter")


def _check_part(part: Any, path: str) -> None:
    if isinstance(part, str):
        return
    fields = Fields.of(part, path)
    kind = fields.text("type", default="text")
    if kind not in TEXT_PARTS:
        where = fields.at("type")
        raise Unsupported(
            where, f"{where}: parts of the type {abbreviate(kind)} are not supported; send text", "unsupported_content"
        )
    name = next((n for n in ("text", "refusal", "thinking", "reasoning") if fields.given(n) is not None), "text")
    if not isinstance(fields.given(name), str):
        where = fields.at(name)
        raise BadRequest(f"{where} must be a string", where, "invalid_type")


def _check_call(call: Fields) -> None:
    inner = call.inner("function") or call.inner("custom")
    if inner is None or not inner.text("name"):
        path = call.at("function")
        raise BadRequest(f"{path} must have the name of a function", path, "missing_required_parameter")
    arguments = inner.given("arguments", "input")
    if arguments is not None and not isinstance(arguments, (str, dict)):
        path = inner.at("arguments")
        raise BadRequest(f"{path} must be a JSON text or an object", path, "invalid_type")


# ---- tools ------------------------------------------------------------------------------------------------------


def read_tools(fields: Fields) -> tuple[Tool, ...]:
    """Read the functions that the model may call."""
    tools = tuple(_tool(Fields.of(tool, f"tools[{i}]")) for i, tool in enumerate(fields.items("tools") or []))
    seen: set[str] = set()
    for i, tool in enumerate(tools):
        if tool.name in seen:
            raise BadRequest(f"tools[{i}]: there are two tools of the name {abbreviate(tool.name)}", f"tools[{i}]")
        seen.add(tool.name)
    return tools


def _tool(fields: Fields) -> Tool:
    kind = fields.choice("type", of=("function", "custom"), default="function")
    inner = fields.inner(kind) or fields
    name = inner.text("name")
    if not name or len(name) > LONGEST_NAME:
        path = inner.at("name")
        raise BadRequest(f"{path} must be a name of 1 to {LONGEST_NAME} characters", path)
    if kind == "custom":
        form = inner.object("format") or {}
        if form.get("type", "text") != "text":
            raise Unsupported(inner.at("format"), f"{inner.at('format')}: only free text is supported")
        schema: Json = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}
        return Tool(name, inner.text("description"), schema, free=True)
    schema = inner.object("parameters") or EMPTY_SCHEMA
    return Tool(name, inner.text("description"), schema, inner.flag("strict"))


def read_choice(fields: Fields, tools: tuple[Tool, ...]) -> ToolChoice:
    """Read which tools may or must be called."""
    parallel, value = fields.flag("parallel_tool_calls", default=True), fields.given("tool_choice")
    if value is None:
        return ToolChoice("auto" if tools else "none", (), parallel)
    if isinstance(value, str):
        mode = fields.choice("tool_choice", of=("auto", "none", "required", "any"))
        mode = "required" if mode == "any" else mode
        return _checked(ToolChoice(_mode(mode), (), parallel), tools)
    choice = Fields.of(value, "tool_choice")
    kind = choice.choice(
        "type", of=("function", "custom", "allowed_tools", "auto", "none", "required"), default="function"
    )
    if kind in ("auto", "none", "required"):
        return _checked(ToolChoice(_mode(kind), (), parallel), tools)
    if kind != "allowed_tools":
        name = (choice.inner(kind) or choice).text("name")
        return _checked(ToolChoice("required", (name,), parallel), tools)
    allowed = choice.inner("allowed_tools") or choice
    mode = allowed.choice("mode", of=("auto", "required"), default="auto")
    items = [Fields.of(t, f"{allowed.at('tools')}[{i}]") for i, t in enumerate(allowed.items("tools") or [])]
    names = tuple((t.inner("function") or t.inner("custom") or t).text("name") for t in items)
    if not names:
        raise BadRequest(f"{allowed.at('tools')} must name at least one tool", allowed.at("tools"))
    return _checked(ToolChoice(_mode(mode), names, parallel), tools)


def _mode(mode: str) -> Any:
    return mode


def _checked(choice: ToolChoice, tools: tuple[Tool, ...]) -> ToolChoice:
    known = {tool.name for tool in tools}
    for name in choice.names:
        if name not in known:
            raise BadRequest(f"tool_choice: there is no tool {abbreviate(name)} in tools", "tool_choice")
    if choice.mode == "required" and not tools:
        raise BadRequest("tool_choice: a call is required, and there are no tools", "tool_choice")
    return choice
