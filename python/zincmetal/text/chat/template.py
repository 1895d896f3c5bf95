"""Renders chat templates: turns messages into a prompt of the form that a model was trained on.

Templates are Jinja programs that come with the model file. They run in jinja2's ``ImmutableSandboxedEnvironment``, with
the settings of Hugging Face's ``apply_chat_template``. A separate process with bounds of time and memory runs them
(``sandbox.py`` and ``renderer.py``). It starts with the first template and stays, so rendering takes about 1 ms.
A template that exceeds a bound ends the process. The next template starts a new one.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ... import arguments
from ...errors import ChatTemplateError, UsageError, quote
from ..special_text import MARK
from .marks import Marker, unmarked
from .message_forms import REASONING, Forms, mentions
from .messages import Message, checked_list, conversation, plain
from .renderer import Renderer

if TYPE_CHECKING:
    from ..tokenizer import Tokenizer

__all__ = ["CHATML", "MARK", "ChatTemplate"]

_log = logging.getLogger("zincmetal.text")

TIME_LIMIT = 2.0  # seconds, to compile and render
MEMORY_LIMIT = 512 << 20  # bytes; Python and jinja2 take about a tenth of them
LONGEST = 8 << 20  # characters of text

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Most common template. It serves for models that were trained on it and whose file has no template."""

KEY = "tokenizer.chat_template"
XML_TOOLS = "xml_tools"  # another name for "tools" in some templates
_HERE = "<zincmetal goes on here> "  # ends the content to continue; a template that trims removes its space
_REWRITES = re.compile(r"\b(replace|join|lower|upper|title|capitalize)\b")  # filters and methods that change text
_UNDEFINED = re.compile(r"UndefinedError: '(\w+_token)' is undefined")


