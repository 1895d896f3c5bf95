"""``zincmetal plan``: prints the needs of a model. Nothing is allocated.

Without options it prints the memory of the model, and the bytes that a token costs. ``--dump``, ``--dot`` and
``--json`` show the plan: every dispatch of a step, with its barriers and regions.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ..errors import UsageError
from ..plan.choices import DRAFT, OUTPUTS
from .arguments import Parser, add_device, add_model, add_sequence, integer, model_path, positive
from .command import Command
from .output import FAILED, print_json

if TYPE_CHECKING:
    from ..plan.plan import Plan
    from ..plan.planner import Planner


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``python -m zincmetal.plan`` and return the exit status. Its ``--json`` leaves the plan out, as before."""
    return OLD_DOOR.main(argv, "plan")


def add_arguments(p: Parser) -> None:
    """Add the options of ``plan``."""
    _add_arguments(p, "print one JSON object: context, memory, token and plan")
    p.set_defaults(json_with_plan=True)


def _add_old_arguments(p: Parser) -> None:
    _add_arguments(p, "print one JSON object: context, memory, token")
    p.set_defaults(json_with_plan=False)


def _add_arguments(p: Parser, json_help: str) -> None:
    add_model(p)
    add_sequence(p)
    add_device(p, threads=False)
    p.add_argument(
        "--bandwidth",
        type=positive,
        metavar="GB/S",
        help="print the tokens per second that a memory of this speed allows",
    )
    p.add_argument("--draft", choices=("mtp",), help="with the file's block that drafts")
    p.add_argument("--json", action="store_true", help=f"{json_help}; with --dump only the plan")
    recorded = p.add_argument_group("the plan")
    form = recorded.add_mutually_exclusive_group()
    form.add_argument("--dump", action="store_true", help="print it as text, a dispatch a line")
    form.add_argument("--dot", action="store_true", help="print it as a graph, for Graphviz")
    step = recorded.add_mutually_exclusive_group()
    step.add_argument("--rows", type=integer, metavar="N", help="of a step that takes N tokens of one prompt")
    step.add_argument("--sequences", type=integer, metavar="N", help="of a decode step of N sequences (default: 1)")
    recorded.add_argument(
        "--output",
        choices=(*OUTPUTS, DRAFT),
        help="the end of a step (default: argmax, the best token of each sequence); draft: the block that drafts",
    )


def run(args: argparse.Namespace) -> int:
    """Print the report or the plan. The exit status is 1 if the model does not fit the device."""
    from .. import gguf
    from ..device import backend
    from ..plan.planner import Planner
    from ..plan.target import Target

    _check(args)
    path = model_path(args)
    core, device = backend.open_device(args.device)
    with gguf.open(path) as file:
        drafts = args.draft == "mtp" or args.output == DRAFT
        planner = Planner(file, Target.of(core, device.info), args.context, args.kv, drafts)
        if args.dump or args.dot:
            plan = _recorded(planner, args)
            print(plan.to_dot() if args.dot else plan.to_json() if args.json else plan.dump())
            return 0
        return _report(planner, args, f"{path}: {planner.config.arch}", f"on {device.info['name']}")


def _check(args: argparse.Namespace) -> None:
    if args.dot and args.json:
        raise UsageError("--dot and --json are two forms: leave one out, or take --dump --json")
    shown = args.dump or args.dot or (args.json and args.json_with_plan)
    for name in ("rows", "sequences", "output"):
        if getattr(args, name) is not None and not shown:
            raise UsageError(f"--{name} is for the plan itself: add --dump, --dot or --json")


def _recorded(planner: Planner, args: argparse.Namespace) -> Plan:
    from .. import arguments
    from ..plan.chunks import LOGITS_ROWS, MAX_SINGLES, chunk_shape, decode_shape

    output = args.output or "argmax"
    if args.rows is None:
        return planner.plan(decode_shape(arguments.integer("--sequences", args.sequences, 1, MAX_SINGLES, 1), output))
    rows = arguments.integer("--rows", args.rows, 1, planner.target.max_rows)
    outs = {"none": 0, "hidden": 0, "all": min(rows, LOGITS_ROWS)}.get(output, 1)
    return planner.plan(chunk_shape(rows, 0, outs, output))


def _report(planner: Planner, args: argparse.Namespace, model: str, place: str) -> int:
    """Print the memory and the bytes of a token."""
    from .plan_report import Longest, Token, memory_figures, memory_lines

    memory = planner.memory()
    token = Token(planner.plan(), planner.kv_read())
    longest = Longest(planner.max_rows, planner.arena_bound(planner.max_rows))
    if args.json:
        figures = {
            "context": memory.n_ctx,
            "memory": memory_figures(memory, longest),
            "token": token.figures(args.bandwidth),
        }
        recorded = {"plan": json.loads(_recorded(planner, args).to_json())} if args.json_with_plan else {}
        print_json(figures | recorded)
    else:
        print(f"{model}, {planner.config.n_layer} layers; {place}")
        print("\n".join([*memory_lines(memory, args.kv, longest), "", *token.lines(args.bandwidth)]))
    return 0 if memory.total <= memory.budget else FAILED


COMMAND = Command(
    "plan",
    "show the memory of a model, the bytes of a token, and its plan",
    add_arguments,
    run,
    (
        ("plan MODEL.gguf -c 32768", "the memory of a long context; exit status 1 if it does not fit"),
        ("plan MODEL.gguf --bandwidth 400", "the tokens per second that a memory of 400 GB/s allows"),
        ("plan MODEL.gguf --dump --rows 512", "every dispatch of a prefill step"),
        ("plan MODEL.gguf --dot | dot -Tsvg > plan.svg", "the graph of a decode step, drawn by Graphviz"),
    ),
    reader_gone=0,
)
OLD_DOOR = replace(COMMAND, add_arguments=_add_old_arguments)
