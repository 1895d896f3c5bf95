"""State of the machine before and after a bench: load, heat, power, and the GPU's own figures where it tells them."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

TOOL_SECONDS = 10.0
BUSY = 0.5  # load for each core, above which other work is likely to be seen in the figures
HOT = 90.0  # degrees Celsius
NVIDIA = (
    "temperature.gpu",
    "power.draw",
    "clocks.sm",
    "utilization.gpu",
    "memory.used",
    "clocks_throttle_reasons.active",
)

Tool = Callable[[Sequence[str]], str]


def run_tool(command: Sequence[str]) -> str:
    """Return the output of a program, "" if it is not there, fails or takes too long."""
    if not shutil.which(command[0]):
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TOOL_SECONDS)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout if done.returncode == 0 else ""


def state(backend: str, root: Path = Path("/sys/class"), tool: Tool = run_tool) -> dict[str, Any]:
    """Return what the system tells of its state. A fact that it does not tell is left out.

    ``load`` is the number of runnable threads of the last minute, ``cores`` the cores of the machine. ``celsius`` is
    the hottest sensor, ``power`` "mains" or "battery", ``thermal_limit`` the share of full speed that macOS allows, in
    percent. ``gpu`` has nvidia-smi's figures.
    """
    found: dict[str, Any] = {"cores": os.cpu_count() or 1}
    with suppress(OSError):
        found["load"] = round(os.getloadavg()[0], 2)
    found |= _mac(tool) if platform.system() == "Darwin" else _linux(root)
    if backend == "cuda" and (gpu := _nvidia(tool)):
        found["gpu"] = gpu
    return found


def warnings(of: dict[str, Any]) -> list[str]:
    """Return what makes figures doubtful in a state."""
    found = []
    if of.get("load", 0) > BUSY * of["cores"]:
        found.append(f"other work runs: load {of['load']:g} on {of['cores']} cores")
    if of.get("power") == "battery":
        found.append("the machine runs on its battery")
    if of.get("thermal_limit", 100) < 100:
        found.append(f"the system limits the speed to {of['thermal_limit']}% because of heat")
    if of.get("celsius", 0) >= HOT:
        found.append(f"the machine is hot: {of['celsius']:g} degrees Celsius")
    if of.get("gpu", {}).get("utilization.gpu", 0) > 10:
        found.append(f"other work runs on the GPU: {of['gpu']['utilization.gpu']:g}% busy")
    return found


def line(of: dict[str, Any]) -> str:
    """Format a state as text."""
    parts = [f"load {of['load']:g} of {of['cores']} cores"] if "load" in of else [f"{of['cores']} cores"]
    parts += [f"{of['celsius']:g} °C"] if "celsius" in of else []
    parts += [f"on {of['power']}"] if "power" in of else []
    parts += [f"speed limit {of['thermal_limit']}%"] if "thermal_limit" in of else []
    parts += [f"{name} {value:g}" for name, value in of.get("gpu", {}).items()]
    return ", ".join(parts)


def _linux(root: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    heat = [n / 1000 for f in root.glob("thermal/thermal_zone*/temp") if (n := _number(_read(f))) is not None]
    if heat:
        found["celsius"] = max(heat)
    mains = [_read(f) for f in root.glob("power_supply/*/online")]
    batteries = [_read(f) for f in root.glob("power_supply/*/status")]
    if mains or batteries:
        found["power"] = "mains" if "1" in mains or (not mains and "Discharging" not in batteries) else "battery"
    return found


def _mac(tool: Tool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if limit := re.search(r"CPU_Speed_Limit\s*=\s*(\d+)", tool(["pmset", "-g", "therm"])):
        found["thermal_limit"] = int(limit[1])
    if source := re.search(r"drawing from '(\w+) Power'", tool(["pmset", "-g", "batt"])):
        found["power"] = "battery" if source[1] == "Battery" else "mains"
    return found


def _nvidia(tool: Tool) -> dict[str, float]:
    """Return the figures of the first GPU. Reasons to throttle are a set of bits, in hexadecimal."""
    told = tool(["nvidia-smi", f"--query-gpu={','.join(NVIDIA)}", "--format=csv,noheader,nounits"])
    cells = [cell.strip() for cell in told.splitlines()[0].split(",")] if told.strip() else []
    return {name: n for name, cell in zip(NVIDIA, cells, strict=False) if (n := _number(cell)) is not None}


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace").strip()
    except OSError:
        return ""


def _number(text: str) -> float | None:
    try:
        return float(int(text, 16)) if text.startswith("0x") else float(text)
    except ValueError:
        return None
