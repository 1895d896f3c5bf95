"""Mistral 3 (Ministral 3, Devstral Small 2, Mistral Small 3): Llama, whose queries may grow with their position."""

from __future__ import annotations

from . import llama
from .family import Family

FAMILY = Family(llama.build)
