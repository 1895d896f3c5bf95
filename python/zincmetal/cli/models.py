"""``zincmetal models`` and ``zincmetal show``: which models are here, which there are, and whether they fit."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .arguments import Parser, add_device, add_sequence, positive
from .command import Command
from .output import print_json

if TYPE_CHECKING:
    from ..hub.catalogue import Entry, Offer
    from ..hub.fit import Fit, Machine
    from ..hub.stores import Local


def _add_judged(p: Parser) -> None:
    add_sequence(p)
    add_device(p, threads=False)
    p.add_argument(
        "--bandwidth",
        type=positive,
        metavar="GB/S",
        help="the speed of the device's memory, for the projected tokens/s",
    )
    p.add_argument("--json", action="store_true", help="print one JSON object")


def add_arguments(p: Parser) -> None:
    """Add the options of ``models``."""
    p.add_argument("--local", action="store_true", help="only the models on this machine")
    _add_judged(p)


def add_show_arguments(p: Parser) -> None:
    """Add the arguments of ``show``."""
    p.add_argument("name", metavar="NAME", help="a name of the catalogue, owner/repo[:quant], or a GGUF file")
    _add_judged(p)


def run(args: argparse.Namespace) -> int:
    """Print the models on this machine and the catalogue."""
    from ..hub import catalogue
    from ..hub.figures import catalogue_figures, local_figures
    from ..hub.stores import local_models

    local = local_models()
    if args.local:
        found = []
    else:
        machine = _machine(args)
        found = [(e, e.offers[0]) for e in catalogue.ENTRIES]
    if args.json:
        fits = catalogue_figures(machine, args.context, args.kv) if found else []
        print_json({"local": [local_figures(m) for m in local], "catalogue": fits})
        return 0
    for line in _local_lines(local):
        print(line)
    if found:
        print("\n".join(_heading(machine)))
        for entry, offer in found:  # a verdict takes a moment: each is printed when it is known
            print(_row(entry, offer, machine.fit(entry, offer, args.context, args.kv)), flush=True)
        print("\n`zincmetal show NAME` says more of one, `zincmetal pull NAME` gets it.")
    return 0


def run_show(args: argparse.Namespace) -> int:
    """Print all that is known of one model."""
    from ..hub import catalogue
    from ..hub.figures import fit_figures, offer_figures
    from ..hub.lookup import matching, resolve
    from ..hub.names import parse
    from ..hub.stores import local_models

    name, machine = parse(args.name), _machine(args)
    entry = catalogue.find(name) if name else None
    local = [m for m in matching(name, local_models()) if not m.missing] if name else []
    if not entry or local:
        path = resolve(args.name)  # or the error that says how to get it
        fit = machine.fit_file(path, args.context, args.kv)
        shown: dict[str, Any] = {"path": str(path), **({"store": local[0].store} if local else {}), **fit_figures(fit)}
    else:
        shown = {}
    judged = [(o, machine.fit(entry, o, args.context, args.kv)) for o in entry.offers] if entry else []
    if args.json:
        offers = [offer_figures(entry, o, f) for o, f in judged] if entry else []
        print_json({"local": shown or None, "catalogue": offers})
        return 0
    if shown:
        print(f"{shown['path']}\n  {words(fit)}")
    if entry:
        print("\n".join(_entry_lines(entry)))
        for offer, fit in judged:
            print(f"  {offer.quant:<11} {words(fit)}")
    return 0


def _machine(args: argparse.Namespace) -> Machine:
    from ..hub.fit import Machine

    return Machine.of(args.device, args.bandwidth)


# ---- words ------------------------------------------------------------------------------------------------------


def _local_lines(local: list[Local]) -> Iterator[str]:
    from ..hub.pull import unfinished_files
    from ..plan.estimate import in_units

    if not local:
        yield "no models on this machine"
    else:
        yield "on this machine"
    for m in local:
        note = f", {m.missing} of its parts missing" if m.missing else ""
        yield f"  {m.name:<58} {in_units(m.nbytes):>9}  {m.store}{note}"
    for path in unfinished_files():
        yield f"  {path.name:<58} {in_units(path.stat().st_size):>9}  unfinished: pull goes on, rm removes it"


def _heading(machine: Machine) -> Iterator[str]:
    from ..plan.estimate import in_units

    known = machine.bandwidth
    speed = f", {known.gb_s:.0f} GB/s ({known.source})" if known else ""
    yield f"\ncatalogue, for {machine.name}: {in_units(machine.budget)} for a model{speed}"
    if known:
        yield "tokens/s are a projection from bytes and bandwidth: at most so many"
    yield f"  {'name':<25} {'type':<11} {'file':>9} {'memory':>9} {'context':>8} {'tokens/s':>8}  tested"


def _row(entry: Entry, offer: Offer, fit: Fit) -> str:
    from ..plan.estimate import in_units

    memory = in_units(fit.memory.total) if fit.memory else ""
    context = f"{fit.largest_context}" if fit.largest_context else "no room"
    speed = _speed(fit.tokens_per_second[0]) if fit.tokens_per_second and fit.largest_context else ""
    size = in_units(offer.nbytes)
    return f"  {entry.name:<25} {offer.quant:<11} {size:>9} {memory:>9} {context:>8} {speed:>8}  {entry.tested}"


def words(fit: Fit) -> str:
    """Describe a verdict in one line."""
    from ..plan.estimate import in_units

    size = f"{in_units(fit.nbytes)}: {fit.verdict}"
    if fit.memory is None:
        return f"{size}, the budget is {in_units(fit.budget)}"
    memory = f"{in_units(fit.memory.total)} of {in_units(fit.budget)} for {fit.memory.n_ctx} tokens"
    longest = f", {fit.largest_context} tokens at most" if fit.largest_context else ""
    speed = ""
    if fit.tokens_per_second and fit.bandwidth:
        start, end = fit.tokens_per_second
        speed = (
            f"; at most {_speed(start)} tokens/s, {_speed(end)} at the end of the context (projection: "
            f"{fit.bandwidth.gb_s:.0f} GB/s, {fit.bandwidth.source})"
        )
    return f"{size}, {memory}{longest}{speed}"


def _speed(rate: float) -> str:
    return f"{rate:.0f}" if rate >= 10 else f"{rate:.1f}"


def _entry_lines(entry: Entry) -> Iterator[str]:
    shape = entry.shape
    experts = f", {shape.moe.used} of {shape.moe.n} experts a token" if shape.moe else ""
    yield f"{entry.name}: {shape.arch}, {shape.n_params / 1e9:.3g} B weights{experts}, trained for {shape.n_ctx} tokens"
    yield f"  licence: {entry.licence}; tested: {entry.tested}"
    yield f"  files: {entry.repo}" + (f" ({entry.note})" if entry.note else "")


COMMAND = Command(
    "models",
    "list the models on this machine, and the catalogue with a verdict for this machine",
    add_arguments,
    run,
    (
        ("models", "what is here, and what would fit"),
        ("models -c 32768", "what would fit with a long context"),
        ("models --local --json | jq -r '.local[].name'", "the names that can be loaded"),
    ),
    reader_gone=0,
)
SHOW = Command(
    "show",
    "show what is known of one model, and whether it fits this machine",
    add_show_arguments,
    run_show,
    (("show qwen3-8b", "each quant type of a model: its size, its memory, its largest context"),),
    reader_gone=0,
)
