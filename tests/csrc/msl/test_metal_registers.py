"""The kernels' arrays stay in registers: loops unroll, and no variable indexes an array that is left."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from support.msl_front import source
from support.msl_front.clang import METAL_4, NO_WARNING, Program, Violation, is_available
from support.msl_front.registers import register_violations
from support.paths import KERNELS

pytestmark = pytest.mark.skipif(
    not is_available(), reason="needs clang of the PyPI package ziglang: pip install ziglang"
)

FILES = sorted(path.name for path in KERNELS.glob("*.metal"))


@pytest.mark.parametrize("file", FILES)
def test_arrays_stay_in_registers(file: str, tmp_path: Path) -> None:
    path = source.of_group(KERNELS / file, tmp_path) or KERNELS / file
    program = Program(path, tmp_path, [KERNELS], NO_WARNING)
    assert program.errors == []
    assert register_violations(program) == []


def test_arrays_of_cooperative_tiles_stay_in_registers(tmp_path: Path) -> None:
    path = tmp_path / "of_metal_4.metal"
    path.write_text('#define SOURCE_TYPES(T) T("q4_k", Quantised<Q4_K>)\n#include "mul_mm.metal"\n')
    program = Program(path, tmp_path, [KERNELS], NO_WARNING, METAL_4)
    assert program.errors == []
    assert register_violations(program) == []


def changed_kernels(folder: Path, file: str, old: str, new: str) -> Path:
    """Makes a copy of the kernels with one text replaced."""
    kernels = shutil.copytree(KERNELS, folder / "kernels")
    text = (kernels / file).read_text()
    assert old in text
    (kernels / file).write_text(text.replace(old, new))
    return kernels


MATRIX_KERNELS = {"attention_prefill.metal": ["attention_prefill"], "moe_mm.metal": ["moe_mm", "moe_mm_gated"]}


@pytest.mark.parametrize("file", MATRIX_KERNELS)
def test_loops_that_stay_are_found(file: str, tmp_path: Path) -> None:
    """Without UNROLL a variable indexes the matrices of every kernel that has matrices."""
    unroll = '#define UNROLL _Pragma("clang loop unroll(full)")'
    kernels = changed_kernels(tmp_path, "common.h", unroll, '#define UNROLL _Pragma("clang loop unroll(disable)")')
    program = Program(kernels / file, tmp_path, [kernels])
    found = register_violations(program)
    for kernel in MATRIX_KERNELS[file]:
        assert any(f"{len(kernel)}{kernel}I" in violation.message for violation in found), kernel


def judge(folder: Path, body: str) -> list[Violation]:
    path = folder / "planted.metal"
    head = '#include "common.h"\nkernel void planted(device float* x [[buffer(0)]], constant uint& n [[buffer(1)]], '
    path.write_text(f"{head}uint tid [[thread_index_in_threadgroup]]) {{\n{body}\n}}\n")
    program = Program(path, folder, [KERNELS])
    assert program.errors == []
    return register_violations(program)


PLANTED: dict[str, Callable[[str], str]] = {
    "index": lambda fill: f"float a[8]; {fill} x[tid] = a[n % 8];",
    "row": lambda fill: (
        f"float b[4][8]; float a[8]; {fill} for (uint i = 0; i < n; i++) b[i % 4][2] = a[1]; x[tid] = b[n % 4][2];"
    ),
    "pointer": lambda fill: (
        f"float a[8]; {fill} float s = 0; for (thread float* p = a; p < a + n; p++) s += *p; x[tid] = s;"
    ),
    "field": lambda fill: (
        f"struct {{ uint at; float a[8]; }} s; {{ thread float* a = s.a; {fill} }} x[tid] = s.a[n & 7];"
    ),
    "matrix": lambda fill: (
        "simdgroup_float8x8 m[4]; for (uint i = 0; i < 4; i++) simdgroup_load(m[i], x + i);"
        " simdgroup_store(m[n % 4], x);"
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_array_indexed_by_a_variable_is_found(name: str, tmp_path: Path) -> None:
    found = judge(tmp_path, PLANTED[name]("for (uint i = 0; i < 8; i++) a[i] = x[i];"))
    assert any("by a variable" in violation.message for violation in found), found
    assert {violation.line for violation in found} <= {0, 3}  # 0: a selected address has no place in the source


def test_loop_of_unknown_length_is_found(tmp_path: Path) -> None:
    found = judge(tmp_path, "float s = 0; UNROLL for (uint i = 0; i < n; i++) s += x[i];\nx[tid] = s;")
    assert any("loop not unrolled" in violation.message for violation in found), found


def test_arrays_of_constant_indices_pass(tmp_path: Path) -> None:
    body = "float a[8]; UNROLL for (uint i = 0; i < 8; i++) a[i] = x[i]; x[tid] = a[n > 3 ? 1 : 7] + a[2];"
    body += " simdgroup_float8x8 m[2]; UNROLL for (uint i = 0; i < 2; i++) simdgroup_load(m[i], x + i);"
    assert judge(tmp_path, body + " simdgroup_store(m[1], x);") == []
