"""Asks macOS's watchdog of the GPU for more time, before Metal is loaded."""

from __future__ import annotations

import os

VARIABLE = "AGX_RELAX_CDM_CTXSTORE_TIMEOUT"  # of Apple's driver


def relax() -> None:
    """Let GPU work keep the display waiting for longer: a long prompt takes seconds. A user's own setting stays.

    The driver reads the variable when the process makes its first Metal device, which another library may do. So the
    package sets it at import, before there are threads that read the environment. ``ZINCMETAL_RELAXED`` marks that the
    package set it, and not the user.
    """
    if VARIABLE not in os.environ:
        os.environ[VARIABLE] = os.environ["ZINCMETAL_RELAXED"] = "1"
