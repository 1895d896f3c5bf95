"""Compares two sides of a bench in turns: model files, commits, or reports that were measured before."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError, quote
from . import machine, report
from .tables import markdown
from .verdict import Figure, Outputs, Verdict

PACKAGE = Path(__file__).parents[1]
#: What a commit's compiled modules are made of. If none of it differs, the modules of this installation serve.
COMPILED = ("csrc", "kernels", "cmake", "CMakeLists.txt")
BUILD_SECONDS = 3600.0

Words = Sequence[str]
Run = Callable[[Words, Mapping[str, str]], str]


@dataclass(frozen=True)
class Side:
    """One side: its name, the model that it measures, the folder of its package ("" for this one), its own options."""

    name: str
    file: str
    package: str = ""
    words: tuple[str, ...] = ()

    @property
    def environment(self) -> dict[str, str]:
        """Environment of its runs."""
        path = [self.package or str(PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "PYTHONSAFEPATH": "1"}

    def check(self, told: Mapping[str, Any]) -> None:
        """Raise UsageError if a report is of another package than this side's: an editable install comes first."""
        if self.package and Path(told["package"]).parent.resolve() != Path(self.package).resolve():
            raise UsageError(
                f"{self.name} ran {told['package']}: the package is installed in editable form; remove that"
            )


def take_turns(sides: tuple[Side, Side], words: Words, runs: int, run: Run, tell: Callable[[str], None]) -> Any:
    """Measure the sides in turns, ``runs`` times each, each time in a process of its own; return a report for each.

    Every second round begins with the second side. Raises UsageError if a run fails.
    """
    found: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    for turn in range(runs):
        for number in (0, 1) if turn % 2 == 0 else (1, 0):
            side = sides[number]
            tell(f"run {turn + 1} of {runs}: {side.name}")
            command = [sys.executable, "-m", "zincmetal", "bench", side.file, "--output", "json", *words, *side.words]
            text = run(command, side.environment)
            try:
                told = json.loads(text)
            except ValueError:
                raise UsageError(
                    f"{side.name} printed no report; does its version have `zincmetal bench FILE`?"
                ) from None
            side.check(report.checked(told, side.name))
            found[number].append(told)
    return tuple(map(report.merged, found))


def run_process(command: Words, environment: Mapping[str, str]) -> str:
    """Run a bench in a process and return what it prints. Raises UsageError with its last words if it fails."""
    done = subprocess.run(list(command), capture_output=True, text=True, env=dict(environment))
    if done.returncode:
        raise UsageError(f"a run failed: {' '.join(done.stderr.split())[-300:] or f'status {done.returncode}'}")
    return done.stdout


# ---- commits ----------------------------------------------------------------------------------------------------


def git(*words: str, cwd: Path | None = None) -> str:
    """Return the output of git. Raises UsageError if git is not there or refuses."""
    try:
        done = subprocess.run(["git", *words], capture_output=True, text=True, cwd=cwd)
    except OSError as error:
        raise UsageError(f"git cannot be run: {error.strerror}") from None
    if done.returncode:
        raise UsageError(f"git {words[0]}: {' '.join(done.stderr.split())[-200:]}")
    return done.stdout.strip()


def commit_of(name: str) -> str:
    """Return the commit that a name stands for here. Raises UsageError."""
    try:
        return git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")
    except UsageError:
        raise UsageError(f"{quote(name)} is no report (.json), no model file, and no commit of this folder") from None


@contextmanager
def packages(commits: Sequence[str], tell: Callable[[str], None]) -> Iterator[list[str]]:
    """Give the folder of each commit's package, in work trees that are removed at the end.

    A commit whose compiled sources are those of the checked-out one takes the modules of this installation. Others are
    built, which takes minutes. Raises UsageError if a build fails.
    """
    root = Path(git("rev-parse", "--show-toplevel"))
    with tempfile.TemporaryDirectory(prefix="zincmetal-bench-") as folder:
        trees = [Path(folder, str(i)) for i in range(len(commits))]
        try:
            for tree, commit in zip(trees, commits, strict=True):
                git("worktree", "add", "--detach", str(tree), commit, cwd=root)
            yield [_package(root, tree, commit, tell) for tree, commit in zip(trees, commits, strict=True)]
        finally:
            for tree in trees:
                if tree.exists():
                    git("worktree", "remove", "--force", str(tree), cwd=root)


def _package(root: Path, tree: Path, commit: str, tell: Callable[[str], None]) -> str:
    """Make the package of a work tree ready to run; return the folder that goes to PYTHONPATH."""
    changed = git("diff", "--name-only", commit, "--", *COMPILED, cwd=root)
    source = tree / "python"
    if not changed:
        for module in [*PACKAGE.glob("*.so"), *PACKAGE.glob("*.metallib")]:
            shutil.copy2(module, source / "zincmetal")
        return str(source)
    tell(f"building {commit[:12]}: its compiled sources differ")
    target = tree / "build" / "bench"
    words = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(tree)]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=BUILD_SECONDS)
    except (OSError, subprocess.SubprocessError) as error:
        raise UsageError(f"{commit[:12]} was not built: {error}") from None
    if done.returncode:
        raise UsageError(f"{commit[:12]} does not build: {' '.join(done.stderr.split())[-300:]}")
    return str(target)


# ---- telling ----------------------------------------------------------------------------------------------------


def doubts(reports: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what makes the figures of the sides doubtful, each with its side."""
    sides = zip("AB", (of["state"]["before"] for of in reports), strict=True)
    return [f"{side}: {text}" for side, state in sides for text in machine.warnings(state)]


def facts(
    names: Words, figures: Sequence[Figure], outputs: Outputs, verdict: Verdict, doubtful: Words = ()
) -> dict[str, Any]:
    """Return the comparison as JSON has it."""
    return {
        "a": names[0],
        "b": names[1],
        "figures": [
            {"name": f.name, "a": f.a, "b": f.b, "gain": f.gain, "noise": f.noise, "judged": f.judged} for f in figures
        ],
        "outputs": {"identical": outputs.identical, "nats": outputs.nats},
        "doubtful": list(doubtful),
        "verdict": verdict.word,
        "why": verdict.why,
    }


def lines(compared: Mapping[str, Any]) -> Iterator[str]:
    """Format the comparison as text: a table, the outputs, and the verdict last."""
    yield f"A: {compared['a']}"
    yield f"B: {compared['b']}"
    yield from markdown([_row(figure) for figure in compared["figures"]])
    outputs = compared["outputs"]
    yield "outputs: identical" if outputs["identical"] else f"outputs: differ by {outputs['nats']:.2g} nats at most"
    yield from (f"doubtful, {text}" for text in compared["doubtful"])
    yield f"**{compared['verdict']}**: {compared['why']}"


def _row(figure: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "figure": figure["name"],
        "A": f"{min(figure['a']):,.2f} to {max(figure['a']):,.2f}",
        "B": f"{min(figure['b']):,.2f} to {max(figure['b']):,.2f}",
        "B against A": f"{figure['gain']:+.1%}",
        "result": figure["judged"],
    }
