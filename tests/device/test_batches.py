"""Steps of several sequences: each row's logits are those of its sequence alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from support.paths import DATA
from support.steps_lab import StepsLab

MODELS = sorted(p.stem for p in DATA.glob("*.gguf"))
IDS = [(7 * i + 3) % 480 for i in range(90)]


def path(name: str) -> Path:
    return DATA / f"{name}.gguf"


@pytest.fixture(params=MODELS)
def lab(request):
    lab = StepsLab(path(request.param), context=256)
    yield lab
    lab.close()


def alone(lab: StepsLab, ids: list[int]) -> np.ndarray:
    """The logits after ids, from steps of one row in a sequence that no test uses."""
    lab.lengths[9] = 0
    for token in ids:
        lab.step([(9, [token])], "all")
    return lab.logits()[0]


def near(found: np.ndarray, wanted: np.ndarray) -> bool:
    return bool(np.abs(found - wanted).max() < 1e-2 * np.abs(wanted).max())


def test_a_decode_step_of_several_sequences(lab):
    prompts = {0: IDS[:5], 1: IDS[10:11], 2: IDS[20:85]}
    for sequence, ids in prompts.items():
        if len(ids) > 1:
            lab.step([(sequence, ids[:-1])], "none")
    chosen = lab.step([(sequence, ids[-1:]) for sequence, ids in prompts.items()])
    logits = lab.logits(3)
    assert chosen["id"].tolist() == logits.argmax(1).tolist()
    for found, ids in zip(logits, prompts.values(), strict=True):
        assert near(found, alone(lab, ids))


def test_decode_beside_two_prompts(lab):
    """Rows that decode, a prompt that begins, one that goes on over a page's end: with an output after each."""
    lab.step([(0, IDS[:4])], "none")
    lab.step([(1, IDS[30:90])], "none")
    runs = [(0, IDS[4:5]), (3, IDS[8:9]), (2, IDS[9:20]), (1, IDS[:15])]
    chosen = lab.step(runs)
    logits = lab.logits(4)
    whole = [IDS[:5], IDS[8:9], IDS[9:20], IDS[30:90] + IDS[:15]]
    assert chosen["id"].tolist() == logits.argmax(1).tolist()
    for found, ids in zip(logits, whole, strict=True):
        assert near(found, alone(lab, ids))


def test_all_logits_of_a_prompt(lab):
    lab.step([(0, IDS[:40])], "all")
    logits = lab.logits(40)
    for n in (1, 2, 33, 40):
        assert near(logits[n - 1], alone(lab, IDS[:n]))


def test_a_token_that_the_step_before_has_chosen(lab):
    """A row that names an output takes its token on the device: as the host would."""
    first = lab.step([(0, IDS[:9])])
    second = lab.step([(0, [-1])])
    lab.lengths[1] = 0
    assert lab.step([(1, IDS[:9])])["id"] == first["id"]
    assert lab.step([(1, [int(first["id"][0])])])["id"] == second["id"]
    history = lab.buffers.buffer("history").read().view(np.int32)
    other = history[lab.table * lab.page :]
    assert history[:9].tolist() == other[:9].tolist() == IDS[:9]
    assert history[9] == other[9] == first["id"][0]


def test_larger_pools_keep_their_contents(lab):
    lab.step([(0, IDS[:70])], "none")
    before = lab.step([(0, IDS[70:71])])
    wanted = lab.logits()
    lab.lengths[0] = 70
    room = lab.planner.addresses.room
    larger = type(room)(2 * room.pages, 2 * room.slots, room.seats)
    if not lab.planner.slot_bytes:  # states cannot go back
        for name, nbytes in lab.planner.addresses.sizes(larger).items():
            lab.buffers.grow(name, nbytes)
        lab.planner.resize(larger)
        lab.programs.clear()
        assert lab.step([(0, IDS[70:71])])["id"] == before["id"]
        assert (lab.logits() == wanted).all()
