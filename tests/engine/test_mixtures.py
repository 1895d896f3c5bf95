"""Sequences that run together: each has the tokens that it has alone, whatever the others do.

``ZINCMETAL_MIXTURES=100`` runs so many mixtures of each kind, larger ones. The seed of a mixture is its number.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from support.block_files import NAMES, with_good_drafts
from support.mixtures import Mixture, engine, few_pages
from support.paths import DATA
from zincmetal.engine.engine import Engine

MORE = int(os.environ.get("ZINCMETAL_MIXTURES", "0"))
SMALL, LARGE = (16, 300, 16), (32, 512, 40)
DRAFTED, DRAFTED_ON_FIBRES = (8, 100, 24), (4, 20, 16)
SMALL_ON_FIBRES, LARGE_ON_FIBRES = (6, 40, 5), (8, 100, 8)
FILES = [DATA / f"{name}.gguf" for name in ("llama-q4_k_m", "qwen35-q4_k_m", "gemma3-q4_0", "qwen35moe-q4k-q5k-q8")]
MODELS = [*((path, kv) for path in FILES for kv in ("f32", "f16", "q8_0"))]
FAMILIES = [(DATA / "families" / f"{name}.gguf", "f16") for name in ("lfm2", "granitehybrid")]
USUAL = [(FILES[0], "f32"), (FILES[1], "f16"), (FILES[0], "q8_0"), *FAMILIES]


def check(mixture: Mixture) -> None:
    engine = mixture.engine
    before = engine.pages.size - engine.pages.free, engine.slots.size - engine.slots.free
    mixture.run()
    for i, member in enumerate(mixture.members):
        assert not isinstance(member.ended, BaseException), member.ended
        about = f"member {i} of {len(mixture.members)}: {len(member.ids)} ids, {member.params}"
        assert member.tokens == member.expected, about
    assert mixture.together > 1
    assert (engine.pages.size - engine.pages.free, engine.slots.size - engine.slots.free) == before


@pytest.mark.parametrize(("path", "kv"), MODELS if MORE else USUAL, ids=lambda x: getattr(x, "stem", x))
@pytest.mark.parametrize("lane", ["native", "msl"])
def test_a_mixture_equals_its_members(path: Path, kv: str, lane: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZINCMETAL_NATIVE", "0" if lane == "msl" else "1")
    small, large = (SMALL, LARGE) if lane == "native" else (SMALL_ON_FIBRES, LARGE_ON_FIBRES)
    with engine(path, kv, threads=2) as opened:
        for seed in range(MORE or 1):
            print("seed", seed)
            check(Mixture(opened, seed, large if MORE else small))


@pytest.mark.parametrize(("path", "kv"), USUAL, ids=lambda x: getattr(x, "stem", x))
@pytest.mark.parametrize("lane", ["native", "msl"])
def test_a_mixture_with_drafts_equals_its_members(
    path: Path, kv: str, lane: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some drafts are right, some are wrong, some sequences have none."""
    monkeypatch.setenv("ZINCMETAL_NATIVE", "0" if lane == "msl" else "1")
    with engine(path, kv, threads=2) as opened:
        copies = count_copies(opened, monkeypatch)
        accepted = rejected = 0
        for seed in range(100, 100 + (MORE or (3 if lane == "native" else 2))):
            print("seed", seed)
            mixture = Mixture(opened, seed, DRAFTED if lane == "native" else DRAFTED_ON_FIBRES, drafts=True)
            check(mixture)
            right, wrong = verdicts(mixture)
            accepted, rejected = accepted + right, rejected + wrong
        assert accepted + rejected  # with q8_0 on fibres, texts up to a near tie are short
        assert lane == "msl" or (accepted and rejected)
        assert not copies


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("lane", ["native", "msl"])
def test_a_mixture_with_drafts_of_its_own_block_equals_its_members(
    name: str, lane: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZINCMETAL_NATIVE", "0" if lane == "msl" else "1")
    accepted = rejected = 0
    with engine(with_good_drafts(name, tmp_path), "f32", threads=2) as opened:
        opened.load_block()
        for seed in range(200, 200 + (MORE or (3 if lane == "native" else 2))):
            print("seed", seed)
            mixture = Mixture(opened, seed, DRAFTED if lane == "native" else DRAFTED_ON_FIBRES, blocks=True)
            check(mixture)
            right, wrong = verdicts(mixture)
            accepted, rejected = accepted + right, rejected + wrong
    assert accepted
    assert rejected


def verdicts(mixture: Mixture) -> tuple[int, int]:
    """Counts the drafted tokens of all members that were accepted, and those that were not."""
    drafts = [count for member in mixture.members if member.stats for count in member.stats.drafts]
    accepted = sum(right for _, right in drafts)
    return accepted, sum(tried for tried, _ in drafts) - accepted


def count_copies(opened: Engine, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Returns the list that takes the copies of states from now on."""
    copies: list[tuple[int, int]] = []
    monkeypatch.setattr(opened, "copy_slot", lambda *slots: copies.append(slots))
    return copies


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
