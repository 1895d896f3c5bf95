"""Programs: made once, by shape and position; dropped where a buffer under them grows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from support.paths import DATA
from zincmetal import gguf
from zincmetal.device import backend
from zincmetal.device.buffers import Buffers, map_weights
from zincmetal.device.fallback import KernelFallbacks
from zincmetal.device.programs import Programs
from zincmetal.errors import DeviceError, KernelError
from zincmetal.plan import planner, tuning
from zincmetal.plan.chunks import ONE_ROW, chunk_shape, decode_shape
from zincmetal.plan.plan import ARENA
from zincmetal.plan.planner import Planner
from zincmetal.plan.target import Target

PATH, CONTEXT = DATA / "llama-q4_k_m.gguf", 96
CHUNK, LARGE = chunk_shape(32, 0, 1, "argmax"), chunk_shape(512, 0, 1, "argmax")


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
    first = get(ONE_ROW, 0)
    assert get(ONE_ROW, 7) is first
    assert (first.plan.shape, first.max_position) == (ONE_ROW, 8)
    assert set(made) == {(ONE_ROW, 8)}
    assert get(ONE_ROW, 8) is not first
    assert get(decode_shape(1, "draw"), 0) is not first
    assert [get(ONE_ROW, at).max_position for at in (8, 15, 16, CONTEXT - 1, CONTEXT)] == [16, 16, *[CONTEXT] * 3]
    assert get(ONE_ROW, 0) is first


def test_many_rows_have_one_program_wherever_they_begin(parts: Parts) -> None:
    program = parts.programs.get(CHUNK, 0)
    assert parts.programs.get(CHUNK, 40) is program
    assert (program.plan.shape, program.max_position) == (CHUNK, CONTEXT)


def test_a_larger_arena_drops_what_was_compiled_on_the_smaller_one(parts: Parts) -> None:
    small = parts.programs.get(ONE_ROW, 0)
    arena = parts.buffers.buffer(ARENA)
    large = parts.programs.get(LARGE, 0)
    assert parts.buffers.buffer(ARENA).nbytes == large.plan.arena_bytes > arena.nbytes == small.plan.arena_bytes
    assert set(parts.programs.made) == {(LARGE, CONTEXT)}
    again = parts.programs.get(ONE_ROW, 0)
    assert again is not small
    assert again.plan is small.plan
    assert parts.programs.get(LARGE, 0) is large


def test_logits_of_all_rows_have_room(parts: Parts) -> None:
    one = parts.buffers.buffer("logits").nbytes
    parts.programs.get(chunk_shape(20, 0, 20, "all"), 0)
    assert parts.buffers.buffer("logits").nbytes == 32 * one


def test_logits_grow_in_few_steps(parts: Parts) -> None:
    """Each time programs are dropped. So decode steps of two and of 32 sequences have the same room."""
    parts.programs.get(decode_shape(2), 0)
    logits = parts.buffers.buffer("logits")
    parts.programs.get(decode_shape(32), 0)
    assert parts.buffers.buffer("logits") is logits


def test_cleared_programs_are_made_anew(parts: Parts) -> None:
    first = parts.programs.get(ONE_ROW, 0)
    parts.programs.clear()
    assert not parts.programs.made
    assert parts.programs.get(ONE_ROW, 0) is not first


def test_another_planner_makes_the_next_programs(parts: Parts) -> None:
    first = parts.programs.get(ONE_ROW, 0)
    with gguf.open(PATH) as file:
        other = Parts(file).planner
    parts.programs.plan_by(other)
    assert parts.programs.get(ONE_ROW, 0).plan is not first.plan
    assert parts.programs.get(ONE_ROW, 0).plan == other.plan(ONE_ROW, 8)


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
    kernels = {d.launch.kernel for d in parts.programs.get(ONE_ROW, 0).plan.dispatches}
    assert "swiglu" in kernels
    assert not any(kernel.startswith("mul_mv_swiglu") for kernel in kernels)
    assert parts.planner.missing == parts.fallbacks.messages.keys() == parts.fallbacks.replacements.keys()


def test_without_kernels_of_many_rows_a_program_takes_one(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, "mul_mm")
    program = parts.programs.get(CHUNK, 3)
    assert program is parts.programs.get(ONE_ROW, 3)
    assert parts.planner.missing == frozenset()
    assert {by for used in parts.fallbacks.replacements.values() for by in used} == {"steps of one row"}


def test_a_kernel_that_has_no_other_is_named(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, "argmax_partial")
    with pytest.raises(KernelError, match="no argmax_partial") as error:
        parts.programs.get(ONE_ROW, 0)
    assert error.value.kernels == ("argmax_partial",)
    assert parts.planner.missing == frozenset()
    assert not parts.programs.made


def test_a_buffer_grows_with_its_contents(parts: Parts) -> None:
    old = parts.buffers.buffer("history")
    old.write(np.arange(old.nbytes // 4, dtype=np.int32))
    parts.buffers.grow("history", old.nbytes)
    assert parts.buffers.buffer("history") is old
    parts.buffers.grow("history", 3 * old.nbytes)
    grown = parts.buffers.buffer("history")
    assert grown.nbytes == 3 * old.nbytes
    assert (grown.read()[: old.nbytes] == old.read()).all()


def test_the_host_sees_what_it_shares(parts: Parts) -> None:
    for name in parts.planner.addresses.shared:
        assert parts.buffers.buffer(name).shared, name
