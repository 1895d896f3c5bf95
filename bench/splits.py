"""Measures whether another split of a kernel's work makes a whole model decode faster: then it belongs in tuning.py.

    python bench/splits.py FILE.gguf mul_mv_add_q8_0:rows=1,threads=512 moe_mv_gated_q4_k:threads=512 [--together]

`pytest bench --sweep` finds splits that win by themselves. Here each split is tried in the model, on its backend,
against the usual plans. All share the weights and take turns in a rotating order. The usual plans run twice a round:
the difference of the two is the noise. Prints the medians, and the median and range of the ratios round by round. A
split wins if its least ratio is above the noise's largest. ``--together`` adds a side with all splits. Other rows need
a build with ``ZINCMETAL_SWEEP=ON``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import zincmetal
from roofline import decode
from tables import table
from zincmetal.plan import tuning
from zincmetal.plan.planner import Planner
from zincmetal.plan.tuning import Split

USUAL, NOISE = "usual", "usual again"


def parse(text: str) -> tuple[str, Split]:
    """Reads a row of the tuning table: "kernel:rows=1,threads=512". Raises ArgumentTypeError."""
    kernel, _, numbers = text.partition(":")
    try:
        given = {name: int(n) for name, _, n in (part.partition("=") for part in numbers.split(","))}
        return kernel, Split(**given)
    except (TypeError, ValueError):
        raise argparse.ArgumentTypeError(f"{text!r} is not as in mul_mv_q8_0:rows=1,threads=512") from None


def tuned(model: zincmetal.Model, splits: Mapping[str, Split]) -> Planner:
    """Makes a planner with other splits for the model's engine.

    Raises UsageError if decode's plan does not change, or the build lacks the kernel.
    """
    engine, backend = model.engine, model.device.info["backend"]
    target = replace(engine.planner.target, splits={**tuning.SPLITS.get(backend, {}), **splits})
    planner = Planner(model.file, target, model.config.n_ctx, engine.planner.kv)
    planner.resize(engine.planner.addresses.room)
    here, there = (
        [(d.launch.kernel, d.launch.grid, d.launch.threads) for d in b.plan().dispatches]
        for b in (planner, engine.planner)
    )
    if here == there:
        raise zincmetal.UsageError(f"{', '.join(splits)}: with or without these splits decode's plan does not change")
    engine.programs.plan_by(planner)
    if missing := model.plan(1).replaced():
        raise zincmetal.UsageError(f"this build has no {', '.join(missing)}: build with ZINCMETAL_SWEEP=ON")
    return planner


def measure(model: zincmetal.Model, tried: Mapping[str, Mapping[str, Split]], args: argparse.Namespace) -> list[Any]:
    """Returns a row for each side: microseconds of a token, and the ratio to the usual plans round by round."""
    usual_planner = model.engine.planner
    sides = {USUAL: usual_planner, NOISE: usual_planner, **{name: tuned(model, s) for name, s in tried.items()}}
    ids = [i * 7919 % model.config.n_vocab for i in range(args.prompt)]
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(args.rounds + 1):  # the first round is not counted
        order = list(sides)[turn % len(sides) :] + list(sides)[: turn % len(sides)]
        for name in order:
            model.engine.programs.plan_by(sides[name])
            wall, _ = decode(model, ids, args.tokens)
            seconds[name].append(wall / args.tokens)
    rows: list[dict[str, Any]] = []
    for name, column in seconds.items():
        ratios = [usual / mine for usual, mine in zip(seconds[USUAL][1:], column[1:], strict=True)]
        rows.append({"split": name, "us": median(column[1:]) * 1e6, "ratio": median(ratios), "range": ratios})
    noise = max(max(row["range"]) for row in rows[:2])
    for row in rows:
        row["wins"] = row["split"] not in (USUAL, NOISE) and min(row["range"]) > noise
    return rows


def shown(row: Mapping[str, Any]) -> dict[str, Any]:
    """Formats a row for the table."""
    low, high = min(row["range"]), max(row["range"])
    return {
        "split": row["split"],
        "us/token": f"{row['us']:.1f}",
        "faster by": f"{row['ratio']:.3f}",
        "range": f"{low:.3f} .. {high:.3f}",
        "wins": "yes" if row["wins"] else "",
    }


def main() -> None:
    """Loads the model, runs the sides in turn, and prints the table."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("file")
    p.add_argument("splits", nargs="+", type=lambda text: (text, parse(text)), metavar="KERNEL:rows=N,threads=N")
    p.add_argument("--together", action="store_true", help="also all of them at once")
    p.add_argument("--device", help="metal, cuda or cpu")
    p.add_argument("--threads", type=int, default=0, help="of the CPU")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--prompt", type=int, default=16)
    p.add_argument("--tokens", type=int, default=128)
    p.add_argument("--json", type=Path, help="write the rows to this file")
    args = p.parse_args()
    tried = {text: dict([row]) for text, row in args.splits}
    if args.together:
        tried["together"] = dict(row for _, row in args.splits)
    context = args.prompt + args.tokens + 2
    try:
        with zincmetal.load(args.file, context=context, device=args.device, threads=args.threads) as model:
            rows = measure(model, tried, args)
    except zincmetal.ZincError as error:
        sys.exit(f"error: {error}")
    print("\n".join(table([shown(row) for row in rows])))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
