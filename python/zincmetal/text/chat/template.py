"""Chat templates: from messages to the prompt that a model was trained on.

Templates are Jinja programs that come with the model file. They run in jinja2's `ImmutableSandboxedEnvironment`,
set up as Hugging Face's `apply_chat_template` does, in a process of their own that is bounded in time and memory
(see ``sandbox.py`` and ``renderer.py``). The process starts with the first template and stays,
so that rendering costs about a millisecond; a template that passes a bound ends it, and the next one gets a new one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ... import arguments
from ...errors import ChatTemplateError, UsageError, quote
from ..tokenizer_keys import warn
from ..vocabulary import MARK
from .forms import REASONING, Forms, mentions
from .marks import Marker, unmarked
from .messages import Message, checked_list, conversation, plain
from .renderer import Renderer

if TYPE_CHECKING:
    from ..tokenizer import Tokenizer

__all__ = ["CHATML", "MARK", "ChatTemplate"]

TIME_LIMIT = 2.0  # seconds to compile and render
MEMORY_LIMIT = 512 << 20  # bytes, of which Python and jinja2 take about a tenth
LONGEST = 8 << 20  # characters of text

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The most common format, for models whose file has no template and that were trained on it."""

KEY = "tokenizer.chat_template"
_HERE = "<zincmetal goes on here> "  # ends the content that is continued; a template that trims takes its space
_REWRITES = re.compile(r"\b(replace|join|lower|upper|title|capitalize)\b")  # ways to make new text of what was said
_UNDEFINED = re.compile(r"UndefinedError: '(\w+_token)' is undefined")


