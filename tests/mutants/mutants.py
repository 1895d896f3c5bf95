"""Measures how many wrong kernels the tests find: deletes each barrier, moves each bound by one, runs the tests.

    python tests/mutants/mutants.py [kernels/norm.metal ...] [--json out.json] [--nvidia]

Builds the checked core once with all mutants in it (mutant_sites.py), in build/mutants. Runs the kernel tests to see
which tests reach which site. Then runs, for every mutant, the tests that reach it until one fails. A mutant runs in a
fork of this process, so that it may crash or hang. A test that takes many times longer than usual fails.

survivors.md lists the mutants that survive, each with its reason. The exit code is 1 if another survives, or if a
listed one does not. ``--nvidia`` builds with NVIDIA's tile sizes and tries the mutants that only those reach: none may
survive. To see one mutant: ``ZINCMETAL_MUTANT=<number> PYTHONPATH=build/mutants/python:tests pytest -k checked
tests/kernels/test_rows.py``.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
from mutant_sites import HEADER, RUNTIME, Mutant, Source

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
BUILD = ROOT / "build" / "mutants"
SURVIVORS = Path(__file__).with_name("survivors.md")
FILES = sorted(str(p) for p in TESTS.glob("kernels/test_*.py"))
#: A survivor whose reason begins so is a real fault that no test finds: it counts as survived.
NOT_SEEN = "not seen: "
#: A survivor whose reason begins so is not reached in the usual build.
ONLY_NVIDIA = f"{NOT_SEEN}only NVIDIA's tiles"
#: Numbers of sites for each file: an edit of one file leaves the others' numbers, and what is built of them.
SITES_OF_A_FILE = 200
#: A test may take so many times as long as without a mutant, and so many seconds more, of processor time.
SLOWER, SECONDS_MORE = 10, 5


# ---- the build ---------------------------------------------------------------------------------------------------


def read_sources() -> list[Source]:
    paths = sorted((ROOT / "kernels").iterdir())
    sources = [Source(f"kernels/{p.name}", p.read_text(), i * SITES_OF_A_FILE) for i, p in enumerate(paths)]
    assert all(s.n_sites <= SITES_OF_A_FILE for s in sources)
    return sources


def write(path: Path, text: str) -> None:
    """Writes a file, unless it has this text already: then nothing is compiled again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def link(path: Path, target: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def build(sources: list[Source], folder: Path, nvidia: bool, jobs: int) -> None:
    """Builds the package in folder/python, with a checked core of the mutated kernels."""
    tree, cmake_build = folder / "source", folder / "cmake"
    for name in ("CMakeLists.txt", "cmake", "csrc", "tests"):
        link(tree / name, ROOT / name)
    for source in sources:
        write(tree / source.name, source.mutated())
    write(tree / "kernels" / "mutants.h", HEADER)
    write(tree / "kernels" / "mutants.metal", RUNTIME % {"n_sites": len(sources) * SITES_OF_A_FILE})

    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}") or "cmake"
    pybind11 = subprocess.check_output([sys.executable, "-m", "pybind11", "--cmakedir"], text=True).strip()
    # The compiler must not derive a loop's bound from the arrays inside it.
    flags = "-w -fno-aggressive-loop-optimizations" + " -DZINC_CUDA=1" * nvidia  # see PER_DEVICE in kernels/shapes.h
    options = [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11}", f"-DCMAKE_CXX_FLAGS={flags}"]
    options += ["-DCMAKE_BUILD_TYPE=Release", "-DZINCMETAL_CHECKED=ON", "-DZINCMETAL_NATIVE=OFF"]
    configure = [cmake, "-S", str(tree), "-B", str(cmake_build), *options]
    make = [cmake, "--build", str(cmake_build), "-j", str(jobs), "--target", "_core_checked"]
    for command in (configure, make):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    installed = importlib.util.find_spec("zincmetal")
    if not installed or not installed.origin:
        raise SystemExit("zincmetal is not installed: its Python sources and its other core are needed")
    files = [p for p in Path(installed.origin).parent.iterdir() if not p.name.startswith("_core_checked")]
    package = folder / "python" / "zincmetal"
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir(parents=True)
    for path in [*files, *cmake_build.glob("_core_checked*.so")]:
        if path.suffix == ".so":  # a build that is made while this runs is not to change it
            shutil.copy(path, package)
        else:
            link(package / path.name, path.resolve())


# ---- the tests ---------------------------------------------------------------------------------------------------


@dataclass
class Result:
    """The outcome of a mutant: survived, killed, crashed, hung or unreached; the test that decided, and its message."""

    mutant: Mutant
    outcome: str = "survived"
    test: str = ""
    message: str = ""
    n_tests: int = 0

    @property
    def is_killed(self) -> bool:
        return self.outcome in ("killed", "crashed", "hung")


