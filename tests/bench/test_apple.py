"""bench/apple.py: what bounds a projection, and that it is called one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import apple
import synthetic
from support.msl_front import occupancy
from support.msl_front.clang import METAL_4, NO_WARNING, Program, is_available
from support.msl_front.ir import functions
from support.paths import KERNELS

M4 = next(machine for machine in apple.MACHINES if machine.name == "M4")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("apple") / "35b.gguf"
    synthetic.write(path, synthetic.Sizes(), empty=True)
    return path


def test_the_table_says_what_it_is(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["apple.py", str(file)])
    apple.main()
    said = capsys.readouterr().out
    assert said.startswith("Projections, not measurements")
    assert said.count("(projection)") == 2
    for machine in apple.MACHINES:
        assert f"| {machine.name} |" in said
    assert "llama.cpp UD-Q4_K_M 92" in said


def test_what_bounds_a_step(file: Path) -> None:
    """More bandwidth helps decode, more cycles prompts, and shorter dispatches both."""
    (_, one), (_, many) = apple.plans(file, False)
    for costs, rows, better in ((one, 1, replace(M4, gb_s=2 * M4.gb_s)), (many, 512, replace(M4, ghz=2 * M4.ghz))):
        worst, best = apple.step(M4, costs, {}, rows)
        assert best < worst
        assert apple.step(better, costs, {}, rows)[1] < 0.8 * best
    read = sum(cost.nbytes for _, cost in one)
    assert apple.step(M4, one, {}, 1)[1] > read / (M4.gb_s * 1e9)


def test_matrix_units_of_their_own_count_with_their_kernels_alone(file: Path) -> None:
    m5 = replace(M4, tensors=True)
    (_, usual), (_, cooperative) = (list(apple.plans(file, tensors))[1] for tensors in (False, True))
    assert apple.step(m5, usual, {}, 512) == apple.step(M4, usual, {}, 512)
    assert apple.step(m5, cooperative, {}, 512)[0] < 0.6 * apple.step(M4, usual, {}, 512)[0]


def test_slots_are_those_of_the_weights(file: Path) -> None:
    """Whatever the name of the kernel; without a matrix there are keys and values."""
    (plan, _), _ = apple.plans(file, False)
    found = {d.launch.kernel: apple._slots(d) for d in plan.dispatches}  # noqa: SLF001
    assert found["mul_mv_stack_q8_0"] == apple.SLOTS["q8_0"]
    assert {n for kernel, n in found.items() if kernel.startswith("attention_")} == {apple.SLOTS["f16"]}
    assert {n for kernel, n in found.items() if kernel.endswith("q4_k")} == {apple.SLOTS["q4_k"]}


def test_what_a_core_holds() -> None:
    assert apple.Resources().resident(128) == 96
    assert apple.Resources(threadgroup_bytes=16 << 10).resident(128) == 3 * 4
    assert apple.Resources(registers=104).resident(128) == 4 * 4
    assert apple.Resources(128, 32 << 10).resident(1024) == 32


SOURCE = """#include "common.h"
template <uint N>
kernel void held(constant Step& p [[buffer(0)]], device const float4* x [[buffer(1)]],
                 device float4* y [[buffer(2)]], GRID_IDS) {
    TG_ARRAY(float4, tile, 96);
    float4 all[N];
    UNROLL for (uint i = 0; i < N; i++) all[i] = x[32 * i + tid];
    tile[tid] = all[0];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    UNROLL for (uint i = 0; i < N; i++) y[32 * i + tid] = all[N - 1 - i] + tile[tid ^ 1];
}
KERNEL("held", held<8>)
"""


@pytest.mark.skipif(not is_available(), reason="needs clang: pip install ziglang")
def test_registers_and_memory_of_a_kernel(tmp_path: Path) -> None:
    path = tmp_path / "held.metal"
    path.write_text(SOURCE)
    ir, _ = Program(path, tmp_path, [KERNELS], NO_WARNING, METAL_4).optimised
    sizes = occupancy.Sizes(ir)
    (held,) = (f for name, f in functions(ir).items() if "held" in name)
    assert [sizes.of(text) for _, text in occupancy.GLOBAL.findall(ir)] == [96 * 16]
    assert 8 * 4 <= occupancy.registers(held, sizes) <= 8 * 4 + 24


def test_sizes_of_types() -> None:
    sizes = occupancy.Sizes('%"struct.P" = type { [3 x <4 x float>], i64, %struct.Q }\n%struct.Q = type { half, half }')
    for text, nbytes in (("<4 x float>", 16), ('[2 x %"struct.P"]', 2 * (48 + 8 + 4)), ("i16 noundef", 2), ("ptr", 8)):
        assert sizes.of(text) == nbytes
