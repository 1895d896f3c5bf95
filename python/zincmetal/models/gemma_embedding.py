"""EmbeddingGemma: Gemma 3 whose tokens see both ways. It makes vectors of texts: their rows' mean, projected twice."""

from __future__ import annotations

from dataclasses import replace

from . import gemma3
from .family import Family

FAMILY = Family(gemma3.build, replace(gemma3.FAMILY.traits, causal=False), name="gemma-embedding")
