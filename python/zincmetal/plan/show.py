"""Plan as text, JSON, a graph, and a table for notebooks."""

from __future__ import annotations

import html
import json
from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING

from ..graph.ops import SIGNATURES
from .estimate import in_units
from .launch import Arg, Dispatch

if TYPE_CHECKING:
    from .addresses import Region
    from .plan import Plan


def dump(plan: Plan) -> str:
    """Write one dispatch a line: barrier, kernel, grid, and its operands with their regions.

    ``-`` fills the place of an operand that was left out. A replacement names the missing kernels.
    """
    lines = [
        f"plan for {plan.shape}: {len(plan.dispatches)} dispatches, {plan.n_barriers} barriers, "
        f"longest chain {plan.longest_chain}, arena {plan.arena_bytes} bytes"
    ]
    for i, d in enumerate(plan.dispatches):
        args = " ".join(_shown(arg, region) for arg, region in zip(d.launch.args, d.regions, strict=True))
        mark = "|" if d.barrier else " "
        note = f" instead of {', '.join(d.launch.replaces)}" if d.launch.replaces else ""
        grid = f"{d.launch.grid!s:14s} x{d.launch.threads:<4d}"
        lines.append(f"{i:4d} {mark} {d.launch.kernel:28s} {grid} {args}{note}")
    return "\n".join(lines)


def _shown(arg: Arg, region: Region) -> str:
    if arg.unused:
        return "-"
    return f"{arg.mode}:{arg.operand.name}@{region.buffer}+{region.offset}:{region.nbytes}"


def to_json(plan: Plan) -> str:
    """Write a JSON object: shape, arena_bytes, dispatches (kernel, replaced kernels, grid, threads, barrier, args)."""
    dispatches = [
        {
            "kernel": d.launch.kernel,
            "instead_of": d.launch.replaces,
            "grid": d.launch.grid,
            "threads": d.launch.threads,
            "barrier": d.barrier,
            "args": [
                {"name": a.operand.name, "mode": a.mode, "buffer": r.buffer, "offset": r.offset, "nbytes": r.nbytes}
                for a, r in zip(d.launch.args, d.regions, strict=True)
            ],
        }
        for d in plan.dispatches
    ]
    return json.dumps({**asdict(plan.shape), "arena_bytes": plan.arena_bytes, "dispatches": dispatches})


def to_dot(plan: Plan) -> str:
    """Write a Graphviz digraph: an arrow from each dispatch to the dispatches that need its bytes."""
    lines = ["digraph plan {", "  node [shape=box, fontname=monospace];"]
    for i, d in enumerate(plan.dispatches):
        lines.append(f'  d{i} [label="{i} {d.launch.kernel}\\n{d.launch.op.out.name}"];')
        lines += [f"  d{j} -> d{i};" for j in _producers(plan, i)]
    return "\n".join([*lines, "}"])


def _producers(plan: Plan, i: int) -> list[int]:
    """Find the latest earlier dispatches that wrote the bytes which dispatch ``i`` reads."""
    found = set()
    for region in plan.dispatches[i].touching("r"):
        for j in range(i - 1, -1, -1):
            if any(region.overlaps(w) for w in plan.dispatches[j].touching("w")):
                found.add(j)
                break
    return sorted(found)


def to_html(plan: Plan) -> str:
    """Write a table for notebooks: dispatches and bytes of weights by class of kernel, the most bytes first."""
    counts, nbytes = Counter[str](), Counter[str]()
    for d in plan.dispatches:
        name = kernel_class(d)
        counts[name] += 1
        nbytes[name] += sum(plan.weights_of(d).values())
    rows = [
        f"<tr><td>{html.escape(name)}</td><td>{counts[name]}</td><td>{in_units(nbytes[name])}</td></tr>"
        for name in sorted(counts, key=lambda name: (-nbytes[name], name))
    ]
    total = f"<tr><th>all</th><th>{counts.total()}</th><th>{in_units(nbytes.total())}</th></tr>"
    head = "<tr><th>kernels</th><th>dispatches</th><th>weights read</th></tr>"
    return f"<table><caption>{html.escape(repr(plan))}</caption>{head}{''.join(rows)}{total}</table>"


def kernel_class(d: Dispatch) -> str:
    """Return the kernel's name without quant type and size: "mul_mv_add", "attention"."""
    kernel = d.launch.kernel
    return max((name for name in SIGNATURES[d.launch.op.kind].kernels if kernel.startswith(name)), key=len).rstrip("_")
