"""Programs: made once, by rows, output and position; dropped where a buffer under them grows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from support.reference_models import reference_models
from zincmetal import gguf
from zincmetal.device import backend
from zincmetal.device.buffers import Buffers, map_weights
from zincmetal.device.fallback import KernelFallbacks
from zincmetal.device.programs import Programs
from zincmetal.errors import DeviceError, KernelError
from zincmetal.plan import planner, tuning
from zincmetal.plan.plan import ARENA
from zincmetal.plan.planner import Planner
from zincmetal.plan.target import Target

PATH, CONTEXT = reference_models("llama")[0], 96


class Parts:
    """Programs and everything under them."""

    def __init__(self, file: gguf.File) -> None:
        core, device = backend.open_device("cpu", 1)
        self.planner = Planner(file, Target.of(core, device.info), CONTEXT)
        self.buffers = Buffers(device, map_weights(device, file, self.planner.addresses), self.planner.addresses)
        self.fallbacks = KernelFallbacks(device)
        self.programs = Programs(core, device, self.planner, self.buffers, self.fallbacks)


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Parts]:
    """With programs of their own for sequences of up to 8 and 16 tokens."""
    monkeypatch.setattr(planner, "MAX_POSITIONS", (8, 16))
    monkeypatch.setitem(tuning.DIVIDE_KEYS_ABOVE, "cpu", 1024)
    with gguf.open(PATH) as file:
        yield Parts(file)


def test_a_program_is_made_once(parts: Parts) -> None:
    get, made = parts.programs.get, parts.programs.made
    first = get(1, "argmax", 0)
    assert get(1, "argmax", 7) is first
    assert (first.plan.rows, first.max_position) == (1, 8)
    assert set(made) == {(1, "argmax", 8)}
    assert get(1, "argmax", 8) is not first
    assert get(1, "candidates", 0) is not first
    assert [get(1, "argmax", at).max_position for at in (8, 15, 16, CONTEXT - 1, CONTEXT)] == [16, 16, *[CONTEXT] * 3]
    assert get(1, "argmax", 0) is first


def test_many_rows_have_one_program_wherever_they_begin(parts: Parts) -> None:
    program = parts.programs.get(32, "argmax", 0)
    assert parts.programs.get(32, "argmax", 40) is program
    assert (program.plan.rows, program.max_position) == (32, CONTEXT)


def test_a_larger_arena_drops_what_was_compiled_on_the_smaller_one(parts: Parts) -> None:
    small = parts.programs.get(1, "argmax", 0)
    arena = parts.buffers.buffer(ARENA)
    large = parts.programs.get(512, "argmax", 0)
    assert parts.buffers.buffer(ARENA).nbytes == large.plan.arena_bytes > arena.nbytes == small.plan.arena_bytes
    assert set(parts.programs.made) == {(512, "argmax", CONTEXT)}
    again = parts.programs.get(1, "argmax", 0)
    assert again is not small
    assert again.plan is small.plan
    assert parts.programs.get(512, "argmax", 0) is large


def test_logits_of_all_rows_have_room(parts: Parts) -> None:
    one = parts.buffers.buffer("logits").nbytes
    parts.programs.get(32, "all", 0)
    assert parts.buffers.buffer("logits").nbytes == 32 * one


def test_cleared_programs_are_made_anew(parts: Parts) -> None:
    first = parts.programs.get(1, "argmax", 0)
    parts.programs.clear()
    assert not parts.programs.made
    assert parts.programs.get(1, "argmax", 0) is not first


def test_another_planner_makes_the_next_programs(parts: Parts) -> None:
    first = parts.programs.get(1, "argmax", 0)
    with gguf.open(PATH) as file:
        other = Parts(file).planner
    parts.programs.plan_by(other)
    assert parts.programs.get(1, "argmax", 0).plan is not first.plan
    assert parts.programs.get(1, "argmax", 0).plan == other.plan(1, "argmax", 8)


def refuse(monkeypatch: pytest.MonkeyPatch, prefix: str) -> None:
    """Make the CPU refuse every kernel whose name begins so."""
    core = backend.load("cpu")
    plan, limits = core.Plan, core.Device.limits

    def check(kernel: str) -> None:
        if kernel.startswith(prefix):
            raise DeviceError(f"no {kernel}")

    def refusing_plan(device: Any, dispatches: Any, *rest: Any) -> Any:
        for dispatch in dispatches:
            check(dispatch[0])
        return plan(device, dispatches, *rest)

    def refusing_limits(device: Any, kernel: str) -> Any:
        check(kernel)
        return limits(device, kernel)

    monkeypatch.setattr(core, "Plan", refusing_plan)
    monkeypatch.setattr(core.Device, "limits", refusing_limits)


def test_a_refused_kernel_is_missing_from_all_later_plans(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, "mul_mv_swiglu")
    kernels = {d.launch.kernel for d in parts.programs.get(1, "argmax", 0).plan.dispatches}
    assert "swiglu" in kernels
    assert not any(kernel.startswith("mul_mv_swiglu") for kernel in kernels)
    assert parts.planner.missing == parts.fallbacks.messages.keys() == parts.fallbacks.replacements.keys()


def test_without_kernels_of_many_rows_a_program_takes_one(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, "mul_mm")
    program = parts.programs.get(32, "argmax", 3)
    assert program is parts.programs.get(1, "argmax", 3)
    assert parts.planner.missing == frozenset()
    assert {by for used in parts.fallbacks.replacements.values() for by in used} == {"steps of one token"}


def test_a_kernel_that_has_no_other_is_named(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, "argmax_partial")
    with pytest.raises(KernelError, match="no argmax_partial") as error:
        parts.programs.get(1, "argmax", 0)
    assert error.value.kernels == ("argmax_partial",)
    assert parts.planner.missing == frozenset()
    assert not parts.programs.made
