"""Arguments of the subcommands: the parser, the types of values, and the options that several share."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ..errors import UsageError, did_you_mean, quote
from ..plan.choices import KV_TYPES

if TYPE_CHECKING:
    from argparse import _ArgumentGroup as Group

LONGEST_ERROR = 240  # characters: a wrong argument may be of any length


class Parser(argparse.ArgumentParser):
    """Parser whose errors are one line, with the prefix of every error of the command.

    ``inner`` are parsers of what follows a first word, such as "serve" in ``zincmetal bench serve``.
    ``rest`` names the argument that gets all words behind "--" as they are. argparse would take options for it too.
    ``defaults`` makes of the parsed arguments the defaults by which they are parsed once more: those of a file.
    """

    rest = ""

    def __init__(self, prog: str, description: str, epilog: str = "") -> None:
        self.inner: dict[str, Parser] = {}
        self.defaults: Callable[[argparse.Namespace], dict[str, Any]] | None = None
        super().__init__(
            prog=prog, description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
        )

    @property
    def actions(self) -> Sequence[argparse.Action]:
        """All arguments of the parser."""
        return self._actions

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse all arguments; an unknown one is an error of this subcommand, not of the whole command."""
        words, behind = list(sys.argv[1:] if args is None else args), []
        if words and words[0] in self.inner:
            return self.inner[words[0]].parse_known_args(words[1:], namespace)
        if self.rest and "--" in words:
            at = words.index("--")
            words, behind = words[:at], words[at + 1 :]
        found, unknown = super().parse_known_args(words, namespace)
        if self.defaults is not None:
            try:
                self.set_defaults(**self.defaults(found))
            except UsageError as error:
                self.error(str(error))
            found, unknown = super().parse_known_args(words, namespace)
        if self.rest:
            setattr(found, self.rest, behind)
        if unknown:
            hint = did_you_mean(unknown[0].partition("=")[0], self._option_string_actions)
            self.error(f"unrecognized arguments: {' '.join(unknown)[:LONGEST_ERROR]}{hint}")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        """Print the message on standard error, and exit with status 2."""
        line = " ".join(message.split())
        if len(line) > LONGEST_ERROR:
            line = line[:LONGEST_ERROR] + "…"
        self.exit(2, f"zincmetal: {line} (see {self.prog} --help)\n")


# ---- options that several subcommands have --------------------------------------------------------------------


def add_model(p: Parser) -> None:
    """Add the model, as a positional argument or with -m. :func:`named_model` reads it."""
    p.add_argument(
        "file", nargs="?", metavar="MODEL", help="a GGUF file, or the name of a model (default: the demo model)"
    )
    p.add_argument("-m", "--model", metavar="FILE", help="another way to write MODEL")


def named_model(args: argparse.Namespace) -> str | None:
    """Return the file or the name that the arguments have, or None. Raises UsageError if they name two models."""
    if args.file is not None and args.model is not None:
        raise UsageError(f"two models are named, {quote(args.model)} and {quote(args.file)}: name one")
    named: str | None = args.model if args.file is None else args.file
    return named


def model_path(args: argparse.Namespace) -> Path:
    """Return the file of the model that the arguments name, or the demo model.

    Raises ModelNotFoundError for a name that no file on this machine has, UsageError if there is no demo model.
    """
    from ..hub import demo_model
    from ..hub.lookup import resolve

    named = named_model(args)
    return demo_model() if named is None else resolve(named)


def add_sequence(p: Parser) -> None:
    """Add the options for the size and the type of a sequence's memory."""
    p.add_argument(
        "-c", "--context", type=integer, metavar="N", help="context in tokens (default: 4096 or the model's)"
    )
    p.add_argument(
        "--kv", default="f16", choices=KV_TYPES, help="type of the KV cache: f16, f32 or q8_0 (default: f16)"
    )


def add_device(p: Parser, threads: bool = True) -> None:
    """Add the option for the device, and with ``threads`` the option for the number of CPU threads."""
    p.add_argument("--device", metavar="NAME", help="metal, cuda or cpu (default: the best that was built)")
    if threads:
        p.add_argument("--threads", type=integer, default=0, metavar="N", help="CPU threads (0 = all cores)")


