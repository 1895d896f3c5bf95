"""Measures how many wrong schedulers, page pools and prefix caches the tests find.

    python tests/mutants/engine_mutants.py [pages.py ...] [--every N] [--skip K] [--again old.json] [--json out.json]

A mutant is a module of ``zincmetal.engine`` with one change: a statement deleted, a condition negated, a bound moved by
one, ``min`` and ``max`` exchanged. It lives in a fork of this process, which runs the tests of the module until one
fails. A test that takes too long shows a mutant that hangs.

``--every N`` tries each N-th mutant alone, ``--skip K`` not the first K: so N runs with another K each try all of them.
``--fast`` leaves the slow tests out. Then ``--again`` tries those that survived in that report, with all tests.

engine_survivors.md lists the mutants that survive, each with its reason. A reason that begins with "not seen" is a
fault that no test finds: it counts as survived. The exit code is 1 if another mutant survives.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.abc
import importlib.util
import itertools
import json
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import Phase, settings

TESTS = Path(__file__).parents[1]
ENGINE = TESTS.parent / "python" / "zincmetal" / "engine"
SURVIVORS = Path(__file__).with_name("engine_survivors.md")
SECONDS = 20  # of the processor, for one test: the slowest takes 6 without a mutant
SLOW_FILES = ("test_step_loop.py", "test_cache_tier.py", "test_scheduler_machine.py")
SLOW = "test_a_model_goes_on_after_a_restart"  # a test of whole models, which others see what it sees
MOST_BYTES = 8 << 30  # of addresses, for the tests of a mutant
#: Tests of each module, the fastest first. Those of SLOW_FILES run for a mutant that the others do not kill.
SCHEDULER = ("test_scheduler_tells.py", "test_scheduler.py", "test_host_draws.py", "test_step_loop.py")
POOLS = ("test_page_pool.py", "test_sequence.py", "test_batch.py", *SCHEDULER[:2])
MODULES = {
    "pages.py": POOLS,
    "pace.py": ("test_scheduler.py",),
    "places.py": ("test_places.py",),
    "flight.py": ("test_host_draws.py", "test_batch.py", "test_scheduler.py", "test_scheduler_machine.py"),
    "batch.py": ("test_batch.py", *SCHEDULER[:2], "test_scheduler_machine.py"),
    "prefix_tree.py": ("test_prefix_cache.py", "test_cache_tier.py"),
    "prefix_cache.py": ("test_prefix_cache.py", "test_cache_tier.py"),
    "cache_reader.py": ("test_cache_reader.py",),
    "pools.py": (
        "test_room.py",
        "test_room_below.py",
        *SCHEDULER[:2],
        "test_cache_reader.py",
        "test_cache_tier.py",
        "test_scheduler_machine.py",
    ),
    "scheduler.py": (*SCHEDULER, "test_cache_reader.py", "test_cache_tier.py", "test_scheduler_machine.py"),
}
FAST = {module: tuple(file for file in files if file not in SLOW_FILES) for module, files in MODULES.items()}
NOT_SEEN = "not seen"
KEYS = ("module", "line", "change")  # of a row of a report
#: Modules that are imported anew in a fork: those of the engine, and all that import them.
ANEW = re.compile(r"(zincmetal\.(engine|api|serve|device)|support)(\.|$)")
ORDERS = (ast.Lt, ast.LtE, ast.Gt, ast.GtE)
EXCHANGED = {"min": "max", "max": "min"}


@dataclass(frozen=True)
class Mutant:
    """Change of a line of a module, whose text without it is ``source``."""

    module: str
    number: int
    line: str
    change: str
    source: str

    @property
    def text(self) -> str:
        """The module with the change. Made when asked for: it costs as much as a look at the whole module."""
        tree = ast.parse(self.source)
        _, _, apply = next(itertools.islice(_sites(tree), self.number, None))
        apply()
        return ast.unparse(ast.fix_missing_locations(tree))


def mutants(module: str, text: str) -> Iterator[Mutant]:
    """Yields all mutants of a module."""
    lines = text.split("\n")
    for i, (node, change, _) in enumerate(_sites(ast.parse(text))):
        yield Mutant(module, i, lines[node.lineno - 1].strip(), change, text)


def _sites(tree: ast.Module) -> Iterator[tuple[Any, str, Callable[[], None]]]:
    """Yields the places of a module that can change: (node, description, function that changes it)."""
    methods = [item for node in tree.body if isinstance(node, ast.ClassDef) for item in node.body]
    for function in (*tree.body, *methods):
        if isinstance(function, ast.FunctionDef) and not _declares_only(function):
            yield from _statements(function)
            for node in ast.walk(function):
                yield from _conditions(node)
                yield from _bounds(node)


def _declares_only(function: ast.FunctionDef) -> bool:
    """Returns True for a method of a protocol: it has a docstring and nothing else."""
    return all(isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant) for s in function.body)


def _statements(function: ast.FunctionDef) -> Iterator[tuple[Any, str, Callable[[], None]]]:
    """Yields deletions. Not of docstrings, of messages to a log, nor of a name's only value: that is no program."""
    for parent in ast.walk(function):
        for name in ("body", "orelse", "finalbody"):
            block = getattr(parent, name, None)
            if not isinstance(block, list) or isinstance(parent, ast.IfExp | ast.Lambda):
                continue
            for i, statement in enumerate(block):
                if _can_go(statement):
                    yield statement, "deleted", _replace(block, i)


