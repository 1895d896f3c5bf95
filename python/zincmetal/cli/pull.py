"""``zincmetal pull`` and ``zincmetal rm``: downloads a model, and removes one."""

from __future__ import annotations

import argparse
import sys

from ..errors import UsageError
from .arguments import Parser
from .command import Command
from .output import FAILED, say
from .progress import bar


def add_arguments(p: Parser) -> None:
    """Add the arguments of ``pull``."""
    p.add_argument("name", metavar="NAME", help="a name of the catalogue, or owner/repo[:quant] of Hugging Face")
    p.add_argument("--dry-run", action="store_true", help="only say which files would be downloaded")
    p.add_argument("--force", action="store_true", help="download a model although it does not run on this machine")


def run(args: argparse.Namespace) -> int:
    """Download the files, and print the path of the first."""
    from ..hub.fit import Machine
    from ..hub.pull import find_remote, pull
    from ..plan.estimate import in_units

    if not args.force and not args.dry_run and not _fits(args.name):
        return FAILED
    if args.dry_run:
        model = find_remote(args.name)
        print(f"{model.repo}, commit {model.commit}: {in_units(model.nbytes)}")
        for file in model.files:
            print(f"  {file.path}  {file.nbytes:,} bytes  sha256 {file.sha256}")
        return 0
    with bar("pull", unit="B") as progress:
        path = pull(args.name, progress, None if args.force else Machine.of().judge)
    print(path)
    return 0


def _fits(name: str) -> bool:
    """Say the verdict on a model of the catalogue. Returns False if it does not fit with any context."""
    from ..hub import catalogue
    from ..hub.fit import Machine
    from ..hub.names import parse
    from .models import words

    parsed = parse(name)
    entry = catalogue.find(parsed) if parsed else None
    offer = entry.offer(parsed.tag) if entry and parsed else None
    if entry is None or offer is None:
        return True  # nothing is known before the file is here
    fit = Machine.of().fit(entry, offer)
    say(f"{entry.name} {offer.quant}, {words(fit)}")
    if not fit.largest_context:
        say("nothing was downloaded; a smaller type may fit (`zincmetal show` lists them), or take --force")
    return fit.largest_context > 0


def add_rm_arguments(p: Parser) -> None:
    """Add the arguments of ``rm``."""
    p.add_argument("name", metavar="NAME", help="a model that `zincmetal pull` downloaded")
    p.add_argument("-y", "--yes", action="store_true", help="do not ask")


def run_rm(args: argparse.Namespace) -> int:
    """Delete the files of a model, after a question."""
    from ..hub.pull import removable, remove
    from ..plan.estimate import in_units

    files = removable(args.name)
    for path in files:
        print(path)
    if not args.yes and not _agreed(len(files)):
        return FAILED
    print(f"{in_units(remove(files))} freed")
    return 0


def _agreed(n: int) -> bool:
    """Ask on a terminal. Raises UsageError without one."""
    if sys.stdin is None or not sys.stdin.isatty():
        raise UsageError("rm asks before it deletes, and there is no terminal: add --yes")
    print(f"delete {'this file' if n == 1 else f'these {n} files'}? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


COMMAND = Command(
    "pull",
    "download a model",
    add_arguments,
    run,
    (
        ("pull qwen3-8b", "a model of the catalogue"),
        ("pull unsloth/Qwen3.6-27B-GGUF:Q5_K_M", "any GGUF file of Hugging Face"),
        ("pull qwen3-8b --dry-run", "the files and their checksums"),
    ),
    notes="An interrupted download goes on where it was. Needs the extra `zincmetal[hub]`.",
)
RM = Command(
    "rm",
    "remove a model that was downloaded",
    add_rm_arguments,
    run_rm,
    (("rm qwen3-8b", "all files of a model in zincmetal's folder"),),
    notes="Other programs' models are left alone.",
)
