"""Sizes of the pools that a caller of load gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import zincmetal
from support.paths import DATA
from zincmetal.errors import UsageError

DENSE, HYBRID = DATA / "llama-q4_k_m.gguf", DATA / "qwen35-q4_k_m.gguf"
PROMPTS = [[(7 * i + j) % 90 + 1 for j in range(60 + 9 * i)] for i in range(5)]


def answers(path: Path, together: bool, **pools: Any) -> list[list[int]]:
    """Generates after all prompts with these pools, at once or one after the other."""
    with zincmetal.load(path, device="cpu", context=256, threads=2, **pools) as model:
        if together:
            found = [r.tokens for r in model.generate(PROMPTS, 40)]
        else:
            found = [model.generate(p, 40).tokens for p in PROMPTS]
        figures = model.figures()
        assert figures["pages"]["most"] * 64 <= max(256, pools.get("pool_tokens", 1 << 30)) + 63
        assert figures["slots"]["most"] <= pools.get("pool_states", 1 << 30)
        return found


@pytest.mark.parametrize("path", [DENSE, HYBRID], ids=lambda p: p.stem)
def test_sequences_take_turns_in_pools_that_are_too_small_for_all(path: Path) -> None:
    alone = answers(path, together=False)
    assert answers(path, together=True, pool_tokens=256) == alone
    assert answers(path, together=True, pool_tokens=300, pool_states=2) == alone
    assert answers(path, together=True, pool_states=3) == alone


def test_a_pool_that_cannot_hold_one_sequence_is_refused() -> None:
    with pytest.raises(UsageError, match="pool_tokens is 255, and one sequence may have 256 tokens"):
        zincmetal.load(DENSE, device="cpu", context=256, pool_tokens=255)
    with pytest.raises(UsageError, match="pool_states"):
        zincmetal.load(HYBRID, device="cpu", context=256, pool_states=1)
