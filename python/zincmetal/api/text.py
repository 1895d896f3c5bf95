"""Text side of a model file: tokenizer, chat template, advised sampling. A model and its forks share one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from .. import arguments, gguf
from ..engine.engine import CLOSED
from ..errors import TokenizerError, UsageError
from ..sampling.defaults import chat_defaults
from ..text.chat.messages import checked_list
from .generation import SAMPLING, refuse_unknown

if TYPE_CHECKING:
    from ..text.chat.template import ChatTemplate
    from ..text.tokenizer import Tokenizer

# Keywords of chat that a template must read. For each: the name of the template that a file may have for it.
ASKED = {"tools": "tool_use", "documents": "rag"}
CHAT_OPTIONS = (
    *ASKED,
    "add_generation_prompt",
    "continue_final_message",
    "hide_special",
    "max_tokens",
    "stop",
    "progress",
)

T = TypeVar("T")


class AtFirstUse(Generic[T]):
    """An attribute that is made at its first use, and kept.

    ``functools.cached_property`` before Python 3.12 holds one lock for all models meanwhile. A fork, or an interrupt
    at the wrong moment, would leave that lock held for good. Two threads at once may make the attribute twice.
    """

    def __init__(self, make: Callable[[Any], T]) -> None:
        self._make, self._name = make, make.__name__
        self.__doc__ = make.__doc__

    def __get__(self, instance: Any, owner: type | None = None) -> T:
        value: T = self._make(instance)
        instance.__dict__[self._name] = value
        return value


class ModelText:
    """Converts text to ids and back, by the file's metadata. Each member is built at its first use."""

    def __init__(self, file: gguf.File) -> None:
        self._file = file

    @AtFirstUse
    def tokenizer(self) -> Tokenizer:
        """Tokenizer of the file. Raises TokenizerError if it has none that can be used."""
        from ..text.tokenizer import Tokenizer

        with self._reading():
            return Tokenizer.from_metadata(self._file.metadata)

    @AtFirstUse
    def id_tokenizer(self) -> Tokenizer:
        """Tokenizer of the file. If the file has none, a tokenizer that only knows the ids that end a text."""
        from ..text.tokenizer import Tokenizer

        try:
            return self.tokenizer
        except TokenizerError:
            with self._reading():
                return Tokenizer.for_ids(self._file.metadata)

    @AtFirstUse
    def chat_template(self) -> ChatTemplate:
        """Chat template of the file. Raises ChatTemplateError if it has none."""
        from ..text.chat.template import ChatTemplate

        with self._reading():
            return ChatTemplate.from_metadata(self._file.metadata, self.tokenizer)

    @AtFirstUse
    def chat_sampling(self) -> Mapping[str, Any]:
        """Return the sampling that the file, or its family's makers, advise for chat."""
        with self._reading():
            return dict(chat_defaults(self._file.metadata))

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Raise UsageError if close() of another thread takes the map away while metadata is read."""
        try:
            yield
        except ValueError:
            if not self._file.parts:
                raise UsageError(CLOSED) from None
            raise

    def prompt_ids(self, prompt: str | Sequence[int], parse_special: bool | None = False) -> list[int]:
        """Return the ids of a prompt, which is text or ids. Raises UsageError for anything else."""
        special = arguments.flag("parse_special", parse_special, False)
        if isinstance(prompt, str):
            return self.tokenizer.prompt(prompt, special)
        try:
            return arguments.token_ids(prompt)
        except UsageError as error:
            raise UsageError(f"a prompt is text or a sequence of token ids: {error}") from error.__cause__

    def chat_ids(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        documents: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool | None,
        continue_final_message: bool | None,
        variables: Mapping[str, Any],
    ) -> list[int]:
        """Make the ids of a conversation, by the chat template with these ``variables``.

        Raises UsageError for a variable that the template does not read.
        """
        opens = arguments.flag("add_generation_prompt", add_generation_prompt, True)
        continues = arguments.flag("continue_final_message", continue_final_message, False)
        asked = {"tools": tools, "documents": documents}
        self._check_read([name for name, value in asked.items() if checked_list(name, value)], variables)
        text = self.chat_template.prompt(
            messages,
            tools=tools,
            documents=documents,
            add_generation_prompt=opens,
            continue_final_message=continues,
            **variables,
        )
        return self.tokenizer.prompt(text, parse_special=True)

    def _check_read(self, asked: Sequence[str], keywords: Mapping[str, Any]) -> None:
        """Raise UsageError for a variable that the chat template does not read: it would change nothing."""
        if not asked and not keywords:
            return
        variables = self.chat_template.variables
        why = "is neither an option nor a variable of this model's chat template"
        refuse_unknown("chat", keywords, {*CHAT_OPTIONS, *SAMPLING, *variables}, why)
        for name in asked:
            if name not in variables and ASKED[name] not in self.chat_template.named:
                raise UsageError(f"chat: this model's chat template does not read {name}; describe them in a message")
