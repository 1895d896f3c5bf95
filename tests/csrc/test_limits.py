"""What the compiled core says of its limits is what its kernels were made for."""

from __future__ import annotations

import re

import pytest

from support.paths import ROOT
from zincmetal import _core_cpu as core
from zincmetal.gguf import quants


@pytest.fixture(scope="module")
def names() -> list[str]:
    return core.Device(threads=1).kernel_names()


def found(names: list[str], pattern: str) -> set[str]:
    """The first group of every name that matches as a whole."""
    return {match[1] for name in names if (match := re.fullmatch(pattern, name))}


@pytest.mark.parametrize(
    ("classes", "pattern"),
    [
        ("HEAD_CLASSES", r"attention_decode_f16_(\d+)"),
        ("HEAD_CLASSES", r"attention_split_q8_0_(\d+)"),
        ("HEAD_CLASSES", r"attention_prefill_f32_(\d+)"),
        ("LATENT_CLASSES", r"attention_latent_f16_(\d+)"),
        ("LATENT_CLASSES", r"attention_latent_split_q8_0_(\d+)"),
        ("SSM_CLASSES", r"ssm_delta_(\d+)"),
        ("SSM_CLASSES", r"ssm_step_(\d+)"),
        ("SSM_CLASSES", r"mamba2_scan_(\d+)"),
        ("SSM_CLASSES", r"mamba2_step_(\d+)"),
    ],
)
def test_size_classes_have_kernels(names: list[str], classes: str, pattern: str) -> None:
    sizes = core.size_classes()[classes]
    assert list(sizes) == sorted(sizes)
    assert {int(size) for size in found(names, pattern)} == set(sizes)


def test_every_class_is_named() -> None:
    assert set(core.size_classes()) == {"HEAD_CLASSES", "LATENT_CLASSES", "SSM_CLASSES"}


def of_types(names: list[str], family: str) -> set[str]:
    """The types, of all that a file may have, for which a family has a kernel."""
    return {t.name for t in quants.ALL if f"{family}_{t.name}" in names}


@pytest.mark.parametrize("family", ["embed", "mul_mv", "mul_mv_stack", "mul_mm"])
def test_tensor_types_have_kernels(names: list[str], family: str) -> None:
    types = core.tensor_types()
    assert len(types) == len(set(types))
    assert of_types(names, family) == set(types)


@pytest.mark.parametrize(
    "family", ["moe_mv", "moe_mv_mix", "moe_mv_gated", "moe_few", "moe_few_gated", "moe_mm", "moe_mm_gated"]
)
def test_expert_types_have_kernels(names: list[str], family: str) -> None:
    assert of_types(names, family) == set(core.expert_types())


@pytest.mark.parametrize(("folder", "ending"), [("kernels", ".metal"), ("csrc/cpu/native", ".cpp")])
def test_groups_of_types_have_every_family(folder: str, ending: str) -> None:
    """A source that makes its kernels from the list of types is included for groups of types too."""
    sources = [p for p in (ROOT / folder).glob(f"*{ending}") if not p.name.startswith("types_")]
    families = [p.name for p in sources if re.search(r"\b(TENSOR|EXPERT|LOW_BIT)_TYPES\(", p.read_text())]
    included = re.findall(r'#include "(?:.*/)?(.+)"', (ROOT / folder / "kernels_of_types.h").read_text())
    assert families
    assert sorted(included) == sorted(families)


def test_limits_are_those_of_the_parameters() -> None:
    shapes = core.shapes()
    assert core.params_dtype("StackParams")["m"].shape == (shapes["STACK_MATRICES"],)
    assert shapes["SSM_MAX_HEAD"] == core.size_classes()["SSM_CLASSES"][-1]
    assert all(size % shapes["HEAD_MULTIPLE"] == 0 for size in core.size_classes()["HEAD_CLASSES"])
