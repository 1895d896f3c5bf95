"""Drafts by the model's own block: what is right and what it costs, whatever else runs. The text stays the same."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import zincmetal
from support.block_files import NAMES, with_good_drafts
from support.kernel_lab import SEED
from support.mixtures import engine
from support.paths import DATA
from support.running import running_of
from zincmetal import gguf
from zincmetal.device import backend
from zincmetal.engine.block_drafts import BlockDrafts
from zincmetal.engine.drafters import Draft
from zincmetal.engine.governor import Always
from zincmetal.engine.session import Session
from zincmetal.errors import DeviceError, OutOfMemoryError, UsageError
from zincmetal.graph.ops import KEPT
from zincmetal.plan.planner import Planner
from zincmetal.plan.target import Target

NO_BLOCK = DATA / "qwen35-q4_k_m.gguf"


@pytest.fixture(params=NAMES)
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return with_good_drafts(request.param, tmp_path)


@pytest.fixture
def model(path: Path) -> Iterator[Any]:
    with zincmetal.load(path, device="cpu", context=512, kv="f32", threads=2) as opened:
        running_of(opened).scheduler.speculation.governor = Always()
        yield opened


def counts(result: Any) -> tuple[int, int]:
    return result.drafted, result.accepted


@pytest.mark.parametrize("options", [{}, {"temperature": 0.6, "seed": 4, "presence_penalty": 0.2}])
def test_some_drafts_are_right_and_the_text_is_the_same(model: Any, options: dict[str, Any]) -> None:
    for ids in ([5, 6, 7], list(range(40, 110))):
        plain = model.generate(ids, 60, **options)
        for n in (1, 3, 7, 15):
            found = model.generate(ids, 60, draft="mtp", draft_tokens=n, **options)
            assert found.tokens == plain.tokens
            assert 0 < found.accepted < found.drafted
            assert len(found.drafts) == n
    assert model.generate(ids, 60, draft="auto", **options).accepted


@pytest.mark.parametrize("options", [{}, {"temperature": 0.6, "seed": 4, "presence_penalty": 0.2}])
def test_drafts_that_are_spoiled_change_nothing(
    model: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens of the block are replaced at random, so all lengths of a draft are accepted, and none."""
    rng, make = random.Random(SEED), BlockDrafts.make
    print(f"ZINCMETAL_TEST_SEED={SEED}")

    def spoiled(self: BlockDrafts, wanted: Any) -> Any:
        made = make(self, wanted)
        return {
            sequence: Draft([token if rng.random() < 0.7 else rng.randrange(256) for token in draft.tokens])
            for sequence, draft in made.items()
        }

    ids = list(range(40, 110))
    plain = model.generate(ids, 60, **options)
    monkeypatch.setattr(BlockDrafts, "make", spoiled)
    found = model.generate(ids, 60, draft="mtp", draft_tokens=3, **options)
    assert found.tokens == plain.tokens
    assert 0 < found.accepted < found.drafted


