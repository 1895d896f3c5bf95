"""Places of biases and masks in shared memory: what an output reads is its own, and no step in flight reads it."""

from __future__ import annotations

import numpy as np
import pytest

from zincmetal.engine.batch import Drawing
from zincmetal.engine.places import Places
from zincmetal.sampling.draws import mask_words
from zincmetal.sampling.params import SamplingParams

BIAS = np.dtype([("id", "<i4"), ("value", "<f4")])
VOCAB = 70  # 3 words of a mask, the last of them not full
OUTS = 3  # of a step
BIASES = 4  # of a step


class Memory:
    """Buffers for two steps, of the sizes that a plan gives them, and the core that knows the record."""

    def __init__(self) -> None:
        self.biases = np.zeros(2 * BIASES, BIAS)
        self.masks = np.zeros((2 * OUTS, 3), np.uint32)
        self.places = Places(self, self, VOCAB)  # type: ignore[arg-type]

    def buffer(self, name: str) -> np.ndarray:
        return {"biases": self.biases, "masks": self.masks}[name]

    def params_dtype(self, name: str) -> np.dtype:
        return {"Bias": BIAS}[name]

    def seen(self, drawing: Drawing, bias_at: int, mask_at: int | None) -> tuple[dict[int, float], list[bool]]:
        """Returns what the draw kernel reads: biases, and the tokens that are allowed."""
        records = self.biases[bias_at : bias_at + len(drawing.params.logit_bias)]
        words = self.masks.reshape(-1)[mask_at : mask_at + 3] if mask_at is not None else np.full(3, 2**32 - 1)
        allowed = [bool(int(words[i // 32]) >> i % 32 & 1) for i in range(VOCAB)]
        return {int(record["id"]): float(record["value"]) for record in records}, allowed


def drawing(biases: dict[int, float], modulo: int | None = None) -> Drawing:
    """Returns a drawing with these biases, and a mask of each ``modulo``-th token."""
    mask = None if modulo is None else mask_words(np.arange(VOCAB) % modulo == 0)
    return Drawing(SamplingParams(temperature=1.0, logit_bias=biases), mask=mask)


STEPS = [
    [drawing({5: 1.0, 7: -2.0}, 3), drawing({}), drawing({69: 4.0, 1: 0.5}, 2)],
    [drawing({9: 9.0}, 5), drawing({1: 1.0, 2: 2.0, 3: 3.0}, 7), drawing({}, 11)],
    [drawing({}, 4), drawing({8: 8.0, 6: 6.0, 4: 4.0, 2: 2.0}), drawing({}, 6)],
]


@pytest.mark.parametrize("first", [0, 1, 6])
def test_each_output_of_two_steps_in_flight_reads_its_own(first: int) -> None:
    memory = Memory()
    before: list[tuple[Drawing, int, int | None]] = []
    for number, drawings in enumerate(STEPS, first):
        place = memory.places.of(number)
        here = [(each, *place(i, each)) for i, each in enumerate(drawings)]
        for each, bias_at, mask_at in [*before, *here]:
            allowed = [each.mask is None or bool(int(each.mask[i // 32]) >> i % 32 & 1) for i in range(VOCAB)]
            assert memory.seen(each, bias_at, mask_at) == (each.params.logit_bias, allowed)
            assert (mask_at is None) == (each.mask is None)
        before = here


def test_all_outputs_of_a_step_have_room_for_their_biases() -> None:
    memory = Memory()
    each = memory.places.biases_each(OUTS)
    assert OUTS * each <= BIASES < OUTS * (each + 1)
