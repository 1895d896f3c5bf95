"""Prompt lookup: what it proposes, against a search through all tokens."""

from __future__ import annotations

import random

import pytest

from zincmetal.engine.drafters import LONGEST_MATCH, MOST_PLACES, MOST_READ, TAIL, Lookup


def searched(ids: list[int], n: int) -> list[int]:
    """Returns what the longest match is followed by, found by comparing with every place."""
    best, longest = 0, TAIL - 1
    for place in range(TAIL, len(ids)):
        match = 0
        while match < min(place, LONGEST_MATCH) and ids[place - 1 - match] == ids[-1 - match]:
            match += 1
        if match >= longest and match >= TAIL:
            best, longest = place, match
    if not best:
        return []
    made = list(ids)
    for i in range(n):
        made.append(made[best + i])
    return made[len(ids) :]


@pytest.mark.parametrize("seed", range(20))
def test_lookup_proposes_what_followed_the_longest_match(seed: int) -> None:
    rng = random.Random(seed)
    ids, lookup, found = [rng.randrange(3)], Lookup(), 0
    assert MOST_PLACES >= 8
    for _ in range(60):
        ids += [rng.randrange(9) for _ in range(rng.randint(1, 3))]
        if rng.random() < 0.4 and len(ids) > 10:
            at = rng.randrange(len(ids) - 8)
            ids += ids[at : at + rng.randint(3, 8)]
        n = rng.randint(1, 9)
        draft = lookup.propose(ids, n)
        assert draft.tokens == searched(ids, n)
        assert bool(draft.tokens) == (draft.match >= TAIL)
        found += bool(draft.tokens)
    assert found


def test_what_repeats_itself_goes_on() -> None:
    assert Lookup().propose([9, 1, 2, 3, 1, 2, 3], 7).tokens == [1, 2, 3, 1, 2, 3, 1]


def test_nothing_is_proposed_without_a_match_or_room() -> None:
    lookup = Lookup()
    assert lookup.propose([1, 2], 4).tokens == []
    assert lookup.propose([1, 2, 3, 4, 1, 2], 4).tokens == []
    assert lookup.propose([1, 2, 3, 4, 1, 2, 3], 0).tokens == []
    assert lookup.propose([1, 2, 3, 4, 1, 2, 3], 1).tokens == [4]


def test_a_long_prompt_is_read_in_pieces() -> None:
    ids = [*range(MOST_READ), *range(50, 60)]
    lookup = Lookup()
    assert lookup.propose(ids, 2).tokens == []
    assert lookup.propose(ids, 2).tokens == [60, 61]
