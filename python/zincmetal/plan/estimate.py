"""The memory that a model needs against what the device can give: known, and refused, before anything is allocated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .. import settings
from ..errors import OutOfMemoryError


def device_budget(free_bytes: int) -> int:
    """Bytes that a model may take where ``free_bytes`` of a device's working set are free, or
    ``ZINCMETAL_MEMORY_LIMIT`` if less.

    Raises UsageError where the variable is not a number of bytes.
    """
    limit = settings.memory_limit()
    return free_bytes if limit is None else min(free_bytes, limit)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of everything that one sequence of ``n_ctx`` tokens needs, against ``budget``.

    ``weights`` by quant type, mapped from the file; ``kv_page`` is what ``page`` positions take in all caches;
    ``arena`` by the rows of a plan: the largest that the context needs counts, as plans share it.
    """

    n_ctx: int
    n_ctx_train: int
    budget: int
    weights: Mapping[str, int]
    page: int
    kv_page: int
    recurrent: int
    arena: Mapping[int, int]
    logits: int
    other: int

    @property
    def kv(self) -> int:
        """The K/V caches of a sequence: whole pages."""
        return -(-self.n_ctx // self.page) * self.kv_page

    def arena_of(self, n_ctx: int) -> int:
        """The arena that steps of up to ``n_ctx`` rows need: the smallest plan that holds them, or the largest."""
        rows = min((r for r in self.arena if r >= n_ctx), default=max(self.arena))
        return max(nbytes for r, nbytes in self.arena.items() if r <= rows)

    @property
    def fixed(self) -> int:
        """What has the same size whatever the context is: everything but the caches and the arena."""
        return sum(self.weights.values()) + self.recurrent + self.logits + self.other

    @property
    def total(self) -> int:
        """Everything."""
        return self.fixed + self.arena_of(self.n_ctx) + self.kv

    @property
    def largest_context(self) -> int:
        """The longest context that fits the budget, up to the trained one or that asked for; 0 where none does.

        Exact where ``arena`` has the plans of all contexts.
        """
        longest = max(self.n_ctx, self.n_ctx_train)
        limits = [longest if rows == max(self.arena) else min(rows, longest) for rows in self.arena]
        return max(self._largest_up_to(limit) for limit in limits)

    def _largest_up_to(self, limit: int) -> int:
        """The longest context of up to ``limit`` tokens that fits with the arena of ``limit`` tokens."""
        room = self.budget - self.fixed - self.arena_of(limit)
        if room < 0 or not self.kv_page:
            return limit if room >= 0 else 0
        return min(limit, room // self.kv_page * self.page)

    def fits(self, sequences: int = 1) -> bool:
        """Whether so many sequences, which share the weights, are within the budget."""
        weights = sum(self.weights.values())
        return weights + sequences * (self.total - weights) <= self.budget

    def check(self, sequences: int = 1) -> None:
        """Raise OutOfMemoryError, with the numbers, where the total of so many sequences is over the budget."""
        if self.fits(sequences):
            return
        weights = sum(self.weights.values())
        if sequences > 1:
            raise OutOfMemoryError(
                f"{sequences} sequences of {self.n_ctx} tokens need {in_units(self.total - weights)} each beside "
                f"weights of {in_units(weights)}, and this device has {in_units(self.budget)}; close one, or load the "
                f"model with a smaller context"
            )
        remedy = f"the largest context that fits is {self.largest_context}"
        if not self.largest_context:
            remedy = "no context fits, whatever its length"
        raise OutOfMemoryError(
            f"with a context of {self.n_ctx} tokens the model needs {in_units(self.total)} and this device has "
            f"{in_units(self.budget)} for it: weights {in_units(weights)}, "
            f"K/V {in_units(self.kv)}, recurrent state {in_units(self.recurrent)}, "
            f"arena {in_units(self.arena_of(self.n_ctx))}, logits and others {in_units(self.logits + self.other)}; "
            f"{remedy}"
        )


def in_units(nbytes: int) -> str:
    """Bytes as people read them: 22.1 GB."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if nbytes >= size:
            return f"{nbytes / size:.4g} {unit}"
    return f"{nbytes} bytes"
