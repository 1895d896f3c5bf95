"""Choices of a caller: the type of the K/V caches, and the output of a plan. The command reads them without NumPy."""

from __future__ import annotations

KV_TYPES = ("f16", "f32", "q8_0")
# What a step does with the rows whose logits are wanted: there are none; it takes the largest logit of each (its id);
# it draws a token for each; it leaves all their logits for the host. Or there are no logits, and it leaves all rows
# after the final norm.
OUTPUTS = ("none", "argmax", "draw", "all", "hidden")
DRAFT = "draft"  # of a step of the block that drafts: it takes the largest logit of each row
WITHOUT_LOGITS = ("none", "hidden")
