"""The stub of the compiled cores says what is built, and a stub that says anything else is found out."""

from __future__ import annotations

import re

import pytest

from support import core_stub
from zincmetal.device import backend

STUB = core_stub.STUB.read_text()


@pytest.mark.parametrize("name", core_stub.modules())
def test_signatures_are_those_of_the_module(name):
    assert core_stub.drifts(backend.load(name.rpartition("_")[2]), STUB) == []


def test_stubtest_finds_nothing():
    status, output = core_stub.stubtest(core_stub.modules(), STUB)
    assert status == 0, output


@pytest.mark.parametrize(
    ("said", "drifted", "found"),
    [
        ("plan: Plan, token: int", "plan: Plan, id: int", "decode_step: the stub has the parameters"),
        ("token: int, ahead: bool", "ahead: bool, token: int", "decode_step: the stub has the parameters"),
        ("native: bool = True", "native: bool = False", "Device.__init__: the default of native"),
        ("ids: NDArray[np.int32]", "ids: NDArray[np.int64]", "prefill_step: the type of ids"),
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
    drifted = re.sub(r"\bPlan\b", "Program", STUB.replace("def settle(", "def settled("))
    status, output = core_stub.stubtest(["zincmetal._core_cpu"], drifted)
    assert status == 1
    for name in ("Steps.settled is not present at runtime", "Steps.settle is not present in stub",
                 "Program is not present at runtime", "Plan is not present in stub"):  # fmt: skip
        assert f"zincmetal._core_cpu.{name}" in output
