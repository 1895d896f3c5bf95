"""Every rule that the Metal double (double/) checks is broken once: the process ends and names the rule."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.metal_double import built

DOUBLE = Path(__file__).parent / "double"
PROGRAMS = re.findall(r'"([a-z-]+/[^"]+)"', "".join(p.read_text() for p in sorted(DOUBLE.glob("breaking*.mm"))))
KEPT = [name for name in PROGRAMS if name.startswith("kept/")]
BROKEN = [name for name in PROGRAMS if not name.startswith("kept/")]
# Rules that no program here can break: of the double's own set-up, and of Objective-C that the shim does not use.
OWN = {"abstract", "block", "conditions", "enumeration", "host", "kernel", "meet", "stale-build"}
_RUN = "import ctypes, sys; ctypes.CDLL(sys.argv[1]).metal_double_run(sys.argv[2].encode())"


def run(program: str) -> subprocess.CompletedProcess[str]:
    """Runs a program of breaking.mm in a process of its own."""
    checked = "threadgroup-memory" in program or "checked double" in program
    module = next(built(checked).glob("_core_metal*.so"))
    command = [sys.executable, "-S", "-c", _RUN, str(module), program]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env={})


@pytest.mark.parametrize("program", KEPT)
def test_what_keeps_the_rules_runs_and_leaks_nothing(program: str) -> None:
    done = run(program)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("program", BROKEN)
def test_broken_rule_is_named(program: str) -> None:
    done = run(program)
    assert done.returncode < 0, "the program ended as if all were well"
    assert done.stderr.startswith(f"metal double: {program.split('/')[0]}: "), done.stderr


def test_every_rule_is_broken_by_a_program() -> None:
    rules = {
        rule for source in DOUBLE.glob("*.[cm]*") for rule in re.findall(r'broken\(\s*"([a-z-]+)"', source.read_text())
    }
    assert rules - OWN == {name.split("/")[0] for name in BROKEN} - {"threadgroup-memory"}
    assert len(rules) > 30
