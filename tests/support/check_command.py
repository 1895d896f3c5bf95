"""Runs the command `zincmetal check`, also on a device with a planted fault."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from support.paths import DATA, SUPPORT
from zincmetal.check import runner
from zincmetal.cli.check import main

MODEL = DATA / "qwen3-q8_0.gguf"
FAULTY = SUPPORT / "faulty_worker.py"
KERNEL, OTHER = "mul_mv_q4_k", "mul_mv_q5_k"


def check(
    tmp_path: Path, device: str, *argv: str, fault: str | None = None, kernel: str = KERNEL
) -> tuple[int, dict[str, Any], dict[str, SimpleNamespace]]:
    """Runs the command; returns its exit status, its JSON report, and the checks of the report by name."""
    path = tmp_path / "report.json"
    command: Sequence[str] = (sys.executable, str(FAULTY), fault or "none", kernel)
    if fault is None and "CHECK_DOUBLE" not in os.environ:
        command = runner.WORKER
    status = main(["--device", device, "--json", str(path), *argv], command)
    found = json.loads(path.read_text())
    checks = {c["name"]: SimpleNamespace(**c) for c in found["checks"]}
    assert len(checks) == len(found["checks"])
    return status, found, checks
