"""Values from the bytes of a fuzzer. The bytes may end at any time: then values are zero or empty."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Reading:
    """Reads values from the front of ``data``."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def __bool__(self) -> bool:
        return self.at < len(self.data)

    def take(self, n: int) -> bytes:
        """The next ``n`` bytes, or fewer at the end."""
        taken = self.data[self.at : self.at + n]
        self.at += n
        return taken

    def rest(self) -> bytes:
        """All bytes that are left."""
        return self.take(len(self.data))

    def byte(self) -> int:
        """The next byte, or 0."""
        return (self.take(1) or b"\0")[0]

    def number(self, n_bytes: int) -> int:
        """An unsigned number of so many bytes."""
        return int.from_bytes(self.take(n_bytes), "little")

    def one(self, choices: Sequence[T]) -> T:
        """One of up to 256 things."""
        return choices[self.byte() % len(choices)]

    def text(self, longest: int = 255) -> str:
        """A text of up to so many bytes, after its length. Bytes that are no UTF-8 are replaced."""
        return self.take(self.byte() % (longest + 1)).decode("utf-8", "replace")

    def pieces(self, text: str) -> list[str]:
        """The text in pieces, cut at places that three bytes say."""
        cuts = sorted(self.byte() * (len(text) + 1) // 256 for _ in range(3))
        return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def spelled(raw: bytes, words: Sequence[str]) -> str:
    """Text of bytes: ASCII, and from 128 on words, so that a fuzzer soon writes what a parser knows."""
    return "".join(words[b - 128] if 128 <= b < 128 + len(words) else chr(b) for b in raw)


def check_message(error: Exception) -> None:
    """An error says one thing, however long the values are that it is about."""
    assert 0 < len(str(error)) < 3000, f"{len(str(error))} characters: {str(error)[:200]}"
