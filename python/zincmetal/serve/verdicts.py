"""Verdicts on the models of the catalogue for this machine, made in a process of their own.

The server's process opens no device. One process at a time: a client that asks often waits, and starts no crowd.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any

from .. import settings
from ..errors import DeviceError, UsageError, ZincError

SECONDS = 120.0  # for the whole catalogue
BOOT = "import sys; sys.path[:] = sys.argv[3:]; from zincmetal.serve.verdicts import main; main()"


class Verdicts:
    """Catalogue with verdicts. They are made once for each device and type of the K/V cache: neither changes."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self._made: dict[tuple[str, str], list[Any]] = {}

    async def of(self, device: str | None, kv: str) -> list[Any]:
        """Return the models of the catalogue as plain data. Raises UsageError or DeviceError."""
        question = (device or "", kv)
        async with self._turn:
            if question not in self._made:
                self._made[question] = await asyncio.wait_for(_asked(*question), SECONDS)
            return self._made[question]


async def _asked(device: str, kv: str) -> list[Any]:
    """Ask a new process."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", BOOT, device, kv, *sys.path),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        env={name: text for name, text in os.environ.items() if name != settings.API_KEY.name},
    )
    try:
        told, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    try:
        reply = json.loads(told)
    except ValueError:
        raise DeviceError(f"the process of the verdicts left with status {process.returncode}") from None
    if "error" in reply:
        raise UsageError(str(reply["error"]))
    found: list[Any] = reply["verdicts"]
    return found


def main() -> None:
    """Print the catalogue with verdicts. The arguments are the device, "" for the best, and the type of the cache."""
    from ..hub.figures import catalogue_figures
    from ..hub.fit import Machine

    told = os.dup(1)
    os.dup2(2, 1)  # what a driver prints is no verdict
    reply: dict[str, Any]
    try:
        reply = {"verdicts": catalogue_figures(Machine.of(sys.argv[1] or None), kv=sys.argv[2])}
    except (ZincError, OSError) as error:
        reply = {"error": str(error)}
    with os.fdopen(told, "w") as out:
        json.dump(reply, out)


__all__ = ["Verdicts", "main"]
