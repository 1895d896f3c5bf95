"""The command line of ``python -m zincmetal.check``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from .. import settings
from ..check import runner
from ..check.results import FAIL, Result
from ..errors import UsageError
from ..hub import demo_model
from . import check_report as report
from .output import as_json, print_json, say
from .output import command as run_command
from .progress import bar, on_terminal


def main(argv: Sequence[str] | None = None, command: Sequence[str] = runner.WORKER) -> int:
    """Check that this machine computes what it should; the exit status: 1 where something failed."""
    args = parser().parse_args(argv)
    return run_command(lambda: run(args, command))


def run(args: argparse.Namespace, command: Sequence[str]) -> int:
    """What :func:`main` does."""
    file = args.file or _demo_model()
    request = {"device": args.device, "file": file, "only": args.only, "long": args.long, "soak": args.soak}
    request["capture"] = args.capture
    if args.json not in (None, "-"):
        _write(args.json, "")  # what cannot be written is said before the work
    out = sys.stderr if args.json == "-" else sys.stdout
    results = [report.host(file)]
    _say(report.line(results[0]), out)
    environment = {"METAL_CAPTURE_ENABLED": "1"} if args.capture else {}
    results += _with_progress(runner.run(request, command, args.timeout, environment))
    results += [found for found in [report.occupancy(results)] if found]
    for way in ways(results, args.validate):
        if only := way.patterns(args.only):
            again = runner.run({**request, "only": only, "done": []}, command, args.timeout, way.environment)
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
    return 1 if counts[FAIL] else 0


def _say(text: str, out: TextIO) -> None:
    """Print to where people read; beside JSON that is standard error, which may be gone."""
    if out is sys.stderr:
        say(text)
    else:
        print(text, flush=True)


def _write(path: str, text: str) -> None:
    """Write a file. Raises UsageError where that cannot be done."""
    try:
        Path(path).write_text(text, "utf-8", errors="backslashreplace")
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from None


@dataclass(frozen=True)
class Way:
    """Another way to run the checks of some kinds: what it is called, and the environment that makes it so."""

    name: str
    environment: Mapping[str, str]
    kinds: tuple[str, ...] = ("device", "source", "pipeline", "kernel", "model")

    def patterns(self, only: Sequence[str]) -> list[str]:
        """Of the names that are to run: those of its kinds, all or as asked for."""
        asked = only or [f"{kind}/*" for kind in self.kinds]
        return [pattern for pattern in asked if pattern.partition("/")[0] in self.kinds]

    def named(self, result: Result) -> Result:
        """A result as one of this way."""
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
    """What else to run on a Metal device: its kernels from text where they came from a metallib, and Apple's layers."""
    device: Mapping[str, Any] = next((r.outcome.figures for r in results if r.name == "device"), {})
    if device.get("backend") == "metal":
        if "metallib" in device["features"].get("kernels", ""):
            yield FROM_TEXT
        if validate:
            yield VALIDATED


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m zincmetal.check", description=main.__doc__)
    p.add_argument("file", nargs="?", help="a GGUF file to make tokens with (default: the demo model, if installed)")
    p.add_argument("--device", help="metal, cuda or cpu (default: the best that was built)")
    p.add_argument("--json", metavar="FILE", help="write everything to a file, to attach to a report (-: print it)")
    p.add_argument("--only", action="append", default=[], metavar="PATTERN", help="of names, as in 'kernel/mul_mv*'")
    p.add_argument("--timeout", type=float, default=runner.TIMEOUT, metavar="S", help="longest that one check may take")
    p.add_argument("--long", action="store_true", help="longer pauses, and a long prompt on every device")
    p.add_argument(
        "--soak", type=float, default=0.0, metavar="S", help="decode for so many seconds, with memory and speed"
    )
    p.add_argument("--validate", action="store_true", help="run kernels and model once more under Apple's layers")
    p.add_argument("--capture", metavar="FILE.gputrace", help="record a decode step for Xcode")
    p.add_argument("-v", "--verbose", action="store_true", help="a line for every kernel")
    return p


def _demo_model() -> str | None:
    try:
        return str(demo_model())
    except UsageError:
        return None


def _with_progress(found: Iterable[Result | list[str]]) -> list[Result]:
    """All results; meanwhile a bar on a terminal."""
    results: list[Result] = []
    with bar("check", disable=not on_terminal()) as progress:
        total = 0
        for item in found:
            if isinstance(item, list):
                total = len(item)
            else:
                results.append(item)
            if total:
                progress(min(len(results), total), total)
    return results


if __name__ == "__main__":
    sys.exit(main())
