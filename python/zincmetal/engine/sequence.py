"""Sequence of tokens. Plain data: nothing here knows a device."""

from __future__ import annotations

from collections.abc import Sequence as AnySequence
from dataclasses import dataclass, field


@dataclass
class Sequence:
    """Tokens whose state an engine holds.

    ``ids`` grow by the tokens of each step that has ended. A rewind cuts them. The token of a step that runs ahead
    joins them when it is settled. ``recurrent``: layers keep one state of the whole sequence, and none of an earlier
    position.
    """

    recurrent: bool
    ids: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)

    def reusable(self, prompt: AnySequence[int]) -> int:
        """Return the number of a prompt's first tokens whose state the engine holds.

        The last token never counts: it is computed in any case, since its logits are wanted.
        """
        kept = min(common(self.ids, prompt), len(prompt) - 1)
        return 0 if self.recurrent and kept < len(self.ids) else kept

    def cut(self, length: int) -> None:
        """Forget all tokens from position ``length`` on."""
        del self.ids[length:]


def common(a: AnySequence[int], b: AnySequence[int]) -> int:
    """Return the length of the common prefix."""
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return n
