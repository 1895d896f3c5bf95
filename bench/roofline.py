"""Compares every kernel of a model's decode and prefill with its roofline: a table, JSON and a plot.

    python bench/roofline.py FILE.gguf --out results      # roofline.json, roofline.png
    python bench/roofline.py --plot results/roofline.json # the plot alone, of another machine's figures

First come figures of the whole model: tokens per second of a prompt and of greedy decode, dispatches, megabytes. Then
each plan's dispatches, timed one by one by the device (the median of several passes), summed by kernel and shape. The
roof of a class is the larger of two times: its bytes at the speed of a copy, and its operations at the speed of a
matrix product. Both speeds are measured in the same run. Weights, activations and states count once each. Savings by a
cache do not count. "Bound" names the largest of bytes, operations and the cost of a bare dispatch. It is "latency" if
the time is over twice that.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import ceilings
import zincmetal
from ceilings import Ceilings
from costs import Costs, shape_of
from zincmetal.plan.plan import Plan

PASSES = 5
START = 16  # prompt tokens if decode is also timed from the start of a context


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
        """Returns the least time of the bytes and operations."""
        return max(self.nbytes / roof.copy, self.flops / roof.flops) * 1e6

    def bound(self, roof: Ceilings) -> str:
        """Returns the bound of the time: bytes, operations, dispatch or latency."""
        bounds = {
            "memory": self.nbytes / roof.copy * 1e6,
            "arithmetic": self.flops / roof.flops * 1e6,
            "launch": self.count * roof.dispatch * 1e6,
        }
        largest = max(bounds, key=lambda name: bounds[name])
        return "latency" if self.us > 2 * bounds[largest] else largest

    def row(self, roof: Ceilings) -> dict[str, Any]:
        """Returns the class as JSON has it."""
        roof_us = self.roof_us(roof)
        share = roof_us / self.us if self.us else 0.0
        return {**asdict(self), "roof_us": roof_us, "share": share, "bound": self.bound(roof)}


# ---- measuring --------------------------------------------------------------------------------------------------


def classes(model: zincmetal.Model, plan: Plan, pos: int, ids: list[int]) -> list[Class]:
    """Times each dispatch of the plan in a step of ``ids`` at ``pos``; sums by kernel and shape, longest first."""
    passes = [model.time_dispatches(ids, pos) for _ in range(PASSES + 1)][1:]
    planner, found = model.engine.planner, dict[tuple[str, str], Class]()
    costs = Costs(plan, model.config, planner.addresses.room.pages * planner.target.page, pos)
    for timed in zip(*passes, strict=True):
        d, seconds = timed[0][0], median(seconds for _, seconds in timed)
        key = (d.launch.kernel, shape_of(plan, d))
        c, cost = found.setdefault(key, Class(*key)), costs.of(d)
        c.count += 1
        c.us += seconds * 1e6
        c.nbytes += cost.nbytes
        c.flops += cost.flops
    return sorted(found.values(), key=lambda c: -c.us)


def timed_prefill(model: zincmetal.Model, ids: list[int]) -> dict[str, float]:
    """Times the prompt: median seconds of the host and of the device."""

    def once() -> tuple[float, float]:
        with model.session() as session:
            worked, began = model.profile()["gpu_seconds"], time.perf_counter()
            session.prefill(ids)
            return time.perf_counter() - began, model.profile()["gpu_seconds"] - worked

    once()
    wall, gpu = (median(column) for column in zip(*(once() for _ in range(PASSES)), strict=True))
    return {"tokens": len(ids), "seconds": wall, "device_seconds": gpu, "tokens_per_second": len(ids) / wall}


def decode(model: zincmetal.Model, ids: list[int], n: int) -> tuple[float, float]:
    """Times ``n`` greedy tokens after the prompt, as generation makes them: seconds of the host and of the device."""
    ahead = model.engine.runs_ahead
    with model.session() as session:
        token = session.prefill(ids)
        token = session.decode(token, ahead)
        worked, began = model.profile()["gpu_seconds"], time.perf_counter()
        for left in range(n, 0, -1):
            token = session.decode(token, ahead and left > 1)
        return time.perf_counter() - began, model.profile()["gpu_seconds"] - worked


def timed_decode(model: zincmetal.Model, ids: list[int], n: int) -> dict[str, float]:
    """Returns the median of three runs, after one that is not counted."""
    decode(model, ids, n)
    wall, gpu = (median(column) for column in zip(*(decode(model, ids, n) for _ in range(3)), strict=True))
    return {"tokens": n, "seconds": wall, "device_seconds": gpu, "tokens_per_second": n / wall}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measures all figures; returns them as JSON has them."""
    with zincmetal.load(args.file, context=args.context, device=args.device, threads=args.threads) as model:
        roof = ceilings.measure(model.engine.core, model.device)
        rng = np.random.default_rng(3)
        ids: list[int] = rng.integers(0, model.config.n_vocab, args.prompt).tolist()
        prefill = timed_prefill(model, ids)
        after = {n: timed_decode(model, ids[:n], args.tokens) for n in (START, args.prompt)}
        with model.session() as session:
            session.prefill(ids)  # states and caches as decode finds them
        decode_plan, prefill_plan = model.plan(1), model.plan(args.prompt)
        phases = {
            "decode": (after[args.prompt], decode_plan, classes(model, decode_plan, args.prompt, ids[:1])),
            "prefill": (prefill, prefill_plan, classes(model, prefill_plan, 0, ids)),
        }
        return {
            "file": Path(args.file).name,
            "device": model.device.info["name"],
            "ceilings": {**asdict(roof), "copy": roof.copy, "flops": roof.flops},
            "measured": roof.lines(),
            **{name: phase(*of, roof) for name, of in phases.items()},
            "decode_after": after,
        }


