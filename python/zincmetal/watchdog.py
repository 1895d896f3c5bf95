"""What macOS's watchdog of the GPU is asked for, before anything of Metal is loaded."""

from __future__ import annotations

import os

VARIABLE = "AGX_RELAX_CDM_CTXSTORE_TIMEOUT"  # of Apple's driver


def relax() -> None:
    """Ask macOS to stop later what keeps the display waiting: a prompt's work can take seconds.

    The driver reads the variable when it makes the first device of the process: maybe another library's. So it is set
    when zincmetal is imported, before there are threads that read the environment. What a user has set stays; the mark
    says whose choice it is.
    """
    if VARIABLE not in os.environ:
        os.environ[VARIABLE] = os.environ["ZINCMETAL_RELAXED"] = "1"
