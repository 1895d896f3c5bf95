"""The verdict of bench/sanitize.py on a sanitizer's run."""

from __future__ import annotations

import subprocess
import sys

import pytest

import sanitize
from support.paths import TESTS
from zincmetal.device import backend

SUMMARIES = {
    "========= COMPUTE-SANITIZER\nhello\n========= ERROR SUMMARY: 0 errors\n": 0,
    "========= Invalid __global__ read of size 4 bytes\n========= ERROR SUMMARY: 1 error\n": 1,
    "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n": 0,
    "========= Error: Race reported\n========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n": 1,
    "========= COMPUTE-SANITIZER\nTraceback (most recent call last):\n": None,
    "": None,
}


@pytest.mark.parametrize(("log", "reports"), SUMMARIES.items())
def test_summaries_are_read(log, reports):
    assert sanitize.reports_in(log) == reports


def test_only_silence_is_good_and_only_of_a_right_workload():
    def good(workload, reports, status):
        return sanitize.Outcome("memcheck", workload, reports, status, 1.0, frozenset()).good

    assert good("model", 0, 0)
    assert not good("model", 1, 0)
    assert not good("model", None, 0)
    assert not good("model", 0, 1)
    assert not good("model", 0, None)
    assert good("planted", 1, 1)
    assert not good("planted", 0, 0)
    assert not good("planted", None, None)


def test_kernels_that_did_not_run_are_named():
    built = ["mul_mv_q4_k", "mul_mv_q4_k_r4", "rms_norm", "probe_fault_NO_FAULT"]
    assert sanitize.kernels_missing(["rms_norm"], built) == ["mul_mv_q4_k"]
    assert sanitize.kernels_missing(["mul_mv_q4_k", "rms_norm"], built) == []


def test_every_kernel_runs():
    """Every built kernel runs, on the Metal source or natively. A sanitizer's run must have seen all of them."""
    built = backend.load("cpu").Device(threads=1).kernel_names()
    assert sanitize.kernels_missing(sanitize.run_kernels("cpu"), built) == []


def test_what_is_planted_is_there():
    """Each tool has a planted fault, which is a probe kernel."""
    source = (TESTS / "csrc/msl/probes/probe_faults.metal").read_text()
    for kernel, _ in sanitize.PLANTED.values():
        name = kernel.removeprefix("probe_fault_")
        assert f"FAULT({name})" in source or f'KERNEL("{kernel}"' in source
    assert set(sanitize.PLANTED) == {"memcheck", "racecheck", "synccheck", "initcheck"}


FAKE = """#!/bin/sh
# A tool that runs its command (after --tool NAME --print-limit N) and then prints REPORTS.
shift 4
"$@"
status=$?
echo "========= ERROR SUMMARY: $REPORTS errors"
exit $status
"""


def run_sanitize(tmp_path, monkeypatch, *options, reports=0):
    """Runs bench/sanitize.py on the CPU with a stand-in tool; returns its exit status and output."""
    tool = tmp_path / "tool"
    tool.write_text(FAKE)
    tool.chmod(0o755)
    monkeypatch.setenv("REPORTS", str(reports))
    command = [sys.executable, sanitize.__file__, "--sanitizer", str(tool), "--device", "cpu", "--workloads", "model"]
    done = subprocess.run([*command, "--out", str(tmp_path), *options], capture_output=True, text=True)
    return done.returncode, done.stdout


def test_a_silent_tool_on_a_model(tmp_path, monkeypatch):
    status, told = run_sanitize(tmp_path, monkeypatch, "--tools", "memcheck", "racecheck")
    assert (status, told.count("0 reports"), told.count(" ok")) == (0, 2, 2)
    log = (tmp_path / "memcheck-model.log").read_text()
    assert "tokens [" in log
    assert "moe_mv_gated_q4_k" in log
    assert "ssm_delta_64" in log  # of the prefill


def test_a_tool_that_reports_or_takes_too_long_fails(tmp_path, monkeypatch):
    assert run_sanitize(tmp_path, monkeypatch, "--tools", "memcheck", reports=2)[0] == 1
    status, told = run_sanitize(tmp_path, monkeypatch, "--tools", "memcheck", "--limit", "0.01")
    assert status == 1
    assert "out of time" in told


def test_without_a_tool_nothing_is_claimed(tmp_path, monkeypatch):
    status, told = run_sanitize(tmp_path, monkeypatch, "--sanitizer", "")
    assert status == 1
    assert "not installed" in told