def phase(whole: dict[str, float], plan: Plan, found: list[Class], roof: Ceilings) -> dict[str, Any]:
    """Returns one plan's figures."""
    return {
        "whole": whole,
        "dispatches": len(plan.dispatches),
        "barriers": plan.n_barriers,
        "weight_bytes": sum(plan.weight_bytes().values()),
        "recurrent_bytes": plan.recurrent_bytes(),
        "classes": [c.row(roof) for c in found],
    }


# ---- telling ----------------------------------------------------------------------------------------------------


def lines(result: dict[str, Any]) -> Iterator[str]:
    """Formats the tables."""
    yield f"{result['file']} on {result['device']}"
    yield from result["measured"]
    for name in ("prefill", "decode"):
        yield ""
        yield from _phase_lines(name, result[name], result["ceilings"]["copy"])
    yield ""
    for n, whole in result["decode_after"].items():
        each = whole["device_seconds"] / whole["tokens"] * 1e6
        label = f"decode of {whole['tokens']} after {n}"
        yield f"{label}: {whole['tokens_per_second']:,.1f} tokens/s, {each:,.0f} us of the device each"


def _phase_lines(name: str, of: dict[str, Any], copy: float) -> Iterator[str]:
    whole, rows = of["whole"], of["classes"]
    steps = whole["tokens"] if name == "decode" else 1
    step_us, alone_us = whole["device_seconds"] / steps * 1e6, sum(c["us"] for c in rows)
    roof_us, moved = sum(c["roof_us"] for c in rows), of["weight_bytes"] + of["recurrent_bytes"]
    yield (
        f"{name} of {whole['tokens']}: {whole['tokens_per_second']:,.1f} tokens/s; a step of {of['dispatches']} "
        f"dispatches and {of['barriers']} barriers takes {step_us:,.0f} us of the device"
    )
    yield (
        f"one by one they take {alone_us:,.0f} us, the roofline allows {roof_us:,.0f}; weights and recurrent state are "
        f"{moved / 1e6:,.1f} MB, {moved / copy * 1e6:,.0f} us of copying"
    )
    yield (
        f"{'kernel':<30}{'shape':<26}{'count':>6}{'us':>12}{'us each':>11}{'MB':>10}{'GFLOP':>9}{'GB/s':>8}"
        f"{'roof us':>12}{'share':>8}  bound"
    )
    for c in rows:
        yield (
            f"{c['kernel']:<30}{c['shape']:<26}{c['count']:>6}{c['us']:>12,.1f}{c['us'] / c['count']:>11,.2f}"
            f"{c['nbytes'] / 1e6:>10,.2f}{c['flops'] / 1e9:>9,.2f}{c['nbytes'] / c['us'] / 1e3:>8,.0f}"
            f"{c['roof_us']:>12,.1f}{c['share']:>8.1%}  {c['bound']}"
        )


def main() -> None:
    """Measures, prints and writes."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("file", nargs="?", help="a GGUF file")
    p.add_argument("--plot", type=Path, metavar="JSON", help="plot figures that were measured before")
    p.add_argument("--out", type=Path, default=Path("."), help="folder for roofline.json and roofline.png")
    p.add_argument("--device")
    p.add_argument("--threads", type=int, default=0, help="of a CPU")
    p.add_argument("--context", type=int, default=4096)
    p.add_argument("--prompt", type=int, default=512, choices=(32, 128, 512), help="tokens, the rows of one plan")
    p.add_argument("--tokens", type=int, default=128, help="to decode")
    args = p.parse_args()
    if args.plot:
        result, out = json.loads(args.plot.read_text()), args.plot.parent
    elif args.file:
        result, out = measure(args), args.out
        out.mkdir(parents=True, exist_ok=True)
        (out / "roofline.json").write_text(json.dumps(result, indent=1))
    else:
        p.error("a file, or --plot")
    print("\n".join(lines(result)))
    try:
        from roofline_plot import plot
    except ImportError as error:
        print(f"no plot: {error}")
    else:
        plot(result, out / "roofline.png")


if __name__ == "__main__":
    main()
