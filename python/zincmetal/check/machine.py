"""Asks a Mac's own programs for facts that explain the results of a check. Other systems are not asked."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..settings import DRIVER_TIMEOUT

SECONDS = 20.0  # the longest that a program may take

Ask = Callable[[str], str]  # from a command line to its output, empty if it fails


def facts(file: str | None = None, ask: Ask | None = None) -> dict[str, str]:
    """Return the facts of this Mac by name: chip, system, power, display, tools, and the file system of ``file``.

    ``ask`` runs a command line and returns its output. A fact that the system does not give is left out.
    """
    if ask is None:
        if sys.platform != "darwin":
            return {}
        ask = run
    with ThreadPoolExecutor(8) as pool:
        answers = dict(zip(_COMMANDS, pool.map(ask, _COMMANDS), strict=True))
    found = {name: _first(pattern, answers[command]) for name, (command, pattern) in _FACTS.items()}
    found["display attached"] = _yes_no(answers[_DISPLAYS], "IOMobileFramebuffer")
    found[DRIVER_TIMEOUT.name] = DRIVER_TIMEOUT.value or "not set"
    if file:
        found["file system of the model"] = _file_system(file, answers[_MOUNTS])
    return {name: value for name, value in found.items() if value}


def run(command: str) -> str:
    """Run a command line; return its output, or nothing if it fails."""
    try:
        done = subprocess.run(command.split(), capture_output=True, text=True, timeout=SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout + done.stderr if done.returncode == 0 else ""


_DISPLAYS = "/usr/sbin/ioreg -r -d 1 -c IOMobileFramebuffer"
_MOUNTS = "/sbin/mount"
_GPU = "/usr/sbin/ioreg -r -d 1 -c AGXAccelerator"
_POWER = "/usr/bin/pmset -g"
# The name of a fact -> the command to ask, and the pattern whose first group is the fact.
_FACTS: Mapping[str, tuple[str, str]] = {
    "chip": ("/usr/sbin/sysctl -n machdep.cpu.brand_string", r"(.+)"),
    "GPU cores": (_GPU, r'"gpu-core-count" = (\d+)'),
    "macOS build": ("/usr/bin/sw_vers -buildVersion", r"(\S+)"),
    "Low Power Mode": (_POWER, r"lowpowermode\s+(\d)"),
    "power source": ("/usr/bin/pmset -g batt", r"drawing from '(.+)'"),
    "CPU speed limit": ("/usr/bin/pmset -g therm", r"CPU_Speed_Limit\s*=\s*(\d+)"),
    "wired limit MB": ("/usr/sbin/sysctl -n iogpu.wired_limit_mb", r"(\d+)"),
    "Xcode": ("/usr/bin/xcodebuild -version", r"Xcode (\S+)"),
    "Metal compiler": ("/usr/bin/xcrun -sdk macosx metal --version", r"(.*version.*)"),
}
_COMMANDS = [*dict.fromkeys([command for command, _ in _FACTS.values()]), _DISPLAYS, _MOUNTS]


def _first(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    return found[1].strip() if found else ""


def _yes_no(text: str, word: str) -> str:
    return ("yes" if word in text else "no") if text else ""


def _file_system(file: str, mounts: str) -> str:
    """Return the type of the mount that holds the file (the longest path wins), such as apfs or smbfs."""
    path, best, kind = Path(file).resolve(), -1, ""
    for place, options in re.findall(r" on (.+) \(([^)]*)\)", mounts):
        if path.is_relative_to(place) and len(place) > best:
            best, kind = len(place), options.partition(",")[0]
    return kind
