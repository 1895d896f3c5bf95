"""Remembers what models wrote, so that a conversation which comes back is the one that was computed.

Clients echo an answer in their own way. They drop its reasoning, and they write a call's arguments anew. A template
and a tokenizer then make other tokens than the model did, and what follows cannot use the prefix cache.

Two things help. Reasoning goes back into the answer that it belongs to (``restored``). And where a prompt goes on as an
earlier one did, with the answer to it, the tokens of both are taken as they were (``ids``). Both are bounded by bytes.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Generic, NamedTuple, TypeVar

from ..errors import UsageError
from ..text.chat.canonical import reasoning_of, text_of
from ..text.chat.marks import unmarked
from ..text.tokenizer import Tokenizer
from ..text.tools.events import CallBegin, CallEnd, Event, Reasoning, Text

Message = Mapping[str, Any]
V = TypeVar("V")

MOST_BYTES = 64 << 20
TRIED = 4  # answers of a conversation whose prompts may be the beginning of the next one, the last ones first
IDLE = 6 * 3600.0  # seconds after which a conversation is a new one, for the date in its prompt
ENTRY = 256  # bytes of an entry beside its contents, about


class Written(NamedTuple):
    """What a model wrote of an answer that clients change: its reasoning, and the arguments of its calls, as JSON."""

    reasoning: str
    arguments: tuple[str, ...]


class Run(NamedTuple):
    """Prompt and the answer to it: the prompt's characters and their hash, the ids of both, and what was written."""

    length: int
    digest: bytes
    ids: array[int]
    made: array[int]
    written: Written


class Echo:
    """Answers of one model. Safe to use from several threads."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._lock = threading.Lock()
        self._written = _Recent[Written](most_bytes // 4)
        self._runs = _Recent[Run](most_bytes - most_bytes // 4)

    def remember(
        self, messages: Sequence[Message], shown: str, ids: Sequence[int], made: Sequence[int], answer: Message
    ) -> None:
        """Learn an answer at its end.

        ``messages`` are those of the request, ``shown`` and ``ids`` are their prompt with the marks of the template.
        ``made`` are the answer's ids, its end token among them. ``answer`` is the message as the client gets it.
        """
        key = _keys([*messages, {**answer, "role": "assistant"}])[-1][1]
        written = Written(reasoning_of(answer), tuple(_arguments(answer)))
        run = Run(len(shown), _digest(shown), array("i", ids), array("i", made), written)
        nbytes = sum(len(text.encode("utf-8", "replace")) for text in (written.reasoning, *written.arguments))
        with self._lock:
            if nbytes:
                self._written.put(key, written, nbytes)
            self._runs.put(key, run, 4 * (len(ids) + len(made)) + nbytes)

    def restored(self, messages: Sequence[Message]) -> list[Message]:
        """Return the messages, with what clients have dropped or written anew in answers of this model."""
        made = list(messages)
        for i, key in _keys(messages):
            with self._lock:
                written = self._written.get(key)
            if written and _still_says(messages[i], written):
                made[i] = _as_written(messages[i], written)
        return made

    def ids(self, messages: Sequence[Message], shown: str, tokenizer: Tokenizer) -> list[int]:
        """Return the ids of a prompt. ``shown`` is what the template made of ``messages``, which are restored."""
        for i, key in _keys(messages)[: -TRIED - 1 : -1]:
            with self._lock:
                run = self._runs.get(key)
            if run and len(shown) > run.length and _digest(shown[: run.length]) == run.digest:
                same = _still_says(messages[i], run.written)
                made = _spliced(run, shown[run.length :], messages[i], tokenizer) if same else None
                if made is not None:
                    return made
        return tokenizer.prompt(shown, parse_special=True)

    @property
    def nbytes(self) -> int:
        """Bytes of all that is remembered, about."""
        return self._written.nbytes + self._runs.nbytes


class Told:
    """Answer as its client gets it, event by event. ``ids`` are its tokens, the end token among them."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._calls: dict[int, dict[str, str]] = {}

    def add(self, token: int, events: Iterable[Event]) -> None:
        """Take a token, and what it led to."""
        self.ids.append(token)
        for event in events:
            if isinstance(event, Text):
                self._text.append(event.text)
            elif isinstance(event, Reasoning):
                self._reasoning.append(event.text)
            elif isinstance(event, CallBegin):
                self._calls[event.call] = {"name": event.name, "arguments": ""}
            elif isinstance(event, CallEnd):
                self._calls[event.call]["arguments"] = event.arguments

    def message(self) -> dict[str, Any]:
        """Return the message, in the form of OpenAI's chat API."""
        calls = [{"type": "function", "function": call} for call in self._calls.values()]
        made: dict[str, Any] = {"role": "assistant", "content": "".join(self._text)}
        return (
            made
            | ({"reasoning_content": "".join(self._reasoning)} if self._reasoning else {})
            | ({"tool_calls": calls} if calls else {})
        )


