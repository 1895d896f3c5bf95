"""The command line of ``python -m zincmetal.check``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence

from ..errors import UsageError
from ..generate import bar, demo_model
from . import report, runner
from .results import FAIL, Result


def main(argv: Sequence[str] | None = None, command: Sequence[str] = runner.WORKER) -> int:
    """Check that this machine computes what it should; the exit status: 1 where something failed."""
    args = parser().parse_args(argv)
    request = {"device": args.device, "file": args.file or _demo_model(), "only": args.only}
    out = sys.stderr if args.json == "-" else sys.stdout
    results = [report.host()]
    print(report.line(results[0]), file=out, flush=True)
    try:
        results += _with_progress(runner.run(request, command, args.timeout))
    except KeyboardInterrupt:
        return 130
    print("\n".join(report.lines(results[1:], args.verbose)), file=out)
    counts = report.summary(results)
    print(", ".join(f"{n} {status}" for status, n in counts.items()), file=out)
    if args.json:
        text = json.dumps(report.as_json(results), indent=1)
        if args.json == "-":
            print(text)
        else:
            with open(args.json, "w", encoding="utf-8") as file:
                file.write(text + "\n")
    return 1 if counts[FAIL] else 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m zincmetal.check", description=main.__doc__)
    p.add_argument("file", nargs="?", help="a GGUF file to make tokens with (default: the demo model, if installed)")
    p.add_argument("--device", help="metal, cuda or cpu (default: the best that was built)")
    p.add_argument("--json", metavar="FILE", help="write everything to a file, to attach to a report (-: print it)")
    p.add_argument("--only", action="append", default=[], metavar="PATTERN", help="of names, as in 'kernel/mul_mv*'")
    p.add_argument("--timeout", type=float, default=runner.TIMEOUT, metavar="S", help="longest that one check may take")
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
    with bar("check", disable=not sys.stderr.isatty()) as progress:
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
