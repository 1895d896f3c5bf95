"""Text side of a model file: tokenizer, chat template, advised sampling. A model and its forks share one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from .. import arguments, gguf
from ..engine.prefix_cache import Mark
from ..errors import CLOSED, TokenizerError, UsageError
from ..models import FAMILIES
from ..sampling.defaults import chat_defaults
from ..text.chat.messages import checked_list
from ..text.chat.turns import turn_starts
from ..text.tools.format import format_of
from .generation import SAMPLING, refuse_unknown

if TYPE_CHECKING:
    from ..engine.request import Mask
    from ..sampling.constrain.budget import Budget
    from ..sampling.constrain.grammar import Grammar
    from ..sampling.constrain.masks import Masks
    from ..sampling.constrain.vocabulary import Vocabulary
    from ..text.chat.capabilities import Capabilities
    from ..text.chat.next_turn import TokenEnds
    from ..text.chat.template import ChatTemplate
    from ..text.tokenizer import Tokenizer
    from .schema import Form
    from .tools import Reading, Tools

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
    "logprobs",
    "deadline",
    "schema",
    "regex",
    "choices",
    "grammar",
    "tool_choice",
    "reasoning_budget",
)

MARKED_TURNS = 4  # the last turns of a chat, whose beginnings are worth a checkpoint
NEAR = 32  # tokens before a mark in which another is not worth its memory

T = TypeVar("T")

_log = logging.getLogger("zincmetal.text")


class AtFirstUse(Generic[T]):
    """Attribute that is made at its first use, and kept.

    Before Python 3.12 ``functools.cached_property`` holds one lock for all models while it makes one. A fork, or an
    interrupt at the wrong moment, would leave that lock held for good. Two threads at once may make the attribute
    twice.
    """

    def __init__(self, make: Callable[[Any], T]) -> None:
        self._make, self._name = make, make.__name__
        self.__doc__ = make.__doc__

    def __get__(self, instance: Any, owner: type | None = None) -> T:
        value: T = self._make(instance)
        instance.__dict__[self._name] = value
        return value


class ModelText:
    """Converts text to ids and back, by the file's metadata. Each member is built at its first use.

    ``template_fix``: a chat template that drops earlier reasoning gets a switch to keep it, if one is known for it.
    """

    def __init__(self, file: gguf.File, template_fix: bool = False) -> None:
        self._file, self._template_fix = file, template_fix
        self._masks: dict[int, Masks] = {}

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
            if self._template_fix:
                from ..text.chat.template_fix import fixed

                if found := fixed(self._file.metadata, self.tokenizer):
                    return found
                _log.warning("the chat template stays as it is: no fix is known for what it drops, or it drops nothing")
            return ChatTemplate.from_metadata(self._file.metadata, self.tokenizer)

    @AtFirstUse
    def chats(self) -> bool:
        """Whether the file has a chat template."""
        from ..text.chat.template import has_template

        with self._reading():
            return has_template(self._file.metadata)

    @AtFirstUse
    def capabilities(self) -> Capabilities:
        """Find by trial what the chat template shows. It takes some tenths of a second."""
        from ..text.chat.capabilities import Capabilities

        return Capabilities.of(self.chat_template)

    @AtFirstUse
    def recurrent(self) -> bool:
        """Whether the model's family has recurrent states."""
        with self._reading():
            family = FAMILIES.get(str(self._file.metadata.get("general.architecture")))
        return family is not None and family.traits.hybrid

    @AtFirstUse
    def _token_ends(self) -> TokenEnds:
        from ..text.chat.next_turn import TokenEnds

        return TokenEnds(self.tokenizer)

    @AtFirstUse
    def chat_sampling(self) -> Mapping[str, Any]:
        """Return the sampling that the file, or its family's makers, advise for chat."""
        with self._reading():
            return dict(chat_defaults(self._file.metadata))

    def reading(self, ids: Sequence[int], tools: Tools, form: Form | None) -> Reading:
        """Return how the answer to a chat is read, whose prompt these ids are."""
        from .tools import TAIL, Reading

        template, tokenizer = self.chat_template, self.tokenizer
        made = format_of(template.source, tokenizer.control_texts)
        return Reading(made, tools, tokenizer.decode(ids[-TAIL:], continues=True), form)

    def mask(self, grammar: Grammar | None, budget: Budget | None, n_prompt: int, n_vocab: int) -> Mask | None:
        """Make the mask of one answer, after a prompt of so many tokens; None if any tokens may follow.

        Raises UsageError for a grammar that is wrong, for a file without a tokenizer, or if llguidance is missing.
        """
        if grammar is None and budget is None:
            return None
        from ..sampling.constrain.masks import Masks

        if n_vocab not in self._masks:
            self._masks[n_vocab] = Masks(vocabulary(self.tokenizer, n_vocab))
        return self._masks[n_vocab].of(grammar, budget, n_prompt)

    def spent(self) -> dict[str, tuple[int, float]]:
        """Return how many grammars were compiled and masks computed, and the seconds of both."""
        every = [masks.spent for masks in list(self._masks.values())]
        return {
            kind: (sum(one.times[kind] for one in every), sum(one.seconds[kind] for one in every))
            for kind in ("compile", "mask")
        }

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

    def marks(self, ids: Sequence[int], with_system: bool) -> dict[int, Mark]:
        """Return where checkpoints of a chat's recurrent states are worth their memory: after so many ids.

        These are the end of the system prompt and its tools, if ``with_system``, and the beginnings of the last turns.
        """
        tokenizer = self.tokenizer
        starts = [at for at in turn_starts(ids, tokenizer.control_ids, tokenizer.bos_id) if at]
        marks = dict.fromkeys(starts[-MARKED_TURNS:], Mark.TURN)
        if with_system and starts:
            marks[starts[0]] = Mark.SYSTEM
        return marks

    def chat_marks(
        self,
        ids: Sequence[int],
        shown: str,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any],
        now: float | None = None,
    ) -> dict[int, Mark]:
        """Return what ``marks`` does, and the places where the next turns' prompts will leave this one.

        ``shown`` is the prompt of these arguments, and ``ids`` are its tokens. Empty for a model without recurrent
        states, which needs no checkpoints.
        """
        if not self.recurrent:
            return {}
        from ..text.chat.marks import unmarked
        from ..text.chat.next_turn import kept

        system, turns = kept(self.chat_template, self.capabilities, shown, messages, tools, variables, now)
        places = self._token_ends.before(ids, unmarked(shown), [system, *turns])
        if not places:
            return self.marks(ids, with_system=bool(system))
        kinds = dict.fromkeys(places[1:], Mark.TURN) | {places[0]: Mark.SYSTEM}
        marks = {at: kind for at, kind in kinds.items() if 0 < at < len(ids)}
        near = [range(at - NEAR, at + 1) for at in marks]
        starts = self.marks(ids, with_system=False)
        return marks | {at: kind for at, kind in starts.items() if not any(at in some for some in near)}

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


def vocabulary(tokenizer: Tokenizer, n_vocab: int) -> Vocabulary:
    """Collect the bytes of a tokenizer's tokens, for a model with so many logits."""
    from ..sampling.constrain.vocabulary import Vocabulary

    ids = range(tokenizer.vocab_size)
    return Vocabulary(
        [tokenizer.token_bytes(i) for i in ids],
        [i for i in ids if tokenizer.is_special(i)],
        tokenizer.eog_ids,
        lambda text, special: tokenizer.encode(text, add_bos=False, parse_special=special, add_eos=False),
        n_vocab,
    )
