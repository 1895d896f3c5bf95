"""The types of experts."""

from __future__ import annotations

import pytest

from zincmetal.gguf import quants

#: Types that experts come in.
TYPES = [t for t in quants.SUPPORTED if t not in (quants.F32, quants.BF16)]


every_type = pytest.mark.parametrize("qtype", TYPES, ids=lambda t: t.name)
