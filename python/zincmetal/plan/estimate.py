"""Memory that a model needs and the memory that a device grants, compared before anything is allocated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .. import settings
from ..errors import OutOfMemoryError


def device_budget(free_bytes: int) -> int:
    """Return the bytes that a model may take: the free bytes of the device's working set, or a lower limit.

    The limit is ``ZINCMETAL_MEMORY_LIMIT``. Raises UsageError if that is not a number of bytes.
    """
    limit = settings.memory_limit()
    return free_bytes if limit is None else min(free_bytes, limit)


_COLORS = ("#4c72b0", "#dd8452", "#55a868", "#8172b3", "#937860")  # of the sections of the bar in a notebook


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that one sequence of ``n_ctx`` tokens needs, and the ``budget`` that it has.

    ``weights``, mapped from the file, are by quant type. ``kv_page`` is the size of a page, ``page`` positions, in all
    pools together. ``table_page`` is the size of its entries in page tables, which are allocated for the whole context.
    ``slot`` is the recurrent state of a sequence. ``arena`` is by the rows of a plan. Plans share one arena: the
    largest that a context needs counts.
    """

    n_ctx: int
    n_ctx_train: int
    budget: int
    weights: Mapping[str, int]
    page: int
    kv_page: int
    table_page: int
    slot: int
    arena: Mapping[int, int]
    logits: int
    other: int

    @property
    def kv(self) -> int:
        """Bytes of the K/V of a sequence: whole pages."""
        return -(-self.n_ctx // self.page) * self.kv_page

    @property
    def tables(self) -> int:
        """Bytes of the page tables."""
        return -(-self.n_ctx // self.page) * self.table_page

    def arena_of(self, n_ctx: int) -> int:
        """Bytes of the arena for a context: of the smallest plan that holds its rows, or of the largest plan."""
        rows = min((r for r in self.arena if r >= n_ctx), default=max(self.arena))
        return max(nbytes for r, nbytes in self.arena.items() if r <= rows)

    @property
    def fixed(self) -> int:
        """Bytes that do not depend on the context: all except the pages, their tables and the arena."""
        return sum(self.weights.values()) + self.slot + self.logits + self.other

    @property
    def total(self) -> int:
        """Bytes of everything."""
        return self.fixed + self.arena_of(self.n_ctx) + self.kv + self.tables

    @property
    def largest_context(self) -> int:
        """Longest context, in tokens, that fits the budget, or 0. At most the trained context, or the requested one.

        An example: the budget is 10 GB, and 6 GB are fixed. A plan of 512 rows needs an arena of 100 MB, and a page of
        64 positions takes 2 MB. The other 3.9 GB have room for 1,950 pages, which are 124,800 tokens. If a smaller plan
        with a smaller arena allows a longer context, that context counts.

        The number is exact if ``arena`` has the plans of all contexts.
        """
        longest = max(self.n_ctx, self.n_ctx_train)
        limits = [longest if rows == max(self.arena) else min(rows, longest) for rows in self.arena]
        return max(self._largest_up_to(limit) for limit in limits)

    @property
    def most_tokens(self) -> int:
        """Tokens of all sequences together whose K/V fit the budget, beside a sequence of the context; or 0."""
        free = (self.budget - self.total) // self.kv_page * self.page
        return self.n_ctx + free if free >= 0 else 0

    def _largest_up_to(self, limit: int) -> int:
        """Return the longest context of up to ``limit`` tokens that fits with the arena of ``limit`` tokens."""
        room = self.budget - self.fixed - self.arena_of(limit)
        if room < 0:
            return 0
        return min(limit, room // (self.kv_page + self.table_page) * self.page)

    def __repr__(self) -> str:
        return f"<MemoryEstimate: {in_units(self.total)} of {in_units(self.budget)} for a context of {self.n_ctx}>"

    def _repr_html_(self) -> str:
        """Draw a bar for notebooks: the sections of the total, and the rest of the budget."""
        sections = {
            "weights": sum(self.weights.values()),
            "K/V": self.kv,
            "recurrent state": self.slot,
            "arena": self.arena_of(self.n_ctx),
            "logits and others": self.logits + self.tables + self.other,
        }
        whole = max(self.total, self.budget, 1)
        shown = [(name, n, color) for (name, n), color in zip(sections.items(), _COLORS, strict=True) if n]
        bar = "".join(
            f'<span style="display:inline-block;height:1em;width:{n / whole:.2%};background:{color}"></span>'
            for _, n, color in shown
        )
        key = ", ".join(f'<span style="color:{color}">&#9632;</span> {name} {in_units(n)}' for name, n, color in shown)
        over = "" if self.fits() else ", which is more than the budget"
        text = f"{in_units(self.total)} of {in_units(self.budget)} for a context of {self.n_ctx} tokens{over}"
        return f'<div>{text}<div style="border:1px solid;font-size:1em;line-height:1em">{bar}</div>{key}</div>'

    def fits(self) -> bool:
        """Return True if the total is within the budget."""
        return self.total <= self.budget

    def check(self) -> None:
        """Raise OutOfMemoryError, with the numbers, if the total is over the budget."""
        if self.fits():
            return
        others = self.logits + self.tables + self.other
        remedy = f"the largest context that fits is {self.largest_context}"
        if not self.largest_context:
            remedy = "no context fits, not even the shortest"
        raise OutOfMemoryError(
            f"with a context of {self.n_ctx} tokens the model needs {in_units(self.total)} and this device has "
            f"{in_units(self.budget)} for it: weights {in_units(sum(self.weights.values()))}, "
            f"K/V {in_units(self.kv)}, recurrent state {in_units(self.slot)}, "
            f"arena {in_units(self.arena_of(self.n_ctx))}, logits and others {in_units(others)}; "
            f"{remedy}"
        )


def in_units(nbytes: int) -> str:
    """Format bytes for people: 22.1 GB."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if nbytes >= size:
            return f"{nbytes / size:.4g} {unit}"
    return f"{nbytes} bytes"
