"""Roofline of a model's kernels: every dispatch of a step beside the least time that the device's rates allow.

The roof of a class is the larger of two times: its bytes at the speed of a copy, and its operations at the speed of a
matrix product. Both speeds are measured in the same run. Weights, activations and states count once each. Savings by a
cache do not count. "Bound" names the largest of bytes, operations and the cost of a bare dispatch. It is "latency" if
the time is over twice that.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from ..engine.session import Session
from ..engine.timing import time_dispatches
from ..plan.chunks import chunk_shape, decode_shape
from ..plan.launch import Dispatch
from ..plan.plan import Plan
from .ceilings import Ceilings
from .costs import Costs, shape_of

PASSES = 5
SHOWN = 12  # classes of a table; the rest is one line


@dataclass
class Class:
    """Dispatches of one kernel and shape, summed over a step. Times are in microseconds."""

    kernel: str
    shape: str
    count: int = 0
    us: float = 0.0
    nbytes: int = 0
    flops: int = 0

    def roof_us(self, roof: Ceilings) -> float:
        """Return the least time of the bytes and operations."""
        return max(self.nbytes / roof.copy, self.flops / roof.flops) * 1e6

    def bound(self, roof: Ceilings) -> str:
        """Return the bound of the time: memory, arithmetic, launch or latency."""
        bounds = {
            "memory": self.nbytes / roof.copy * 1e6,
            "arithmetic": self.flops / roof.flops * 1e6,
            "launch": self.count * roof.dispatch * 1e6,
        }
        largest = max(bounds, key=lambda name: bounds[name])
        return "latency" if self.us > 2 * bounds[largest] else largest

    def facts(self, roof: Ceilings) -> dict[str, Any]:
        """Return the class as JSON has it."""
        roof_us = self.roof_us(roof)
        share = roof_us / self.us if self.us else 0.0
        return {**asdict(self), "roof_us": roof_us, "share": share, "bound": self.bound(roof)}


def profiled(session: Session, roof: Ceilings, rows: int, position: int, passes: int = PASSES) -> dict[str, Any]:
    """Time each dispatch of a step of ``rows`` tokens at ``position``, one by one; return the step's figures.

    Each time is the median of the passes. ``classes`` are sums by kernel and shape, the longest first. ``bytes`` are of
    weights, by their use and type. Forgets the session's sequence. Raises as ``time_dispatches``.
    """
    ids = [1 + i % (session.engine.config.n_vocab - 1) for i in range(rows)]
    runs = [time_dispatches(session, ids, position) for _ in range(passes + 1)][1:]
    times = [(timed[0][0], median(seconds for _, seconds in timed)) for timed in zip(*runs, strict=True)]
    engine = session.engine
    plan = engine.program(decode_shape(1) if rows == 1 else chunk_shape(rows, 0, 0, "none"), position + rows - 1).plan
    pool = engine.planner.addresses.room.pages * engine.planner.target.page
    found = classes(plan, times, Costs(plan, engine.config, pool, position))
    return {
        "rows": rows,
        "position": position,
        "dispatches": len(plan.dispatches),
        "barriers": plan.n_barriers,
        "bytes": [{"path": path, "type": of, "bytes": n} for (path, of), n in plan.weight_reads().most_common()],
        "recurrent_bytes": plan.recurrent_bytes(),
        "classes": [c.facts(roof) for c in found],
    }


def classes(plan: Plan, times: Iterable[tuple[Dispatch, float]], costs: Costs) -> list[Class]:
    """Sum dispatches with their seconds by kernel and shape, the longest first."""
    found = dict[tuple[str, str], Class]()
    for d, seconds in times:
        key = (d.launch.kernel, shape_of(plan, d))
        c, cost = found.setdefault(key, Class(*key)), costs.of(d)
        c.count += 1
        c.us += seconds * 1e6
        c.nbytes += cost.nbytes
        c.flops += cost.flops
    return sorted(found.values(), key=lambda c: -c.us)


# ---- telling ----------------------------------------------------------------------------------------------------


def class_rows(step: Mapping[str, Any], shown: int = SHOWN) -> list[dict[str, Any]]:
    """Make the rows of a table of a step's classes: the longest, and one row for all others."""
    found: Sequence[Mapping[str, Any]] = step["classes"]
    total = sum(c["us"] for c in found) or 1.0
    rest = found[shown:]
    if rest:
        sums = {key: sum(c[key] for c in rest) for key in ("count", "us", "nbytes", "flops", "roof_us")}
        share = sums["roof_us"] / (sums["us"] or 1.0)
        found = [*found[:shown], {"kernel": f"{len(rest)} more", "shape": "", "share": share, "bound": "", **sums}]
    return [
        {
            "kernel": c["kernel"],
            "shape": c["shape"],
            "count": c["count"],
            "us": f"{c['us']:,.1f}",
            "of step": f"{c['us'] / total:.1%}",
            "MB": f"{c['nbytes'] / 1e6:,.2f}",
            "GB/s": f"{c['nbytes'] / (c['us'] or 1.0) / 1e3:,.1f}",
            "of roofline": f"{c['share']:.0%}",
            "bound by": c["bound"],
        }
        for c in found
    ]


def byte_rows(step: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Make the rows of a table of the weights that a step reads, by use and type."""
    total = sum(of["bytes"] for of in step["bytes"]) or 1
    return [
        {
            "weights": of["path"],
            "type": of["type"],
            "MB": f"{of['bytes'] / 1e6:,.2f}",
            "share": f"{of['bytes'] / total:.1%}",
        }
        for of in step["bytes"]
    ]


def hottest(step: Mapping[str, Any], n: int = 4) -> list[str]:
    """Return the shapes of products that take the most time, with their kernels and microseconds."""
    products = [c for c in step["classes"] if c["shape"]]
    return [f"{c['shape']} ({c['kernel']}, {c['count']} x {c['us'] / c['count']:,.1f} us)" for c in products[:n]]


def points(step: Mapping[str, Any]) -> Iterator[tuple[str, float, float, float]]:
    """Yield the points of a plot: label, operations for each byte, operations per second, share of the step's time.

    A class without operations that are counted has no place on the plot.
    """
    total = sum(c["us"] for c in step["classes"]) or 1.0
    for c in step["classes"]:
        if c["flops"] and c["nbytes"] and c["us"]:
            label = f"{c['kernel']} {c['shape']}".rstrip()
            yield label, c["flops"] / c["nbytes"], c["flops"] / c["us"] * 1e6, c["us"] / total
