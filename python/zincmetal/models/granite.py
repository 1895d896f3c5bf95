"""Granite: Llama with scales of the embedding, of what blocks add, of attention and of the logits."""

from __future__ import annotations

from ..config import Traits
from . import llama
from .family import Family

TRAITS = Traits(scales_residual=True, logit_scale=lambda divisor: 1 / divisor, finetuned_rotates=True)
FAMILY = Family(llama.build, TRAITS)
