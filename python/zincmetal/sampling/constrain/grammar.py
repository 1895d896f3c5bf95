"""Grammar of an answer, as plain data that can be sent to another process."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import UsageError, quote
from .gbnf import is_gbnf
from .gbnf_lark import lark_of
from .schema import prepared

MAX_CHOICES = 10_000
MAX_REGEX = 20_000  # characters
MAX_LARK = 4_000_000  # characters; the tools of an agent have some 100,000

#: Between the parts of a JSON text: a space, or a line break and the indentation after it. Never more of them, since
#: small models would go on with spaces for ever.
WHITESPACE = r"\x20|\r?\n[\x20\t]{0,40}"

NAMED_ESCAPES = 'nrbtf\\"'  # letters after a backslash in JSON texts, without that of numbers


@dataclass(frozen=True)
class Grammar:
    """What the tokens of an answer may be: a grammar in llguidance's dialect of Lark, whose first rule is ``start``.

    JSON schemas and regular expressions stand inside it (``%json``, ``/…/``), so that one form serves for all. The
    functions that make one need no other package; a model that follows one needs llguidance.
    """

    lark: str

    def __post_init__(self) -> None:
        if not isinstance(self.lark, str):
            raise UsageError(f"a grammar is a text in Lark, not {type(self.lark).__name__}")
        if len(self.lark) > MAX_LARK:
            raise UsageError(f"a grammar has at most {MAX_LARK:,} characters, and this one {len(self.lark):,}")

    @classmethod
    def of_schema(cls, schema: Any, lenient: bool = False) -> Grammar:
        """JSON that a JSON schema allows, its properties in the order of the schema.

        Raises UnsupportedSchemaError for a keyword that cannot be followed. ``lenient`` leaves such keywords out: the
        answer then follows the rest of the schema.
        """
        return cls(f"start: {json_term(schema, lenient)}")

    @classmethod
    def of_object(cls) -> Grammar:
        """Any JSON object."""
        return cls.of_schema({"type": "object"})

    @classmethod
    def of_regex(cls, regex: str) -> Grammar:
        r"""Text that a regular expression matches as a whole, in the syntax of Rust's ``regex``.

        Only ``\d`` differs: it is a digit from 0 to 9.
        """
        return cls(f"start: {regex_term(regex)}")

    @classmethod
    def of_gbnf(cls, text: str) -> Grammar:
        """Text that a grammar in llama.cpp's GBNF allows. Raises UsageError for one that is wrong, with the line."""
        return cls(lark_of(cls(text).lark))  # a text, and not too long

    @classmethod
    def of_text(cls, text: str) -> Grammar:
        """Text that a grammar allows, in llama.cpp's GBNF (``root ::= …``) or in llguidance's Lark (``start: …``)."""
        return cls.of_gbnf(text) if isinstance(text, str) and is_gbnf(text) else cls(text)

    @classmethod
    def of_choices(cls, choices: Sequence[str]) -> Grammar:
        """One of some texts."""
        return cls(f"start: {choices_term(choices)}")

    def rule(self, name: str) -> str:
        """Return the lines that define a rule ``name`` as this grammar, for use inside another one."""
        one = self.lark.removeprefix("start: ")
        if one != self.lark and "\n" not in one:
            return f"{name}: {one}\n"
        return f"{name}: %lark {{\n{self.lark}\n}}\n"


def json_term(schema: Any, lenient: bool = False) -> str:
    """Return what stands for a JSON schema in a rule of a grammar. See :meth:`Grammar.of_schema`."""
    ready = prepared(schema, lenient)
    made = ready.schema if isinstance(ready.schema, dict) else {} if ready.schema else {"enum": []}
    # Keywords for the compiler stand at the top of the schema; those that came with it were left out.
    options = {"whitespace_pattern": WHITESPACE}
    if ready.open and not ready.controls:  # a property could have its name twice, once with a letter as a number
        options["json_allowed_escapes"] = NAMED_ESCAPES
    return "%json " + json.dumps({"x-guidance": options, **made}, ensure_ascii=True)


def regex_term(regex: str) -> str:
    r"""Return what stands for a regular expression in a rule of a grammar. ``\d`` is a digit from 0 to 9."""
    if not isinstance(regex, str):
        raise UsageError(f"a regular expression is a text, not {type(regex).__name__}")
    if len(regex) > MAX_REGEX:
        raise UsageError(f"a regular expression has at most {MAX_REGEX:,} characters, and this one {len(regex):,}")
    if not regex:
        return '""'
    parts, i, in_class = list[str](), 0, False
    while i < len(regex):
        pair = regex[i : i + 2] if regex[i] == "\\" else regex[i]
        parts.append(_REGEX.get(pair, pair) if not in_class else _CLASS.get(pair, pair))
        in_class = pair == "[" or (in_class and pair != "]")
        i += len(pair)
    if parts[-1] == "\\":
        raise UsageError(f"the regular expression {quote(regex)} ends in a single backslash")
    return f"/{''.join(parts)}/"


_CLASS = {
    "/": r"\/",
    "\n": r"\n",
    "\\\n": r"\n",
    r"\d": "0-9",
}  # what is written otherwise within a class of characters
_REGEX = {**_CLASS, r"\d": "[0-9]", r"\D": "[^0-9]"}


def choices_term(choices: Sequence[str]) -> str:
    """Return what stands for one of some texts in a rule of a grammar."""
    texts = [choices] if isinstance(choices, str) else list(choices)
    if not texts:
        raise UsageError("choices need at least one text")
    if len(texts) > MAX_CHOICES:
        raise UsageError(f"at most {MAX_CHOICES:,} choices are possible, and here are {len(texts):,}")
    return " | ".join(dict.fromkeys(text_term(text) for text in texts))


def text_term(text: str) -> str:
    """Return what stands for a text in a rule of a grammar."""
    if not isinstance(text, str):
        raise UsageError(f"a choice is a text, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{quote(text)} has a lone surrogate, which no answer can have") from None
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def control_term(text: str) -> str:
    """Return what stands for a control token, by its text, in a rule of a grammar.

    Grammars name control tokens as ``<…>``. A token of another form, such as ``[TOOL_CALLS]``, has a name of its own.
    """
    inside = text[1:-1]
    plain = len(text) > 2 and text[0] == "<" and text[-1] == ">" and inside[0] != "["
    if plain and not any(c in "<>" or c.isspace() for c in inside):
        return text
    return f"<~{text.encode('utf-8', 'replace').hex()}>"
