"""Process of a model whose device fails as long as a file exists: in place of ``zincmetal.serve.worker``."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from zincmetal.engine.engine import Engine
from zincmetal.errors import DeviceError
from zincmetal.serve import worker

FLAG = "FAULT_OF_THE_DEVICE"  # the file; its text is "device", "once" or "segv"
BOOT = "import sys; sys.path[:] = sys.argv[4:]; from support.faulty_model import main; main()"


def main() -> None:
    """Serves a model; steps fail while the file exists."""
    flag, collect = Path(os.environ[FLAG]), Engine.collect

    def faulty(self: Engine) -> Any:
        if flag.exists():
            fault = flag.read_text()
            if fault == "segv":
                signal.raise_signal(signal.SIGSEGV)
            if fault == "once":
                flag.unlink()
            raise DeviceError("the GPU was lost")
        return collect(self)

    Engine.collect = faulty  # type: ignore[method-assign]
    worker.main()
