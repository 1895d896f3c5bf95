"""Every harness of the fuzzers runs its seeds and its corpus: what was found once stays found."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from support.fuzz import NAMES
from support.fuzz.reading import Reading
from support.paths import TESTS

CORPUS = TESTS / "fuzz" / "corpus"


@pytest.mark.parametrize("name", NAMES)
def test_seeds_and_corpus_are_clean(name: str) -> None:
    harness: Any = importlib.import_module(f"support.fuzz.{name}")
    seeds = harness.seeds()
    assert len(set(seeds)) == len(seeds) > 0
    for data in [*seeds, b""]:
        harness.run(data)
    for path in sorted((CORPUS / name).glob("*")):
        try:
            harness.run(path.read_bytes())
        except BaseException as error:
            raise AssertionError(f"{path.name} of {name} fails again") from error


def test_the_corpus_belongs_to_harnesses() -> None:
    assert {path.name for path in CORPUS.iterdir()} <= set(NAMES)
    assert sum(path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()) < 1 << 20


def test_values_come_from_bytes_to_their_end() -> None:
    data = Reading(bytes([3, 97, 98, 99, 1, 2, 0, 128, 255]))
    assert data.text() == "abc"
    assert data.number(2) == 513
    assert data.pieces("abcd") == ["", "ab", "cd", ""]
    assert not data
    assert (data.byte(), data.text(), data.number(8), data.rest()) == (0, "", 0, b"")
