"""Makes the prompt of a request, so that it begins as the conversation's last one did.

In this order: the reasoning that the client dropped comes back (``echo.py``), messages take their canonical form, the
template gets the variables for reasoning and the day of the conversation, and known answers keep their tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from ..api.text import ModelText
from ..engine.prefix_cache import Mark
from ..text.chat.canonical import canonical, described
from ..text.chat.capabilities import thinking_variables
from ..text.tokenizer import NO_INFILL
from .ask import Ask, Json, Tool
from .echo import Beginnings, Echo
from .errors import BadRequest, Unsupported

CHAT_KWARGS = "chat_template_kwargs"  # as clients name the variables of a template
RESERVED = frozenset({"self", "messages", "tools", "add_generation_prompt", "continue_final_message", "now"})
_log = logging.getLogger("zincmetal.serve")


class Memory:
    """What the server remembers of a model's conversations."""

    def __init__(self) -> None:
        self.echo, self.beginnings = Echo(), Beginnings()
        self.warned = False  # that reasoning cannot be controlled


_memories: WeakKeyDictionary[ModelText, Memory] = WeakKeyDictionary()


def memory_of(text: ModelText) -> Memory:
    """Return what is remembered of a model, by its text side, which outlives its weights."""
    return _memories.setdefault(text, Memory())


@dataclass(frozen=True)
class Prompt:
    """Prompt of a request: its text, with the marks of the template, and its tokens.

    ``said`` are the messages of the client, restored. ``messages``, ``tools`` and ``variables`` are what the template
    got, and ``now`` is the time that it took for the present. All are empty for a prompt that no template made.
    """

    shown: str
    ids: list[int]
    said: Sequence[Mapping[str, Any]] = ()
    messages: Sequence[Json] = ()
    tools: Sequence[Json] | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    now: float | None = None

    def marks(self, text: ModelText) -> Mapping[int, Mark] | None:
        """Return where checkpoints of recurrent states are worth their memory."""
        if not self.messages:
            return None
        return text.chat_marks(self.ids, self.shown, self.messages, self.tools, self.variables, self.now)

    def remember(self, text: ModelText, made: Sequence[int], answer: Mapping[str, Any]) -> None:
        """Learn the answer at its end: the ids that were made, the end token among them, and the client's message."""
        if self.messages:
            memory_of(text).echo.remember(self.said, self.shown, self.ids, made, answer)


def prompt_of(ask: Ask, text: ModelText) -> Prompt:
    """Make the prompt of a request. Raises UsageError, ChatTemplateError and TokenizerError."""
    if ask.prompt is not None:
        ids = _checked_ids(ask.prompt, ask.suffix, text)
        return Prompt(ask.prompt if isinstance(ask.prompt, str) else text.tokenizer.decode(ids), ids)
    memory, can = memory_of(text), text.capabilities
    said = memory.echo.restored(ask.messages)
    tools = [_shown(tool) for tool in ask.tools if tool.listed] or None
    given = described(said, tools) if tools and not can.tools else said
    messages = canonical(given, can)
    variables = {**can.preserving, **_thinking(ask, text), **ask.variables}
    if wrong := RESERVED & variables.keys():
        raise BadRequest(f"chat_template_kwargs may not have {min(wrong)}: the request itself sets it", CHAT_KWARGS)
    now = memory.beginnings.of(ask.messages, ask.affinity) if can.dated else None
    tools = tools if can.tools else None
    shown = text.chat_template.prompt(
        messages,
        tools=tools,
        add_generation_prompt=not ask.continue_final,
        continue_final_message=ask.continue_final,
        now=now,
        **variables,
    )
    ids = memory.echo.ids(said, shown, text.tokenizer)
    return Prompt(shown, ids, said, messages, tools, variables, now)


def _checked_ids(prompt: str | Sequence[int], suffix: str, text: ModelText) -> list[int]:
    """Return the ids of a prompt without a template."""
    n_vocab = text.id_tokenizer.vocab_size
    if suffix and text.id_tokenizer.infill_ids is None:
        raise Unsupported("suffix", f"suffix: {NO_INFILL}")
    ids = text.id_tokenizer.infill(prompt, suffix) if suffix else text.prompt_ids(prompt)
    wrong = next((i for i, token in enumerate(ids) if not 0 <= token < n_vocab), None)
    if wrong is not None:
        raise BadRequest(f"prompt: token id {ids[wrong]} is outside the vocabulary of {n_vocab}", "prompt")
    if not ids:
        raise BadRequest("prompt has no tokens; send some text", "prompt")
    return ids


def _thinking(ask: Ask, text: ModelText) -> dict[str, Any]:
    """Return the variables for the reasoning that is asked for. Warns once about a template that has none."""
    said = ask.variables.get("enable_thinking")  # the name that most clients use, for whatever the template reads
    made = thinking_variables(text.capabilities, ask.thinking.effort, said if isinstance(said, bool) else None)
    memory = memory_of(text)
    if ask.thinking.effort and not made and not memory.warned:
        memory.warned = True
        _log.warning("this model's chat template has no variable for reasoning: its effort is the model's own")
    return made


def _shown(tool: Tool) -> Json:
    """Return a tool in the form that chat templates take."""
    schema = {key: value for key, value in tool.schema.items() if key != "$schema"}
    function = {"name": tool.seen, "description": tool.description, "parameters": schema}
    return {"type": "function", "function": function}
