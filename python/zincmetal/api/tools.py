"""Tools of a chat: Python functions as JSON schemas, the calls in an answer, and the loop that carries them out."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .. import arguments
from ..errors import UsageError, quote
from ..sampling.constrain.budget import Budget
from ..sampling.constrain.compiler import installed
from ..text.tools.events import CallBegin, CallEnd, Reasoning, Text
from ..text.tools.format import Format, Wanted
from .generation import Asked
from .result import Call, Result
from .schema import Form, Json, Shape, Shapes, object_schema, read_fields, read_value

if TYPE_CHECKING:
    from .model import Model

TAIL = 64  # tokens of the prompt's end, which tell how the answer begins
MAX_ROUNDS = 8
MAX_RESULT = 100_000  # characters of a result that the model is told

Tool = Mapping[str, Any] | Callable[..., Any]


# ---- functions as tools --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Function:
    """Python function that a model may call. ``schema`` is that of its arguments."""

    name: str
    description: str
    schema: Json
    shapes: Mapping[str, Shape]
    function: Callable[..., Any]

    @classmethod
    def of(cls, function: Callable[..., Any]) -> Function:
        """Describe a function by its name, its annotations and its docstring. Raises UsageError."""
        name = getattr(function, "__name__", "")
        if not re.fullmatch(r"[a-zA-Z_][a-zA-Z0-9_]*", name):
            raise UsageError(f"a tool is a function with a name, not {quote(repr(function))}; write one with def")
        if inspect.iscoroutinefunction(function):
            raise UsageError(f"{name} is asynchronous, and chat waits for its tools: write a plain function")
        parameters = inspect.signature(function).parameters
        try:
            hints = typing.get_type_hints(function, include_extras=True)
        except Exception as error:
            raise UsageError(f"the annotations of {name} cannot be read: {error}") from error
        about, said = described(inspect.getdoc(function) or "")
        made, shapes, properties = Shapes(), dict[str, Shape](), {}
        for parameter in parameters.values():
            if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                raise UsageError(f"{name}: a model gives arguments by their names, so {parameter} is not possible")
            shapes[parameter.name] = shape = made.of(hints.get(parameter.name, Any))
            text = {"description": said[parameter.name]} if parameter.name in said else {}
            properties[parameter.name] = {**text, **shape.schema}
        required = [p.name for p in parameters.values() if p.default is p.empty]
        schema = object_schema(properties, required)
        return cls(name, about, {**schema, "$defs": made.defs} if made.defs else schema, shapes, function)

    @property
    def tool(self) -> Json:
        """The function in the form that chat templates take."""
        about = {"name": self.name, "description": self.description, "parameters": self.schema}
        return {"type": "function", "function": about}

    def call(self, arguments: Mapping[str, Any]) -> Any:
        """Call it. Raises ValueError for arguments that do not follow its schema, and what the function raises."""
        return self.function(**read_fields(self.shapes, self.schema["required"], dict(arguments)))


def described(text: str) -> tuple[str, dict[str, str]]:
    """Split a docstring: what a function does, and what is said of its arguments, in Google's form or Sphinx'."""
    said = {name: " ".join(rest.split()) for name, rest in _SPHINX.findall(text)}
    about = _SPHINX.split(text)[0] if said else text
    section = _GOOGLE.search(about)
    if section:
        said |= {name: " ".join(rest.split()) for name, rest in _ARGUMENT.findall(section["body"])}
        about = about[: section.start()] + about[section.end() :]
    about = re.split(r"^(?:Returns|Raises|Yields|Examples?):\s*$", about, maxsplit=1, flags=re.MULTILINE)[0]
    return about.strip(), said


_GOOGLE = re.compile(r"^(?:Args|Arguments|Parameters):[ \t]*\n(?P<body>(?:[ \t]+.*\n?|[ \t]*\n)*)", re.MULTILINE)
_ARGUMENT = re.compile(r"^ {1,4}(\w+)(?: \([^)]*\))?:[ \t]*(.*(?:\n {5,}.*)*)", re.MULTILINE)
_SPHINX = re.compile(r"^:param(?: \w+)? (\w+):[ \t]*(.*(?:\n[ \t]+.*)*)\n?", re.MULTILINE)


class Tools:
    """Tools of a chat: functions, and schemas of tools that the caller carries out."""

    def __init__(self, tools: Sequence[Tool] | None) -> None:
        given = list(tools) if isinstance(tools, (list, tuple)) else []
        made = [Function.of(tool) if callable(tool) else None for tool in given]
        self.functions = {one.name: one for one in made if one}
        offered = [one.tool if one else tool for one, tool in zip(made, given, strict=True)]
        self.shown: Any = offered or tools  #: in the form that chat templates take, or what was given in its place
        named = [found for tool in offered if (found := _named(tool))]
        self.schemas: dict[str, Json] = dict(named)
        if self.functions and len(self.schemas) < len(named):
            raise UsageError("two tools have one name; rename one of them")

    def mode(self, choice: str | None) -> tuple[str, dict[str, Json]]:
        """Return the mode of calls, and the tools that may be called, for a ``tool_choice``."""
        if choice is None or choice in ("auto", "none", "required"):
            return choice or "auto", self.schemas
        if choice not in self.schemas:
            raise UsageError(f"tool_choice is auto, none, required or the name of a tool, not {quote(choice)}")
        return "required", {choice: self.schemas[choice]}


def _named(tool: Any) -> tuple[str, Json] | None:
    """Return the name of a tool and the schema of its arguments, None if it is of another form."""
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        return None
    schema = function.get("parameters")
    return function["name"], dict(schema) if isinstance(schema, Mapping) else {}


# ---- answers -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """How an answer of a chat is read: its format, the tools, the end of its prompt, and the form of its text."""

    format: Format
    tools: Tools
    tail: str
    form: Form | None = None

    def __call__(self, result: Result) -> Result:
        """Complete a result by its calls and its value."""
        text, _, calls = self.split(result.text)
        complete = result.finish_reason == "stop" and not calls
        parsed = read_value(self.form, text, complete) if self.form and (complete or not calls) else None
        return replace(result, calls=tuple(calls), parsed=parsed)

    def held(self, asked: Asked, choice: str | None, budget: int | None) -> Asked:
        """Return the arguments of a generation that is held to what is wanted of the answer.

        Without llguidance nothing holds a call that the model may begin or not.
        """
        mode, schemas = self.tools.mode(choice)
        wanted = Wanted(schemas, mode if schemas else "none", body=self.form.grammar if self.form else None)
        grammar = None
        if self.form or mode == "required" or (schemas and self.tools.functions and installed()):
            grammar = self.format.grammar(wanted, self.tail)
        if mode == "required" and grammar is None:
            raise UsageError("this model's chat template shows no form of calls, so that none can be required")
        limit = -1 if budget is None else arguments.integer("reasoning_budget", budget, -1)
        return replace(asked, grammar=grammar, reasoning=budget_of(self.format, self.tail, limit))

    def split(self, answer: str) -> tuple[str, str, list[Call]]:
        """Return the text of an answer, its reasoning, and its calls."""
        parser = self.format.parser(self.tools.schemas, self.tail)
        text, reasoning = list[str](), list[str]()
        names, calls = dict[int, str](), list[Call]()
        for event in (*parser.push(answer), *parser.finish()):
            if isinstance(event, Text):
                text.append(event.text)
            elif isinstance(event, Reasoning):
                reasoning.append(event.text)
            elif isinstance(event, CallBegin):
                names[event.call] = event.name
            elif isinstance(event, CallEnd):
                calls.append(Call(names[event.call], json.loads(event.arguments)))
        return "".join(text), "".join(reasoning), calls


def budget_of(form: Format, tail: str, tokens: int) -> Budget | None:
    """Return the budget of reasoning of a format, None for answers without reasoning or without a bound."""
    if tokens < 0 or not form.reasons:
        return None
    if form.shape.harmony:
        return Budget(tokens, "<|end|>", begin="<|channel|>analysis<|message|>")
    return Budget(tokens, form.shape.think_end[0], begin="" if form.thinks(tail) else form.shape.think[0])


# ---- the loop ------------------------------------------------------------------------------------------------------


def converse(
    model: Model, messages: Sequence[Mapping[str, Any]], tools: Tools, max_rounds: int, options: Mapping[str, Any]
) -> Result:
    """Answer messages, and carry out the calls of functions until an answer has none.

    It ends too at a call of a tool that is no function, which the caller carries out, and after ``max_rounds`` rounds
    of calls.
    """
    conversation, done = [dict(message) for message in messages], list[Call]()
    choice = options.get("tool_choice")
    for made in range(max_rounds + 1):
        now = {**options, "tools": tools.shown, "tool_choice": choice}
        with model.submit_chat(conversation, **now) as running:
            result = running.result()
            reading = running.complete
        assert isinstance(reading, Reading)
        text, reasoning, calls = reading.split(result.text)
        conversation.append(_answer(text, reasoning, calls, len(done)))
        carried = calls and all(call.name in tools.functions for call in calls)
        if not carried or made == max_rounds:
            ended = "max_rounds" if carried else result.finish_reason
            done += calls
            return replace(result, text=text, finish_reason=ended, calls=tuple(done), messages=tuple(conversation))
        for call in calls:
            ran = carried_out(tools.functions[call.name], call)
            conversation.append(_told(ran, _call_id(len(done))))
            done.append(ran)
        choice = choice if choice in (None, "auto", "none") else "auto"  # a call that was required has been made
    raise AssertionError("the last round returns")


def carried_out(function: Function, call: Call) -> Call:
    """Carry out a call. An error of the arguments or of the function, or a value without JSON, is the result."""
    try:
        made = call._replace(result=function.call(call.arguments))
        as_text(made.result)
        return made
    except Exception as error:
        return call._replace(error=f"{type(error).__name__}: {error}")


def _answer(text: str, reasoning: str, calls: Iterable[Call], first: int) -> Json:
    """Return the message of an answer."""
    message: Json = {"role": "assistant", "content": text}
    if reasoning:
        message["reasoning_content"] = reasoning
    made = [
        {
            "id": _call_id(first + i),
            "type": "function",
            "function": {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)},
        }
        for i, call in enumerate(calls)
    ]
    return {**message, "tool_calls": made} if made else message


def _told(call: Call, id: str) -> Json:
    """Return the message that tells the result of a call."""
    content = f"error: {call.error}" if call.error else as_text(call.result)
    return {"role": "tool", "tool_call_id": id, "name": call.name, "content": content[:MAX_RESULT]}


def _call_id(number: int) -> str:
    return f"call{number:05d}"  # nine letters and digits, as some templates demand


def as_text(value: Any) -> str:
    """Write a result of a function for the model: a text as it is, anything else as JSON."""
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=_plain)


def _plain(value: Any) -> Any:
    """Return something that JSON has for an object that it has not."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    return list(value) if isinstance(value, (set, frozenset, tuple)) else str(value)
