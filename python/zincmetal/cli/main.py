"""Command ``zincmetal``, and ``python -m zincmetal``: chooses a subcommand."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from . import bench, chat, check, completion, info, inspect, launch, models, plan, pull, run, serve
from .arguments import Parser
from .command import Command, examples, start

COMMANDS: tuple[Command, ...] = (
    *(module.COMMAND for module in (run, chat, serve, launch, bench)),
    *(models.COMMAND, models.SHOW, pull.COMMAND, pull.RM),
    *(module.COMMAND for module in (plan, inspect, check, info, completion)),
)
DESCRIPTION = "Run large language models from GGUF files. `zincmetal COMMAND --help` describes a command."
EPILOG = """
exit status:
  0    done
  1    an error, printed on standard error; a failed check; a model that does not fit;
       without a message, if the reader of the output goes away (0 if only facts are printed)
  2    a wrong argument
  130  ended by Ctrl-C"""
EXAMPLES = (
    ('run MODEL.gguf -p "Water boils at"', "continue a text"),
    ("chat MODEL.gguf", "talk with a model"),
    ("check", "compare this machine's results with the CPU"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit status."""
    return start(parser(), argv)


def parser() -> Parser:
    """Return the parser of the whole command line. Making it imports nothing that loads or runs models."""
    p = Parser("zincmetal", DESCRIPTION, f"{examples(EXAMPLES)}\n{EPILOG}")
    p.add_argument("--version", action=Version, nargs=0, help="print the version and exit")
    p.set_defaults(command=None)
    chosen = p.add_subparsers(title="commands", metavar="COMMAND", parser_class=Parser)
    for c in COMMANDS:
        sub = chosen.add_parser(
            c.name, help=c.summary, prog=f"zincmetal {c.name}", description=c.description, epilog=examples(c.examples)
        )
        c.prepare(sub)
    return p


class Version(argparse.Action):
    """Prints the version. It is looked up only when asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        """Print the version and exit."""
        print(f"zincmetal {info.version()}")
        parser.exit()


if __name__ == "__main__":
    sys.exit(main())
