"""The stub of the compiled cores says what is built, and a stub that says anything else is found out."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from support import core_stub
from zincmetal.device import backend, core

STUB = core_stub.STUB.read_text()
CORE = Path(core.__file__).read_text()


@pytest.mark.parametrize("name", core_stub.modules())
def test_signatures_are_those_of_the_module(name):
    assert core_stub.drifts(backend.load(name.rpartition("_")[2]), STUB) == []


def test_stubtest_finds_nothing():
    status, output = core_stub.stubtest(core_stub.modules(), STUB)
    assert status == 0, output


def signatures(body: list[ast.stmt], skip: int) -> dict[str, str]:
    """The functions of a module or class by name, without their first ``skip`` parameters."""
    found = {}
    for f in body:
        if isinstance(f, ast.FunctionDef) and not f.decorator_list:
            f.args.args = f.args.args[skip:]
            found[f.name] = f"({ast.unparse(f.args)}) -> {ast.unparse(f.returns)}".replace("_core.", "")
    return found


def test_the_protocol_has_the_functions_and_classes_of_the_stub():
    """mypy compares their types, but not the names of parameters."""
    (protocol,) = [node for node in ast.parse(CORE).body if isinstance(node, ast.ClassDef) and node.name == "Core"]
    stub = ast.parse(STUB)
    assert signatures(protocol.body, 1) == signatures(stub.body, 0)
    classes = {node.name for node in protocol.body if getattr(node, "decorator_list", None)} - {"__file__"}
    assert classes == {node.name for node in stub.body if isinstance(node, ast.ClassDef)}


@pytest.mark.parametrize(
    ("said", "drifted", "found"),
    [
        ("steps: Steps, plan: Plan)", "steps: Steps, program: Plan)", "submit_described: the stub has the parameters"),
        ("offset: int = 0, nbytes", "nbytes: int = 0, offset", "Buffer.read: the stub has the parameters"),
        ("native: bool = True", "native: bool = False", "Device.__init__: the default of native"),
        ("nbytes: int, shared: bool = False", "nbytes: str, shared: bool = False", "Device.alloc: the type of nbytes"),
        ("*, threads", "threads", "Device.__init__: the kind of threads"),
        ("def limits(self, kernel: str) -> tuple[int, int, int]", "def limits(self, kernel: str) -> tuple[int, int]",
         "Device.limits: returns"),
        ("def n_barriers(self) -> int", "def n_barriers(self) -> float", "Plan.n_barriers: returns"),
        ("dispatches: Sequence[BoundDispatch], max_tokens", "dispatches: Sequence[str], max_tokens",
         "Plan.__init__: the type of dispatches"),
    ],
)  # fmt: skip
def test_a_signature_that_drifted_is_named(said, drifted, found):
    assert said in STUB
    (line,) = core_stub.drifts(backend.load("cpu"), STUB.replace(said, drifted, 1))
    assert line.startswith(f"zincmetal._core_cpu.{found}")


def test_stubtest_names_what_has_drifted():
    drifted = re.sub(r"\bPlan\b", "Program", STUB.replace("def drop(", "def dropped("))
    status, output = core_stub.stubtest(["zincmetal._core_cpu"], drifted)
    assert status == 1
    for name in ("Steps.dropped is not present at runtime", "Steps.drop is not present in stub",
                 "Program is not present at runtime", "Plan is not present in stub"):  # fmt: skip
        assert f"zincmetal._core_cpu.{name}" in output
