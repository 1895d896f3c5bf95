"""Measures which lines and branches the tests run: ``python .ci/covered.py python|core [FOLDER ...]``.

``python`` counts the package, by room; ``core`` the compiled core, by folder, in a build of its own. Other arguments go
to pytest, not the usual tests. Counts stay in ``build/coverage``, and those of several runs add up. It needs coverage,
and for the core g++, gcov, cmake and ninja.
"""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from tree import ROOT, environment

from sanitize import build

FOLDER = ROOT / "build" / "coverage"
#: Of a test with many cases, which run the same lines, four.
FEW = ("-p", "support.few_cases", "--cases", "4")
#: Rooms of `make test` and of the server. Kernels and whole models are left out.
ROOMS = ("api", "cli", "config", "device", "engine", "gguf", "graph", "hub", "plan", "sampling", "serve", "text")
CORE = ("tests/csrc/core", "tests/csrc/cpu", "tests/device", "tests/engine", "tests/gguf")
#: A test that runs all kernel tests again.
WITHOUT = ("-k", "not lesser_instruction_set")
SETTINGS = f"""[run]
branch = true
parallel = true
source_pkgs = zincmetal
patch = subprocess
data_file = {FOLDER}/counts
"""
Counts = tuple[int, int]  # that ran, of all


def pytest(env: Mapping[str, str], arguments: list[str]) -> None:
    """Runs tests. Those that fail are shown, and count as they ran."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    subprocess.run(command, env=env, cwd=ROOT)


def show(counts: Mapping[str, Counts], files: Mapping[str, Counts]) -> None:
    """Shows shares in percent, and the files with the most that did not run."""
    for name, (ran, of) in [*sorted(counts.items()), ("all", tuple(map(sum, zip(*counts.values(), strict=True))))]:
        print(f"{name:32} {100 * ran / max(of, 1):6.1f} %  of {of:,}")
    for name, (ran, of) in sorted(files.items(), key=lambda item: item[1][0] - item[1][1])[:20]:
        print(f"  {of - ran:5} of {of:5} did not run: {name}")


def by_folder(files: Mapping[str, Counts], depth: int) -> dict[str, Counts]:
    """Adds the counts of files up by folder."""
    found: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for name, (ran, of) in files.items():
        parts = Path(name).parts[:-1][:depth]
        total = found["/".join(parts)]
        total[0] += ran
        total[1] += of
    return {name: (ran, of) for name, (ran, of) in found.items()}


def python(arguments: list[str]) -> None:
    """Counts lines and branches of the package."""
    settings = FOLDER / "settings"
    settings.write_text(SETTINGS)
    env = environment(COVERAGE_PROCESS_START=str(settings))
    pytest(env, arguments or [*FEW, "-n", "2", "--dist", "worksteal", *(f"tests/{room}" for room in ROOMS)])
    result = FOLDER / "python.json"
    coverage = [sys.executable, "-m", "coverage"]
    subprocess.run([*coverage, "combine", "-q", "--append", f"--rcfile={settings}"], cwd=ROOT, check=True)
    subprocess.run([*coverage, "json", "-q", f"--rcfile={settings}", "-o", str(result)], cwd=ROOT, check=True)
    files: dict[str, Counts] = {}
    for name, file in json.loads(result.read_text())["files"].items():
        sums = file["summary"]
        ran = sums["covered_lines"] + sums["covered_branches"]
        files[name[name.rindex("zincmetal/") :]] = ran, sums["num_statements"] + sums["num_branches"]
    show(by_folder(files, 2), files)


def core(arguments: list[str]) -> None:
    """Counts lines of the core. A line of a header or template counts once, if any file that has it ran it."""
    package = build("coverage")
    pytest(environment(package), arguments or [*FEW, *WITHOUT, "-n", "0", *CORE])
    lines: dict[str, dict[int, bool]] = defaultdict(dict)
    notes = [str(path) for path in package.parent.rglob("*.gcno") if path.with_suffix(".gcda").exists()]
    for i in range(0, len(notes), 20):
        subprocess.run(["gcov", "-j", *notes[i : i + 20]], cwd=FOLDER, check=True, capture_output=True)
        for made in FOLDER.glob("*.gcov.json.gz"):
            with gzip.open(made) as text:
                report = json.load(text)
            for file in report["files"]:
                name = (package.parent / file["file"]).resolve()
                if name.is_relative_to(ROOT / "csrc"):
                    seen = lines[str(name.relative_to(ROOT))]
                    for line in file["lines"]:
                        seen[line["line_number"]] = seen.get(line["line_number"], False) or line["count"] > 0
            made.unlink()
    files = {name: (sum(seen.values()), len(seen)) for name, seen in lines.items()}
    show(by_folder(files, 3), files)


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    {"python": python, "core": core}[sys.argv[1]](sys.argv[2:])
