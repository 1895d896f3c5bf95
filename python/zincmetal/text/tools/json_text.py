"""Reads a JSON value that comes in pieces, and writes it as valid JSON.

Valid JSON passes through as it is, piece by piece. Models also write what is almost JSON: quotes of Python, a comma
before the end, a name without quotes, a line break or a quote inside a string, a bracket too few. All of it becomes
JSON, and no word of it is lost.
"""

from __future__ import annotations

import json
import re

from .json_string import SPACE, JsonString, RawString
from .markers import begins
from .observers import Observer, Passing

# Numbers of a length that any JSON reader takes.
_SCALAR = re.compile(r"-?(?:0|[1-9][0-9]{0,999})(?:\.[0-9]{1,999})?(?:[eE][-+]?[0-9]{1,9})?|true|false|null")
_DEEPEST = 200  # lists and objects inside of each other; a bracket beyond is text
_LONGEST = 40  # pieces of a number
_WORDS = {"True": "true", "False": "false", "None": "null"}


class JsonText:
    """Reads one value.

    - ``stop``: a marker that ends the value, wherever it stands outside of a string.
    - ``ends``: characters that end a value which is not inside of another.
    - ``quote``: one more delimiter of strings, longer than a character. Nothing is escaped between two of them.
    - ``tuples``: round brackets are lists.
    """

    def __init__(
        self, observer: Observer, *, stop: str = "", ends: str = "", quote: str = "", tuples: bool = False
    ) -> None:
        self._observer, self._stop, self._ends, self._quote = observer, stop, ends, quote
        self._opens, self._closes = ("{[(", "}])") if tuples else ("{[", "}]")
        self._stack: list[str] = []
        self._state = self._value
        self._held = ""  # text whose meaning the next characters tell
        self._pending = ""  # a comma and spaces, written if another element follows
        self._words: list[str] = []  # a number or a word, or the inside of a name
        self._string: JsonString | RawString | None = None
        self._is_key = False
        self.repaired = False  #: the text was not JSON
        self.begun = False  #: a value has begun
        self.done = False

    def push(self, text: str) -> str | None:
        """Take more text. Return None, or, when the value is complete, the text behind it."""
        text, self._held = self._held + text, ""
        at = 0
        while not self.done and 0 <= at < len(text):
            stops = False if self._string or not self._stop else begins(text[at : at + len(self._stop)], self._stop)
            if stops is None:
                at = ~at
            elif stops:
                self._close_all()
            else:
                at = self._state(text, at)
        if self.done:
            return text[at:]
        self._held = text[~at:] if at < 0 else ""
        return None

    def finish(self) -> None:
        """Take the end of the text: close what is open."""
        held, self._held = self._held, ""
        if not self.done and self.begun:
            if self._string:
                self._string.finish(held)
            self._close_all()

    # --- states: each takes the text from a place on, and returns the next place, or ~place to wait for more text

    def _value(self, text: str, at: int) -> int:
        char = text[at]
        if char in SPACE:
            return self._space(char, at)
        if not self._stack and char in self._ends:
            self.done = True
            return at
        if char in self._closes or char in ",:":
            return self._no_value(char, at)
        if (opened := self._open_string(text, at)) is not None:
            return opened
        self._begin(char)
        if char not in self._opens or len(self._stack) == _DEEPEST:
            self._state = self._word
            return at
        self._stack.append("{" if char == "{" else "[")
        self._observer.write(self._stack[-1])
        self._state = self._member if char == "{" else self._value
        return at + 1

    def _no_value(self, char: str, at: int) -> int:
        """Take what stands in the place of a value."""
        if char in self._closes and self._stack[-1:] == ["["]:
            return self._close(char, at)
        self.repaired = True
        if self._stack[-1:] != ["{"] or char == ":":
            return at + 1
        self._write_null()
        return at

    def _member(self, text: str, at: int) -> int:
        """Expect the name of a member, or the end of the object."""
        char = text[at]
        if char in SPACE:
            return self._space(char, at)
        if char in self._closes:
            return self._close(char, at)
        if char in ",:":
            self.repaired = True
            return at + 1
        self._is_key, self._words = True, []
        if (opened := self._open_string(text, at)) is not None:
            self._is_key = opened >= 0
            return opened
        self._flush()
        self._state = self._word
        return at

    def _colon(self, text: str, at: int) -> int:
        char = text[at]
        if char in SPACE:
            self._observer.write(char)
            return at + 1
        self.repaired |= char != ":"
        self._observer.write(":")
        self._state = self._value
        return at + (char in ":=")

    def _next(self, text: str, at: int) -> int:
        """Expect a comma, or the end of the object or list."""
        char = text[at]
        if char in SPACE:
            return self._space(char, at)
        if char in self._closes:
            return self._close(char, at)
        self.repaired |= char != ","
        if char in ":=":
            return at + 1
        self._pending = "," + self._pending
        self._state = self._member if self._stack[-1] == "{" else self._value
        return at + (char == ",")

    def _in_string(self, text: str, at: int) -> int:
        assert self._string
        at = self._string.take(text, at)
        if self._string.done:
            self._string_ended()
        return at

    def _word(self, text: str, at: int) -> int:
        """Collect a number or a word, up to what ends it."""
        ends = ":=,}]" if self._is_key else ",}]" + self._closes if self._stack else self._ends or SPACE + ",}]"
        ends += self._stop[:1]
        end = at + (not self._words)
        while end < len(text) and text[end] not in ends and not (text[end] == '"' and self._is_scalar(text[at:end])):
            end += 1
        self._words.append(text[at:end])
        if end < len(text):
            self._word_ended()
        return end

    def _is_scalar(self, more: str) -> bool:
        word = ("".join(self._words[:_LONGEST]) + more).rstrip()
        return (
            not self._is_key and len(self._words) < _LONGEST and (word in _WORDS or _SCALAR.fullmatch(word) is not None)
        )

    # --- beginnings and ends

    def _begin(self, first: str) -> None:
        self._flush()
        self.begun = True
        self._is_key, self._words = False, []
        self._observer.value(first)

    def _flush(self) -> None:
        if self._pending:
            self._observer.write(self._pending)
            self._pending = ""

    def _space(self, char: str, at: int) -> int:
        if self._pending:
            self._pending += char
        elif self._stack:
            self._observer.write(char)
        return at + 1

    def _open_string(self, text: str, at: int) -> int | None:
        long = begins(text[at : at + len(self._quote)], self._quote) if self._quote else False
        if long is None:
            return ~at
        if not long and text[at] not in "\"'":
            return None
        if self._is_key:
            self._flush()
        else:
            self._begin('"')
        if long:
            self._string = RawString(self._write_string, self._quote)
        else:
            follows = ":=" if self._is_key else self._closes + "," if self._stack else self._ends
            self._string = JsonString(self._write_string, text[at], follows, self._stop)
        self._observer.write('"')
        self._state = self._in_string
        return at + (len(self._quote) if long else 1)

    def _write_string(self, text: str) -> None:
        if self._is_key:
            self._words.append(text)
        self._observer.write(text)

    def _string_ended(self) -> None:
        assert self._string
        self.repaired |= self._string.repaired
        self._string = None
        self._observer.write('"')
        self._ended("".join(self._words))

    def _word_ended(self) -> None:
        whole, self._words = "".join(self._words), []
        word = whole.rstrip()
        known = None if self._is_key else word if _SCALAR.fullmatch(word) else _WORDS.get(word)
        self.repaired |= known != word and not (self._is_key and self._quote)
        shown = json.dumps(word, ensure_ascii=False) if known is None else known
        self._observer.write(shown)
        deep = bool(self._stack)
        self._ended(shown[1:-1])
        if deep:
            # A no-break space is no space of JSON.
            self._observer.write("".join(char for char in whole[len(word) :] if char in SPACE))

    def _ended(self, name: str) -> None:
        """End a name or a value."""
        if self._is_key:
            self._is_key = False
            self._state = self._colon
            self._observer.key(json.loads(f'"{name}"'))
            return
        self._observer.ended()
        self._state = self._next
        self.done |= not self._stack

    def _write_null(self) -> None:
        self._begin("n")
        self._observer.write("null")
        self._ended("")

    def _close(self, char: str, at: int) -> int:
        opens = "{" if char == "}" else "["
        if opens not in self._stack:
            self.repaired = True
            return at + 1
        while self._stack[-1] != opens:
            self.repaired = True
            self._close_one()
        self._close_one()
        return at + 1

    def _close_one(self) -> None:
        self.repaired |= "," in self._pending
        self._observer.write(self._pending.replace(",", "") + ("}" if self._stack.pop() == "{" else "]"))
        self._pending = ""
        self._ended("")

    def _close_all(self) -> None:
        """End the value here, whatever is open."""
        self.repaired = True
        if self._state == self._word:
            self._word_ended()
        elif self._string:
            self._string_ended()
        if self._state == self._colon:
            self._observer.write(":")
            self._state = self._value
        if self._state == self._value and self._stack[-1:] == ["{"]:
            self._write_null()
        while self._stack:
            self._close_one()
        self.done = True


def rewritten(text: str) -> str | None:
    """Write a whole text as one JSON value. None if it has anything else."""
    written: list[str] = []
    reads = JsonText(Passing(written.append))
    rest = reads.push(text)
    reads.finish()
    return None if (rest or "").strip() or not reads.begun else "".join(written)
