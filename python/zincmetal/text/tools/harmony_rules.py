"""Grammar of an answer of gpt-oss: messages in channels."""

from __future__ import annotations

from collections.abc import Iterable

from ...sampling.constrain.grammar import Grammar, text_term
from .harmony import CHANNEL, MESSAGE, START
from .lark import Lark
from .wanted import Wanted

_END, _CONSTRAIN = "<|end|>", "<|constrain|>"


def harmony_grammar(wanted: Wanted, control: Iterable[str], tail: str) -> Grammar | None:
    """Return the grammar of an answer whose message the prompt has just begun, None if anything is allowed.

    The usual token behind a call ends the answer. Some models write more messages in place of it. ``tail``: an answer
    that goes on inside of a message is not constrained, unless the message has the text.
    """
    calls = wanted.tools if wanted.mode != "none" else {}
    if not wanted.body and not wanted.tools:
        return None
    lark = Lark(control)
    text, again = "ANY?", lark.marker(f"{_END}{START}assistant")
    inside = tail.rpartition(START)[2]
    lark.rule("thought", f"{lark.marker(CHANNEL + 'analysis' + MESSAGE)} {text}")
    lark.rule("note", f"{lark.marker(CHANNEL + 'commentary' + MESSAGE)} {text}")
    if wanted.body:
        lark.lines(wanted.body.rule("body"))
        text = "body"
    lark.rule("final", f"{lark.marker(CHANNEL + 'final' + MESSAGE)} {text}")
    if MESSAGE in inside:
        return Grammar(f"start: {text}\n{lark.text}") if wanted.body and "final" in inside else None
    if wanted.mode == "required" and calls:
        one = _call(lark, wanted)
        start = f"(thought {again})* {one}" + (f" ({again} {one})*" if wanted.parallel else "")
    elif wanted.body:
        start = f"(thought {again})* final"
    else:
        call = [_call(lark, wanted)] if calls else []
        first = ["thought", "note", *(call if wanted.parallel else [])]
        start = f"(({' | '.join(first)}) {again})* ({' | '.join(['final', 'note', 'thought', *call])})"
    return Grammar(f"start: {start}\n{lark.text}")


def _call(lark: Lark, wanted: Wanted) -> str:
    """Return a rule for the message of a call: the recipient is behind the channel, or in front of it."""
    kind = f'(" json" | " "? {lark.marker(_CONSTRAIN)} " "? "json")?'
    channel, message = lark.marker(f"{CHANNEL}commentary"), lark.marker(MESSAGE)
    calls = []
    for name, schema in wanted.tools.items():
        to = text_term(f" to=functions.{name}")
        arguments = lark.json(schema, lenient=name not in wanted.strict)
        calls.append(f"({channel} {to} {kind} | {to} {channel} {kind}) {message} {arguments}")
    return lark.new(" | ".join(calls))