class ChatTemplate:
    """Template of a model, or several with names. Safe to use from several threads, which take turns.

    - ``source`` is the Jinja source, as in ``tokenizer.chat_template``.
    - ``bos`` and ``eos`` are the texts of the begin and end tokens, ``bos_token`` and ``eos_token`` in templates. The
      name of an empty text is undefined.
    - ``special`` has more of these names and their texts: ``pad_token``, ``unk_token``, …
    - ``named`` has templates by name. Calls with tools use ``tool_use``, calls with documents ``rag``.
    - ``control_texts`` are the texts of control tokens. ``prompt`` marks them in messages.
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
        self._sources = _Sources(source, self.named, {"bos_token": bos, "eos_token": eos} | self._names)
        self._control_texts = tuple(control_texts)

    def __repr__(self) -> str:
        names = f", and by name {', '.join(map(quote, sorted(self.named)))}" if self.named else ""
        return f"<ChatTemplate: {len(self.source)} characters{names}>"

    @classmethod
    def from_metadata(cls, meta: Mapping[str, Any], tokenizer: Tokenizer) -> ChatTemplate:
        """Read the templates of a GGUF file. Raises ChatTemplateError if it has none."""
        sources = {name.removeprefix(KEY).removeprefix("."): v for name, v in meta.items() if names_template(name)}
        for name, source in sources.items():
            if not isinstance(source, str):
                key = f"{KEY}.{name}" if name else KEY
                raise ChatTemplateError(f"{key} is of type {type(source).__name__}, not a string")
        default = sources.pop("", sources.get("default", next(iter(sources.values()), None)))
        if default is None:
            raise ChatTemplateError(
                f"this file has no chat template ({KEY}): write the prompt out and pass it to generate, with "
                "parse_special=True (--special in a shell) if it has special tokens such as <|im_start|>; or render "
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
        """Select one of the templates in ``named``. Raises UsageError for an unknown name."""
        if arguments.text("name", name) not in self.named:
            known = ", ".join(sorted(self.named)) or "none"
            raise UsageError(f"there is no chat template {quote(name)}; templates with a name: {known}")
        source = self.named[name]
        return ChatTemplate(source, self.bos, self.eos, special=self._names, control_texts=self._control_texts)

    @property
    def variables(self) -> frozenset[str]:
        """Names that the templates read. Any other keyword changes nothing."""
        names: set[str] = set()
        for source in {self.source, *self.named.values()}:
            reply = _ask({"source": source})
            names.update(_result(reply))
        return frozenset(names | ({"tools"} if names & {XML_TOOLS} else set()))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool = False,
        now: float | None = None,
        **keywords: Any,
    ) -> str:
        """Render the prompt for a conversation, to be read. Use ``prompt`` to get a text to tokenize.

        - ``messages`` has at least one message. Each has a ``role``, a string, and a ``content``: a string, or a list
          of parts ``{"type": "text", "text": …}``. An answer may have no content, only ``tool_calls`` or its reasoning
          (``reasoning_content``, ``reasoning`` or ``thinking``). Other keys are passed on.
        - ``add_generation_prompt`` ends the prompt with the opening of the model's answer.
        - ``tools`` are the functions that the model may call, as JSON schemas.
        - ``documents`` are the texts that the model may cite.
        - ``continue_final_message`` ends the prompt inside the last message, which must be an answer. The end is right
          after its content, or after its reasoning if it has no content.
        - ``now`` is the time that the template takes for the present, in seconds since 1970. Without it a prompt with
          the date changes at midnight, and nothing of the prompt before can be reused.
        - ``keywords`` are more variables of the template, such as ``enable_thinking``. All are JSON values. A keyword
          outside ``variables`` changes nothing.

        Messages are brought into the form that the template needs. Raises UsageError for an argument that breaks these
        rules or that the template has no place for. Raises ChatTemplateError if the template is wrong, refuses the
        messages, or exceeds TIME_LIMIT seconds, MEMORY_LIMIT bytes or LONGEST characters.
        """
        opens, continues = add_generation_prompt, continue_final_message
        return _Call(self._sources, messages, tools, documents, opens, continues, keywords, now).text(Marker(()))

    def attempts(self, calls: Sequence[Mapping[str, Any]], *, now: float | None = None) -> list[str | None]:
        """Render several conversations, all at once. None for each one that the template refuses.

        Each call has ``messages``, and may have ``tools`` and ``variables``.
        """
        texts: list[str | None] = [None] * len(calls)
        tried: dict[str, dict[int, dict[str, Any]]] = {}  # by source: the variables of calls, by their index
        for i, asked in enumerate(calls):
            with suppress(UsageError):
                call = self._call(asked)
                tried.setdefault(call.source, {})[i] = call.variables(Marker(()))
        for source, trials in tried.items():
            for i, text in zip(trials, self._sources.attempts(source, list(trials.values()), now), strict=True):
                texts[i] = text
        return texts

    def _call(self, call: Mapping[str, Any]) -> _Call:
        variables = dict(call.get("variables", ()))
        return _Call(self._sources, call["messages"], call.get("tools"), None, True, False, variables, quiet=True)

    def prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        now: float | None = None,
        **keywords: Any,
    ) -> str:
        """Render the prompt like ``render``, with marks (``marks.py``) in the texts of the caller.

        A message, a tool or a document may have the text of a control token, such as ``<|im_end|>``. A mark keeps it
        text for the tokenizer. So no text inside a chat can end its turn.

        There is one exception. Some templates search earlier answers for control tokens, to remove old reasoning. If
        marks would hide these tokens from the template, answers keep them unmarked.
        """
        opens, continues = add_generation_prompt, continue_final_message
        call = _Call(self._sources, messages, tools, documents, opens, continues, keywords, now)
        marker = Marker(self._control_texts)
        marked = call.text(marker)
        if _REWRITES.search(call.source):  # the template may make a control text from other text
            with suppress(ChatTemplateError):
                all_marked = call.text(Marker(self._control_texts, beginnings=True), answers=marker)
                if marker.count(all_marked) < marker.count(marked):
                    return all_marked
        if not marker.met:
            return marked
        try:
            wanted = call.text(Marker(()))
        except ChatTemplateError:  # the template refuses a control text in a message; with marks it is plain text
            return marked
        if unmarked(marked) == wanted:
            return marked
        return self._looked_into(call, marker, wanted, marked)

    def _looked_into(self, call: _Call, marker: Marker, wanted: str, marked: str) -> str:
        """Find a prompt for a template that marks would change."""
        escaped = marked.replace(ascii(MARK)[1:-1], MARK)  # the template escaped it: by repr, or as ASCII in JSON
        if unmarked(escaped) == wanted:
            return escaped
        hidden = [text for text in sorted(marker.met) if text in call.source]
        best = self._with_open_answers(call, marker, hidden, wanted)
        for text in hidden if best is not None else ():  # leave as few texts unmarked as possible
            fewer = [other for other in hidden if other != text]
            other = self._with_open_answers(call, marker, fewer, wanted)
            best, hidden = (best, hidden) if other is None else (other, fewer)
        return marked if best is None else best

    def _with_open_answers(self, call: _Call, marker: Marker, texts: list[str], wanted: str) -> str | None:
        """Render with ``texts`` unmarked in answers. None if the result differs from ``wanted``, which has no marks."""
        try:
            made = call.text(marker, answers=marker.without(texts))
        except ChatTemplateError:
            return None
        return made if unmarked(made) == wanted else None


class _Sources:
    """Sources of a model's templates: the choice among them, their forms of messages, and their rendering."""

    def __init__(self, default: str, named: Mapping[str, str], special: Mapping[str, Any]) -> None:
        self._default, self._named = default, named
        sources = (default, *named.values())
        self._special = {name: v for name, v in special.items() if v and any(name in text for text in sources)}
        self._forms: dict[str, Forms] = {}
        self._ignored: set[str] = set()  # "tools" or "documents", once a warning said that the template ignores them

    def choose(self, tools: Any, documents: Any, quiet: bool = False) -> str:
        """Choose the source for a call. A warning, if not ``quiet``, names arguments that it ignores, once for each."""
        given = {name: value for name, value in (("tools", tools), ("documents", documents)) if value}
        names = {"tools": "tool_use", "documents": "rag"}
        source = next((self._named[names[g]] for g in given if names[g] in self._named), self._default)
        for name in given:
            read = mentions(source, name) or (name == "tools" and mentions(source, XML_TOOLS))
            if not quiet and not read and name not in self._ignored:
                self._ignored.add(name)
                _log.warning("this model's chat template has no place for %s: the model does not see them", name)
        return source

    def forms(self, source: str) -> Forms:
        """Return the forms of messages that a source needs."""
        if source not in self._forms:
            self._forms[source] = Forms(source, lambda trials: self.attempts(source, trials))
        return self._forms[source]

    def attempts(self, source: str, trials: list[dict[str, Any]], now: float | None = None) -> list[str | None]:
        """Render trials, such as those of ``message_forms.py``. None for each one that fails."""
        base = {"bos_token": "", "eos_token": "", "documents": None, "add_generation_prompt": True} | self._special
        try:
            replies = _ask({"source": source, "variables": [base | trial for trial in trials], "now": now})
        except ChatTemplateError:  # the template exceeds a bound, and will exceed it again in the real call
            return [None] * len(trials)
        return [reply.get("result") for reply in replies]

    def render(self, source: str, variables: dict[str, Any], now: float | None = None) -> str:
        """Render a source. An undefined name of a token is rendered again as an empty text."""
        while True:
            (reply,) = _ask({"source": source, "variables": [self._special | variables], "now": now})
            missing = _UNDEFINED.search(reply.get("error", ""))
            if missing is None or missing[1] in self._special or missing[1] in variables:
                text: str = _result(reply)
                return text
            self._special[missing[1]] = ""  # the template needs a token that the model does not have


