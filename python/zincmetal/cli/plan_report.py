"""Report of ``zincmetal plan``: the memory that a model needs, and the bytes that a token costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..plan.chunks import SEATS, rows_for
from ..plan.estimate import MemoryEstimate, in_units
from ..plan.plan import Plan


@dataclass(frozen=True)
class Token:
    """Bytes that one token of decoding moves: the plan's, and ``kv_read`` bytes of K/V at the end of the context."""

    plan: Plan
    kv_read: int

    def speeds(self, bandwidth: float) -> dict[str, float]:
        """Return the tokens per second that ``bandwidth`` GB/s allow, at the start of a context and at its end."""
        nbytes = sum(self.plan.weight_bytes().values()) + self.plan.recurrent_bytes()
        return {"empty": bandwidth * 1e9 / nbytes, "full": bandwidth * 1e9 / (nbytes + self.kv_read)}

    def figures(self, bandwidth: float | None) -> dict[str, Any]:
        """Return the token for ``--json``, in bytes unless the key names another unit."""
        reads: dict[str, dict[str, int]] = {}
        for (path, qtype), nbytes in self.plan.weight_reads().items():
            reads.setdefault(path, {})[qtype] = nbytes
        return {
            "weights": reads,
            "recurrent": self.plan.recurrent_bytes(),
            "kv": self.kv_read,
            "dispatches": len(self.plan.dispatches),
            "barriers": self.plan.n_barriers,
            "longest_chain": self.plan.longest_chain,
            "tokens_per_second": self.speeds(bandwidth) if bandwidth else None,
        }

    def lines(self, bandwidth: float | None) -> Iterator[str]:
        """Yield a table by path and quant type, in MB."""
        reads = self.plan.weight_reads()
        by_path, by_type = Counter[str](), Counter[str]()
        for (path, qtype), nbytes in reads.items():
            by_path[path] += nbytes
            by_type[qtype] += nbytes
        types = [qtype for qtype, _ in by_type.most_common()]
        plan = self.plan
        steps = f"{plan.n_barriers} barriers, longest chain {plan.longest_chain}"
        yield f"bytes of a token, in MB: {len(plan.dispatches)} dispatches, {steps}"
        yield _row("weights", "all", types)
        for path, total in by_path.most_common():
            yield _row(path, _mb(total), [_mb(reads[path, qtype]) for qtype in types])
        yield _row("total", _mb(by_path.total()), [_mb(by_type[qtype]) for qtype in types])
        yield _row("share", "", [f"{by_type[qtype] / by_path.total():.1%}" for qtype in types])
        if self.plan.recurrent_bytes():
            yield _row("recurrent state", _mb(self.plan.recurrent_bytes()), ["read and written"])
        yield _row("K/V", _mb(self.kv_read), ["at the end of the context"])
        if bandwidth:
            empty, full = self.speeds(bandwidth).values()
            yield f"{bandwidth:g} GB/s allow {empty:.1f} tokens/s at the start of the context, {full:.1f} at its end"


class Longest(NamedTuple):
    """Most rows that a step has, of the prompts of all sequences, and about the bytes of its arena."""

    rows: int
    arena: int


def memory_figures(memory: MemoryEstimate, longest: Longest) -> dict[str, Any]:
    """Return the estimate for ``--json``, in bytes unless the key names another unit."""
    return {
        "weights": memory.weights,
        "kv": memory.kv,
        "kv_per_token": memory.kv_page / memory.page,
        "tables": memory.tables,
        "recurrent": memory.slot,
        "arena_by_rows": _arenas(memory),
        "logits": memory.logits,
        "other": memory.other,
        "total": memory.total,
        "budget": memory.budget,
        "fits": memory.total <= memory.budget,
        "largest_context": memory.largest_context,
        "most_tokens": memory.most_tokens,
        "longest_step": {"rows": longest.rows, "arena": longest.arena},
    }


def memory_lines(memory: MemoryEstimate, kv: str, longest: Longest) -> Iterator[str]:
    """Yield the estimate as a table, in bytes. ``kv`` is the type of the K/V cache."""

    def line(name: str, nbytes: int, note: str = "") -> str:
        return f"  {name:<22}{nbytes:>18,}  {note}".rstrip()

    yield f"\nmemory of a sequence of {memory.n_ctx:,} tokens, in bytes"
    weights = (f"{qtype} {in_units(n)}" for qtype, n in sorted(memory.weights.items()))
    yield line("weights, mapped", sum(memory.weights.values()), ", ".join(weights))
    yield line(f"K/V in {kv}", memory.kv, f"{memory.kv_page // memory.page:,} a token")
    yield line("page tables", memory.tables, f"for up to {SEATS} sequences")
    yield line("recurrent state", memory.slot)
    arenas = ", ".join(f"{rows}: {in_units(n)}" for rows, n in _arenas(memory).items())
    yield line("arena", memory.arena_of(memory.n_ctx), f"by rows of a step: {arenas}")
    yield line("logits", memory.logits)
    yield line("other", memory.other)
    fits = "fits" if memory.total <= memory.budget else "does not fit"
    yield line("total", memory.total, f"of {memory.budget:,}: {fits}")
    yield line("largest context", memory.largest_context, "tokens")
    yield line("all sequences", memory.most_tokens, "tokens, at most")
    yield line("longest step", longest.rows, f"rows of prompts; its arena: about {in_units(longest.arena)}")


def _arenas(memory: MemoryEstimate) -> dict[int, int]:
    """Return the arena's bytes by the rows of a plan, for the plans that prompts of this context need."""
    return {rows: nbytes for rows, nbytes in memory.arena.items() if rows <= rows_for(memory.n_ctx)}


def _row(name: str, value: str, rest: Sequence[str]) -> str:
    return f"  {name:<16}{value:>10}  " + "".join(f"{v:>9}" for v in rest)


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.1f}" if nbytes else ""
