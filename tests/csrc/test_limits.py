"""What the compiled core says of its limits is what its kernels were made for."""

from __future__ import annotations

import re

import pytest

from zincmetal import _core_cpu as core


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
        ("SSM_CLASSES", r"ssm_delta_(\d+)"),
        ("SSM_CLASSES", r"ssm_step_(\d+)"),
        ("EXPERT_CLASSES", r"moe_topk_(\d+)"),
    ],
)
def test_size_classes_have_kernels(names: list[str], classes: str, pattern: str) -> None:
    sizes = core.size_classes()[classes]
    assert list(sizes) == sorted(sizes)
    assert {int(size) for size in found(names, pattern)} == set(sizes)


def test_every_class_is_named() -> None:
    assert set(core.size_classes()) == {"HEAD_CLASSES", "SSM_CLASSES", "EXPERT_CLASSES"}


@pytest.mark.parametrize("family", ["embed", "mul_mv", "mul_mv_stack", "mul_mm"])
def test_tensor_types_have_kernels(names: list[str], family: str) -> None:
    types = core.tensor_types()
    assert len(types) == len(set(types))
    assert found(names, rf"{family}_((?:q\d_|b?f\d).*?)(?:_r\d)?") == set(types)


@pytest.mark.parametrize("family", ["moe_mv", "moe_mv_mix", "moe_mv_swiglu", "moe_mm", "moe_mm_swiglu"])
def test_expert_types_have_kernels(names: list[str], family: str) -> None:
    assert found(names, rf"{family}_((?:q\d_|b?f\d).*?)(?:_r\d)?") == set(core.expert_types())


def test_limits_are_those_of_the_parameters() -> None:
    shapes = core.shapes()
    assert core.params_dtype("StackParams")["m"].shape == (shapes["STACK_MATRICES"],)
    assert shapes["SSM_MAX_HEAD"] == core.size_classes()["SSM_CLASSES"][-1]
    assert all(size % shapes["HEAD_MULTIPLE"] == 0 for size in core.size_classes()["HEAD_CLASSES"])
