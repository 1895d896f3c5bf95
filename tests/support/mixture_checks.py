"""What must hold of mixtures of sequences: each member has the tokens that it has alone. For both lanes of the CPU.

``ZINCMETAL_MIXTURES=100`` runs so many mixtures of each kind, larger ones. The seed of a mixture is its number.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import pytest

from support.block_files import with_good_drafts
from support.mixtures import Mixture, engine
from support.paths import DATA
from zincmetal.engine.engine import Engine

Size = tuple[int, int, int]
MORE = int(os.environ.get("ZINCMETAL_MIXTURES", "0"))
FILES = [DATA / f"{name}.gguf" for name in ("llama-q4_k_m", "qwen35-q4_k_m", "gemma3-q4_0", "qwen35moe-q4k-q5k-q8")]
MODELS = [*((path, kv) for path in FILES for kv in ("f32", "f16", "q8_0"))]
FAMILIES = [(DATA / "families" / f"{name}.gguf", "f16") for name in ("lfm2", "granitehybrid")]
USUAL = [(FILES[0], "f32"), (FILES[1], "f16"), (FILES[0], "q8_0"), *FAMILIES]


def check(mixture: Mixture) -> None:
    """Runs a mixture. Fails unless each member has its tokens, and all pages and slots are free again."""
    engine = mixture.engine
    before = engine.pages.size - engine.pages.free, engine.slots.size - engine.slots.free
    mixture.run()
    for i, member in enumerate(mixture.members):
        assert not isinstance(member.ended, BaseException), member.ended
        about = f"member {i} of {len(mixture.members)}: {len(member.ids)} ids, {member.params}"
        assert member.tokens == member.expected, about
    assert mixture.together > 1
    assert (engine.pages.size - engine.pages.free, engine.slots.size - engine.slots.free) == before


def check_plain(path: Path, kv: str, size: Size) -> None:
    """Checks mixtures without drafts."""
    with engine(path, kv, threads=2) as opened:
        for seed in range(MORE or 1):
            print("seed", seed)
            check(Mixture(opened, seed, size))


def check_drafted(path: Path, kv: str, size: Size, n: int, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """Checks ``n`` mixtures with drafts: (tokens that were accepted, tokens that were not). No state is copied."""
    with engine(path, kv, threads=2) as opened:
        copies = count_copies(opened, monkeypatch)
        found = verdicts(_checked(Mixture(opened, seed, size, drafts=True), seed) for seed in range(100, 100 + n))
        assert not copies
    return found


def check_drafted_by_block(name: str, folder: Path, size: Size, n: int) -> tuple[int, int]:
    """Checks ``n`` mixtures with drafts of the model's own block: (tokens that were accepted, that were not)."""
    with engine(with_good_drafts(name, folder), "f32", threads=2) as opened:
        opened.load_block()
        return verdicts(_checked(Mixture(opened, seed, size, blocks=True), seed) for seed in range(200, 200 + n))


def _checked(mixture: Mixture, seed: int) -> Mixture:
    print("seed", seed)
    check(mixture)
    return mixture


def verdicts(mixtures: Iterable[Mixture]) -> tuple[int, int]:
    """Counts the drafted tokens of all members that were accepted, and those that were not."""
    members = [member for mixture in mixtures for member in mixture.members]
    drafts = [count for member in members if member.stats for count in member.stats.drafts]
    accepted = sum(right for _, right in drafts)
    return accepted, sum(tried for tried, _ in drafts) - accepted


def count_copies(opened: Engine, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Returns the list that takes the copies of states from now on."""
    copies: list[tuple[int, int]] = []
    monkeypatch.setattr(opened, "copy_slot", lambda *slots: copies.append(slots))
    return copies