def test_a_draft_begins_behind_the_step_that_verifies_the_one_before(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So its first row is one that the device chooses, and the host waits once for each draft."""
    opened, ids, behind = model.engine, list(range(40, 110)), list[int]()
    plain = model.generate(ids, 60)
    submit = opened.submit

    def noted(batch: Any) -> None:
        if batch.drafts and batch.runs[0].drafted:
            assert opened.in_flight == 1
            behind.append(batch.runs[0].drafted)
        submit(batch)

    monkeypatch.setattr(opened, "submit", noted)
    found = model.generate(ids, 60, draft="mtp", draft_tokens=3)
    assert found.tokens == plain.tokens
    assert found.accepted
    drafts = found.drafts[0][0]
    assert drafts - 8 < len(behind) < drafts, "but for the first and the last ones"


#: Drafts of one token, of which some are wrong: so different runs have drafts after the same tokens.
SAMPLED: dict[str, Any] = {"draft": "mtp", "draft_tokens": 1, "temperature": 0.6, "seed": 3}
Drafts = dict[tuple[int, ...], list[int]]


@pytest.fixture
def drafts(monkeypatch: pytest.MonkeyPatch) -> Drafts:
    """Returns the drafts that are made from now on, by the ids before them."""
    found: Drafts = {}
    make = BlockDrafts.make

    def noted(self: BlockDrafts, wanted: Any) -> Any:
        made = make(self, wanted)
        found.update({tuple(sequence.ids): draft.tokens for sequence, draft in made.items()})
        return made

    monkeypatch.setattr(BlockDrafts, "make", noted)
    return found


def taken(drafts: Drafts) -> Drafts:
    """Takes the drafts that were made so far."""
    found = dict(drafts)
    drafts.clear()
    return found


def assert_alike(some: Drafts, others: Drafts) -> None:
    """Fails unless drafts after the same ids are the same. A few may differ: other cuts of a prompt round otherwise."""
    pairs = [(a, b) for ids in some.keys() & others for a, b in zip(some[ids], others[ids], strict=False)]
    assert len(pairs) > 5
    assert sum(a != b for a, b in pairs) <= 1


def test_drafts_do_not_depend_on_what_was_reused(model: Any, drafts: Drafts) -> None:
    """Pages of the prefix cache, of a fork and of an earlier answer hold of the block what a prompt computes."""
    ids, pools = list(range(30, 180)), running_of(model).scheduler.pools
    first = model.generate(ids, 60, **SAMPLED)
    fresh = taken(drafts)
    with model.fork() as other:
        for made in (model, other, model):
            again = made.generate(ids, 60, **SAMPLED)
            assert again.cache.reused > 100
            assert again.tokens == first.tokens
            assert_alike(fresh, taken(drafts))
    longer = [*ids, *first.tokens]
    reused = model.generate(longer, 60, **SAMPLED)
    assert reused.cache.reused > len(ids)
    by_reuse = taken(drafts)
    running_of(model).loop.call(pools.forget_cache)
    assert not model.generate(longer, 60, **SAMPLED).cache.reused
    assert_alike(by_reuse, taken(drafts))


def test_a_folder_keeps_what_the_block_needs(path: Path, tmp_path: Path, drafts: Drafts) -> None:
    ids, found, made = list(range(30, 230)), [], []
    for _ in range(2):
        options = {"device": "cpu", "context": 512, "kv": "f32", "threads": 2, "cache_dir": tmp_path / "cache"}
        with zincmetal.load(path, **options) as opened:
            running_of(opened).scheduler.speculation.governor = Always()
            opened.generate(ids[:100], 4)  # before the block is loaded: its pages are of no use for it
            found.append(opened.generate(ids, 60, **SAMPLED))
            made.append(taken(drafts))
    assert found[0].cache.reused == 0
    assert found[1].cache.reused > 100
    assert found[1].cache.source == "disk"
    assert found[0].tokens == found[1].tokens
    assert_alike(*made)


def test_what_ran_before_the_block_was_loaded_is_not_reused_for_it(path: Path, drafts: Drafts) -> None:
    """Pages of a sequence that goes on lack the block's keys and values. Nobody who drafts by them takes them over."""
    ids, made = list(range(30, 230)), []
    for loaded_meanwhile in (False, True):
        with zincmetal.load(path, device="cpu", context=512, kv="f32", threads=1) as opened:
            running_of(opened).scheduler.speculation.governor = Always()
            if loaded_meanwhile:
                with opened.submit(ids, 40) as running:
                    next(running)
                    opened.generate([5, 6], 2, draft="mtp")
                    running.result()
                taken(drafts)
            opened.generate(ids, 60, **SAMPLED)
            made.append(taken(drafts))
    assert_alike(*made)


def test_the_block_is_loaded_while_others_run(model: Any) -> None:
    ids = list(range(20, 60))
    plain = model.generate(ids, 120)
    with model.submit(ids, 120) as running:
        next(running)
        drafted = model.generate(ids, 60, draft="mtp")
        assert running.result().tokens == plain.tokens
    assert drafted.tokens == plain.tokens[:60]
    assert drafted.accepted


def test_sequences_that_were_moved_out_go_on(path: Path) -> None:
    """Their pages come back with the block's keys and values, or are computed again."""
    prompts, moved_out = [[i, 7, 9] for i in range(3)], []
    with zincmetal.load(path, device="cpu", context=256, pool_tokens=448, kv="f32", threads=2) as opened:
        plain = [opened.generate(ids, 200) for ids in prompts]
        running = running_of(opened)
        running.scheduler.speculation.governor = Always()
        move_out = running.scheduler.pools.move_out

        def noted(job: Any, pace: Any) -> None:
            moved_out.append(job)
            move_out(job, pace)

        running.scheduler.pools.move_out = noted  # type: ignore[method-assign]
        found = opened.generate(prompts, 200, draft="mtp")
    assert moved_out
    for want, got in zip(plain, found, strict=True):
        assert got.tokens == want.tokens
        assert got.accepted


def test_cancelled_requests_leave_nothing(model: Any) -> None:
    running = running_of(model)
    model.generate([5, 6], 4, draft="mtp")
    running.loop.call(running.scheduler.pools.forget_cache)
    pages, slots = running.engine.pages, running.engine.slots
    before = pages.size - pages.free, slots.size - slots.free
    for n in (1, 2, 5):
        handles = [model.submit([7, i, 9], 200, draft="mtp") for i in range(4)]
        for handle in handles:
            for _ in range(n):
                next(handle)
            handle.cancel()
        for handle in handles:
            handle.result()
    running.loop.call(running.scheduler.pools.forget_cache)
    assert (pages.size - pages.free, slots.size - slots.free) == before


def test_many_threads_ask_for_the_block_at_once(model: Any) -> None:
    found: list[Any] = []
    ask = [
        threading.Thread(target=lambda i=i: found.append(model.generate([5, 6, 7 + i], 30, draft="mtp")))
        for i in range(6)
    ]
    for thread in ask:
        thread.start()
    for thread in ask:
        thread.join()
    assert len(found) == 6
    assert sum(result.accepted for result in found)


def test_drafts_end_where_logits_are_not_finite(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with engine(path, "f32") as opened:
        opened.load_block()
        with Session(opened) as session:
            session.prefill(list(range(20)))
            session.sequence.ids.append(5)
            drafts = BlockDrafts(opened, opened.pages, opened.slots)
            assert len(drafts.make({session.sequence: 5})[session.sequence].tokens) == 5
            page = opened.buffers.buffer(KEPT.name)
            page.write(np.full(page.nbytes // 4, np.nan, np.float32))
            assert drafts.make({session.sequence: 5})[session.sequence].tokens == []
            session.sequence.ids.pop()


# ---- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv", ["f32", "f16", "q8_0"])
def test_the_plan_counts_the_block(path: Path, kv: str) -> None:
    target = Target.of_kernels(backend.load("cpu"), "cpu")
    with gguf.open(path) as file:
        without, block = Planner(file, target, 512, kv), Planner(file, target, 512, kv, drafts=True)
        layer = block.config.layers[-1]
        kept = 4 if kv == "f32" else 2
        row = {"f32": 4.0, "f16": 2.0, "q8_0": 34 / 32}[kv] * layer.head_dim * layer.n_head_kv
        more = target.page * (2 * row + kept * block.config.n_embd)
        assert block.page_bytes - without.page_bytes == more
        assert block.memory().total - without.memory().total >= 8 * more
        assert (
            block.config.n_layer == without.config.n_layer == len(without.config.layers) == len(block.config.layers) - 1
        )
        assert block.memory().weights == without.memory().weights


def test_a_block_that_does_not_fit_is_refused_and_the_model_goes_on(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with zincmetal.load(path, device="cpu", context=512, kv="f32", threads=2) as opened:
        plain = opened.generate([5, 6, 7], 20)
        needed = opened.engine.planner.memory().total
        monkeypatch.setenv("ZINCMETAL_MEMORY_LIMIT", str(needed + 1000))
        with pytest.raises(OutOfMemoryError):
            opened.generate([5, 6, 7], 20, draft="mtp")
        ids = [5, 6, 7, 8, 5, 6, 7]
        assert opened.generate(ids, 20, draft="auto").tokens == opened.generate(ids, 20).tokens
        assert "drafts are by prompt lookup" in caplog.text
        monkeypatch.delenv("ZINCMETAL_MEMORY_LIMIT")
        assert opened.generate([5, 6, 7], 20, draft="mtp").tokens == plain.tokens


# ---- files without it -----------------------------------------------------------------------------------------------


def test_a_file_without_a_block_is_refused_by_its_key() -> None:
    with zincmetal.load(NO_BLOCK, device="cpu", context=128, threads=1) as opened:
        with pytest.raises(UsageError, match=r"qwen35\.nextn_predict_layers.*'lookup' or a draft model"):
            opened.generate([5, 6], 4, draft="mtp")
        assert not opened.engine.config.drafts
        assert opened.generate([5, 6, 7, 5, 6, 7], 4, draft="auto").tokens


def test_contexts_end_where_they_end(path: Path) -> None:
    with zincmetal.load(path, device="cpu", context=70, kv="f32", threads=1) as opened:
        running_of(opened).scheduler.speculation.governor = Always()
        plain = opened.generate([5, 6, 7], -1)
        assert opened.generate([5, 6, 7], -1, draft="mtp").tokens == plain.tokens
        assert len(plain.tokens) == 68


def test_pages_come_back_if_the_device_fails_or_there_are_none(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with engine(path, "f32") as opened:
        opened.load_block()
        with Session(opened) as session:
            session.prefill(list(range(63)))
            sequence, drafts = session.sequence, BlockDrafts(opened, opened.pages, opened.slots)
            sequence.ids.append(5)
            shared = opened.pages.retain_all(sequence.pages)  # as the prefix cache does: the draft copies the page
            free = [opened.pages.take() for _ in range(opened.pages.free - 1)]
            assert len(drafts.make({sequence: 6})[sequence].tokens) == 1, "the next page is not to be had"
            assert opened.pages.count(shared[0]) == 1
            opened.pages.release_all(free)

            def failing(batch: Any) -> None:
                raise DeviceError("the device is gone")

            (old,) = opened.pages.retain_all(sequence.pages[:1])
            monkeypatch.setattr(opened, "submit", failing)
            with pytest.raises(DeviceError):
                drafts.make({sequence: 6})
            monkeypatch.undo()
            assert opened.pages.count(old) == 1, "the sequence has a copy"
            sequence.ids.pop()
