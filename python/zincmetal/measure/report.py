"""Report of a bench: what was measured, of what, on what, in which state; as Markdown, JSON or CSV."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import UsageError
from . import machine
from .profile import counter_lines, profile_lines
from .tables import as_csv, markdown

FORMAT = 1  # of the JSON; another number has other names
_KEYS = ("format", "version", "package", "model", "device", "settings", "state", "tests", "cases", "logprobs")


def read(path: Path) -> dict[str, Any]:
    """Read a report that ``bench --output json`` wrote. Raises UsageError for a file that is none."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    return checked(found, str(path))


def checked(found: Any, source: str) -> dict[str, Any]:
    """Return a report if it has the parts of one. Raises UsageError that names its source."""
    missing = [key for key in _KEYS if key not in found] if isinstance(found, dict) else list(_KEYS)
    if missing:
        raise UsageError(f"{source} is no report of zincmetal bench --output json: it has no {missing[0]!r}")
    if found["format"] != FORMAT:
        raise UsageError(f"{source} is a report of format {found['format']}; this version reads {FORMAT}")
    report: dict[str, Any] = found
    return report


def merged(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """Join the reports of one side's runs: all samples, the outputs of the first if all have the same, the worst state.

    Raises UsageError for reports that measured different things.
    """
    first, *others = reports
    for other in others:
        if [t["test"] for t in other["tests"]] != [t["test"] for t in first["tests"]]:
            raise UsageError("the runs of one side measured different things")
    joined = json.loads(json.dumps(first))
    joined["state"] = max((of["state"] for of in reports), key=lambda of: of["before"].get("load", 0.0))
    for other in others:
        for part, keys in (("tests", ("samples_ts", "samples_ns", "samples_tokens")), ("cases", ("samples_us",))):
            for mine, theirs in zip(joined[part], other[part], strict=True):
                for key in keys:
                    mine[key] += theirs[key]
                if part == "tests" and mine["digest"] != theirs["digest"]:
                    mine["digest"] = "varies"
    return dict(joined)


# ---- telling ----------------------------------------------------------------------------------------------------


def test_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Make the rows of the table, as llama-bench has them. A peer's rows follow ours."""
    model, ours = report["model"], f"zincmetal {report['version']}"
    sides = [(ours, row) for row in report["tests"]] + [(row["build"], row) for row in report.get("peer", ())]
    order = {row["test"]: i for i, row in enumerate(report["tests"])}
    return [
        {
            "model": model["name"],
            "size": f"{model['bytes'] / 2**30:.2f} GiB",
            "engine": side,
            "backend": report["device"]["backend"],
            "kv": report["settings"]["kv"],
            "test": row["test"],
            "t/s": _speed(row["median_ts"], row["spread_ts"]),
        }
        for side, row in sorted(sides, key=lambda pair: order.get(pair[1]["test"], len(order)))
    ]


def case_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Make the rows of the table of exact shapes."""
    return [
        {
            "case": row["case"],
            "variant": row["variant"],
            "kernel": row["kernel"],
            "threads": row["threads"],
            "us": f"{row['median_us']:,.2f} ± {row['spread_us']:,.2f}",
            "GB/s": f"{row['bytes_per_second'] / 1e9:,.1f}",
            "of copy": f"{row['share_of_copy']:.0%}",
            "outputs": row["outputs"],
        }
        for row in report["cases"]
    ]


def lines(report: Mapping[str, Any]) -> Iterator[str]:
    """Format the whole report as Markdown: tables, profile, the state of the machine, and what makes it doubtful."""
    if report["tests"]:
        yield from markdown(test_rows(report))
    if report["cases"]:
        yield from ["", *markdown(case_rows(report))]
    settings, state = report["settings"], report["state"]
    yield ""
    yield f"{report['device']['name']}; {_told(settings)}"
    yield "Median of the runs ± half the distance from the slowest to the fastest."
    for moment in ("before", "after"):
        yield f"{moment}: {machine.line(state[moment])}"
    yield from (f"doubtful: {text}" for text in machine.warnings(state["before"]))
    if profile := report.get("profile"):
        yield from ["", "```", *counter_lines(profile["counts"]), "", *profile_lines(profile), "```"]


def csv_text(report: Mapping[str, Any]) -> str:
    """Format the figures as CSV: tests, and those of a peer, then a table of exact shapes."""
    ours = [{"build": f"zincmetal {report['version']}", **row} for row in report["tests"]]
    tables = [[*ours, *report.get("peer", ())], report["cases"]]
    return "\n".join(as_csv(rows) for rows in tables if rows)


def _speed(middle: float, noise: float) -> str:
    return f"{middle:,.2f} ± {noise:,.2f}"


def _told(settings: Mapping[str, Any]) -> str:
    told = [f"{name} {value}" for name, value in settings.items() if value not in (None, "", [], {}) and name != "set"]
    told += [f"set {key}={row}" for key, row in settings.get("set", {}).items()]
    return ", ".join(told)
