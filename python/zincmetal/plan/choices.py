"""Choices of a caller: the type of the K/V caches, and the output of a plan. The command reads them without NumPy."""

from __future__ import annotations

KV_TYPES = ("f16", "f32", "q8_0")
# The last row's largest logit (its id), the last row's candidates, or the logits of all rows.
OUTPUTS = ("argmax", "candidates", "all")