class Core:
    """The mutated build's state: the live mutant, the sites that are built, and the sites that were reached."""

    def __init__(self, n_sites: int) -> None:
        library = ctypes.CDLL(importlib.import_module("zincmetal._core_checked").__file__)
        self._live = ctypes.c_int.in_dll(library, "zinc_mutant")
        self._sites = (ctypes.c_ubyte * n_sites).in_dll(library, "zinc_mutant_sites")
        self.built = {i for i, flags in enumerate(self._sites) if flags}

    def forget(self) -> None:
        ctypes.memset(self._sites, 0, len(self._sites))

    def reached(self) -> set[int]:
        return {i for i, flags in enumerate(bytes(self._sites)) if flags & 2}

    def make_live(self, mutant: Mutant | None) -> None:
        self._live.value = mutant.number if mutant else -1


class Mutation:
    """A pytest plugin: runs the tests for every mutant, instead of once."""

    def __init__(self, sources: list[Source], mutants: list[Mutant], jobs: int) -> None:
        self.jobs = jobs
        self.n_sites = len(sources) * SITES_OF_A_FILE
        self.mutants = mutants
        self.results: list[Result] = []
        self.n_not_built = 0
        self._failure = ""
        self._seconds: dict[Any, float] = {}
        self._tests_of: dict[int, list[Any]] = defaultdict(list)
        self._kills: Counter[str] = Counter()

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        def lane(item: Any) -> str:
            return item.callspec.params.get("lane", "checked") if hasattr(item, "callspec") else "checked"

        items[:] = [item for item in items if lane(item) == "checked"]

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self._failure:
            crash = getattr(report.longrepr, "reprcrash", None)
            self._failure = crash.message if crash else str(report.longrepr)

    def pytest_runtestloop(self, session: Any) -> bool:
        self.core = Core(self.n_sites)
        self._measure(session.items)
        n_all = len(self.mutants)
        self.mutants = [m for m in self.mutants if m.site in self.core.built]
        self.n_not_built = n_all - len(self.mutants)
        self._try_all()
        self._check_killers(session.items)
        return True

    def _run(self, item: Any) -> str:
        """Runs a test; returns its failure's message, or ""."""
        self._failure = ""
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
        return self._failure

    def _measure(self, items: list[Any]) -> None:
        """Measures every test's time without a mutant, and the sites that it reaches."""
        for item in items:
            self.core.forget()
            began = time.process_time()
            if failure := self._run(item):
                raise pytest.UsageError(f"{item.nodeid} fails without a mutant: {failure}")
            self._seconds[item] = time.process_time() - began
            for site in self.core.reached():
                self._tests_of[site].append(item)

    # ---- a process per mutant

    def _try_all(self) -> None:
        todo = list(reversed(self.mutants))
        running: dict[int, tuple[Mutant, int]] = {}
        while todo or running:
            while todo and len(running) < self.jobs:
                mutant = todo.pop()
                child, pipe = self._start(mutant, self._most_likely_first(self._tests_of[mutant.site]))
                running[child] = mutant, pipe
            child, status = os.wait()
            result = self._judge(*running.pop(child), status)
            self.results.append(result)
            if result.is_killed:
                self._kills[result.test] += 1
            m = result.mutant
            print(f"\n{len(self.results)}/{len(self.mutants)}: {m.number} {m.file}:{m.line} `{m.change}`", end=" ")
            message = " ".join(result.message.split())[:100]
            print(result.outcome, result.test.split("::")[-1], message, end="", flush=True)

    def _most_likely_first(self, tests: list[Any]) -> list[Any]:
        """Sorts tests: quick ones and those that have killed many first."""
        return sorted(tests, key=lambda t: self._seconds[t] / (1 + self._kills[t.nodeid]))

    def _check_killers(self, items: list[Any]) -> None:
        """Fails unless all tests that killed a mutant pass without one: else not the mutants killed."""
        pipe = self._start(None, [i for i in items if i.nodeid in self._kills])[1]
        status = os.wait()[1]
        if status:
            raise pytest.UsageError(f"these figures are worth nothing: {os.fdopen(pipe).read()[-2000:]}")

    def _start(self, mutant: Mutant | None, tests: list[Any]) -> tuple[int, int]:
        read_end, write_end = os.pipe()
        child = os.fork()
        if child:
            os.close(write_end)
            return child, read_end
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        self.core.make_live(mutant)
        os._exit(self._find_killer(tests, write_end))

    def _find_killer(self, tests: list[Any], pipe: int) -> int:
        """Runs tests until one fails, and writes a line for each."""
        for test in tests:
            os.write(pipe, f"{test.nodeid}\n".encode())
            signal.setitimer(signal.ITIMER_PROF, SECONDS_MORE + SLOWER * self._seconds[test])
            if failure := self._run(test):
                os.write(pipe, failure[:2000].encode())
                return 1
        return 0

    def _judge(self, mutant: Mutant, pipe: int, status: int) -> Result:
        with os.fdopen(pipe, encoding="utf-8", errors="replace") as lines:
            said = lines.read()
        ran = re.findall(r"^\S*\.py::.*$", said, re.M)
        if not ran:
            return Result(mutant, "unreached")
        if status == 0:
            return Result(mutant, n_tests=len(ran))
        message = said.partition(f"{ran[-1]}\n")[2].strip()
        if os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            outcome, message = "hung" if number == signal.SIGPROF else "crashed", signal.Signals(number).name
        else:
            outcome = "killed"
        return Result(mutant, outcome, ran[-1], message, len(ran))


