"""Latent attention in a model: smaller caches, forks, snapshots, the disk, and keys divided among threadgroups."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from support.paths import DATA
from support.reference_models import GPUS, check_divided_keys, kl, load

FILE = DATA / "families" / "deepseek2-glm47flash.gguf"
IDS = (np.arange(150) * 37 % 256).tolist()  # three pages, the last of them not whole


@pytest.mark.parametrize(("kv", "bound"), [("f16", 1e-4), ("q8_0", 1e-3)])
@pytest.mark.parametrize("lane", ["native", *GPUS])
def test_smaller_caches_stay_close(kv: str, bound: float, lane: str, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = np.load(FILE.with_suffix(".npz"))
    with load(FILE, lane, monkeypatch, kv=kv, context=128, exact=lane != "native") as model:
        logits = model.logits(exact["tokens"])
    got = kl(exact["logprobs"], logits[exact["prefix_lengths"] - 1])
    assert (got <= bound).all(), f"KL {got}"


@pytest.mark.parametrize("kv", ["f16", "q8_0"])
def test_forks_and_snapshots_go_on_as_one_sequence_would(kv: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fork writes to copies of the page that both have begun."""
    with load(FILE, "native", monkeypatch, kv=kv, context=300, cache=False) as model:

        def alone(token: int) -> np.ndarray:
            with model.session() as session:
                session.prefill(IDS)
                session.decode(token)
                return session.last_logits().copy()

        want = {token: alone(token) for token in (5, 7)}
        with model.session() as session:
            session.prefill(IDS)
            saved = session.save()
            with session.fork() as fork:
                session.decode(5)
                assert np.array_equal(session.last_logits(), want[5])
                fork.decode(7)
                assert np.array_equal(fork.last_logits(), want[7])
            session.restore(saved)
            session.decode(7)
            assert np.array_equal(session.last_logits(), want[7])


def test_a_prefix_comes_back_from_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    for _ in range(2):
        with load(FILE, "native", monkeypatch, context=300, cache_dir=tmp_path) as model:
            found = model.generate(IDS, max_tokens=6, stop=[])
            told.append((found.tokens, found.cache.reused))
    assert told[0][0] == told[1][0]
    assert told[0][1] == 0
    assert told[1][1] >= 128


def test_keys_divided_among_threadgroups_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan of a GPU for a context of many shares, on this device."""
    with load(FILE, "native", monkeypatch, context=1024) as model:
        check_divided_keys(model, IDS, model.config.n_layer, monkeypatch)
