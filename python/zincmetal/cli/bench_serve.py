"""``zincmetal bench serve``: asks servers as clients and agents do."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from .arguments import Parser, integer, positive, seconds
from .command import Command
from .output import FAILED, print_json, say

if TYPE_CHECKING:
    from ..serve.bench.scenarios import Load

STOP_SECONDS = 40.0  # for a server that was started here
KINDS = ("single", "clients", "agents", "mixed", "storm", "churn", "soak")


def add_arguments(p: Parser) -> None:
    """Add the options of ``bench serve``."""
    add = p.add_argument
    add(
        "urls",
        nargs="*",
        metavar="URL",
        help="servers that run, such as http://127.0.0.1:9462; they take turns; name them before the options",
    )
    add("--model", action="append", default=[], metavar="FILE", help="start `zincmetal serve FILE` and measure it too")
    add("--name", action="append", default=[], metavar="NAME", help="a name for each URL, in the reports")
    add(
        "--only",
        action="append",
        default=[],
        choices=KINDS,
        help="this kind of scenario (default: all but churn and soak)",
    )
    add("--remote", action="store_true", help="allow servers on other machines")
    add("--json", action="store_true", help="print one JSON object")
    add("--limit", type=seconds, default=900.0, metavar="S", help="end after S seconds (default: 900)")
    _add_load(p.add_argument_group("load", "Lengths are in tokens."))
    goals = p.add_argument_group("goals", "A good reply meets both; see goodput.")
    goals.add_argument("--ttft", type=seconds, default=2.0, metavar="S", help="time to the first token (default: 2)")
    goals.add_argument(
        "--tpot", type=positive, default=0.1, metavar="S", help="time of each token after (default: 0.1)"
    )


def _add_load(group: Any) -> None:
    add = group.add_argument
    add("--seed", type=integer, default=1, metavar="N", help="seed of prompts and times (default: 1)")
    add("--rounds", type=integer, default=3, metavar="N", help="rounds of each scenario (default: 3)")
    add("-n", "--answer", type=integer, default=64, metavar="N", help="length of an answer (default: 64)")
    add("--prompt", action="append", type=integer, metavar="N", help="length of single prompts (default: 128 and 1024)")
    add("--clients", action="append", type=integer, metavar="N", help="clients at once (default: 1, 4 and 8)")
    add("--each", type=integer, default=3, metavar="N", help="requests of each client (default: 3)")
    add("--long", type=integer, default=2048, metavar="N", help="the prompt that meets 4 decoders (default: 2048)")
    add("--turns", type=integer, default=5, metavar="N", help="turns of an agent (default: 5)")
    add("--system", type=integer, default=1000, metavar="N", help="system prompt of an agent (default: 1000)")
    add("--storm", type=integer, default=100, metavar="N", help="clients that hang up (default: 100)")
    add("--churn", type=integer, default=30, metavar="N", help="requests for all models by turns (default: 30)")
    add("--soak", type=seconds, default=60.0, metavar="S", help="seconds of the soak (default: 60)")


def run(args: argparse.Namespace) -> int:
    """Measure, and print the report. The exit status is 1 if a request failed."""
    import asyncio

    from .. import settings
    from ..serve.bench.measures import Goals
    from ..serve.bench.run import measure, named
    from ..serve.bench.scenarios import USUAL

    if not args.urls and not args.model:
        raise UsageError("name a server by its URL, or a file by --model")
    targets = named(args.urls, args.name, args.remote, settings.API_KEY.value) if args.urls else []
    with ExitStack() as stack:
        pid = None
        for file in args.model:
            url, pid = stack.enter_context(_served(file))
            targets += named([url], [os.path.basename(file)], False, settings.API_KEY.value)
        goals, kinds = Goals(args.ttft, args.tpot), args.only or USUAL
        load = _load(args, pid if len(targets) == 1 else None)
        report = asyncio.run(measure(targets, load, goals, kinds, args.limit, say))
    if args.json:
        print_json(report.facts())
    else:
        print("\n".join(report.lines()))
    return FAILED if report.failed else 0


def _load(args: argparse.Namespace, pid: int | None) -> Load:
    from ..serve.bench.scenarios import Load

    least = {"rounds": 1, "answer": 2, "each": 1, "long": 1, "turns": 2, "system": 1, "storm": 1, "churn": 2}
    for name, low in least.items():
        if not low <= getattr(args, name) <= 1_000_000:
            raise UsageError(f"--{name} must be from {low} to 1,000,000")
    prompts, clients = tuple(args.prompt or (128, 1024)), tuple(args.clients or (1, 4, 8))
    if any(not 1 <= value <= 1_000_000 for value in (*prompts, *clients)):
        raise UsageError("--prompt and --clients must be from 1 to 1,000,000")
    numbers = {name: getattr(args, name) for name in least}
    return Load(seed=args.seed, prompts=prompts, clients=clients, soak=args.soak, pid=pid, **numbers)


@contextmanager
def _served(file: str) -> Iterator[tuple[str, int]]:
    """Start a server with a model; give its address and its process."""
    command = [sys.executable, "-m", "zincmetal", "serve", file, "--port", "0", "--json", "--no-cache-dir"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            told = process.stdout.read(1) and _whole_object(process.stdout)
            if not told:
                raise UsageError(f"the server of {file} did not start: see above")
            yield str(told["url"]), process.pid
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


def _whole_object(lines: Any) -> dict[str, Any]:
    """Read the rest of one JSON object, whose first character was read."""
    text = "{"
    for line in lines:
        text += line
        try:
            found: dict[str, Any] = json.loads(text)
        except ValueError:
            continue
        return found
    return {}


COMMAND = Command(
    "serve",
    "measure servers as clients and agents use them",
    add_arguments,
    run,
    (
        ("bench serve http://127.0.0.1:9462", "measure a server that runs"),
        ("bench serve http://127.0.0.1:8080 --name llama --model MODEL.gguf", "start one, and compare it with another"),
        ("bench serve http://127.0.0.1:9462 --only soak --soak 3600", "an hour of clients that come and go"),
    ),
    notes="Prompts are words in an order that the seed fixes. Nothing but the servers that you name is asked.",
)
