"""Subcommand as data: its words, its options, and the function that runs it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .arguments import Parser
from .output import FAILED, command


@dataclass(frozen=True)
class Command:
    """One subcommand of ``zincmetal``.

    ``examples`` are pairs: the words after "zincmetal", and their meaning. ``reader_gone`` is the exit status if the
    reader of standard output goes away. ``inner`` are subcommands of this one, by their first word.
    """

    name: str
    summary: str
    add_arguments: Callable[[Parser], None]
    run: Callable[[argparse.Namespace], int]
    examples: tuple[tuple[str, str], ...]
    notes: str = ""
    reader_gone: int = FAILED
    inner: tuple[Command, ...] = ()

    @property
    def description(self) -> str:
        """First lines of the help."""
        return f"{self.summary[0].upper()}{self.summary[1:]}." + (f"\n\n{self.notes}" if self.notes else "")

    def prepare(self, parser: Parser) -> Parser:
        """Give a parser the options of this subcommand."""
        self.add_arguments(parser)
        parser.set_defaults(command=self)
        for c in self.inner:
            parser.inner[c.name] = c.prepare(Parser(f"{parser.prog} {c.name}", c.description, examples(c.examples)))
        return parser

    def main(self, argv: Sequence[str] | None, door: str) -> int:
        """Run as a separate program, ``python -m zincmetal.<door>``, and return the exit status."""
        parser = Parser(f"python -m zincmetal.{door}", self.description, examples(self.examples))
        return start(self.prepare(parser), argv)


def start(parser: Parser, argv: Sequence[str] | None) -> int:
    """Parse the arguments, run the subcommand that they choose, and return the exit status."""

    def parse_and_run() -> int:
        args = parser.parse_args(argv)
        chosen: Command | None = args.command
        if chosen is None:
            parser.print_help(sys.stderr)
            return 2
        return command(lambda: chosen.run(args), chosen.reader_gone)

    return command(parse_and_run, reader_gone=0)


def examples(pairs: Sequence[tuple[str, str]]) -> str:
    """Return the last lines of a help text: command lines, each below its meaning."""
    lines = [line for words, does in pairs for line in (f"  # {does}", f"  zincmetal {words}")]
    return "\n".join(["examples:", *lines])
