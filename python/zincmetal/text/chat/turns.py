"""Finds the turns of a chat in its token ids, so that what they begin with can be kept for the next prompt.

A chat's turns begin with one control token, such as ``<|im_start|>``. No text of a message can hold it
(``marks.py``). It is the first control token of the prompt after the begin token.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence


def turn_starts(ids: Sequence[int], control: Collection[int], bos: int | None) -> list[int]:
    """Return the positions at which turns begin, the first turn's among them. Empty if no control token is there."""
    begin = 1 if ids and ids[0] == bos else 0
    opening = next((t for t in ids[begin:] if t in control), None)
    if opening is None:
        return []
    return [i for i in range(begin, len(ids)) if ids[i] == opening]
