"""Names test cases."""

from __future__ import annotations

import re

from zincmetal.errors import abbreviate


def case_name(value: object) -> str:
    """Names the test case of a value. Leaves out an object's address, which differs between processes."""
    return re.sub(" at 0x[0-9a-f]+", "", abbreviate(value))
