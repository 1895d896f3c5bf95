"""SmolLM3: Llama, but every fourth block knows no positions (NoPE): its heads do not turn."""

from __future__ import annotations

from ..config import Traits
from . import llama
from .family import Family

FAMILY = Family(llama.build, Traits(rotates=lambda i, window: (i + 1) % 4 != 0))
