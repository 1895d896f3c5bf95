"""The block that drafts, against exact distributions at every prefix, on every lane."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from support.mixtures import engine
from support.paths import DATA
from support.reference_models import GPUS, NOISE, kl
from zincmetal.engine.batch import Builder, id_of
from zincmetal.engine.engine import Engine
from zincmetal.engine.session import Session

FILES = sorted((DATA / "families").glob("*-mtp.gguf"))
LANES = ["msl", "native", *GPUS]
every_file = pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)


def opened(path: Path, lane: str, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Any:
    monkeypatch.setenv("ZINCMETAL_NATIVE", "0" if lane == "msl" else "1")
    return engine(path, options.pop("kv", "f32"), device=lane if lane in GPUS else "cpu", **options)


def draft_logits(made: Engine, sessions: list[Session], tokens: list[int]) -> NDArray[np.float32]:
    """Runs a step of the block, with a row for each session. Returns the logits, [sessions, n_vocab]."""
    builder = Builder(made, made.pages, made.slots)
    for session, token in zip(sessions, tokens, strict=True):
        assert builder.add_draft(session.sequence, session.length, token)
    made.submit(builder.batch())
    best = [id_of(choice) for choice in made.collect()]
    logits = made.logits(len(sessions)).copy()
    assert best == logits.argmax(axis=-1).tolist()
    return logits


@every_file
@pytest.mark.parametrize("lane", LANES)
def test_distribution_at_every_prefix(path: Path, lane: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each prefix is a sequence of its own, and the block drafts for all of them in one step."""
    exact = np.load(path.with_suffix(".npz"))
    with opened(path, lane, monkeypatch, exact=lane != "native") as made:
        made.load_block()
        sessions = [Session(made) for _ in exact["prefix_lengths"]]
        for session, n in zip(sessions, exact["prefix_lengths"].tolist(), strict=True):
            session.prefill(exact["tokens"][:n].tolist())
        logits = draft_logits(made, sessions, exact["mtp_next"].tolist())
        for session in sessions:
            session.close()
    got = kl(exact["mtp_logprobs_zero_pair"], logits)
    assert (got <= (1e-5 if lane in GPUS else NOISE)).all(), f"KL {got}"
