"""The tensor types that expert kernels take."""

from __future__ import annotations

import pytest

from zincmetal.gguf import quants

#: Every type but f32 and bf16.
TYPES = [t for t in quants.SUPPORTED if t not in (quants.F32, quants.BF16)]


every_type = pytest.mark.parametrize("qtype", TYPES, ids=lambda t: t.name)
