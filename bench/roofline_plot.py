"""Plots the figures of bench/roofline.py: microseconds of every kernel beside its roof."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {"memory": "#2b6cb0", "arithmetic": "#b7791f", "launch": "#718096", "latency": "#c53030"}
ROOF = "#1a202c"
SMALL = 0.004  # classes with a smaller share of the time are one bar


def plot(result: dict[str, Any], path: Path) -> None:
    """Writes a PNG: a panel for decode and one for prefill, the longest class first."""
    panels = {name: _rows(result[name]) for name in ("decode", "prefill")}
    heights = [len(rows) + 2 for rows in panels.values()]
    figure, axes = plt.subplots(
        2, 1, figsize=(13, 0.34 * sum(heights) + 2.0), gridspec_kw={"height_ratios": heights}, layout="constrained"
    )
    copy, flops = result["ceilings"]["copy"], result["ceilings"]["flops"]
    figure.suptitle(
        f"{result['file']} on {result['device']}: kernels against their roofline\n"
        f"(copy {copy / 1e9:,.0f} GB/s, matrix product {flops / 1e12:,.3g} TFLOP/s, measured in the same run)",
        fontsize=11,
    )
    for axis, (name, rows) in zip(axes, panels.items(), strict=True):
        _panel(axis, name, result[name], rows)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _rows(part: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the large classes, and one row for all others."""
    rows: list[dict[str, Any]] = part["classes"]
    total = sum(c["us"] for c in rows)
    large = [c for c in rows if c["us"] >= SMALL * total]
    small = [c for c in rows if c["us"] < SMALL * total]
    if len(small) < 2:
        return rows
    sums = {key: sum(c[key] for c in small) for key in ("count", "us", "roof_us")}
    rest = {"kernel": f"{len(small)} more", "shape": "", "bound": "launch", "share": sums["roof_us"] / sums["us"]}
    return [*large, {**rest, **sums}]


def _panel(axis: Any, name: str, part: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    whole, steps = part["whole"], part["whole"]["tokens"] if name == "decode" else 1
    largest = max(max(c["us"], c["roof_us"]) for c in rows)
    for i, c in enumerate(rows):
        axis.barh(i, c["us"], height=0.72, color=COLOURS[c["bound"]], alpha=0.55)
        axis.barh(i, c["roof_us"], height=0.30, color=ROOF)
        label = f"{c['us']:,.0f} us = {c['count']} x {c['us'] / c['count']:,.1f}, {c['share']:.0%} of roofline"
        axis.text(max(c["us"], c["roof_us"]) + 0.006 * largest, i, label, va="center", fontsize=8)
    axis.set_yticks(range(len(rows)), [f"{c['kernel']}  {c['shape']}".rstrip() for c in rows], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.32 * largest)
    axis.set_xlabel(f"microseconds of the device in a step of {name}, dispatches run one by one", fontsize=9)
    axis.set_title(
        f"{name} of {whole['tokens']}: {whole['tokens_per_second']:,.0f} tokens/s, {part['dispatches']} dispatches, "
        f"{whole['device_seconds'] / steps * 1e6:,.0f} us a step",
        fontsize=10,
        loc="left",
    )
    axis.grid(axis="x", alpha=0.3)
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.tick_params(axis="x", labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour, alpha=0.55) for colour in COLOURS.values()]
    handles.append(plt.Rectangle((0, 0), 1, 1, color=ROOF))
    names = [*(f"bound by {bound}" for bound in COLOURS), "the roofline"]
    axis.legend(handles, names, loc="lower right", fontsize=8, frameon=False)