# ---- the report --------------------------------------------------------------------------------------------------


def read_survivors() -> Iterator[tuple[tuple[str, str, str], str]]:
    """Reads (file, line's text, change) and reason of every listed mutant: ``- `line` | `change`, ... | reason``."""
    file = ""
    for line in SURVIVORS.read_text().splitlines() if SURVIVORS.exists() else []:
        if line.startswith("## "):
            file = line[3:].strip()
        elif found := re.fullmatch(r"- `(.+?)` \| (`.+`) \| (.+)", line):
            text, changes, reason = found.groups()
            yield from (((file, text, change), reason) for change in re.findall(r"`(.+?)`", changes))


def report(mutation: Mutation, sources: list[Source], whole: bool, listed: dict[tuple[str, str, str], str]) -> int:
    """Prints the figures and the faults of the list of survivors; returns 1 if it has any."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    wrong = []
    for result in mutation.results:
        m = result.mutant
        reason = listed.pop((m.file, m.text, m.change), None)
        equivalent = reason and not reason.startswith(NOT_SEEN)
        kind = "killed" if result.is_killed else "equivalent" if equivalent else "survived"
        counts[m.file].update({kind} | ({result.outcome} & {"crashed", "hung"}))
        which = f"{m.file}:{m.line}: `{m.text}` | `{m.change}` | mutant {m.number}"
        if kind == "survived" and not reason:
            wrong.append(f"{which} {result.outcome}")
        elif reason and result.is_killed:
            wrong.append(f"{which} is listed as a survivor, but {result.test} kills it")
    if whole:
        wrong += [f"{file}: `{text}` | `{change}` is listed, but there is none" for file, text, change in listed]

    print(f"\n\n{'':32} mutants equivalent survived   killed of the others (crashed, hung)")
    for name, c in [*sorted(counts.items()), ("all", sum(counts.values(), Counter()))]:
        n = c["killed"] + c["equivalent"] + c["survived"]
        share = c["killed"] / max(1, n - c["equivalent"])
        print(f"{name:32}{n:8}{c['equivalent']:11}{c['survived']:9}{c['killed']:9}  {share:6.1%}", end="")
        print(f" ({c['crashed']}, {c['hung']})")
    n_constant = sum(s.n_constant for s in sources)
    print(f"left out: {n_constant} bounds of constants, {mutation.n_not_built} mutants of comparisons between floats")
    print(*wrong, sep="\n")
    return int(bool(wrong))


def main() -> int:
    parser = argparse.ArgumentParser(description="Mutation testing of the kernels; see the head of this file.")
    parser.add_argument("kernels", nargs="*", help="only the mutants of these files")
    parser.add_argument("--tests", nargs="+", default=FILES, help="only these test files")
    parser.add_argument("--json", help="write what became of every mutant to this file")
    parser.add_argument("--jobs", type=int, default=2, help="compilers, and then mutants, at a time")
    parser.add_argument("--mutants", type=int, nargs="+", help="only these, by number")
    parser.add_argument("--every", type=int, default=1, help="only each N-th")
    parser.add_argument("--nvidia", action="store_true", help="only what NVIDIA's tile sizes reach, with these")
    args = parser.parse_args()

    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # forks
    sources = read_sources()
    folder = BUILD.with_name("mutants-nvidia") if args.nvidia else BUILD
    build(sources, folder, args.nvidia, args.jobs)
    sys.path[:0] = [str(folder / "python"), str(TESTS)]
    wanted = {f"kernels/{Path(name).name}" for name in args.kernels} or {s.name for s in sources}
    mutants = [m for s in sources if s.name in wanted for m in s.mutants]
    if args.mutants:
        mutants = [m for m in mutants if m.number in args.mutants]
    mutants = mutants[:: args.every]
    listed = dict(read_survivors())
    if args.nvidia:
        only = {mutant for mutant, reason in listed.items() if reason.startswith(ONLY_NVIDIA)}
        mutants = [m for m in mutants if (m.file, m.text, m.change) in only]
        listed = {}
    mutation = Mutation(sources, mutants, args.jobs)
    options = [
        "-q",
        "-s",
        "--tb=native",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-p",
        "no:faulthandler",
        *args.tests,
    ]
    if code := pytest.main(options, plugins=[mutation]):
        return int(code)
    if args.json:
        Path(args.json).write_text(json.dumps([asdict(r) for r in mutation.results], indent=1) + "\n")
    return report(mutation, sources, len(mutants) == sum(len(s.mutants) for s in sources), listed)


if __name__ == "__main__":
    sys.exit(main())
