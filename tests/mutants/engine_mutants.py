"""Measures how many wrong schedulers, page pools and prefix caches the tests find.

    python tests/mutants/engine_mutants.py [pages.py ...] [--every N] [--skip K] [--again old.json] [--json out.json]

A mutant is a module of ``zincmetal.engine`` with one change: a statement deleted, a condition negated, a bound moved by
one, ``min`` and ``max`` exchanged. The tests are collected once, and run once without a mutant to see which functions
each of them calls, and for how long. A mutant lives in a fork of this process, where one function gets other code. The
tests that call it run there until one fails: quick ones and those that have killed many first. A test that takes many
times longer than usual shows a mutant that hangs.

``--every N`` tries each N-th mutant alone, ``--skip K`` not the first K: so N runs with another K each try all of them.
``--again`` tries those that survived in that report.

engine_survivors.md lists the mutants that survive, each with its reason. A reason that begins with "not seen" is a
fault that no test finds: it counts as survived. The exit code is 1 if another mutant survives, or if a listed one does
not.
"""

from __future__ import annotations

import argparse
import ast
import gc
import itertools
import json
import os
import re
import resource
import signal
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any

import pytest
from hypothesis import Phase, settings

TESTS = Path(__file__).parents[1]
ENGINE = TESTS.parent / "python" / "zincmetal" / "engine"
SURVIVORS = Path(__file__).with_name("engine_survivors.md")
MOST_BYTES = 8 << 30  # of addresses, for the tests of a mutant
#: A test may take so many times as long as when its calls are noted, and so many seconds more: of the processor, and in
#: all.
PROCESSOR, IN_ALL = (4, 3), (12, 10)
CLOCKS = (signal.SIGPROF, signal.SIGALRM)
#: Modules that are tried if none is named.
MODULES = (
    "pages.py",
    "pace.py",
    "places.py",
    "flight.py",
    "batch.py",
    "prefix_tree.py",
    "prefix_cache.py",
    "cache_reader.py",
    "pools.py",
    "scheduler.py",
    "readings.py",
    "scores.py",
    "texts.py",
)
#: Files of tests. The others of the engine run whole models, and take long.
FILES = (
    "test_page_pool.py",
    "test_places.py",
    "test_sequence.py",
    "test_batch.py",
    "test_room.py",
    "test_room_below.py",
    "test_host_draws.py",
    "test_scheduler.py",
    "test_scheduler_tells.py",
    "test_scheduler_machine.py",
    "test_step_loop.py",
    "test_prefix_cache.py",
    "test_cache_reader.py",
    "test_cache_tier.py",
    "test_readings.py",
    "test_verifying.py",
    "test_drafts_ahead.py",
)
SLOW = "test_a_model_goes_on_after_a_restart"  # a test of whole models, which others see what it sees
NOT_SEEN = "not seen"
KEYS = ("module", "line", "change")  # of a row of a report
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
    function: range  # its lines
    at: int  # the line

    def tree(self) -> ast.Module:
        """Makes the module with the change. It costs as much as a look at the whole module."""
        tree = ast.parse(self.source)
        *_, apply = next(itertools.islice(_sites(tree), self.number, None))
        apply()
        return ast.fix_missing_locations(tree)

    def code(self) -> CodeType:
        """Compiles the function with the change."""
        whole = compile(self.tree(), self.module, "exec")
        return next(code for code in _functions(whole) if code.co_firstlineno in self.function)


def mutants(module: str, text: str) -> Iterator[Mutant]:
    """Yields all mutants of a module."""
    lines, seen = text.split("\n"), Counter[tuple[str, str]]()
    for i, (function, node, change, _) in enumerate(_sites(ast.parse(text))):
        first = min(part.lineno for part in (function, *function.decorator_list))
        line = lines[node.lineno - 1].strip()
        seen[line, change] += 1
        if seen[line, change] > 1:  # the same line again, further down
            change += f" (#{seen[line, change]})"
        yield Mutant(module, i, line, change, text, range(first, function.end_lineno + 1), node.lineno)


def _functions(code: CodeType) -> Iterator[CodeType]:
    """Yields the functions and methods of a module, and what is inside of each behind it."""
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield inner
            yield from _functions(inner)


