"""Pools of pages and of state slots: which are free, and how many owners the others have.

A pool hands out numbers. It knows neither tokens nor bytes. Whoever takes or retains a number releases it once.
"""

from __future__ import annotations

from collections.abc import Iterable


class PoolEmptyError(Exception):
    """Raised inside the engine if a pool has nothing free. No caller sees it: the scheduler makes room."""


class Pool:
    """Numbers 0 .. size-1, each free or with a count of owners."""

    def __init__(self, size: int) -> None:
        self._counts = [0] * size
        self._free = list(range(size - 1, -1, -1))  # the lowest number is taken first

    @property
    def size(self) -> int:
        """Numbers of the pool."""
        return len(self._counts)

    @property
    def free(self) -> int:
        """Numbers without an owner."""
        return len(self._free)

    def take(self) -> int:
        """Return a free number. The caller is its one owner. Raises PoolEmptyError."""
        if not self._free:
            raise PoolEmptyError(f"all {self.size} are in use")
        number = self._free.pop()
        self._counts[number] = 1
        return number

    def retain(self, number: int) -> int:
        """Add an owner to a number that has one, and return it."""
        assert self._counts[number] > 0, f"{number} is free: nobody can share it"
        self._counts[number] += 1
        return number

    def release(self, number: int) -> None:
        """Remove an owner. Without any, the number is free."""
        count = self._counts[number]
        assert count > 0, f"{number} is free already"
        self._counts[number] = count - 1
        if count == 1:
            self._free.append(number)

    def retain_all(self, numbers: Iterable[int]) -> list[int]:
        """Add an owner to each of some numbers, and return them."""
        return [self.retain(number) for number in numbers]

    def release_all(self, numbers: Iterable[int]) -> None:
        """Remove an owner of each of some numbers."""
        for number in numbers:
            self.release(number)

    def count(self, number: int) -> int:
        """Return the number of owners."""
        return self._counts[number]

    def shared(self, number: int) -> bool:
        """Return True if there are several owners: none of them may write."""
        return self._counts[number] > 1

    def grow(self, size: int) -> None:
        """Add free numbers until there are ``size``. A smaller size changes nothing."""
        added = range(self.size, size)
        self._free[:0] = reversed(added)  # taken after those that are free now
        self._counts += [0] * len(added)


class PagePool(Pool):
    """Pages: places for the keys, the values and the ids of ``PAGE`` positions of a sequence."""

    PAGE = 64

    @classmethod
    def needed(cls, length: int) -> int:
        """Return the pages of a sequence of ``length`` tokens."""
        return -(-length // cls.PAGE)


class StateSlots(Pool):
    """State slots: places for the recurrent states of a sequence after one of its tokens."""


class Seats:
    """Seats: page tables on the device. A sequence whose rows are in steps has one."""

    def __init__(self, n: int, first: int = 0) -> None:
        self._all = range(first + n - 1, first - 1, -1)
        self._free = list(self._all)

    def reset(self) -> None:
        """Take all seats back."""
        self._free = list(self._all)

    @property
    def free(self) -> int:
        """Seats that nobody has."""
        return len(self._free)

    def take(self) -> int:
        """Return a free seat. Raises PoolEmptyError."""
        if not self._free:
            raise PoolEmptyError("all seats are taken")
        return self._free.pop()

    def release(self, seat: int) -> None:
        """Give a seat back."""
        assert seat not in self._free, f"seat {seat} is free already"
        self._free.append(seat)
