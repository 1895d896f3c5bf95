"""Files mapped into memory, whatever the device."""

import os

class Map:
    """All of an open file, read-only, as a Python buffer.

    A page that the file no longer backs when it is read is zeros, where the operating system would end the
    process, and the map is damaged from then on.
    """

    def __init__(self, fd: int, path: str | os.PathLike[str]) -> None: ...
    def close(self) -> None:
        """Give the memory back. Raises BufferError while views look into it."""
    def changed(self) -> bool:
        """Whether the file's size or time of change is another than when it was mapped.

        Also sees to it that the guard's handler of SIGBUS is the first one.
        """
    def touch(self, start: int, nbytes: int, /) -> None:
        """Read these pages into memory, at most 1 GiB of them."""
    @property
    def closed(self) -> bool: ...
    @property
    def damaged(self) -> bool:
        """Whether pages were read that the file no longer backs."""
    def __len__(self) -> int: ...
    def __getitem__(self, part: slice, /) -> bytes: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...
