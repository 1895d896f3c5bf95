"""``zincmetal bench``: measures a model as llama-bench does, exact shapes by name, and the share of the roofline."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..device.lock import NO_LOCK
from ..errors import UsageError
from ..measure.choices import BOTH, GREEDY, OUTPUTS, PEERS, SAMPLED
from ..plan.choices import KV_TYPES
from . import bench_compare, bench_serve
from .arguments import Parser, add_device, add_model, integer, integers, model_path, named_model
from .command import Command
from .output import FAILED, as_json, say

if TYPE_CHECKING:
    from ..measure.whole import Asked

MOST_RUNS = 1000


def add_arguments(p: Parser) -> None:
    """Add the options of ``bench``."""
    add_model(p)
    add_tasks(
        p.add_argument_group("tests", "Lists have commas. A prompt is read, or an answer decoded, at each depth.")
    )
    add_load(p.add_argument_group("how the model runs"))
    add_device(p)
    add = p.add_argument
    add("-o", "--output", choices=OUTPUTS, default="md", help="form of the report (default: md)")
    add("--no-lock", action="store_true", help=NO_LOCK)
    more = p.add_argument_group("more figures").add_argument
    more(
        "--profile", action="store_true", help="time by kernel, share of the roofline, bytes by use and type, counters"
    )
    more("--svg", type=Path, metavar="FILE", help="write the roofline as a picture; it makes the profile too")
    more("--versus", choices=PEERS, help="measure this engine too, on the same file, by its own bench")
    more("--llama-bench", metavar="FILE", help="the program of llama.cpp (default: llama-bench on PATH)")


def add_tasks(group: Any) -> None:
    """Add the options that say what is timed."""
    add = group.add_argument
    add("-p", "--prompt", type=integers, default=[512], metavar="LIST", help="tokens of a prompt (default: 512)")
    add("-n", "--tokens", type=integers, default=[128], metavar="LIST", help="tokens to decode (default: 128)")
    add("-d", "--depth", type=integers, default=[0], metavar="LIST", help="tokens before these (default: 0)")
    add("-s", "--sequences", type=integers, default=[1], metavar="LIST", help="sequences that decode at once, 1 to 32")
    add("--sampling", choices=(GREEDY, SAMPLED, BOTH), default=GREEDY, help="of the decoded tokens (default: greedy)")
    add("-r", "--repetitions", type=integer, default=5, metavar="N", help="counted runs of each test (default: 5)")
    add("--warmup", type=integer, default=1, metavar="N", help="runs before these (default: 1)")
    add("--case", action="append", default=[], metavar="NAME", help="an exact shape, such as ssm_dual, or a group, 35b")
    add("--variant", default=BOTH, metavar="NAME", help="a variant of the cases (default: both, which is all)")
    add("--sweep", action="store_true", help="try all rows that were built, and numbers of threads, in cases")
    add("--threadgroups", type=integers, default=[], metavar="LIST", help="threads of a threadgroup, to try in cases")


def add_load(group: Any) -> None:
    """Add the options that change how a model runs."""
    add = group.add_argument
    add("--kv", default="f16", choices=KV_TYPES, help="type of the KV cache (default: f16)")
    help_text = "a row of the tuning table: KERNEL=rows:N,threads:N, q8-tg=N, q8-dual-tg=N, divide_keys_above=N"
    add("--set", action="append", default=[], metavar="KEY=ROW", help=help_text)


def run(args: argparse.Namespace) -> int:
    """Measure, and print the report. The exit status is 1 if the outputs of an exact shape are wrong."""
    from ..measure import report

    if args.svg and not args.svg.parent.is_dir():
        raise UsageError(f"--svg {args.svg}: there is no folder {args.svg.parent}")
    made = _measured(args)
    if args.svg:
        _draw(made, args.svg)
    if args.output == "json":
        print(as_json(made, ascii_only=True, indent=1))
    elif args.output == "csv":
        print(report.csv_text(made), end="")
    else:
        print("\n".join(report.lines(made)))
    return 0 if all(case["allowed"] for case in made["cases"]) else FAILED


def _measured(args: argparse.Namespace) -> dict[str, Any]:
    """Measure what the arguments ask for, alone on the device, and return the report."""
    from .. import measure
    from ..device import backend
    from ..measure import machine, peer, report
    from .info import version

    asked = _asked(args)
    program = peer.find(args.llama_bench) if args.versus else ""
    path = None if args.case and named_model(args) is None else model_path(args)
    if program and not path:
        raise UsageError("--versus measures a model: name its file")
    name = backend.choose(args.device)
    with _alone(name, not args.no_lock):
        before = machine.state(name)
        for text in machine.warnings(before):
            say(f"doubtful: {text}")
        parts = {**_cases(args, asked), **(_model(path, asked) if path else _NO_MODEL)}
        if program and path:
            say(program)
            settings = {"repetitions": asked.repetitions, "kv": asked.kv, "backend": name, "threads": asked.threads}
            parts["peer"] = peer.measure(program, path, asked.tasks, settings)
        after = machine.state(name)
    return {
        "format": report.FORMAT,
        "version": version(),
        "package": str(Path(measure.__path__[0]).parent),
        "settings": _settings(asked),
        "state": {"before": before, "after": after},
        **parts,
    }


_NO_MODEL: dict[str, Any] = {"model": {"name": "", "file": "", "bytes": 0}, "tests": [], "logprobs": []}


def _asked(args: argparse.Namespace) -> Asked:
    """Return what the arguments ask for. Raises UsageError for numbers that make no sense."""
    from ..measure.tasks import tasks
    from ..measure.tuned import rows
    from ..measure.whole import Asked

    for name, least in (("repetitions", 1), ("warmup", 0)):
        if not least <= getattr(args, name) <= MOST_RUNS:
            raise UsageError(f"--{name} must be from {least} to {MOST_RUNS}")
    sampling = (GREEDY, SAMPLED) if args.sampling == BOTH else (args.sampling,)
    return Asked(
        tuple(tasks(args.prompt, args.tokens, args.depth, args.sequences, sampling)),
        args.repetitions,
        args.warmup,
        args.kv,
        args.device,
        args.threads,
        rows(args.set),
        args.profile or args.svg is not None,
    )


@contextmanager
def _alone(device: str, lock: bool) -> Iterator[None]:
    """Hold the lock of the device, unless it is not wanted."""
    from ..device.lock import lock_device

    with ExitStack() as stack:
        if lock:
            stack.enter_context(lock_device(device))
        yield


def _cases(args: argparse.Namespace, asked: Asked) -> dict[str, Any]:
    """Measure the exact shapes; return the parts of the report about them, and about the device."""
    from ..device import backend
    from ..measure import ceilings, exact
    from ..measure.cold import Lab

    core, device = backend.open_device(args.device, args.threads)
    facts = {"name": device.info["name"], "backend": device.info["backend"]}
    if not args.case:
        return {"device": facts, "cases": []}
    found, lab = exact.chosen(args.case), Lab(core, device)
    say("exact shapes: " + ", ".join(found))
    copy = ceilings.measure(core, device).copy
    sweep = exact.Sweep(tuple(args.threadgroups), args.sweep)
    rows = exact.measure(lab, found, args.variant, asked.rows.splits, sweep, asked.repetitions, copy)
    return {"device": facts, "cases": rows}


def _model(path: Path, asked: Asked) -> dict[str, Any]:
    from ..api.naming import model_name
    from ..measure import whole

    with whole.loaded(path, asked) as running:
        return whole.measure(running, asked, model_name(running.engine.file, running.engine.config), say)


def _settings(asked: Asked) -> dict[str, Any]:
    return {
        "repetitions": asked.repetitions,
        "warmup": asked.warmup,
        "kv": asked.kv,
        "threads": asked.threads,
        "set": asked.rows.facts(),
    }


def _draw(made: dict[str, Any], path: Path) -> None:
    from ..measure.drawing import Roofline, svg

    if "profile" not in made:
        raise UsageError("--svg draws the roofline of a model: name its file")
    try:
        path.write_text(svg(Roofline.of(made["profile"])), "utf-8")
    except OSError as error:
        raise UsageError(f"--svg {path}: {error.strerror}") from None


COMMAND = Command(
    "bench",
    "measure a model, exact shapes or servers, and compare two sides",
    add_arguments,
    run,
    (
        ("bench MODEL.gguf", "a prompt of 512 tokens, and 128 decoded, five times each"),
        ("bench MODEL.gguf -d 0,4096,16384 -s 1,4,32 --sampling both", "at depths, many sequences, sampled and greedy"),
        ("bench MODEL.gguf --profile --svg roofline.svg", "every kernel beside its roofline"),
        ("bench --case ssm_dual --variant both --threadgroups 256,512,1024", "an exact shape, on random weights"),
        ("bench MODEL.gguf --set q8-tg=512 -o json > b.json", "another row of the tuning table, for `bench compare`"),
        ("bench MODEL.gguf --versus llama.cpp", "with llama-bench beside it"),
    ),
    notes=(
        "`bench compare` decides between two sides, `bench serve` measures servers; each has a --help of its own.\n"
        "A line of the table is the median of the runs and half the distance from the slowest to the fastest."
    ),
    inner=(bench_compare.COMMAND, bench_serve.COMMAND),
)
