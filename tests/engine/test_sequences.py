"""Sequences copied out and back in, forked, and taken up again where they were left."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import zincmetal
from support.reference_models import reference_models
from zincmetal.api.model import Model
from zincmetal.errors import ContextFullError, OutOfMemoryError, UsageError

PATHS = [p for p in reference_models("llama", "qwen35", "qwen35moe") if "q5k-q6k" not in p.stem]
every_model = pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)
N_MADE = 24


def load(path: Path, **options: object) -> Model:
    return zincmetal.load(path, device="cpu", context=192, **{"kv": "f32", **options})


def prompt(path: Path, n: int = 70) -> list[int]:
    """More than a page of K/V."""
    return np.load(path.with_suffix(".npz"))["tokens"][:n].tolist()


def go_on(model: Model, n: int = N_MADE) -> list[int]:
    """Greedy tokens from the end of the model's sequence, whatever they are."""
    best, made = int(model.engine.last_logits().argmax()), []
    for _ in range(n):
        made.append(best)
        best = model.engine.decode(best)
    return made


@every_model
@pytest.mark.parametrize("kv", ["f32", "f16", "q8_0"])
def test_saved_and_restored_it_continues_identically(path, kv):
    with load(path, kv=kv) as model:
        model.engine.prefill(prompt(path))
        saved, first_logits = model.save(), model.engine.last_logits().copy()
        made = go_on(model)
        other = model.engine.prefill(prompt(path, 9))
        assert other >= 0
        model.restore(saved)
        assert model.engine.steps.length == 70
        # The logits are not part of a sequence: the next token is what was made first.
        again = [int(first_logits.argmax())]
        while len(again) < N_MADE:
            again.append(model.engine.decode(again[-1]))
    assert again == made


@every_model
def test_restored_in_another_model_with_its_pages_elsewhere(path):
    ids = prompt(path)
    with load(path) as one, load(path) as two:
        one.engine.prefill(ids)
        saved = one.save()
        pages = np.arange(two.engine.buffers.buffer("pages").nbytes // 4, dtype=np.uint32)[::-1].copy()
        two.engine.buffers.buffer("pages").write(pages)
        two.restore(saved)
        assert two.engine.decode(5) == one.engine.decode(5)
        assert np.array_equal(two.engine.last_logits(), one.engine.last_logits())


@every_model
def test_a_fork_goes_its_own_way(path):
    ids = prompt(path)
    with load(path) as model:
        model.engine.prefill(ids)
        twin = model.fork()
        with twin:
            model.engine.decode(5)
            twin.engine.decode(6)
            mine, its = model.engine.last_logits().copy(), twin.engine.last_logits().copy()
            assert twin.engine.steps.length == model.engine.steps.length == 71
        assert not np.array_equal(mine, its)
        for token, want in ((5, mine), (6, its)):
            model.reset()
            model.engine.prefill([*ids, token])
            assert np.abs(model.engine.last_logits() - want).max() < 1e-4


def test_a_fork_outlives_the_model_it_came_from():
    path = PATHS[0]
    model = load(path)
    model.engine.prefill(prompt(path))
    twin = model.fork()
    want = model.engine.decode(5)
    model.close()
    assert twin.engine.decode(5) == want
    twin.close()
    with pytest.raises(UsageError, match="closed"):
        twin.save()


@every_model
def test_a_reset_sequence_is_a_new_one(path):
    ids = prompt(path, 33)
    with load(path) as model:
        first = model.generate(ids, max_tokens=12, temperature=0.0).tokens
        model.reset()
        assert model.generate(ids, max_tokens=12).tokens == first


@every_model
def test_a_conversation_continues_where_it_was_left(path):
    """The second prompt holds the first and its answer; another one that departs early starts anew."""
    ids = prompt(path, 40)
    with load(path) as model, load(path) as fresh:
        answer = model.generate(ids, max_tokens=9).tokens
        longer = [*ids, *answer, 7, 8, 9]
        assert model.generate(longer, max_tokens=9).tokens == fresh.generate(longer, max_tokens=9).tokens
        assert model.profile()["tokens"] < fresh.profile()["tokens"] + 60
        departed = [*ids[:20], 3, 4]
        fresh.reset()
        assert model.generate(departed, max_tokens=9).tokens == fresh.generate(departed, max_tokens=9).tokens


def test_what_does_not_fit_is_refused():
    llama, hybrid = PATHS[0], PATHS[-1]
    with load(llama) as model, load(hybrid) as other, load(llama, kv="f16") as half:
        model.engine.prefill(prompt(llama))
        saved = model.save()
        for wrong in (other, half):
            with pytest.raises(UsageError, match="another model, or of one with another type"):
                wrong.restore(saved)
            assert wrong.engine.steps.length == 0
    with zincmetal.load(llama, device="cpu", kv="f32", context=64) as short, pytest.raises(ContextFullError):
        short.restore(saved)


def test_an_empty_sequence_can_be_saved():
    with load(PATHS[-1]) as model:
        saved = model.save()
        assert saved.nbytes == 0
        model.engine.prefill([1, 2, 3])
        model.restore(saved)
        assert model.engine.steps.length == 0


def test_a_refused_snapshot_leaves_the_sequence_alone():
    llama, hybrid = PATHS[0], PATHS[-1]
    with load(llama) as model, load(hybrid) as other:
        model.engine.prefill([1, 2, 3])
        other.engine.prefill([1, 2, 3, 4])
        with pytest.raises(UsageError):
            other.restore(model.save())
        assert other.engine.steps.length == 4


def test_a_fork_that_does_not_fit_is_refused(monkeypatch):
    with load(PATHS[-1]) as model:
        plan = model.engine.planner.memory()
        monkeypatch.setenv("ZINCMETAL_MEMORY_LIMIT", str(plan.total + 1000))
        with pytest.raises(OutOfMemoryError, match="2 sequences of 192 tokens need"):
            model.fork()
