"""Nemotron-H mixtures: experts, chosen by sigmoid and bias, and a shared one in the blocks with a feed-forward."""

from __future__ import annotations

from dataclasses import replace

from . import nemotron_h, qwen3moe
from .family import Family

TRAITS = replace(
    nemotron_h.TRAITS,
    mixture=True,
    expert_activation="relu2",
    expert_score="sigmoid",
    shared_gated=False,
)
FAMILY = Family(nemotron_h.build, TRAITS, (nemotron_h.SSM, *qwen3moe.PATHS))
