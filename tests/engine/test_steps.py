"""The step API of an engine: what it computes, what it computes again, and what engines share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from support.reference_models import reference_models
from zincmetal import gguf
from zincmetal.engine.engine import Engine
from zincmetal.engine.loaded import Loaded
from zincmetal.errors import ContextFullError, OutOfMemoryError, UsageError
from zincmetal.sampling.params import SamplingParams
from zincmetal.sampling.sampler import Sampler

LLAMA, HYBRID = reference_models("llama")[0], reference_models("qwen35")[0]
every_kind = pytest.mark.parametrize("path", [LLAMA, HYBRID], ids=["attention", "hybrid"])
IDS = [7 * i % 250 + 1 for i in range(50)]


def opened(path: Path, **options: object) -> Engine:
    return Engine(Loaded(gguf.open(path), **{"context": 96, "device": "cpu", "kv": "f32", "threads": 1, **options}))


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = opened(LLAMA)
    yield made
    made.close()


@every_kind
def test_sync_computes_what_is_new(path: Path) -> None:
    """Whatever the sequence was: the sequence is the prompt then, and the logits are those of a new engine."""
    engine, fresh = opened(path), opened(path)
    recurrent = engine.sequence.recurrent
    prompts = [IDS[:20], IDS[:30], IDS[:30], [*IDS[:25], 3, 4], [9], IDS]
    computed = [20, 10, 30 if recurrent else 1, 27 if recurrent else 2, 1, 50]
    for prompt, n in zip(prompts, computed, strict=True):
        before = engine.profile()["tokens"]
        synced = engine.sync(prompt)
        fresh.rewind(0)
        assert synced.best == fresh.prefill(prompt)
        assert (synced.computed, engine.profile()["tokens"] - before) == (n, n)
        assert engine.sequence.ids == prompt
        assert np.abs(engine.last_logits() - fresh.last_logits()).max() < 1e-4
    engine.close()
    fresh.close()


def test_sync_refuses_what_is_no_prompt_and_keeps_the_sequence(engine: Engine) -> None:
    engine.sync(IDS[:5])
    for wrong, error in (([], UsageError), ([1, 512], UsageError), ([-1], UsageError), ([1] * 97, ContextFullError)):
        with pytest.raises(error):
            engine.sync(wrong)
    assert engine.sequence.ids == IDS[:5]
    assert engine.steps.length == 5


@every_kind
def test_a_prompt_may_come_in_any_steps(path: Path) -> None:
    engine = opened(path)
    want = engine.prefill(IDS)
    logits = engine.last_logits().copy()
    engine.rewind(0)
    engine.step(IDS[:30], 32)
    for token in IDS[30:-1]:
        engine.decode(token)
    assert engine.step(IDS[-1:], 1) == want == logits.argmax()
    assert np.abs(engine.last_logits() - logits).max() < 1e-4
    assert engine.sequence.ids == IDS
    engine.close()


def test_progress_counts_the_tokens_to_compute(engine: Engine) -> None:
    engine.sync(IDS[:10])
    told: list[tuple[int, int]] = []
    engine.sync(IDS, progress=lambda *at: told.append(at))
    assert told == [(0, 40), (39, 40), (40, 40)]


def test_a_step_ahead_is_part_of_the_sequence_once_it_is_settled() -> None:
    engine = opened(LLAMA, threads=2)
    assert engine.runs_ahead
    first = engine.sync(IDS[:5]).best
    second = engine.decode(first, ahead=True)
    assert len(engine.sequence) == 6
    engine.settle()
    assert engine.sequence.ids == [*IDS[:5], first, second]
    assert engine.steps.length == 7
    engine.close()


def test_a_sampled_token_is_among_the_best(engine: Engine) -> None:
    assert engine.sync(IDS[:9], "candidates").best == -1
    best = set(np.argsort(-engine.last_logits())[:3].tolist())
    sampler = Sampler(SamplingParams(temperature=5.0, top_k=3, seed=1))
    drawn = set()
    for _ in range(20):
        token = engine.sample(sampler)
        assert token in best
        drawn.add(token)
        engine.rewind(8)
        engine.decode(IDS[8], output="candidates")
    assert engine.words_read > 0


def test_engines_share_what_was_loaded_and_the_last_one_closes_it(engine: Engine) -> None:
    loaded = engine.loaded
    engine.sync(IDS[:9])
    twin = engine.fork()
    assert twin.loaded is loaded
    assert set(loaded.engines) == {engine, twin}
    assert twin.sequence == engine.sequence
    assert twin.sequence is not engine.sequence
    assert twin.buffers.buffer("step") is not engine.buffers.buffer("step")
    weights = list(loaded.weights)
    assert all(twin.buffers.buffer(name) is engine.buffers.buffer(name) for name in weights)
    engine.close()
    assert (len(loaded.weights), bool(loaded.file.parts)) == (len(weights), True)
    assert twin.decode(5) >= 0
    twin.close()
    assert (len(loaded.weights), bool(loaded.file.parts)) == (0, False)


def test_an_engine_that_was_dropped_does_not_count(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sequences fit: so does a fork after a fork that nobody has any more."""
    memory = engine.planner.memory()
    for_two = 2 * (memory.total - sum(memory.weights.values())) + sum(memory.weights.values())
    monkeypatch.setenv("ZINCMETAL_MEMORY_LIMIT", str(for_two))
    for _ in range(3):
        engine.fork()
    twin = engine.fork()
    with pytest.raises(OutOfMemoryError):
        engine.fork()
    twin.close()
    engine.fork().close()


def test_a_closed_engine_takes_no_step(engine: Engine) -> None:
    engine.sync(IDS[:5])
    engine.close()
    for call in (lambda: engine.decode(1), lambda: engine.sync(IDS), lambda: engine.prefill([1]), engine.save):
        with pytest.raises(UsageError, match="closed"):
            call()