class Beginnings:
    """When conversations began, so that the date in their prompts stays. Safe to use from several threads."""

    def __init__(self, most: int = 4096) -> None:
        self._lock, self._most = threading.Lock(), most
        self._seen: OrderedDict[bytes, tuple[float, float]] = OrderedDict()  # began, and last seen

    def of(self, messages: Sequence[Message], affinity: str = "", now: float | None = None) -> float:
        """Return the second since 1970 in which a conversation began: this one, if it is new or was idle for long.

        A conversation is known by the client's name for it, or else by its first question.
        """
        now = time.time() if now is None else now
        question = next((m for m in messages if m.get("role") == "user"), {})
        key = _hash("by name", affinity) if affinity else _hash("by question", *_said(question))
        with self._lock:
            began, seen = self._seen.pop(key, (now, now))
            if now - seen > IDLE:
                began = now
            self._seen[key] = (began, now)
            while len(self._seen) > self._most:
                self._seen.popitem(last=False)
        return began


class _Recent(Generic[V]):
    """Values by key, the least recently used first to go."""

    def __init__(self, most_bytes: int) -> None:
        self._most, self.nbytes = most_bytes, 0
        self._values: OrderedDict[bytes, tuple[V, int]] = OrderedDict()

    def put(self, key: bytes, value: V, nbytes: int) -> None:
        self.nbytes -= self._values.pop(key, (value, 0))[1]
        self._values[key] = (value, nbytes + ENTRY)
        self.nbytes += nbytes + ENTRY
        while self.nbytes > self._most:
            self.nbytes -= self._values.popitem(last=False)[1][1]

    def get(self, key: bytes) -> V | None:
        if key not in self._values:
            return None
        self._values.move_to_end(key)
        return self._values[key][0]


def _spliced(run: Run, rest: str, message: Message, tokenizer: Tokenizer) -> list[int] | None:
    """Join the ids of a prompt and its answer with those of what follows. None if the answer is not shown whole.

    ``rest`` is what the template has after the prompt: it begins with the answer in the template's words, up to an end
    token. It need not be the one that the model drew.
    """
    if not run.made or run.made[-1] not in tokenizer.eog_ids:
        return None  # it was cut off
    ends = {tokenizer.token_bytes(token).decode("utf-8", "replace"): token for token in tokenizer.eog_ids}
    found = re.search("|".join(re.escape(text) for text in sorted(ends, key=len, reverse=True) if text), rest)
    if found is None:
        return None
    calls = message.get("tool_calls") or ()
    said = [run.written.reasoning, _text(message), *(call["function"]["name"] for call in calls)]
    answer = unmarked(rest[: found.start()])
    if any(text.strip() not in answer for text in said):
        return None
    tail = tokenizer.encode(rest[found.start() :], add_bos=False, parse_special=True, add_eos=False)
    return [*run.ids, *run.made[:-1], *tail] if tail[:1] == [ends[found[0]]] else None


def _keys(messages: Sequence[Message]) -> list[tuple[int, bytes]]:
    """Return the indices of all answers, and what a client's echo of each is known by.

    That is its text and its calls, the message before it, how often all that came before, and the first question of
    the conversation. It is not the whole conversation: clients change old messages. It is no id: each API has its own.
    """
    first = next((m for m in messages if m.get("role") == "user"), {})
    opening = _text(first)
    made: list[tuple[int, bytes]] = []
    met: Counter[bytes] = Counter()
    for i, message in enumerate(messages):
        if message.get("role") == "assistant":
            key = _hash(opening, *_said(messages[i - 1] if i else {}), *_said(message))
            met[key] += 1
            made.append((i, _hash(key.hex(), str(met[key]))))
    return made


def _text(message: Message) -> str:
    """Return the text of a message. A content that is refused later has none."""
    with suppress(UsageError):
        return text_of("a message", message).strip()
    return ""


def _said(message: Message) -> list[str]:
    """Return what an echo keeps of a message: its role, its text, the names of its calls."""
    calls = message.get("tool_calls") or ()
    return [str(message.get("role")), _text(message), *(str(_function(call).get("name")) for call in calls)]


def _function(call: Message) -> Message:
    function: Message = call.get("function", call)
    return function


def _arguments(message: Message) -> list[str]:
    """Return the arguments of a message's calls, as JSON."""
    found = [_function(call).get("arguments") for call in message.get("tool_calls") or ()]
    return [value if isinstance(value, str) else json.dumps(value) for value in found]


def _still_says(message: Message, written: Written) -> bool:
    """Return True if an echo has all arguments that the model wrote. Some clients add those that have a default."""
    echoed = _arguments(message)
    return len(echoed) == len(written.arguments) and all(map(_holds, echoed, written.arguments))


def _holds(echoed: str, written: str) -> bool:
    if echoed == written:
        return True
    try:
        more, less = json.loads(echoed), json.loads(written)
    except (ValueError, RecursionError):
        return False
    if not (isinstance(more, dict) and isinstance(less, dict)):
        return bool(more == less)
    return all(key in more and more[key] == value for key, value in less.items())


def _as_written(message: Message, written: Written) -> Message:
    """Return an echo as the model wrote it. Reasoning that the client gives is left as it is."""
    made = dict(message)
    if written.reasoning and not reasoning_of(message):
        made["reasoning_content"] = written.reasoning
    if written.arguments:
        calls = zip(message["tool_calls"], written.arguments, strict=True)
        made["tool_calls"] = [_with_arguments(call, text) for call, text in calls]
    return made


def _with_arguments(call: Message, text: str) -> Message:
    if "function" in call:
        return {**call, "function": {**call["function"], "arguments": text}}
    return {**call, "arguments": text}


def _hash(*texts: str) -> bytes:
    made = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        made.update(len(data).to_bytes(8, "little") + data)
    return made.digest()


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
