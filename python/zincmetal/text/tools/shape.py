"""Shape of a family's answers: plain data, from which a parser and a grammar are made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["json", "tagged", "named", "pythonic"]


@dataclass(frozen=True)
class Tags:
    """Tags around the names and values of a call.

    The name of the tool follows ``CallShape.item``, up to ``name_end``. A parameter is ``key``, its name, ``key_end``,
    ``value``, its value, ``value_end``. ``text_value`` and ``json_value`` stand in the place of ``value`` where the
    model itself says what the value is; ``text_end`` then stands in front of ``value_end``. ``lines``: values stand on
    lines of their own.
    """

    name_end: str
    key: str
    key_end: str
    value_end: str
    value: str = ""
    text_value: str = ""
    json_value: str = ""
    text_end: str = ""
    lines: bool = False


@dataclass(frozen=True)
class CallShape:
    """One way to write tool calls.

    - ``open`` begins a section of calls and ``close`` ends it. Some families have no ``close``. With ``open`` "" a call
      can only be the whole answer.
    - ``item`` begins one call of a section and ``item_end`` ends it.
    - ``kind`` says how a call is written: "json", an object with its name and arguments; "tagged", parameters between
      ``tags``; "named", a head with the name, ``head``, and then the arguments as an object; "pythonic", a call of
      Python's.
    - ``bare``: the marker may be in other texts. So calls begin on a line of their own and have a known name.
    - ``keys`` are the keys of a "json" call's name and arguments, as the model is told. ``id_key`` is one that it may
      write besides, for the name of the call.
    - ``head`` is a regular expression with the group ``name``; ``head_form`` shows how to write it
      (``{index}`` is the number of the call, and ``{id}`` its name). ``tail`` stands
      behind the arguments.
    - ``many``: a section may have several calls. ``listed``: they stand in a list.
    - ``quote`` is a delimiter of strings, if it is none of JSON's.
    """

    kind: Kind
    open: str = ""
    close: str = ""
    item: str = ""
    item_end: str = ""
    bare: bool = False
    tags: Tags | None = None
    keys: tuple[str, str] = ("name", "arguments")
    id_key: str = ""
    head: str = ""
    head_form: str = ""
    tail: str = ""
    quote: str = ""
    many: bool = False
    listed: bool = False


@dataclass(frozen=True)
class Shape:
    """Shape of answers.

    - ``think`` has the texts that open reasoning, and ``think_end`` those that close it; the first is the usual one.
    - ``calls`` has the ways to write calls. The first is the one that the model was trained on; answers in the others
      are understood as well.
    - ``turns`` has control texts of turns. Nobody sees them; the last one in a prompt is where the answer begins.
    """

    name: str = "plain"
    think: tuple[str, ...] = ()
    think_end: tuple[str, ...] = ()
    calls: tuple[CallShape, ...] = ()
    turns: tuple[str, ...] = ()
    harmony: bool = False
