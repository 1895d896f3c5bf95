"""Any answer of any family: its parser never raises, reads the same however the answer is cut, and calls are JSON."""

from __future__ import annotations

from functools import cache

from support.answers import Read, checked, events_of
from support.chat_forms import FORMS, rendered
from support.fuzz.reading import Reading, spelled
from zincmetal.text.tools.format import Format, format_of


@cache
def _formats() -> tuple[Format, ...]:
    return tuple(format_of(form.source, form.control) for form in FORMS)


@cache
def _words(index: int) -> tuple[str, ...]:
    """Markers of a family, and pieces of JSON."""
    shape = _formats()[index].shape
    texts = {*shape.turns, *shape.think, *shape.think_end}
    for one in shape.calls:
        texts |= {one.open, one.close, one.item, one.item_end, one.quote}
    json = ('{"name": "', '"arguments": {', '"city"', ": ", ", ", "}", "{", "[", "]", '"', "\\u00", "\\", "get_weather")
    others = ("now", "days", "1", "-", ".5e", "null", "true", "'", "=", "(", ")")
    return (*sorted(filter(None, texts)), *json, *others)


def run(data: bytes) -> None:
    """Parse an answer of words and characters, whole and in pieces."""
    given = Reading(data)
    index = given.byte() % len(FORMS)
    split, tail = bool(given.byte() & 1), given.one(("", "<think>", "<think>\n", "x"))
    cuts = Reading(given.take(3))
    words = _words(index)
    text = spelled(given.rest(), words)
    form = _formats()[index]
    whole = events_of(form, [text], tail, split=split)
    checked(whole)
    assert events_of(form, cuts.pieces(text), tail, split=split) == whole
    if len(text) < 60:
        assert events_of(form, list(text), tail, split=split) == whole


def seeds() -> list[bytes]:
    """The answers that the templates of all families show."""
    call = ("get_weather", {"city": "Zürich", "days": 3})
    made = []
    for i, form in enumerate(FORMS):
        for answer in (Read("", "Look.", []), Read("", "", [call]), Read("Hm.", "", [("now", {"zone": "UTC"})])):
            _, text = rendered(form, answer)
            made.append(bytes([i, 1, 0, 60, 120, 180]) + bytes(ord(c) for c in text if ord(c) < 128))
    return made
