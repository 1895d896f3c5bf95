"""Reads the resident memory of another process, cheaply enough to do it every millisecond."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache

_RUSAGE_INFO_V0 = 0
_RESIDENT, _FOOTPRINT = 8, 9  # fields of struct rusage_info_v0, as indices of 8-byte words
_WORDS = 12


def resident(pid: int) -> int | None:
    """Read the resident bytes of process ``pid``. None if they are unknown, such as after the process ended."""
    return _way()(pid)


@cache
def _way() -> Callable[[int], int | None]:
    """Find the best way to ask on this system: ``/proc``, Apple's libproc, or ``ps``."""
    for way in (of_proc, _of_libproc()):
        if way is not None and way(os.getpid()) is not None:
            return way
    return of_ps


def of_proc(pid: int) -> int | None:
    """Read the resident bytes from ``/proc`` of Linux, or None."""
    try:
        with open(f"/proc/{pid}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None


def _of_libproc() -> Callable[[int], int | None] | None:
    if sys.platform != "darwin":
        return None
    try:
        ask = ctypes.CDLL("/usr/lib/libproc.dylib").proc_pid_rusage
    except (OSError, AttributeError):
        return None
    ask.argtypes, ask.restype = [ctypes.c_int, ctypes.c_int, ctypes.c_void_p], ctypes.c_int

    def of_libproc(pid: int) -> int | None:
        words = (ctypes.c_uint64 * _WORDS)()
        if ask(pid, _RUSAGE_INFO_V0, ctypes.byref(words)) != 0:
            return None
        return max(words[_RESIDENT], words[_FOOTPRINT])  # the footprint also counts compressed memory

    return of_libproc


def of_ps(pid: int) -> int | None:
    """Read the resident bytes with the command ``ps``, or None."""
    try:
        shown = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, timeout=1, check=True)
        return int(shown.stdout) << 10
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
