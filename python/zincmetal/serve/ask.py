"""Request for an answer in one form, which all APIs turn theirs into. Plain data: no HTTP, no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Json = dict[str, Any]


@dataclass(frozen=True)
class Tool:
    """Function that the model may call. ``schema`` is the JSON schema of its arguments, an object.

    ``strict`` is as the client said it; arguments follow the schema in any case. ``space`` is the namespace of
    OpenAI's Responses API, "" for none: the model then sees ``space.name``. ``free`` marks a tool that takes a text in
    place of JSON (Responses' "custom"): the model sees a single string, ``input``. A tool that is not ``listed`` may be
    called, but stands in a message and not among the prompt's tools.
    """

    name: str
    description: str = ""
    schema: Json = field(default_factory=dict)
    strict: bool = False
    space: str = ""
    free: bool = False
    listed: bool = True

    @property
    def seen(self) -> str:
        """Name that the model sees."""
        return f"{self.space}.{self.name}" if self.space else self.name


@dataclass(frozen=True)
class ToolChoice:
    """Which tools may or must be called. ``names``: of these only, () for all."""

    mode: Literal["auto", "none", "required"] = "auto"
    names: tuple[str, ...] = ()
    parallel: bool = True


@dataclass(frozen=True)
class AnswerFormat:
    """Form of the answer's text. ``value`` is a JSON schema, a regular expression, a grammar or the choices."""

    kind: Literal["text", "json_object", "json_schema", "regex", "lark", "gbnf", "grammar", "choice"] = "text"
    value: Any = None
    strict: bool = True


@dataclass(frozen=True)
class Thinking:
    """How a model thinks before it answers.

    ``effort``: "none", "minimal", "low", "medium", "high", … or "" for the model's own way. ``budget``: the most
    tokens of it, -1 for no bound. ``split``: False leaves the reasoning, as the model wrote it, in the text.
    """

    effort: str = ""
    budget: int = -1
    split: bool = True


@dataclass(frozen=True)
class Ask:
    """What a client asks for.

    - ``model``: the name of a model, as the client wrote it.
    - ``messages``: a conversation in the form of OpenAI's chat API, as the client sent it: before canonicalisation.
      A reasoning of an earlier answer is ``reasoning_content``.
    - ``prompt``: a text or token ids in place of messages: no chat template, no tools, no reasoning. ``suffix``: the
      text behind the gap that the answer fills, "" for none.
    - ``sampling``: fields of ``SamplingParams``. Fields that are missing have the model's defaults.
    - ``max_tokens``: the most tokens of the answer, None: until the context is full.
    - ``logprobs``: None, or how many others beside each token, 0 to 20.
    - ``variables``: more variables of the chat template.
    - ``affinity``: a name of the client's session, "" if it gave none.
    - ``deadline``: seconds to the end.
    - ``keep_alive``: seconds that the model stays loaded after the request, see ``Models.lease``.
    """

    model: str
    messages: Sequence[Json] = ()
    prompt: str | Sequence[int] | None = None
    suffix: str = ""
    tools: Sequence[Tool] = ()
    choice: ToolChoice = ToolChoice()
    format: AnswerFormat = AnswerFormat()
    thinking: Thinking = Thinking()
    sampling: Mapping[str, Any] = field(default_factory=dict)
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    n: int = 1
    logprobs: int | None = None
    continue_final: bool = False
    variables: Mapping[str, Any] = field(default_factory=dict)
    affinity: str = ""
    deadline: float | None = None
    keep_alive: float | None = None
