"""Calls with a tag around each parameter: ``<function=f><parameter=a>text</parameter></function>``.

Texts stand there as they are, without quotes, so the schema tells a text from a number. Texts are streamed, other
values wait for their end.
"""

from __future__ import annotations

import json
import re

from .calls import Calls
from .json_string import SPACE, escaped
from .json_text import JsonText
from .markers import Markers, begins
from .observers import Passing
from .schema_types import typed, types_of
from .shape import CallShape

_NAME = re.compile(r"\s*[^\s<>{}\[\]\"'`|()]{0,128}\s{0,16}")
_KEY = re.compile(r"[^<>\n]{0,128}")  # of a parameter
_MOST_SPACE = 64  # between a tag and the next
_LONGEST_KEY = 128
_TEXT = frozenset({"string"})
_NESTED = frozenset({"object", "array"})


class TaggedCall:
    """Reads one call, from behind ``CallShape.item``."""

    def __init__(self, calls: Calls, shape: CallShape) -> None:
        assert shape.tags
        self._calls, self._shape, self._tags = calls, shape, shape.tags
        tags = self._tags
        self._name_ends = Markers({tags.name_end, tags.key, shape.item_end, shape.close})
        self._value_ends = Markers({tags.value_end, tags.key, shape.item_end or shape.close})
        self._state = self._in_name
        self._held = ""
        self._name = ""
        self._keys: list[str] = []
        self._types = _TEXT
        self._value: list[str] = []  # of a value that waits for its end
        self._suffix = ""  # stands between a value and its end
        self._ending = ""  # held back: it may be the suffix
        self._json: JsonText | None = None  # a value, or all arguments in the place of parameters
        self._repaired = False
        self._final = False  # no text follows
        self._done = False

    def push(self, text: str) -> str | None:
        """Take more text. See ``Reader``."""
        text, self._held = self._held + text, ""
        while text and not self._done:
            rest = self._state(text)
            if rest is None:
                return None
            text = rest
        return text if self._done else None

    def finish(self) -> None:
        """Take the end of the text. See ``Reader``."""
        self._final = True
        held, self._held = self._held, ""
        rest: str | None = held
        while rest and not self._done:
            rest = self._state(rest)
        if not self._calls.open:
            return
        self._repaired = True
        if self._json:
            self._json.finish()
            self._keys = self._keys or ["{"]
        elif self._state == self._before_value:
            self._open_value("")
        if self._state in (self._in_value, self._at_json):
            self._write(self._held)
            self._value_ended()
        self._end()

    # --- states: each takes text and returns what it leaves of it, or None if it needs more

    def _in_name(self, text: str) -> str | None:
        at, marker = self._name_ends.find(text)
        name = text[:at]
        if not _NAME.fullmatch(name):
            return self._stop(text)
        if not marker:
            self._held = text
            return None
        name = name.strip()
        if not name or (self._shape.bare and name not in self._calls.tools):
            return self._stop(text)
        self._name = name
        self._calls.begin(name)
        self._state = self._between
        return text[at + len(marker) * (marker == self._tags.name_end) :]

    def _between(self, text: str) -> str | None:
        """Expect a parameter or the end of the call."""
        text = text.lstrip(SPACE)
        if not text:
            return None
        tags, shape = self._tags, self._shape
        if not self._keys and text[0] == "{":
            self._json, self._state = JsonText(Passing(self._calls.write), stop=shape.item_end), self._in_json
            return text
        for marker in (tags.key, shape.item_end, tags.value_end, shape.close):
            found = begins(text, marker) if marker else False
            if found is None:
                self._held = text
                return None
            if found:
                return self._tag(marker, text)
        self._repaired = True
        return self._stop(text)

    def _tag(self, marker: str, text: str) -> str:
        rest = text[len(marker) :]
        if marker == self._tags.key:
            self._state = self._in_key
            return rest
        if marker == self._tags.value_end:  # once too often
            self._repaired = True
            return rest
        self._repaired |= marker != (self._shape.item_end or self._shape.close)
        return self._stop(rest if marker == self._shape.item_end else text)

    def _in_key(self, text: str) -> str | None:
        longest = _LONGEST_KEY + len(self._tags.key_end)
        at = text.find(self._tags.key_end, 0, longest)
        if at < 0 and len(text) < longest:
            self._held = text
            return None
        at = at if at >= 0 else _LONGEST_KEY
        key = text[:at].strip()
        self._calls.write(f"{', ' if self._keys else '{'}{json.dumps(key, ensure_ascii=False)}: ")
        self._keys.append(key)
        self._state = self._before_value
        return text[at:].removeprefix(self._tags.key_end)

    def _before_value(self, text: str) -> str | None:
        tags = self._tags
        markers = [marker for marker in (tags.value, tags.text_value, tags.json_value) if marker]
        bare = text.lstrip(SPACE) if markers else text
        for marker in markers:
            place = text if marker[0] == " " else bare
            found = begins(place, marker)
            if found is None:
                self._held = text
                return None
            if found:
                self._open_value(marker)
                return place[len(marker) :]
        self._open_value("")
        self._repaired |= bool(tags.value or tags.json_value)
        return text.removeprefix("\n") if tags.lines else text

    def _in_value(self, text: str) -> str | None:
        at, marker = self._value_ends.find(text, self._final)
        ends = self._value_may_end(text, at, marker) if marker else None
        self._write(text[:at])
        if not marker or (ends is None and not self._final):
            self._held = text[at:]
            return None
        if not ends and ends is not None:
            self._write(text[at : at + 1])
            return text[at + 1 :]
        self._value_ended()
        self._repaired |= marker != self._tags.value_end
        return text[at + len(marker) * (marker == self._tags.value_end) :]

    def _at_json(self, text: str) -> str | None:
        """Expect an object or a list: it ends by its brackets, whatever tags it has in its strings."""
        bare = text.lstrip(SPACE)
        if not bare:
            return None
        self._state = self._in_value
        if bare[0] in "{[":
            self._json, self._state = JsonText(Passing(self._calls.write), stop=self._tags.value_end), self._in_json
        return bare

    def _in_json(self, text: str) -> str | None:
        assert self._json
        rest = self._json.push(text)
        if rest is not None:
            self._repaired |= self._json.repaired
            self._json, self._state = None, self._behind_json if self._keys else self._behind_all
        return rest

    def _behind_json(self, text: str) -> str | None:
        bare = text.lstrip(SPACE)
        found = begins(bare, self._tags.value_end)
        if found is None:
            self._held = text
            return None
        self._repaired |= not found
        self._state = self._between
        return bare[len(self._tags.value_end) :] if found else bare

    def _behind_all(self, text: str) -> str | None:
        """Expect the end of a call whose arguments are an object."""
        self._keys, self._state = ["{"], self._between
        return text

    # --- values

    def _value_may_end(self, text: str, at: int, marker: str) -> bool | None:
        """Tell if a tag inside of a value ends it: a text may have the tag in it. None if more text will tell."""
        tags, shape = self._tags, self._shape
        rest = text[at + len(marker) :]
        if marker == tags.key:  # without the end of the value before
            end = rest.find(tags.key_end, 0, _LONGEST_KEY + len(tags.key_end))
            if end < 0:
                return None if self._may_be_key(rest) and not self._final else False
            own_line = not tags.lines or (self._ending + text[:at]).endswith("\n")
            return own_line and rest[:end].strip() in self._calls.properties(self._name)
        next_ones = [shape.close, shape.item or shape.open]
        if marker == tags.value_end:
            next_ones += [tags.key, shape.item_end or shape.close, tags.value_end]
        after = rest.lstrip(SPACE)
        if not after:
            return None if len(rest) <= _MOST_SPACE else False
        found = [begins(after, one) for one in next_ones if one]
        return True if True in found else None if None in found else False

    def _may_be_key(self, text: str) -> bool:
        """Return True for the beginning of a key, maybe with a part of what ends it."""
        end = self._tags.key_end
        key, first, _ = text.partition(end[0])
        return _KEY.fullmatch(key) is not None and (not first or begins(text[len(key) :], end) is None)

    def _open_value(self, marker: str) -> None:
        tags = self._tags
        schema = self._calls.tools.get(self._name, {})
        types = types_of(self._calls.properties(self._name).get(self._keys[-1]), schema)
        if marker and marker == tags.text_value:
            types = _TEXT
        elif marker and marker == tags.json_value:
            types = types - _TEXT or types
        self._types, self._value, self._ending = types, [], ""
        self._suffix = "\n" if tags.lines else tags.text_end if marker and marker == tags.text_value else ""
        self._state = self._at_json if types & _NESTED and not types & _TEXT else self._in_value
        if types == _TEXT:
            self._calls.write('"')

    def _write(self, text: str) -> None:
        """Write more of a value. What may be the end of its last line is held back."""
        text = self._ending + text
        kept = min(len(self._suffix), len(text))
        while kept and not self._suffix.startswith(text[len(text) - kept :]):
            kept -= 1
        said, self._ending = text[: len(text) - kept], text[len(text) - kept :]
        if self._types == _TEXT:
            self._calls.write(escaped(said))
        else:
            self._value.append(said)

    def _value_ended(self) -> None:
        if self._ending != self._suffix:
            self._suffix = ""
            self._write("")
        if self._types == _TEXT:
            self._calls.write('"')
        else:
            text, repaired = typed("".join(self._value), self._types)
            self._repaired |= repaired
            self._calls.write(text)
        self._state = self._between

    # --- the end

    def _stop(self, rest: str) -> str:
        self._done = True
        if self._calls.open:
            self._end()
        return rest

    def _end(self) -> None:
        if self._keys and self._keys != ["{"]:
            self._calls.write("}")
        self._calls.end(self._repaired)