class _Call:
    """Arguments of one call of ``render`` or ``prompt``, checked and in the form that the template needs."""

    def __init__(
        self,
        sources: _Sources,
        messages: Sequence[Mapping[str, Any]],
        tools: Any,
        documents: Any,
        add_generation_prompt: bool,
        continues: bool,
        keywords: dict[str, Any],
        now: float | None = None,
        quiet: bool = False,
    ) -> None:
        self._sources, self._now = sources, now
        checked = conversation(messages)
        if continues and checked[-1]["role"] != "assistant":
            role = quote(checked[-1]["role"])
            raise UsageError(f"continue_final_message: the last message has the role {role}; it must be 'assistant'")
        self._said = {name: checked_list(name, value) for name, value in (("tools", tools), ("documents", documents))}
        self._keywords = {name: plain(name, value) for name, value in keywords.items()}
        self.source = sources.choose(self._said["tools"], self._said["documents"], quiet)
        if self._said["tools"] and mentions(self.source, XML_TOOLS) and not mentions(self.source, "tools"):
            self._keywords.setdefault(XML_TOOLS, self._said["tools"])
        self._messages = sources.forms(self.source).prepared(checked)
        self._opens = bool(add_generation_prompt) and not continues
        self._continues = continues

    def text(self, marker: Marker, answers: Marker | None = None) -> str:
        """Render with marks by ``marker``. In messages of the assistant, ``answers`` marks instead."""
        variables, tail = self.variables(marker, answers), ""
        if self._continues:
            variables["messages"][-1], tail = _open_end(variables["messages"][-1])
        text = self._sources.render(self.source, variables, self._now)
        return _cut(text, tail) if self._continues else text

    def variables(self, marker: Marker, answers: Marker | None = None) -> dict[str, Any]:
        """Return the variables of the template, marked like ``text``."""
        answers = answers or marker
        messages = [(answers if m["role"] == "assistant" else marker).mark(m) for m in self._messages]
        # The caller may set the texts of special tokens. They get no marks.
        said = {k: v if k.endswith("_token") else marker.mark(v) for k, v in (self._said | self._keywords).items()}
        return {"messages": messages, "add_generation_prompt": self._opens} | said


def _special_texts(tokenizer: Tokenizer) -> dict[str, Any]:
    """Map names in templates to texts of special tokens. ``additional_special_tokens`` has the texts without a name."""
    others = list(tokenizer.other_special_texts)
    return dict(tokenizer.special_texts) | ({"additional_special_tokens": others} if others else {})


def has_template(meta: Mapping[str, Any]) -> bool:
    """Return True if the metadata of a file have a chat template."""
    return any(map(names_template, meta))


def names_template(key: str) -> bool:
    """Return True for the key of a chat template, of the default one or of another."""
    return key == KEY or key.startswith(KEY + ".")


def _open_end(message: Message) -> tuple[Message, str]:
    """Copy a message with _HERE at the end of its text. Returns it with that text."""
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
    """Cut a text at its last _HERE, which stands behind ``tail``."""
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