def _replace(block: list[ast.stmt], i: int) -> Callable[[], None]:
    def apply() -> None:
        block[i] = ast.copy_location(ast.Pass(), block[i])

    return apply


def _can_go(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Expr):
        said = ast.unparse(statement)
        return not isinstance(statement.value, ast.Constant) and not said.startswith("_log.")
    if isinstance(statement, ast.Assign):
        return not all(isinstance(target, ast.Name | ast.Tuple) for target in statement.targets)
    return isinstance(statement, ast.AugAssign | ast.Return | ast.Raise | ast.Break | ast.Continue | ast.Delete)


def _conditions(node: ast.AST) -> Iterator[tuple[Any, str, Callable[[], None]]]:
    """Yields negations of conditions."""
    if isinstance(node, ast.If | ast.While | ast.IfExp):

        def negate() -> None:
            node.test = ast.UnaryOp(ast.Not(), node.test)

        if not (isinstance(node.test, ast.Constant)):
            yield node.test, f"not ({ast.unparse(node.test)})", negate
    if isinstance(node, ast.comprehension):
        for i, test in enumerate(node.ifs):

            def negate_one(i: int = i, test: ast.expr = test) -> None:
                node.ifs[i] = ast.UnaryOp(ast.Not(), test)

            yield test, f"not ({ast.unparse(test)})", negate_one


def _bounds(node: ast.AST) -> Iterator[tuple[Any, str, Callable[[], None]]]:
    """Yields bounds that are moved by one, and min and max that are exchanged."""
    if isinstance(node, ast.Compare) and isinstance(node.ops[0], ORDERS):
        right = node.comparators[0]
        for operator, sign in ((ast.Add(), "+"), (ast.Sub(), "-")):

            def move(operator: ast.operator = operator) -> None:
                node.comparators[0] = ast.BinOp(right, operator, ast.Constant(1))

            if not isinstance(right, ast.Tuple):
                yield node, f"{ast.unparse(node)} {sign} 1", move
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in EXCHANGED:
        name = node.func

        def exchange() -> None:
            name.id = EXCHANGED[name.id]

        yield node, f"{EXCHANGED[name.id]}{ast.unparse(node)[3:]}", exchange


# ---- a fork ------------------------------------------------------------------------------------------------------


class Loader(importlib.abc.Loader, importlib.abc.MetaPathFinder):
    """Imports the mutated module in place of its own."""

    def __init__(self, mutant: Mutant) -> None:
        self._mutant, self._name = mutant, f"zincmetal.engine.{mutant.module.removesuffix('.py')}"

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        """Finds the module by its name."""
        return importlib.util.spec_from_loader(name, self) if name == self._name else None

    def exec_module(self, module: ModuleType) -> None:
        """Runs the mutated text."""
        module.__file__ = str(ENGINE / self._mutant.module)
        exec(compile(self._mutant.text, module.__file__, "exec"), module.__dict__)


class First:
    """Plugin of pytest that keeps the name of the first test that fails."""

    def __init__(self) -> None:
        self.name = ""

    def pytest_runtest_logstart(self) -> None:
        """Winds up the clocks that end a test."""
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.alarm(10 * SECONDS)  # waits for something that never comes

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Takes a report."""
        if report.failed and not self.name:
            self.name = report.nodeid

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Takes an error of an import."""
        if report.failed and not self.name:
            self.name = f"import of {report.nodeid}"


