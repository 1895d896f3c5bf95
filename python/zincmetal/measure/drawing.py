"""Draws a roofline: what each kernel does for a byte and in a second, below the rates of the device.

:func:`svg` writes it as text and needs nothing. :func:`figure` draws it with matplotlib, for notebooks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

from ..errors import UsageError
from .roofline import points

COLOURS = {"decode": "#2b6cb0", "prefill": "#b7791f"}
INK, PALE = "#1a202c", "#cbd5e0"
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 860, 520, 76, 56, 24, 58
LABELLED = 0.1  # share of a step's time, from which on a point has its name


@dataclass(frozen=True)
class Roofline:
    """Rates of a device and points of steps, as a plot needs them."""

    title: str
    copy: float  # bytes per second
    flops: float  # operations per second
    found: tuple[tuple[str, str, float, float, float], ...]  # step, label, operations a byte and a second, share

    @classmethod
    def of(cls, profile: Mapping[str, Any]) -> Roofline:
        """Take what a plot needs from a profile as JSON has it. Raises UsageError if no kernel has operations."""
        steps, rates = profile["steps"], profile["ceilings"]
        found = tuple((name, *point) for name, step in steps.items() for point in points(step))
        if not found:
            raise UsageError("the profile has no kernel whose operations are counted: there is nothing to draw")
        return cls(f"{profile['model']} on {profile['device']}", rates["copy"], rates["flops"], found)

    @property
    def ridge(self) -> float:
        """Operations a byte, from which on arithmetic is the bound."""
        return self.flops / self.copy

    def roof(self, intensity: float) -> float:
        """Return the most operations per second at some operations a byte."""
        return min(self.flops, intensity * self.copy)

    @property
    def across(self) -> tuple[float, float]:
        """Whole decades of operations a byte that the plot spans."""
        return _decades([self.ridge, *(x for _, _, x, _, _ in self.found)])

    @property
    def up(self) -> tuple[float, float]:
        """Whole decades of operations per second that the plot spans."""
        return _decades([self.flops, *(y for _, _, _, y, _ in self.found)])

    @property
    def caption(self) -> str:
        """The measured rates, as text."""
        return f"copy {self.copy / 1e9:,.1f} GB/s, matrix product {self.flops / 1e12:,.3g} TFLOP/s, in the same run"


def _decades(values: list[float]) -> tuple[float, float]:
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    return 10.0**low, 10.0 ** max(high, low + 1)


def svg(of: Roofline) -> str:
    """Draw as SVG. A point is as large as its share of the step's time; its title says all."""
    x_of, y_of = _scale(of.across, LEFT, WIDTH - RIGHT), _scale(of.up, HEIGHT - BOTTOM, TOP)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="12" fill="{INK}">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text(LEFT, 22, of.title, size=15),
        _text(LEFT, 40, of.caption),
        *_axes(of, x_of, y_of),
        *_roof(of, x_of, y_of),
    ]
    for step, label, x, y, share in sorted(of.found, key=lambda point: -point[4]):
        colour, radius = COLOURS.get(step, INK), 3 + 16 * math.sqrt(share)
        told = f"{step}: {label}, {share:.1%} of the step, {y / of.roof(x):.0%} of the roofline"
        lines.append(
            f'<circle cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="{radius:.1f}" fill="{colour}" fill-opacity="0.5" '
            f'stroke="{colour}"><title>{escape(told)}</title></circle>'
        )
        if share >= LABELLED:
            lines.append(_text(x_of(x) + radius + 3, y_of(y) + 4, label, size=10))
    for i, step in enumerate(dict.fromkeys(point[0] for point in of.found)):
        lines.append(
            _text(WIDTH - RIGHT - 90, HEIGHT - BOTTOM - 12 - 16 * i, f"● {step}", colour=COLOURS.get(step, INK))
        )
    return "\n".join([*lines, "</svg>", ""])


def figure(of: Roofline) -> Any:
    """Draw with matplotlib; return the figure. Raises UsageError if matplotlib is not installed."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise UsageError("a plot needs matplotlib: pip install 'zincmetal[plot]', or take the SVG") from None
    made, axis = plt.subplots(figsize=(9, 5.5), layout="constrained")
    low, high = of.across
    axis.loglog([low, of.ridge, high], [of.roof(low), of.flops, of.flops], color=INK)
    for step in dict.fromkeys(point[0] for point in of.found):
        mine = [point for point in of.found if point[0] == step]
        sizes = [20 + 900 * share for *_, share in mine]
        axis.scatter([p[2] for p in mine], [p[3] for p in mine], sizes, COLOURS.get(step, INK), alpha=0.5, label=step)
        for _, label, x, y, share in mine:
            if share >= LABELLED:
                axis.annotate(label, (x, y), fontsize=8, xytext=(6, 0), textcoords="offset points")
    axis.set(xlim=of.across, ylim=of.up, xlabel="operations for each byte", ylabel="operations per second")
    axis.set_title(f"{of.title}\n{of.caption}", fontsize=10, loc="left")
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right", frameon=False)
    return made


def _scale(span: tuple[float, float], first: float, last: float) -> Any:
    """Return the function from a value to its place on a logarithmic axis."""
    low, high = (math.log10(value) for value in span)
    return lambda value: first + (math.log10(value) - low) / (high - low) * (last - first)


def _axes(of: Roofline, x_of: Any, y_of: Any) -> Iterator[str]:
    """Draw a line and a number for each decade, and the names of the axes."""
    left, right, top, bottom = LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM
    for x in _powers(of.across):
        yield f'<path d="M{x_of(x):.1f} {top}V{bottom}" stroke="{PALE}"/>'
        yield _text(x_of(x), bottom + 18, f"{x:g}", anchor="middle")
    for y in _powers(of.up):
        yield f'<path d="M{left} {y_of(y):.1f}H{right}" stroke="{PALE}"/>'
        yield _text(left - 8, y_of(y) + 4, _rate(y), anchor="end")
    yield _text((left + right) / 2, HEIGHT - 14, "operations for each byte", anchor="middle")
    yield _text(LEFT - 8, TOP - 8, "operations/s", anchor="end", size=10)


def _roof(of: Roofline, x_of: Any, y_of: Any) -> Iterator[str]:
    """Draw the slope of memory from where it enters the plot, and the flat roof of arithmetic."""
    low, high = of.across
    start = max(low, of.up[0] / of.copy)
    places = ((x, of.roof(x)) for x in (start, of.ridge, high))
    path = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in places)
    yield f'<polyline points="{path}" fill="none" stroke="{INK}" stroke-width="2"/>'


def _powers(span: tuple[float, float]) -> Iterator[float]:
    low, high = (round(math.log10(value)) for value in span)
    yield from (10.0**power for power in range(low, high + 1))


def _rate(value: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g} {unit}"
    return f"{value:g}"


def _text(x: float, y: float, text: str, anchor: str = "start", size: int = 12, colour: str = INK) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{colour}">{escape(text)}</text>'
    )