class ChatTemplate:
    """The template of a model, or several with names. Safe to use from several threads, which take turns.

    Args:
        source: the Jinja source, as in `tokenizer.chat_template`.
        bos: text of the begin token, which templates write as `bos_token`; empty where the model has none, and
            then the name is not defined.
        eos: text of the end token, `eos_token`.
        special: more of these names and their texts (`pad_token`, `unk_token`, …).
        named: templates by name. `tool_use` is used when there are tools, `rag` when there are documents.
        control_texts: the texts of the tokens that are no text, which :meth:`prompt` marks in messages.
    """

    def __init__(
        self,
        source: str,
        bos: str = "",
        eos: str = "",
        *,
        special: Mapping[str, Any] | None = None,
        named: Mapping[str, str] | None = None,
        control_texts: Sequence[str] = (),
    ) -> None:
        self.source = arguments.text("source", source)
        self.bos = arguments.text("bos", bos)
        self.eos = arguments.text("eos", eos)
        self.named = {name: arguments.text(f"named[{quote(name)}]", text) for name, text in (named or {}).items()}
        self._names = dict(special or {})
        own = {"bos_token": bos, "eos_token": eos} | self._names
        sources = (source, *self.named.values())
        self._special = {name: v for name, v in own.items() if v and any(name in text for text in sources)}
        self._control_texts = tuple(control_texts)
        self._forms: dict[str, Forms] = {}
        self._unseen: set[str] = set()  # of tools and documents: what was given in vain, and a warning has named

    @classmethod
    def from_metadata(cls, meta: Mapping[str, Any], tokenizer: Tokenizer) -> ChatTemplate:
        """The templates of a GGUF file. Raises ChatTemplateError if it has none."""
        sources = {name.removeprefix(KEY).removeprefix("."): v for name, v in meta.items() if _names_template(name)}
        for name, source in sources.items():
            if not isinstance(source, str):
                key = f"{KEY}.{name}" if name else KEY
                raise ChatTemplateError(f"{key} is of type {type(source).__name__}, not a string")
        default = sources.pop("", sources.get("default", next(iter(sources.values()), None)))
        if default is None:
            raise ChatTemplateError(
                f"this file has no chat template ({KEY}): write the prompt out and pass it to generate, with "
                "parse_special=True (--special in a shell) where it has special tokens such as <|im_start|>; or render "
                "the messages with ChatTemplate(zincmetal.text.chat.template.CHATML) if the model knows ChatML"
            )
        return cls(
            default,
            tokenizer.bos_text,
            tokenizer.eos_text,
            special=_special_texts(tokenizer),
            named=sources,
            control_texts=tokenizer.control_texts,
        )

    def choose(self, name: str) -> ChatTemplate:
        """One of the templates in :attr:`named`, alone. Raises UsageError where there is none of that name."""
        if arguments.text("name", name) not in self.named:
            known = ", ".join(sorted(self.named)) or "none"
            raise UsageError(f"there is no chat template {quote(name)}; templates with a name: {known}")
        source = self.named[name]
        return ChatTemplate(source, self.bos, self.eos, special=self._names, control_texts=self._control_texts)

    @property
    def variables(self) -> frozenset[str]:
        """The names that the templates read: a keyword that is not among them changes nothing."""
        names: set[str] = set()
        for source in {self.source, *self.named.values()}:
            reply = _ask({"source": source})
            names.update(_result(reply))
        return frozenset(names)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool = False,
        **keywords: Any,
    ) -> str:
        """The text of the prompt for a conversation. To tokenize it, :meth:`prompt` is the one to use.

        Args:
            messages: at least one; each has `role`, a string, and `content`, a string or a list of parts
                `{"type": "text", "text": …}`. An answer may do without: it has `tool_calls`, or its reasoning as
                `reasoning_content`, `reasoning` or `thinking`, or is to be filled. Other keys are passed on. They
                are put into the form that the template needs.
            add_generation_prompt: end with the opening of the model's answer.
            tools: what the model may call, as JSON schemas.
            documents: what it may cite.
            continue_final_message: end inside the last message, which is an answer, right after its content, or
                after its reasoning if it has no content.
            keywords: more variables for the template (`enable_thinking`, …). All must be JSON values. One that the
                template does not read (see :attr:`variables`) changes nothing.

        Raises:
            UsageError: an argument is not as described, or the template has no place for it.
            ChatTemplateError: the template is wrong, refuses the messages, or needs more than TIME_LIMIT seconds,
                MEMORY_LIMIT bytes or LONGEST characters.
        """
        call = _Call(self, messages, tools, documents, add_generation_prompt, continue_final_message, keywords)
        return call.text(Marker(()))

    def prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **keywords: Any,
    ) -> str:
        """What :meth:`render` says, with marks (:mod:`zincmetal.text.chat.marks`) in what the caller said.

        Where a message, a tool or a document has the text of a control token, `<|im_end|>` for one, a mark makes it
        text for the tokenizer: nothing that is said inside a chat ends its turn.

        There is one exception. Some templates look into earlier answers for control tokens of their own, to take
        old reasoning out. Where marks would hide from them what they look for, an answer's own are left unmarked.
        """
        call = _Call(self, messages, tools, documents, add_generation_prompt, continue_final_message, keywords)
        marker = Marker(self._control_texts)
        marked = call.text(marker)
        if _REWRITES.search(call.source):  # it may make a control text of what was none
            with suppress(ChatTemplateError):
                all_marked = call.text(Marker(self._control_texts, beginnings=True), answers=marker)
                if marker.count(all_marked) < marker.count(marked):
                    return all_marked
        if not marker.met:
            return marked
        try:
            wanted = call.text(Marker(()))
        except ChatTemplateError:  # it refuses to see what the marks hid, which is text now
            return marked
        if unmarked(marked) == wanted:
            return marked
        return self._looked_into(call, marker, wanted, marked)

    def _looked_into(self, call: _Call, marker: Marker, wanted: str, marked: str) -> str:
        """The prompt where marks change what the template does."""
        escaped = marked.replace(ascii(MARK)[1:-1], MARK)  # by repr, or as ASCII in JSON
        if unmarked(escaped) == wanted:
            return escaped
        hidden = [text for text in sorted(marker.met) if text in call.source]
        best = self._with_open_answers(call, marker, hidden, wanted)
        for text in hidden if best is not None else ():  # as few as will do
            fewer = [other for other in hidden if other != text]
            other = self._with_open_answers(call, marker, fewer, wanted)
            best, hidden = (best, hidden) if other is None else (other, fewer)
        return marked if best is None else best

    def _with_open_answers(self, call: _Call, marker: Marker, texts: list[str], wanted: str) -> str | None:
        """The prompt with earlier answers' own `texts` unmarked, if that is what the template makes without marks."""
        try:
            made = call.text(marker, answers=marker.without(texts))
        except ChatTemplateError:
            return None
        return made if unmarked(made) == wanted else None

    # --- within the package

    def _source(self, tools: Any, documents: Any) -> str:
        for name, given in (("tool_use", tools), ("rag", documents)):
            if given and name in self.named:
                return self.named[name]
        return self.source

    def _forms_of(self, source: str) -> Forms:
        if source not in self._forms:
            self._forms[source] = Forms(source, lambda trials: self._trials(source, trials))
        return self._forms[source]

    def _trials(self, source: str, trials: list[dict[str, Any]]) -> list[str | None]:
        """What a template makes of the conversations of :mod:`zincmetal.text.chat.forms`."""
        base = {"bos_token": "", "eos_token": "", "documents": None, "add_generation_prompt": True} | self._special
        try:
            replies = _ask({"source": source, "variables": [base | trial for trial in trials]})
        except ChatTemplateError:  # it passes a bound; so it will when it is rendered
            return [None] * len(trials)
        return [reply.get("result") for reply in replies]

    def _rendered(self, source: str, variables: dict[str, Any]) -> str:
        while True:
            (reply,) = _ask({"source": source, "variables": [self._special | variables]})
            missing = _UNDEFINED.search(reply.get("error", ""))
            if missing is None or missing[1] in self._special or missing[1] in variables:
                text: str = _result(reply)
                return text
            self._special[missing[1]] = ""  # a template that cannot do without a token that the model has not


