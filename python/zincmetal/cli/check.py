"""``zincmetal check``: compares this machine's results with reference results."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from .. import settings
from ..check import runner
from ..check.results import FAIL, Result
from ..errors import UsageError, quote
from ..hub import demo_model
from . import check_report as report
from .arguments import Parser, add_device, add_model, named_model, positive, seconds
from .command import Command
from .output import as_json, complain, print_json, say
from .progress import bar


def main(argv: Sequence[str] | None = None, worker: Sequence[str] = runner.WORKER) -> int:
    """Run ``python -m zincmetal.check`` and return the exit status. ``worker`` is the command that runs the checks."""
    return replace(COMMAND, run=partial(run, worker=worker)).main(argv, "check")


def add_arguments(p: Parser) -> None:
    """Add the options of ``check``."""
    add_model(p)
    add_device(p, threads=False)
    p.add_argument("--json", metavar="FILE", help="write everything to a file, to attach to a report (-: print it)")
    p.add_argument("--only", action="append", default=[], metavar="PATTERN", help="run the checks of these names alone")
    p.add_argument(
        "--timeout", type=positive, default=runner.TIMEOUT, metavar="S", help="time limit of one check, in seconds"
    )
    p.add_argument("--long", action="store_true", help="longer pauses, and a long prompt on every device")
    p.add_argument("--soak", type=seconds, default=0.0, metavar="S", help="also decode for S seconds: memory and speed")
    p.add_argument("--validate", action="store_true", help="run kernels and model once more under Apple's layers")
    p.add_argument("--capture", metavar="FILE.gputrace", help="capture a decode step for Xcode")
    p.add_argument("-v", "--verbose", action="store_true", help="a line for every kernel")


def run(args: argparse.Namespace, worker: Sequence[str] = runner.WORKER) -> int:
    """Run the checks and print their results. The exit status is 1 if a check failed or a pattern chose none."""
    file = _model(args)
    request = {"device": args.device, "file": file, "only": args.only, "long": args.long, "soak": args.soak}
    request["capture"] = args.capture
    if args.json not in (None, "-"):
        _write(args.json, "")  # complain of a file that cannot be written before the work
    out = sys.stderr if args.json == "-" else sys.stdout
    results = [report.host(file)]
    _say(report.line(results[0]), out)
    environment = {"METAL_CAPTURE_ENABLED": "1"} if args.capture else {}
    results += _with_progress(runner.run(request, worker, args.timeout, environment))
    results += [found for found in [report.occupancy(results)] if found]
    for way in ways(results, args.validate):
        if only := way.patterns(args.only):
            again = runner.run({**request, "only": only, "done": []}, worker, args.timeout, way.environment)
            results += [way.named(r) for r in _with_progress(again) if r.kind in way.kinds]
    counts = report.summary(results)
    lines = [*report.lines(results[1:], args.verbose), ", ".join(f"{n} {status}" for status, n in counts.items())]
    if args.json == "-":
        _say("\n".join(lines), out)
        print_json(report.as_json(results))
    else:
        if args.json:
            _write(args.json, as_json(report.as_json(results), indent=1) + "\n")
        _say("\n".join(lines), out)
    return 1 if counts[FAIL] or _unmatched(args.only, results) else 0


def _unmatched(patterns: Sequence[str], results: Sequence[Result]) -> bool:
    """Complain of each pattern that chose no check. Return True if there is one: a misspelt name must not pass."""
    unmatched = [p for p in patterns if not any(fnmatch(r.name, p) for r in results)]
    for pattern in unmatched:
        complain(f"no check is called {quote(pattern)}; with -v every check has a line")
    return bool(unmatched)


def _say(text: str, out: TextIO) -> None:
    """Print for people: on standard error beside JSON, else on standard output."""
    if out is sys.stderr:
        say(text)
    else:
        print(text, flush=True)


def _write(path: str, text: str) -> None:
    """Write a file. Raises UsageError if it cannot be written."""
    try:
        Path(path).write_text(text, "utf-8", errors="backslashreplace")
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from None


@dataclass(frozen=True)
class Way:
    """Another way to run the checks of some kinds: its name, and the environment variables that select it."""

    name: str
    environment: Mapping[str, str]
    kinds: tuple[str, ...] = ("device", "source", "pipeline", "kernel", "model")

    def patterns(self, only: Sequence[str]) -> list[str]:
        """Return the patterns of the checks to run again: all of these kinds, or the patterns in ``only`` of them."""
        asked = only or [f"{kind}/*" for kind in self.kinds]
        return [pattern for pattern in asked if pattern.partition("/")[0] in self.kinds]

    def named(self, result: Result) -> Result:
        """Return the result with the name of this way in its own."""
        return replace(result, name=f"{result.group} ({self.name}){result.name.removeprefix(result.group)}")


FROM_TEXT = Way("from text", {settings.METALLIB.name: "0"})
VALIDATED = Way(
    "validated",
    {
        "MTL_DEBUG_LAYER": "1",
        "MTL_DEBUG_LAYER_WARNING_MODE": "nslog",
        "MTL_DEBUG_LAYER_VALIDATE_UNRETAINED_RESOURCES": "0x1",  # command buffers do not retain what they use
        "MTL_SHADER_VALIDATION": "1",
        "MTL_SHADER_VALIDATION_REPORT_TO_STDERR": "1",
    },
)


def ways(results: Sequence[Result], validate: bool) -> Iterator[Way]:
    """Yield the other ways for a Metal device.

    Kernels are compiled from text if they came from a metallib. With ``validate``, Apple's validation layers are on.
    """
    device: Mapping[str, Any] = next((r.outcome.figures for r in results if r.name == "device"), {})
    if device.get("backend") == "metal":
        if "metallib" in device["features"].get("kernels", ""):
            yield FROM_TEXT
        if validate:
            yield VALIDATED


def _model(args: argparse.Namespace) -> str | None:
    """Return the file that the arguments name, else the demo model, else None.

    Raises UsageError for a missing file, ModelNotFoundError for a name that no file has.
    """
    if named := named_model(args):
        from ..hub.lookup import resolve

        path = resolve(named)
        if not os.path.isfile(path):
            raise UsageError(f"there is no file {quote(str(path))}")
        return str(path)
    try:
        return str(demo_model())
    except UsageError:
        return None


def _with_progress(found: Iterable[Result | list[str]]) -> list[Result]:
    """Collect all results, with a progress bar."""
    results: list[Result] = []
    with bar("check") as progress:
        total = 0
        for item in found:
            if isinstance(item, list):
                total = len(item)
            else:
                results.append(item)
            if total:
                progress(min(len(results), total), total)
    return results


COMMAND = Command(
    "check",
    "check that this machine computes what it should",
    add_arguments,
    run,
    (
        ("check", "every kernel, and the demo model if it is installed"),
        ("check MODEL.gguf --json report.json", "with the tokens of a model; a report to attach to an issue"),
        ("check --only 'kernel/mul_mv*' -v", "some kernels, a line each"),
    ),
)
