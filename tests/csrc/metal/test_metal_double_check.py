"""The command check through the real Metal shim, on the Metal double, which fails as told."""

from __future__ import annotations

import pytest

from support.check_command import KERNEL, MODEL, OTHER, check
from support.metal_double import built

KERNELS = f"--only=kernel/{KERNEL}", f"--only=kernel/{OTHER}", "--only=kernel/add"


@pytest.fixture(autouse=True)
def double(monkeypatch):
    monkeypatch.setenv("CHECK_DOUBLE", str(built()))


@pytest.mark.parametrize(
    ("condition", "failed", "words"),
    [
        ("library=rms_norm", "source/norm.metal", "norm.metal does not compile: program_source"),
        (f"pipeline={KERNEL}", f"pipeline/{KERNEL}", "Compilation failed"),
        (f"threads={KERNEL}:32", f"pipeline/{KERNEL}", "it takes 32 threads; plans launch 64"),
        ("gpu=3:2", f"kernel/{KERNEL}", "timeout: the GPU took too long or hung"),
        ("gpu=3:8", f"kernel/{KERNEL}", "out of memory"),
        ("hang=3", f"kernel/{KERNEL}", "the GPU completed nothing"),
        ("exception=9", f"kernel/{KERNEL}", "Metal raised NSInvalidArgumentException"),
    ],
)
def test_a_fault_of_metal_is_said_and_what_can_run_runs(tmp_path, monkeypatch, condition, failed, words):
    monkeypatch.setenv("METAL_DOUBLE", condition)
    monkeypatch.setenv("ZINCMETAL_METAL_TIMEOUT", "2")
    status, found, checks = check(tmp_path, "metal", *KERNELS, f"--only=pipeline/{KERNEL}")
    assert status == 1
    assert checks[failed].status == "FAIL"
    assert words in checks[failed].message
    assert checks[f"kernel/{OTHER}"].status == "PASS"
    assert found["summary"]["FAIL"] == (2 if failed.startswith("pipeline") else 1)


def test_a_kernel_that_has_another_fails_alone(tmp_path, monkeypatch):
    """The report names the replacement, and the model runs with it."""
    monkeypatch.setenv("METAL_DOUBLE", "pipeline=mul_mv_stack_q8_0")
    wanted = "--only=pipeline/mul_mv_stack_q8_0", "--only=model/first tokens"
    status, found, checks = check(tmp_path, "metal", str(MODEL), *wanted)
    assert (status, found["summary"]["FAIL"]) == (1, 1)
    message = checks["pipeline/mul_mv_stack_q8_0"].message
    assert "Compilation failed" in message
    assert message.splitlines()[-1] == "the engine uses mul_mv_q8_0, mul_mv_f32, mul_mv_swiglu_q8_0 instead"
    tokens = checks["model/first tokens"]
    assert (tokens.status, tokens.figures["tokens"]) == ("PASS", tokens.figures["cpu_tokens"])
    assert tokens.message.endswith("; mul_mv_q8_0 instead of mul_mv_stack_q8_0")


@pytest.mark.parametrize(
    ("condition", "words"),
    [
        ("device=none", "no Metal device"),
        ("queue=none", "no command queue"),
        ("macos=13.0", "which needs macOS 14"),
        ("library=threadgroup_barrier", "does not compile"),
    ],
)
def test_a_mac_that_cannot_run_it_is_told_why(tmp_path, monkeypatch, condition, words):
    monkeypatch.setenv("METAL_DOUBLE", condition)
    status, found, _ = check(tmp_path, "metal", *KERNELS)
    assert status == 1
    first = next(c for c in found["checks"] if c["status"] == "FAIL")
    assert words in first["message"]
    assert len(first["message"].splitlines()) < 10


def test_a_gpu_older_than_the_kernels_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.setenv("METAL_DOUBLE", "family=Apple5")
    status, found, checks = check(tmp_path, "metal", *KERNELS)
    assert (status, checks["device"].status) == (0, "WARN")
    assert "Apple7" in checks["device"].message
    assert found["device"]["features"]["Apple7"] == "no"
