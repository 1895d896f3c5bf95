"""``zincmetal bench compare``: decides between two sides, by runs in turns and one rule."""

from __future__ import annotations

import argparse
import textwrap
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..measure.verdict import LEAST_RUNS, RULE
from .arguments import Parser, integer, model_path, number
from .command import Command
from .output import FAILED, print_json, say

if TYPE_CHECKING:
    from ..measure.compare import Side

MOST_RUNS = 100


def add_arguments(p: Parser) -> None:
    """Add the options of ``bench compare``."""
    p.rest = "words"
    add = p.add_argument
    add("a", metavar="A", help="the usual side: a report (.json), a model file or name, or a commit")
    add("b", nargs="?", metavar="B", help="the changed side, of the same kind (default: A, with --set)")
    add("-m", "--model", dest="model", metavar="FILE", help="the model that two commits run (default: the demo model)")
    add("--set", action="append", default=[], metavar="KEY=ROW", help="a row of the tuning table, for B alone")
    add("--runs", type=integer, default=LEAST_RUNS, metavar="N", help="runs of each side, in turns (default: 3)")
    add(
        "--error",
        type=number,
        default=0.0,
        metavar="NATS",
        help="difference of log-probabilities to allow (default: 0)",
    )
    add("--json", action="store_true", help="print one JSON object")
    p.set_defaults(file=None)


def run(args: argparse.Namespace) -> int:
    """Compare and print the verdict. The exit status is 0 for keep, 1 for revert."""
    from ..measure import compare
    from ..measure.verdict import decide, figures

    if not LEAST_RUNS <= args.runs <= MOST_RUNS:
        raise UsageError(f"--runs must be from {LEAST_RUNS} to {MOST_RUNS}")
    if args.error < 0:
        raise UsageError("--error must be 0 or more nats")
    names, reports = _reports(args)
    shapes, whole, outputs = figures(*reports)
    verdict = decide(shapes, whole, outputs, args.error)
    found = compare.facts(names, [*shapes, *whole], outputs, verdict, compare.doubts(reports))
    if args.json:
        print_json(found)
    else:
        print("\n".join(compare.lines(found)))
    return 0 if verdict.keep else FAILED


def _reports(args: argparse.Namespace) -> tuple[list[str], Any]:
    """Return the names and the reports of both sides: read, or measured now, in turns."""
    from ..measure import compare, report

    if args.b is None and not args.set:
        raise UsageError("name a second side, or a row of the tuning table by --set")
    names = [args.a, args.a if args.b is None else args.b]
    if all(name.endswith(".json") for name in names):
        if args.words or args.set:
            raise UsageError("reports were measured already: --set and options behind -- are for files and commits")
        return names, [report.read(Path(name)) for name in names]
    with ExitStack() as stack:
        usual, changed = _files(names) or _commits(names, args, stack)
        sides = usual, _with_rows(changed, args.set)
        turns = compare.take_turns(sides, _words(args.words), args.runs, compare.run_process, say)
        return [side.name for side in sides], turns


def _files(names: list[str]) -> tuple[Side, Side] | None:
    """Return the sides of two model files, or None if neither is one. Raises UsageError if one of them is."""
    from ..measure.compare import Side

    found = [name for name in names if name.endswith((".gguf", ".json"))]
    if not found:
        return None
    if len(found) == 1 or any(name.endswith(".json") for name in found):
        raise UsageError(
            f"{names[0]} and {names[1]} are of two kinds: name two reports, two model files or two commits"
        )
    one, other = (Side(name, name) for name in names)
    return one, other


def _commits(names: list[str], args: argparse.Namespace, stack: ExitStack) -> tuple[Side, Side]:
    from ..measure.compare import Side, commit_of, packages

    commits, file = [commit_of(name) for name in names], str(model_path(args).resolve())
    folders = stack.enter_context(packages(commits, say))
    one, other = (Side(name, file, folder) for name, folder in zip(names, folders, strict=True))
    return one, other


def _with_rows(side: Side, rows: list[str]) -> Side:
    """Return a side with rows of the tuning table of its own."""
    words = tuple(word for row in rows for word in ("--set", row))
    return replace(side, name=" ".join([side.name, *words]), words=words)


def _words(words: list[str]) -> list[str]:
    """Return the options of each run. One repetition is usual: the runs take turns."""
    return words if any(word in ("-r", "--repetitions") for word in words) else ["-r", "1", *words]


COMMAND = Command(
    "compare",
    "decide between two reports, model files or commits: keep or revert",
    add_arguments,
    run,
    (
        ("bench compare a.json b.json", "two reports of `zincmetal bench -o json`, each with three runs or more"),
        ("bench compare main HEAD -m MODEL.gguf -- -p 512 -n 128", "two commits; options behind -- are those of bench"),
        ("bench compare HEAD~1 HEAD -- --case lm_head", "an exact shape first, then the whole model"),
        ("bench compare MODEL.gguf --set q8-tg=512 -- --case lm_head", "a row of the tuning table, and without it"),
        ("bench compare Q4_0.gguf Q4_K_M.gguf --error 0.5", "two files, whose log-probabilities may differ"),
    ),
    notes=textwrap.fill(RULE, 110) + "\n\nThe exit status is 0 for keep, 1 for revert and for errors.",
)