def add_template(group: Group) -> None:
    """Add the options for the system message and the variables of the chat template."""
    group.add_argument("--system", metavar="TEXT", help="the system message")
    group.add_argument("--tools", type=Path, metavar="FILE.json", help="tools to offer: a list of JSON schemas")
    group.add_argument("--documents", type=Path, metavar="FILE.json", help="documents to cite: a list of objects")
    group.add_argument("--no-thinking", action="store_true", help="short for --template-arg enable_thinking=false")
    group.add_argument(
        "--template-arg",
        type=template_arg,
        action="append",
        default=[],
        metavar="KEY=JSON",
        help="a variable of the model's chat template",
    )


def add_sampling(group: Group) -> None:
    """Add the options of sampling."""
    add = group.add_argument
    add("--temp", "--temperature", dest="temperature", type=number, metavar="T", help="temperature (0 = greedy)")
    add("--top-k", type=integer, metavar="K", help="keep the K most probable tokens (0 = off)")
    add("--top-p", type=number, metavar="P", help="keep the fewest tokens whose probabilities sum to P (1 = off)")
    add("--min-p", type=number, metavar="P", help="keep tokens of at least P times the best (0 = off)")
    add("--typical", dest="typical_p", type=number, metavar="P", help="locally typical sampling (1 = off)")
    add("--repeat-penalty", type=number, metavar="X", help="divide the logits of repeated tokens by X (1 = off)")
    add("--presence-penalty", type=number, metavar="X", help="subtract X from logits of repeated tokens (0 = off)")
    add("--frequency-penalty", type=number, metavar="X", help="subtract X for each repetition (0 = off)")
    add("--repeat-last-n", type=integer, metavar="N", help="number of last tokens that the penalties see (-1 = all)")
    add("--logit-bias", type=bias, action="append", default=[], metavar="ID:X", help="add X to the logit of a token")
    add("--seed", type=integer, metavar="N", help="seed of the draw (default: a new one each time)")


def add_drafts(p: Parser) -> None:
    """Add the options of drafts, as a group of their own."""
    group = p.add_argument_group("drafts", "Guessed tokens that a step verifies together: faster, the same text.")
    group.add_argument("--draft", metavar="KIND", help="auto, mtp, lookup, or a draft model's file (default: off)")
    group.add_argument("--draft-tokens", type=integer, metavar="N", help="tokens of a draft at most, 1 to 15")


# ---- types of values ------------------------------------------------------------------------------------------


def integer(text: str) -> int:
    """Parse an integer in digits. Raises ArgumentTypeError."""
    try:
        return int(text)
    except ValueError:  # also of thousands of digits
        raise _wrong(text, "an integer") from None


def count(text: str) -> int:
    """Parse an integer of at least 1. Raises ArgumentTypeError."""
    value = integer(text)
    if value < 1:
        raise _wrong(text, "an integer above 0")
    return value


def integers(text: str) -> list[int]:
    """Parse integers with commas between them. Raises ArgumentTypeError."""
    return [integer(part.strip()) for part in text.split(",")]


def number(text: str) -> float:
    """Parse a finite number. Raises ArgumentTypeError."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise _wrong(text, "a finite number")
    return value


def positive(text: str) -> float:
    """Parse a number above 0, 1e100 at most, so that products with sizes stay finite. Raises ArgumentTypeError."""
    value = number(text)
    if not 0 < value <= 1e100:
        raise _wrong(text, "a number above 0")
    return value


def seconds(text: str) -> float:
    """Parse a time of at least 0 seconds. Raises ArgumentTypeError."""
    value = number(text)
    if value < 0:
        raise _wrong(text, "a number of seconds")
    return value


def bias(text: str) -> tuple[int, float]:
    """Parse ID:X as a token id and a number. Raises ArgumentTypeError."""
    token, _, value = text.partition(":")
    try:
        return int(token), float(value)
    except ValueError:
        raise _wrong(text, "a token id and a number, as in 42:-1.5 or 42:-inf") from None


def template_arg(text: str) -> tuple[str, Any]:
    """Parse KEY=JSON as a name and a value. Raises ArgumentTypeError."""
    name, equals, value = text.partition("=")
    try:
        if name.isidentifier() and equals:
            return name, json.loads(value)
    except (ValueError, RecursionError):
        pass
    raise _wrong(text, "a name and JSON, as in enable_thinking=false")


def read_json(path: Path) -> Any:
    """Read a JSON file and return its value. Raises UsageError if the file cannot be read or holds no JSON."""
    try:
        return json.loads(path.read_bytes())  # in UTF-8, -16 or -32
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: {getattr(error, 'strerror', None) or error}") from None


def _wrong(text: str, wanted: str) -> argparse.ArgumentTypeError:
    return argparse.ArgumentTypeError(f"{quote(text)} is not {wanted}")
