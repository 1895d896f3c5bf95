"""Profile of a model: counts of its steps and the host's times, and on demand the device's time by kernel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from ..config import Layer, ModelConfig
from ..engine.request import Stats
from ..engine.session import Session
from ..plan.chunks import full_rows
from . import ceilings
from .drawing import Roofline, figure, svg
from .roofline import byte_rows, class_rows, hottest, profiled
from .tables import table

Counts = Mapping[str, Any]
SUMMED = ("steps", "tokens", "command_buffers", "dispatches", "barriers", "gpu_seconds", "waits")
HOST = ("record_seconds", "plan_seconds", "submit_seconds", "wait_seconds")


@dataclass(frozen=True)
class Spent:
    """Counts when a request was submitted and when it ended, and its own figures."""

    before: Counts
    after: Counts
    stats: Stats


@dataclass(frozen=True)
class Subject:
    """Model that a profile is of: its name, its configuration, and the way to take its engine alone."""

    name: str
    config: ModelConfig
    session: Callable[[], AbstractContextManager[Session]]


class Profile(Mapping[str, Any]):
    """Counts of what a model has done, as of one moment: a mapping.

    ``steps`` and ``tokens`` (their rows), ``command_buffers``, ``dispatches``, ``barriers``, ``gpu_seconds``,
    ``max_in_flight``; ``waits`` of the host, and its seconds: ``record_seconds``, ``plan_seconds``, ``submit_seconds``,
    ``wait_seconds``. ``shared_command_steps`` are the steps that were one command buffer. ``host_routed`` counts the
    others, and ``host_routed_why`` says why there are any. ``replaced`` has the kernels that the device could not make.
    ``layer_mix`` counts the layers by kind. The difference of two profiles is a profile of what was between them.
    """

    def __init__(
        self, counts: Counts, subject: Subject, spent: Spent | None = None, stats: Stats | None = None
    ) -> None:
        self._subject, self._spent, self._stats = subject, spent, stats
        shared = counts["steps"] - counts["host_routed"]["steps"]
        self._counts = {**counts, "shared_command_steps": shared, "layer_mix": layer_mix(subject.config)}
        if stats:
            self._counts |= _seconds(stats)

    def __getitem__(self, name: str) -> Any:
        return self._counts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._counts)

    def __len__(self) -> int:
        return len(self._counts)

    def __sub__(self, before: Profile) -> Profile:
        return Profile(difference(before, self), self._subject)

    @property
    def request(self) -> Profile | None:
        """Profile of the request that ended last, from its submission to its end. None before the first.

        It also has the seconds of its stages: ``queue_seconds``, ``prefill_seconds``, ``decode_seconds``, and of its
        draws by the host, ``sampling_seconds``. Steps that it shared with other requests count whole.
        """
        spent = self._spent
        if spent is None:
            return None
        return Profile(difference(spent.before, spent.after), self._subject, None, spent.stats)

    @cached_property
    def measured(self) -> dict[str, Any]:
        """Device time by kernel and shape, of a decode step and of a prefill step, beside the device's rates.

        Measured at first use, which takes seconds: every dispatch runs alone, several times. Other requests wait. The
        decode step stands where the profile's request ended. Raises UsageError if the host routes the experts.
        """
        stats = self._stats or (self._spent.stats if self._spent else Stats())
        return measured(self._subject, stats.prompt + stats.generated)

    def plot(self) -> Any:
        """Draw the roofline with matplotlib; return the figure for a notebook. Raises UsageError without it."""
        return figure(Roofline.of(self.measured))

    def svg(self) -> str:
        """Draw the roofline as SVG. It needs no other package."""
        return svg(Roofline.of(self.measured))

    def lines(self) -> list[str]:
        """Format the counts as text."""
        return counter_lines(self)

    def __repr__(self) -> str:
        return f"<Profile of {self._subject.name}: {self['steps']} steps, {self['gpu_seconds']:.3f} s of the device>"


def measured(subject: Subject, position: int) -> dict[str, Any]:
    """Time a decode step at ``position`` and a prefill step at 0 by kernel: figures as JSON has them."""
    with subject.session() as session:
        engine, n_ctx = session.engine, subject.config.n_ctx
        roof = ceilings.measure(engine.core, engine.device)
        return {
            "model": subject.name,
            "device": engine.device.info["name"],
            "ceilings": {**asdict(roof), "copy": roof.copy, "flops": roof.flops},
            "measured": roof.lines(),
            "steps": {
                "decode": profiled(session, roof, 1, min(position, n_ctx - 1)),
                "prefill": profiled(session, roof, full_rows(min(engine.max_rows, n_ctx)), 0),
            },
        }


def layer_mix(config: ModelConfig) -> dict[str, int]:
    """Count the layers by what mixes their positions, and by their feed-forward: "experts" or "dense"."""
    found: Counter[str] = Counter()
    for layer in config.layers[: config.n_layer]:
        found.update([_mixer(layer)] if layer.mixer else [])
        found.update(["experts"] if layer.mixture else ["dense"] if layer.n_ff else [])
    return dict(found)


def _mixer(layer: Layer) -> str:
    if layer.mixer == "attention" and (layer.latent or layer.window):
        return "latent attention" if layer.latent else "window attention"
    return layer.mixer


def difference(before: Counts, after: Counts) -> dict[str, Any]:
    """Subtract the counts. What is no sum, such as ``max_in_flight``, is as after."""
    spent = {name: after[name] - before[name] for name in (*SUMMED, *HOST)}
    routed = {name: n - before["host_routed"][name] for name, n in after["host_routed"].items()}
    return {**after, **spent, "host_routed": routed}


def counter_lines(of: Counts) -> list[str]:
    """Format counts as text: what a step cost, the host's part, and the layers."""
    steps = of["steps"] or 1
    host = {name.removesuffix("_seconds"): of[name] for name in (*HOST, "sampling_seconds") if name in of}
    mix, others = of["layer_mix"], of["host_routed"]["steps"]
    return [
        f"steps: {of['steps']:,} of {of['tokens']:,} rows; {of['shared_command_steps']:,} in one command buffer, "
        f"{others:,} with experts routed by the host",
        f"each: {of['command_buffers'] / steps:,.2f} command buffers, {of['dispatches'] / steps:,.1f} dispatches, "
        f"{of['barriers'] / steps:,.1f} barriers, {of['waits'] / steps:,.2f} waits, "
        f"{of['gpu_seconds'] / steps * 1e3:,.3f} ms of the device",
        "host, ms a step: " + ", ".join(f"{name} {s / steps * 1e3:,.3f}" for name, s in host.items()),
        "layers: " + ", ".join(f"{n} {name}" for name, n in mix.items()),
    ]


def profile_lines(measured: Mapping[str, Any]) -> Iterator[str]:
    """Format the measured steps as tables."""
    yield from measured["measured"]
    for name, step in measured["steps"].items():
        alone, roof = (sum(c[key] for c in step["classes"]) for key in ("us", "roof_us"))
        yield ""
        yield (
            f"{name}: a step of {step['rows']} rows at {step['position']}, {step['dispatches']} dispatches, "
            f"{step['barriers']} barriers; one by one {alone:,.0f} us, the roofline allows {roof:,.0f} us"
        )
        yield from table(class_rows(step))
        yield "hottest shapes: " + ("; ".join(hottest(step)) or "none")
    yield ""
    yield from table(byte_rows(measured["steps"]["decode"]))


def _seconds(stats: Stats) -> dict[str, float]:
    """Return the seconds of a request's stages."""
    return {f"{name}_seconds": getattr(stats, name) for name in ("queue", "prefill", "decode", "sampling")}
