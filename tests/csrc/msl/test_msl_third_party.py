"""The front end takes published MSL of others that is known to compile on Macs.

``make test-msl-third-party`` fetches the sources; ``ZINCMETAL_THIRD_PARTY_MSL`` names their folder. Kernels that do not
pass are listed with the reason, which lies in C++14. If one passes one day, a test says so.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from support.msl_front.clang import Program, is_available

FOLDER = Path(os.environ.get("ZINCMETAL_THIRD_PARTY_MSL", ""))

pytestmark = [
    pytest.mark.skipif(not is_available(), reason="needs clang: pip install ziglang"),
    pytest.mark.skipif(not FOLDER.name, reason="needs the sources of others: make test-msl-third-party"),
]

APPLE_HEADERS = (
    "metal_atomic metal_common metal_compute metal_integer metal_math metal_simdgroup metal_simdgroup_matrix"
)


@pytest.fixture(scope="module")
def apple_headers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes Apple's headers, which are parts of metal_stdlib, as files that include it whole."""
    folder = tmp_path_factory.mktemp("apple")
    for name in APPLE_HEADERS.split():
        (folder / name).write_text("#include <metal_stdlib>\n")
    return folder


def one(pattern: str) -> Path:
    found = sorted(FOLDER.glob(pattern))
    assert found, f"{FOLDER} has no {pattern}: make test-msl-third-party fetches it"
    return found[-1]


def said_of(path: Path, folder: Path, includes: Sequence[Path]) -> tuple[list[str], Program]:
    program = Program(path, folder, includes, options=())
    return [str(error) for error in program.errors], program


# ---- llama.cpp ---------------------------------------------------------------------------------------------------

LLAMA = "llama_cpp_python-*/vendor/llama.cpp/ggml/src"
LLAMA_FILES = (
    "argsort binbcast conv fa_vec_f16 fa_vec_f32 fa_vec_q4_0 fa_vec_q4_1 fa_vec_q5_0 fa_vec_q5_1 fa_vec_q8_0 "
    "gated_delta_net misc norm pool reduce rope softmax solve_tri ssm tri upscale wkv"
)
# These assign to a structure or matrix in device or threadgroup memory, or call its member: C++ has that for `thread`
# objects alone. Others convert vectors by T(x) with a template's T, which C++ does not.
LLAMA_NOT_MODELLED = {
    "fa_aux": "matrices assigned in threadgroup memory",
    "fa_f16": "matrices assigned in threadgroup memory",
    "mul_mm": "matrices assigned in threadgroup memory",
    "mul_mv": "members of a matrix in device memory",
    "quantize": "structures assigned in device memory",
    "unary": "T(x) from a vector of booleans",
}


def llama(name: str, tmp_path: Path, apple_headers: Path) -> tuple[list[str], Program]:
    source = one(LLAMA)
    kernels = source / "ggml-metal/kernels"
    return said_of(kernels / f"{name}.metal", tmp_path, [kernels, source / "ggml-metal", source, apple_headers])


@pytest.mark.parametrize("name", LLAMA_FILES.split())
def test_takes_a_file_of_llama_cpp(name: str, tmp_path: Path, apple_headers: Path) -> None:
    said, program = llama(name, tmp_path, apple_headers)
    assert said == []
    assert program.source.kernels or program.source.instances


@pytest.mark.parametrize("name", LLAMA_NOT_MODELLED)
def test_what_is_not_modelled_is_still_so(name: str, tmp_path: Path, apple_headers: Path) -> None:
    assert llama(name, tmp_path, apple_headers)[0] != [], f"no longer true: {LLAMA_NOT_MODELLED[name]}"


# ---- MLX ---------------------------------------------------------------------------------------------------------

MLX = "mlx/include"
MLX_HEADERS = "mlx/backend/metal/kernels"
# (headers, instances): MLX compiles such text when a kernel is first used.
MLX_KERNELS = {
    "softmax": (
        ["softmax"],
        ["softmax_single_row, float", "softmax_single_row, bfloat16_t, float", "softmax_looped, half, float"],
    ),
    "logsumexp": (["logsumexp"], ["logsumexp, float", "logsumexp_looped, half"]),
    "arange": (["arange"], ["arange, int", "arange, float"]),
    "copy": (
        ["copy"],
        ["copy_s, float, half", "copy_v, uint, float", "copy_g_nd3, float, float", "copy_gg_nd2, int, int"],
    ),
    "attention": (
        ["sdpa_vector"],
        ["sdpa_vector, float, 64, 64", "sdpa_vector, half, 128, 128", "sdpa_vector_2pass_1, bfloat16_t, 64, 64",
         "sdpa_vector_2pass_2, float, 64"],
    ),
    "dot": (["dot"], ["dot_product, float, 8, 256, 8"]),
    "cross_entropy": (["cross_entropy"], ["cross_entropy, float", "cross_entropy_vjp, half"]),
    "hadamard": (["hadamard"], ["hadamard_n, float, 256, 16, 4", "hadamard_n, half, 512, 8, 2"]),
}  # fmt: skip


def mlx(headers: list[str], instances: list[str], folder: Path, apple_headers: Path) -> tuple[list[str], Program]:
    """Returns the violations of these kernels. Headers in ``folder`` come before MLX's."""
    # MLX spells its bfloat functions with Apple's builtins, which are not MSL. These instances call none of them.
    builtins = folder / MLX_HEADERS / "bf16_math.h"
    builtins.parent.mkdir(parents=True, exist_ok=True)
    builtins.touch()
    text = "".join(f'#include "{MLX_HEADERS}/{header}.h"\n' for header in ["utils", "defines", *headers])
    text += "".join(f'instantiate_kernel("k{i}", {instance})\n' for i, instance in enumerate(instances))
    path = folder / "kernels.metal"
    path.write_text(text)
    return said_of(path, folder, [folder, one(MLX), apple_headers])


@pytest.mark.parametrize("name", MLX_KERNELS)
def test_takes_kernels_of_mlx(name: str, tmp_path: Path, apple_headers: Path) -> None:
    headers, instances = MLX_KERNELS[name]
    said, program = mlx(headers, instances, tmp_path, apple_headers)
    assert said == []
    assert len(program.source.instances) == len(instances)


@pytest.mark.parametrize(("name", "output"), [("softmax", "device T* out,"), ("arange", "device T* out,")])
def test_objects_to_mlx_with_another_space(name: str, output: str, tmp_path: Path, apple_headers: Path) -> None:
    """The same text with its output in constant memory is refused."""
    headers, instances = MLX_KERNELS[name]
    original = (one(MLX) / MLX_HEADERS / f"{headers[0]}.h").read_text()
    assert output in original
    (tmp_path / MLX_HEADERS).mkdir(parents=True)
    (tmp_path / MLX_HEADERS / f"{headers[0]}.h").write_text(
        original.replace(output, output.replace("device", "constant"))
    )
    said, _ = mlx(headers, instances, tmp_path, apple_headers)
    assert any("read-only" in text or "const-qualified" in text for text in said), said
