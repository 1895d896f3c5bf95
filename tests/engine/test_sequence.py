"""A sequence as plain data, and how a prompt is cut into steps: without a model."""

from __future__ import annotations

import random

import pytest

from zincmetal.engine.sequence import Sequence, common
from zincmetal.plan.chunks import PREFILL_ROWS, chunk_rows, prompt_rows


@pytest.mark.parametrize("recurrent", [False, True])
def test_reused_tokens_are_a_common_prefix_and_never_the_whole_prompt(recurrent: bool) -> None:
    rng = random.Random(3)
    kept = set()
    for _ in range(500):
        held, prompt = ([rng.randrange(2) for _ in range(rng.randint(low, 6))] for low in (0, 1))
        n = Sequence(recurrent, list(held)).reusable(prompt)
        assert n < len(prompt)
        assert held[:n] == prompt[:n]
        if recurrent:
            assert n in (0, len(held))
        elif n < len(prompt) - 1:
            assert n == len(held) or held[n] != prompt[n]
        kept.add(n)
    assert len(kept) > 3


def test_a_recurrent_sequence_is_reused_whole_or_not_at_all() -> None:
    sequence = Sequence(True, [1, 2, 3])
    assert [sequence.reusable(p) for p in ([1, 2, 3, 4], [1, 2, 3], [1, 2, 9, 9])] == [3, 0, 0]
    assert [Sequence(False, [1, 2, 3]).reusable(p) for p in ([1, 2, 3, 4], [1, 2, 3], [1, 2, 9, 9])] == [3, 2, 2]


def test_a_sequence_is_cut() -> None:
    sequence = Sequence(False, [1, 2, 3])
    sequence.cut(1)
    assert (sequence.ids, len(sequence)) == ([1], 1)
    sequence.cut(5)
    assert sequence.ids == [1]


def test_a_common_prefix_ends_with_the_shorter() -> None:
    assert [common(*pair) for pair in (([], [1]), ([1, 2], [1, 2, 3]), ([1, 2], [2, 1]))] == [0, 2, 0]


@pytest.mark.parametrize("n", [1, 2, 31, 32, 33, 128, 129, 511, 512, 513, 1025, 1600])
def test_steps_take_every_token_of_a_prompt_and_the_last_one_alone(n: int) -> None:
    rows = prompt_rows(n)
    assert rows[-1] == 1
    assert rows[:-1] == chunk_rows(n - 1)
    taken = 0
    for r in rows[:-1]:
        assert r in (1, *PREFILL_ROWS)
        left = n - 1 - taken
        assert left > 0
        taken += min(r, left)
        # No smaller plan holds the rest.
        assert all(smaller < left for smaller in (1, *PREFILL_ROWS) if smaller < r)
    assert taken == n - 1


def test_no_prompt_takes_no_step() -> None:
    assert prompt_rows(0) == chunk_rows(0) == []