def _sites(tree: ast.Module) -> Iterator[tuple[Any, Any, str, Callable[[], None]]]:
    """Yields the places of a module that can change: (function, node, description, what changes it)."""
    methods = [item for node in tree.body if isinstance(node, ast.ClassDef) for item in node.body]
    for function in (*tree.body, *methods):
        if isinstance(function, ast.FunctionDef) and not _declares_only(function):
            inside = (site for node in ast.walk(function) for site in (*_conditions(node), *_bounds(node)))
            for site in (*_statements(function), *inside):
                yield (function, *site)


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


# ---- the tests ---------------------------------------------------------------------------------------------------


class Calls:
    """Notes which functions of the engine are called, on any thread: their first lines, by module."""

    def __init__(self) -> None:
        self.lines: dict[str, set[int]] = defaultdict(set)

    def begin(self) -> None:
        """Begins to note calls."""
        threading.settrace(self._note)
        sys.settrace(self._note)

    def take(self) -> dict[str, list[int]]:
        """Takes what was called since."""
        taken, self.lines = self.lines, defaultdict(set)
        return {module: sorted(lines) for module, lines in taken.items()}

    def _note(self, frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if "/zincmetal/engine/" in code.co_filename:
            self.lines[code.co_filename.rpartition("/")[2]].add(code.co_firstlineno)


class Mutation:
    """A plugin of pytest: runs the tests for every mutant, instead of once. ``done`` takes what becomes of it."""

    def __init__(self, tried: list[Mutant], done: Callable[[Mutant, str, float], None]) -> None:
        self._tried, self._done = tried, done
        self._failed = False
        self._tests: list[Any] = []
        self._measured: list[tuple[float, dict[str, list[int]]]] = []
        self._kills: Counter[int] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Takes a report."""
        self._failed |= report.failed

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Measures the tests, and then tries the mutants."""
        if session.testsfailed:
            raise pytest.UsageError("a file of tests cannot be imported")
        self._tests = session.items
        said, status = in_fork(self._measure)
        if status:
            raise pytest.UsageError(f"without a mutant a test fails: {said}")
        self._measured = json.loads(said)
        for mutant in self._tried:
            began = time.monotonic()
            self._done(mutant, self._try(mutant), time.monotonic() - began)
        return True

    def _fails(self, test: Any) -> bool:
        self._failed = False
        test.config.hook.pytest_runtest_protocol(item=test, nextitem=None)
        return self._failed

    def _measure(self, tell: Callable[[str], None]) -> int:
        """Runs all tests. Tells the seconds and the calls of each, or which one fails."""
        calls, found = Calls(), []
        calls.begin()
        for test in self._tests:
            began = time.monotonic()
            if self._fails(test):
                tell(test.nodeid)
                return 1
            found.append((time.monotonic() - began, calls.take()))
        tell(json.dumps(found))
        return 0

    def _try(self, mutant: Mutant) -> str:
        """Tries a mutant. Returns the test that fails, and how, or nothing."""
        calls = [set(calls.get(mutant.module, ())) for _, calls in self._measured]
        order = [i for i in range(len(self._tests)) if calls[i].intersection(mutant.function)]
        order.sort(key=lambda i: self._measured[i][0] / (1 + self._kills[i]))
        said, status = in_fork(lambda tell: self._find_killer(mutant, order, tell))
        if not status:
            return ""
        killer = int(said.split()[-1])
        self._kills[killer] += 1
        how = "fails" if os.WIFEXITED(status) else "hangs" if os.WTERMSIG(status) in CLOCKS else "crashes"
        return f"{self._tests[killer].nodeid.rpartition('/')[2]} {how}"

    def _find_killer(self, mutant: Mutant, order: list[int], tell: Callable[[str], None]) -> int:
        """Runs tests until one fails. Tells the number of each when it begins."""
        exchange(mutant)
        for i in order:
            tell(str(i))
            seconds = self._measured[i][0]
            signal.setitimer(signal.ITIMER_PROF, PROCESSOR[0] * seconds + PROCESSOR[1])
            signal.setitimer(signal.ITIMER_REAL, IN_ALL[0] * seconds + IN_ALL[1])
            if self._fails(self._tests[i]):
                return 1
        return 0


def exchange(mutant: Mutant) -> None:
    """Gives the function that lives in this process the code with the change."""
    file, code = f"/zincmetal/engine/{mutant.module}", mutant.code()  # of this tree, or installed from it
    (function,) = (
        f
        for f in gc.get_objects()
        if isinstance(f, FunctionType)
        and f.__code__.co_filename.endswith(file)
        and (f.__code__.co_firstlineno, f.__code__.co_name) == (code.co_firstlineno, code.co_name)
    )
    function.__code__ = code


def in_fork(run: Callable[[Callable[[str], None]], int]) -> tuple[str, int]:
    """Runs something in a fork of this process. Returns what it tells, and the status of its end; of an error, 255."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        status = 255
        try:
            os.close(receive)
            resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
            with os.fdopen(send, "w", buffering=1) as pipe:
                status = run(lambda said: print(said, file=pipe, flush=True))
        finally:  # whatever is raised: the caller's work goes on in one process alone
            os._exit(status)
    os.close(send)
    with os.fdopen(receive) as pipe:
        said = pipe.read()
    return said, os.waitpid(child, 0)[1]


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


class Report:
    """Counts what became of the mutants, and finds what is wrong with the list of survivors."""

    def __init__(self, file: Path | None) -> None:
        self.wrong = 0
        self._file, self._rows = file, list[dict[str, Any]]()
        self._known = listed()
        self._counts: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])  # mutants, killed, without effect

    def add(self, mutant: Mutant, outcome: str, seconds: float) -> None:
        """Takes a mutant: the test that it fails, or nothing."""
        reason = self._known.get((mutant.module, mutant.line, mutant.change), "")
        same = not outcome and bool(reason) and not reason.startswith(NOT_SEEN)
        counts = self._counts[mutant.module]
        counts[:] = counts[0] + 1, counts[1] + bool(outcome), counts[2] + same
        which = f"{mutant.module}:{mutant.at}: `{mutant.line}` | `{mutant.change}`"
        if not outcome and not reason:
            self.wrong += 1
            print(f"{which} survives", flush=True)
        elif outcome and reason:
            self.wrong += 1
            print(f"{which} is listed as a survivor, but {outcome}", flush=True)
        row = {"module": mutant.module, "line": mutant.line, "change": mutant.change, "outcome": outcome}
        self._rows.append({**row, "seconds": round(seconds, 1)})
        if self._file:
            self._file.write_text(json.dumps(self._rows, indent=1))

    def show(self) -> None:
        """Shows the counts of each module."""
        for module, (n, killed, same) in self._counts.items():
            share = killed / max(1, n - same)
            print(f"{module}: {n} mutants, {same} of them without effect, {killed} killed: {share:.1%}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", default=list(MODULES))
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--skip", type=int, default=0)
    parser.add_argument("--again", type=Path)
    parser.add_argument("--tests", nargs="+", default=list(FILES), help="only these files of tests/engine")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    tried = list[Mutant]()
    for module in options.modules:
        every = list(mutants(module, (ENGINE / module).read_text("utf-8")))
        tried += every[options.skip :: options.every]
    if options.again:
        rows = [tuple(map(row.get, KEYS)) for row in json.loads(options.again.read_text()) if not row["outcome"]]
        tried = [mutant for mutant in tried if (mutant.module, mutant.line, mutant.change) in rows]
    report = Report(options.json)
    settings.register_profile("one failure is enough", phases=[Phase.generate])  # to make it small takes minutes
    settings.load_profile("one failure is enough")
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # these tests need none of them
    usual = ["-q", "-s", "--tb=native", "--no-header", "-p", "no:cacheprovider", "-p", "no:faulthandler"]
    usual += ["-k", f"not {SLOW}"]
    files = [str(TESTS / "engine" / file) for file in options.tests]
    if code := pytest.main([*usual, *files], plugins=[Mutation(tried, report.add)]):
        return int(code)
    report.show()
    return int(report.wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
