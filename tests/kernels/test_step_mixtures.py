"""Steps with rows of many sequences, by the Metal text: each sequence has the tokens that it has alone.

``tests/engine/test_mixtures.py`` runs larger mixtures on the native lane.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from support.block_files import NAMES
from support.mixture_checks import MODELS, MORE, USUAL, check_drafted, check_drafted_by_block, check_plain

SMALL, LARGE, DRAFTED = (6, 40, 5), (8, 100, 8), (4, 20, 16)


@pytest.fixture(autouse=True)
def _metal_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZINCMETAL_NATIVE", "0")


@pytest.mark.parametrize(("path", "kv"), MODELS if MORE else USUAL, ids=lambda x: getattr(x, "stem", x))
def test_a_mixture_on_fibres_equals_its_members(path: Path, kv: str) -> None:
    check_plain(path, kv, LARGE if MORE else SMALL)


@pytest.mark.parametrize(("path", "kv"), USUAL, ids=lambda x: getattr(x, "stem", x))
def test_a_mixture_on_fibres_with_drafts_equals_its_members(
    path: Path, kv: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    accepted, rejected = check_drafted(path, kv, DRAFTED, MORE or 2, monkeypatch)
    assert accepted + rejected  # with q8_0, texts up to a near tie are short


@pytest.mark.parametrize("name", NAMES)
def test_a_mixture_on_fibres_with_drafts_of_its_own_block_equals_its_members(name: str, tmp_path: Path) -> None:
    accepted, rejected = check_drafted_by_block(name, tmp_path, DRAFTED, MORE or 2)
    assert accepted
    assert rejected
