"""Predicts where the prompt of the next turn will leave this one, so that a recurrent state can be kept there.

Templates change what they have shown. The reasoning of an answer goes when the next question comes, and so do the
words that opened it: a prompt that ends in ``<think>`` is no beginning of the next. A state after them is of no use.

So the template renders what may follow, with words in the place of the answer, and the texts are compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .marks import unmarked

if TYPE_CHECKING:
    from ..tokenizer import Tokenizer
    from .capabilities import Capabilities
    from .template import ChatTemplate

Messages = Sequence[Mapping[str, Any]]

_NONE: Mapping[str, Any] = MappingProxyType({})
# No template and hardly a message begins with such a word.
_WORDS = "zinknext"
_CALL = {"id": "zinkcall1", "type": "function", "function": {"name": _WORDS, "arguments": {_WORDS: _WORDS}}}
_ANSWERED = ({"role": "assistant", "content": _WORDS}, {"role": "user", "content": _WORDS})
_CALLED = (
    {"role": "assistant", "content": None, "tool_calls": [_CALL], "reasoning_content": _WORDS},
    {"role": "tool", "content": _WORDS, "tool_call_id": "zinkcall1", "name": _WORDS},
)


class Kept(NamedTuple):
    """Characters of a prompt that other prompts will begin with, without marks: up to which they are the same.

    ``system``: the prompts of other conversations, 0 for none. ``turns``: the next ones of this conversation.
    """

    system: int
    turns: tuple[int, ...]


def kept(
    template: ChatTemplate,
    can: Capabilities,
    shown: str,
    messages: Messages,
    tools: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] = _NONE,
    now: float | None = None,
) -> Kept:
    """Compare a prompt with those that may follow it. ``shown`` is that of the ``messages``, which are canonical.

    What the template is known to leave as it is, it need not render.
    """
    known = variables == can.preserving
    leading = list(takewhile(lambda message: message["role"] == "system", messages))
    followed = [] if known and can.stable else [[*messages, *_ANSWERED]]
    followed += [] if not tools or (known and can.stable_in_loop) else [[*messages, *_CALLED]]
    asked = [[*leading, {"role": "user", "content": _WORDS}]] if leading or tools else []
    calls = [{"messages": some, "tools": tools, "variables": variables} for some in asked + followed]
    texts = template.attempts(calls, now=now)
    text = unmarked(shown)
    same = [0 if other is None else common_length(text, other) for other in texts]
    return Kept(same[0] if asked else 0, tuple(n for n in same[len(asked) :] if 0 < n < len(text)))


def common_length(a: str, b: str) -> int:
    """Return the number of characters that two texts have in common at their beginning."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low


class TokenEnds:
    """Finds tokens by their place in the text. Keep one for a tokenizer: it learns the lengths of tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._lengths = np.full(tokenizer.vocab_size, -1, np.int64)

    def before(self, ids: Sequence[int], text: str, lengths: Sequence[int]) -> list[int]:
        """Return, for each number of characters of ``text``, after how many of its tokens another text may go on there.

        The last token before the place does not count, unless it is a control token: with other text behind it, it
        may be a part of a longer one. ``text`` may have less in front than ``ids``: a begin token. Returns [] if they
        do not belong together.
        """
        tokens = np.asarray(ids, np.int64)
        for new in np.unique(tokens[self._lengths[tokens] < 0]).tolist():
            self._lengths[new] = len(self._tokenizer.token_bytes(new))
        ends = np.cumsum(self._lengths[tokens])
        extra = int(ends[-1]) - len(text.encode("utf-8", "replace")) if len(ids) else -1
        if not 0 <= extra <= int(self._lengths[ids[0]]) + 1:
            return []
        places = [len(text[:n].encode("utf-8", "replace")) + extra for n in lengths]
        found = [int(n) for n in np.searchsorted(ends, places, side="right")]
        return [n - 1 if 0 < n < len(ids) and ids[n - 1] not in self._tokenizer.control_ids else n for n in found]