def run_tests(mutant: Mutant | None, files: tuple[str, ...]) -> str:
    """Runs tests. Returns the first that fails, "hung", "crashed", or nothing."""
    fast = tuple(file for file in files if file not in SLOW_FILES)
    slow = tuple(file for file in files if file in SLOW_FILES)
    return (fast and run_in_fork(mutant, fast)) or (slow and run_in_fork(mutant, slow)) or ""


def run_in_fork(mutant: Mutant | None, files: tuple[str, ...]) -> str:
    """Runs tests in a fork of this process."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(receive)
        _be_child(mutant, files, send)
    os.close(send)
    with os.fdopen(receive, "rb") as pipe:
        told = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return "hung" if os.WTERMSIG(status) in (signal.SIGPROF, signal.SIGALRM) else "crashed"
    return told


def _be_child(mutant: Mutant | None, files: tuple[str, ...], send: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    First().pytest_runtest_logstart()  # for the imports
    settings.register_profile("one failure is enough", phases=[Phase.generate])  # to make it small takes minutes
    settings.load_profile("one failure is enough")
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # these tests need none of them
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    for name in [name for name in sys.modules if ANEW.match(name)]:
        del sys.modules[name]
    if mutant is not None:
        sys.meta_path.insert(0, Loader(mutant))
    first = First()
    options = ["-x", "-q", "-k", f"not {SLOW}", "-p", "no:cacheprovider", "--no-header"]
    pytest.main([*options, *(str(TESTS / "engine" / file) for file in files)], plugins=[first])
    os.write(send, first.name.encode())
    os._exit(0)


# ---- the survivors -----------------------------------------------------------------------------------------------


def listed() -> dict[tuple[str, str, str], str]:
    """Reads the survivors' reasons by (module, line, change)."""
    found, module = dict[tuple[str, str, str], str](), ""
    for line in SURVIVORS.read_text("utf-8").splitlines():
        if line.startswith("## "):
            module = line[3:].strip()
        elif parsed := re.fullmatch(r"- `(.*)` \| `(.*)` \| (.*)", line):
            found[module, parsed[1], parsed[2]] = parsed[3]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", default=list(MODULES))
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--skip", type=int, default=0)
    parser.add_argument("--fast", action="store_true", help="without the slow tests")
    parser.add_argument("--again", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    known, rows, wrong = listed(), [], 0
    left = None
    if options.again:
        left = {tuple(map(row.get, KEYS)) for row in json.loads(options.again.read_text()) if not row["outcome"]}
    for module in options.modules:
        files = FAST[module] if options.fast else MODULES[module]
        if failed := run_tests(None, files):
            raise SystemExit(f"without a mutant {failed} fails")
        counts = [0, 0, 0]  # mutants, killed, without effect
        for mutant in list(mutants(module, (ENGINE / module).read_text("utf-8")))[options.skip :: options.every]:
            if left is not None and (module, mutant.line, mutant.change) not in left:
                continue
            began = time.monotonic()
            reason = known.get((module, mutant.line, mutant.change), "")
            outcome = run_tests(mutant, FAST[module] if reason else files)
            same = not outcome and bool(reason) and not reason.startswith(NOT_SEEN)
            counts = [counts[0] + 1, counts[1] + bool(outcome), counts[2] + same]
            seconds = time.monotonic() - began
            row = {"module": module, "line": mutant.line, "change": mutant.change}
            rows.append({**row, "outcome": outcome, "seconds": round(seconds, 1)})
            if not outcome and not reason:
                wrong += 1
                print(f"{module}: `{mutant.line}` | `{mutant.change}` survives", flush=True)
            elif seconds > 4 * SECONDS:
                print(f"{module}: `{mutant.line}` | `{mutant.change}` is slow: {outcome}", flush=True)
            if options.json:
                options.json.write_text(json.dumps(rows, indent=1))
        n, killed, same = counts
        share = killed / max(1, n - same)
        print(f"{module}: {n} mutants, {same} of them without effect, {killed} killed: {share:.1%}", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    for unchanged in ("numpy", "hypothesis.stateful", "zincmetal.gguf", "zincmetal.sampling.sampler"):
        importlib.import_module(unchanged)  # once, before the forks
    sys.exit(main())
