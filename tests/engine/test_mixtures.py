"""Sequences that run together: each has the tokens that it has alone, whatever the others do.

On the native lane; ``tests/kernels/test_step_mixtures.py`` runs the Metal text.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from support.block_files import NAMES
from support.mixture_checks import FILES, MODELS, MORE, USUAL, check, check_drafted, check_drafted_by_block, check_plain
from support.mixtures import Mixture, engine, few_pages

SMALL, LARGE, DRAFTED = (16, 300, 16), (32, 512, 40), (8, 100, 24)


@pytest.mark.parametrize(("path", "kv"), MODELS if MORE else USUAL, ids=lambda x: getattr(x, "stem", x))
def test_a_mixture_equals_its_members(path: Path, kv: str) -> None:
    check_plain(path, kv, LARGE if MORE else SMALL)


@pytest.mark.parametrize(("path", "kv"), USUAL, ids=lambda x: getattr(x, "stem", x))
def test_a_mixture_with_drafts_equals_its_members(path: Path, kv: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some drafts are right, some are wrong, some sequences have none."""
    accepted, rejected = check_drafted(path, kv, DRAFTED, MORE or 3, monkeypatch)
    assert accepted
    assert rejected


@pytest.mark.parametrize("name", NAMES)
def test_a_mixture_with_drafts_of_its_own_block_equals_its_members(name: str, tmp_path: Path) -> None:
    accepted, rejected = check_drafted_by_block(name, tmp_path, DRAFTED, MORE or 3)
    assert accepted
    assert rejected


@pytest.mark.parametrize("path", FILES[:2], ids=lambda p: p.stem)
def test_a_mixture_that_has_few_pages_equals_its_members(path: Path) -> None:
    """Sequences leave their pages to older ones, and go on later."""
    moved_out = 0
    with engine(path, "f32", threads=2) as opened:
        for seed in (2, 3, *range(4, MORE)):
            print("seed", seed)
            mixture = Mixture(opened, seed, (16, 40, 150))
            with few_pages(opened, 7):
                check(mixture)
            moved_out += sum(member.stats.moved_out for member in mixture.members if member.stats)
    assert moved_out
