"""Files mapped into memory, for every device."""

import os
from typing import final

@final
class Map:
    """Whole open file, read-only, as a Python buffer.

    A page that the file no longer backs reads as zeros, and the map is *damaged* from then on. Without the map's guard
    the operating system would end the process.
    """

    def __new__(cls, fd: int, path: str | os.PathLike[str]) -> Map: ...
    def close(self) -> None:
        """Give the memory back. Raises BufferError while views look into it."""
    def changed(self) -> bool:
        """Return True if the file's size or time of change differs from when it was mapped.

        The call also makes the guard's handler of SIGBUS the first one again.
        """
    def touch(self, start: int, nbytes: int, /) -> None:
        """Read these pages into memory, at most 1 GiB of them."""
    @property
    def closed(self) -> bool: ...
    @property
    def damaged(self) -> bool:
        """True if a page was read that the file no longer backs."""
    def __len__(self) -> int: ...
    def __getitem__(self, part: slice, /) -> bytes: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...