class _Call:
    """What one call of `render` or `prompt` was given, checked and in the form that the template needs."""

    def __init__(
        self,
        template: ChatTemplate,
        messages: Sequence[Mapping[str, Any]],
        tools: Any,
        documents: Any,
        add_generation_prompt: bool,
        continues: bool,
        keywords: dict[str, Any],
    ) -> None:
        self._template = template
        checked = conversation(messages)
        if continues and checked[-1]["role"] != "assistant":
            role = quote(checked[-1]["role"])
            raise UsageError(f"continue_final_message: the last message is of role {role}, not an assistant's")
        self._said = {name: checked_list(name, value) for name, value in (("tools", tools), ("documents", documents))}
        self._keywords = {name: plain(name, value) for name, value in keywords.items()}
        self.source = template._source(self._said["tools"], self._said["documents"])
        for name, value in self._said.items():
            if value and not mentions(self.source, name) and name not in template._unseen:
                template._unseen.add(name)
                warn("this model's chat template has no place for %s: the model does not see them", name)
        self._messages = template._forms_of(self.source).prepared(checked)
        self._opens = bool(add_generation_prompt) and not continues
        self._continues = continues

    def text(self, marker: Marker, answers: Marker | None = None) -> str:
        """The text, with marks by `marker`; in messages of the assistant by `answers`."""
        answers = answers or marker
        messages = [(answers if m["role"] == "assistant" else marker).mark(m) for m in self._messages]
        tail = ""
        if self._continues:
            messages[-1], tail = _open_end(messages[-1])
        # Texts of special tokens are the caller's to set, and no text.
        said = {k: v if k.endswith("_token") else marker.mark(v) for k, v in (self._said | self._keywords).items()}
        variables = {"messages": messages, "add_generation_prompt": self._opens} | said
        text = self._template._rendered(self.source, variables)
        return _cut(text, tail) if self._continues else text


def _special_texts(tokenizer: Tokenizer) -> dict[str, Any]:
    """The texts of special tokens by their names in templates; `additional_special_tokens` are those without one."""
    others = list(tokenizer.other_special_texts)
    return dict(tokenizer.special_texts) | ({"additional_special_tokens": others} if others else {})


def _names_template(key: str) -> bool:
    return key == KEY or key.startswith(KEY + ".")


def _open_end(message: Message) -> tuple[Message, str]:
    """A message with _HERE at its end, and the text before that."""
    content = message.get("content")
    if isinstance(content, list):
        last = max((i for i, part in enumerate(content) if isinstance(part.get("text"), str)), default=None)
        if last is None:
            raise UsageError("continue_final_message: the last message has no text to continue")
        part = content[last] | {"text": content[last]["text"] + _HERE}
        return message | {"content": [*content[:last], part, *content[last + 1 :]]}, content[last]["text"]
    thoughts = {name: message[name] for name in REASONING if isinstance(message.get(name), str)}
    if thoughts and not content:
        return message | {name: text + _HERE for name, text in thoughts.items()}, next(iter(thoughts.values()))
    return message | {"content": (content or "") + _HERE}, content or ""


def _cut(text: str, tail: str) -> str:
    """A text up to the last _HERE, behind `tail`."""
    at = text.rfind(_HERE.rstrip())
    if at < 0:
        raise ChatTemplateError("the chat template does not show the end of the last message: it cannot be continued")
    trimmed = not text.startswith(_HERE, at)
    return text[:at].rstrip() if trimmed and tail.strip() else text[:at]


def _ask(request: dict[str, Any]) -> Any:
    return _renderer.ask(request | {"longest": LONGEST, "seconds": TIME_LIMIT}, MEMORY_LIMIT)


def _result(reply: dict[str, Any]) -> Any:
    if "error" in reply:
        raise ChatTemplateError(f"the chat template {reply['error']}")
    return reply["result"]


_renderer = Renderer()
