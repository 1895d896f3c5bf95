"""Rows of the tuning table for one run: ``--set KEY=ROW`` changes them, and the plans of a model with them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace

from ..engine.loaded import Loaded
from ..errors import UsageError, quote
from ..plan.chunks import ONE_ROW, USUAL_ROWS, chunk_shape
from ..plan.planner import Planner
from ..plan.target import Target
from ..plan.tuning import Split

#: Short names of rows: the kernel, and the number of its split that a bare integer sets.
SHORT = {"q8-tg": ("mul_mv_q8_0", "threads"), "q8-dual-tg": ("mul_mv_stack_q8_0", "threads")}
#: Rows that are one integer, by their names in :class:`Target`.
NUMBERS = ("divide_keys_above", "cooperative")
_PARTS = tuple(f.name for f in fields(Split))


@dataclass(frozen=True)
class Rows:
    """Rows that replace those of ``plan/tuning.py``: splits by kernel, and numbers by name."""

    splits: dict[str, Split] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.splits or self.numbers)

    def target(self, of: Target) -> Target:
        """Return a target with these rows."""
        numbers: dict[str, int | None] = dict(self.numbers)
        return replace(of, splits={**of.splits, **self.splits}, **numbers)  # type: ignore[arg-type]

    def facts(self) -> dict[str, str]:
        """Return the rows as JSON has them."""
        found = {kernel: ",".join(_told(split)) for kernel, split in self.splits.items()}
        return found | {name: str(n) for name, n in self.numbers.items()}


def rows(texts: Iterable[str]) -> Rows:
    """Read rows: "mul_mv_q8_0=rows:1,threads:512", "q8-tg=512", "divide_keys_above=256". Raises UsageError."""
    found = Rows()
    for text in texts:
        key, equals, value = text.partition("=")
        if not (key and equals and value):
            raise _wrong(text)
        if key in NUMBERS:
            found.numbers[key] = _integer(text, value, least=0)
            continue
        kernel, part = SHORT.get(key, (key, ""))
        given = found.splits.get(kernel, Split())
        for word in value.split(","):
            name, colon, number = word.partition(":")
            name, number = (name, number) if colon else (part, word)
            if name not in _PARTS:
                raise _wrong(text)
            given = replace(given, **{name: _integer(text, number)})
        found.splits[kernel] = given
    return found


def tune(loaded: Loaded, of: Rows) -> None:
    """Let the engine that will be made of a loaded file plan with these rows.

    Raises UsageError if they change no plan, or if the build lacks a kernel that they ask for.
    """
    usual = loaded.planner
    planner = Planner(loaded.file, of.target(usual.target), usual.config.n_ctx, usual.kv)
    if _launches(planner) == _launches(usual):
        raise UsageError(f"--set {', '.join(of.facts())}: plans are the same without it; see `zincmetal plan --dump`")
    wanted = {kernel for kernel, _, _ in _launches(planner)}
    if missing := sorted(wanted.difference(loaded.device.kernel_names())):
        raise UsageError(f"this build has no {', '.join(missing)}: build with ZINCMETAL_SWEEP=ON")
    loaded.planner = planner


def _launches(planner: Planner) -> list[tuple[str, tuple[int, int, int], int]]:
    plans = [planner.plan(ONE_ROW, n) for n in planner.max_positions]
    plans.append(planner.plan(chunk_shape(min(USUAL_ROWS, planner.prompt_rows), 0, 0, "none")))
    return [(d.launch.kernel, d.launch.grid, d.launch.threads) for plan in plans for d in plan.dispatches]


def _told(split: Split) -> list[str]:
    return [f"{name}:{getattr(split, name)}" for name in _PARTS if getattr(split, name) is not None]


def _integer(text: str, number: str, least: int = 1) -> int:
    if not number.isdecimal() or len(number) > 9 or int(number) < least:
        raise _wrong(text)
    return int(number)


def _wrong(text: str) -> UsageError:
    known = ", ".join([*SHORT, *NUMBERS])
    return UsageError(
        f"--set {quote(text)} is no row of the tuning table: write KERNEL=rows:N,threads:N, or NAME=N for {known}"
    )
