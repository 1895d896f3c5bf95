"""Names of test cases."""

from __future__ import annotations

import re

from zincmetal.errors import abbreviate


def case_name(value: object) -> str:
    """What a test case of this value is called: without the address of an object, which each process has another of."""
    return re.sub(" at 0x[0-9a-f]+", "", abbreviate(value))
