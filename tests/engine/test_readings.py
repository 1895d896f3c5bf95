"""Readings: their slices come between the steps of requests, and hold nobody's pages for long."""

from __future__ import annotations

import threading
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

import zincmetal
from support.fake_executor import FakeExecutor
from support.reference_models import reference_models
from support.scheduler_lab import Lab, sink_of
from support.tiny_dense import Tiny
from zincmetal.engine.pages import PagePool
from zincmetal.engine.readings import Reading, Slices
from zincmetal.engine.scheduler import GAP_SECONDS, Scheduler
from zincmetal.engine.step_loop import StepLoop
from zincmetal.errors import UsageError

SECONDS_PER_ROW = 0.002  # of a slice, on the executor's clock


class Read:
    """Reading of a text that takes pages as it goes. ``slices``: when each began, and its rows."""

    def __init__(self, lab: Lab, n: int, most: int = 512, pages: bool = False) -> None:
        self.lab, self.n, self.takes_pages = lab, n, pages
        self.slices: list[tuple[float, int]] = []
        self.left = False
        self.reading = Reading("test", most, self._run())
        lab.scheduler.read(self.reading)

    def _run(self) -> Slices[str]:
        rows, done, held = (yield 0, self.n), 0, list[int]()
        executor, pool = self.lab.executor, self.lab.pools.pages
        try:
            while done < self.n:
                assert not executor.in_flight
                n = min(rows, self.n - done)
                self.slices.append((executor.now, n))
                executor.now += SECONDS_PER_ROW * n
                done += n
                while self.takes_pages and len(held) < PagePool.needed(done):
                    held.append(pool.take())
                rows = yield n, self.n - done
        finally:
            self.left = True
            pool.release_all(held)
        return "read"


def times(request: Any) -> list[float]:
    return sink_of(request).times


def test_a_sequence_decodes_between_the_slices_of_a_text() -> None:
    lab = Lab()
    request = lab.submit(range(5), 40)
    while not times(request):
        lab.scheduler.step()
    read = Read(lab, 3000)
    lab.run()
    assert read.reading.result() == "read"
    assert sum(n for _, n in read.slices) == 3000
    for (began, _), (next_began, _) in pairwise(read.slices):
        assert any(began < at <= next_began for at in times(request))
    assert np.diff(times(request)).max() <= GAP_SECONDS
    assert max(n for _, n in read.slices) < 3000 / 4
    lab.check_ended(request)
    lab.check_owners()


def test_a_text_alone_is_read_in_whole_slices() -> None:
    lab = Lab()
    read = Read(lab, 1100)
    lab.run()
    assert read.reading.result() == "read"
    assert [n for _, n in read.slices] == [512, 512, 76]


def test_slices_and_prompts_take_turns_beside_a_sequence_that_decodes() -> None:
    lab = Lab(FakeExecutor(seconds=lambda rows: 0.01 + SECONDS_PER_ROW * rows, max_rows=512))
    request = lab.submit(range(5), 60)
    while not times(request):
        lab.scheduler.step()
    prompt = lab.submit([7 * i % 1000 for i in range(900)], 2)
    read = Read(lab, 3000)
    lab.run()
    assert read.reading.result() == "read"
    assert np.diff(times(request)).max() <= GAP_SECONDS
    first = times(prompt)[0]
    during = [began for began, _ in read.slices if began < first]
    assert 2 <= len(during) < len(read.slices), "neither waits for the end of the other"
    lab.check_ended(request, prompt)


def test_texts_are_read_one_after_another() -> None:
    lab = Lab()
    first, second = Read(lab, 600), Read(lab, 600)
    lab.run()
    assert first.slices[-1][0] < second.slices[0][0]
    assert second.reading.result() == "read"


def test_a_request_without_pages_lets_the_text_end_and_loses_nothing() -> None:
    lab = Lab(FakeExecutor(pages=8, pages_most=8), cached=False)
    request = lab.submit(range(100), 250)  # 6 pages of 8
    while not times(request):
        lab.scheduler.step()
    read = Read(lab, 64 * 5, pages=True)
    lab.run()
    assert read.reading.result() == "read"
    assert read.left
    lab.check_ended(request)
    lab.check_owners()


def test_a_text_that_ends_makes_room_enough_and_nobody_is_moved_out() -> None:
    """While the text holds two of four pages, two sequences come to the end of theirs."""
    lab = Lab(FakeExecutor(pages=4, pages_most=4), cached=False)
    requests = [lab.submit(range(58), 40), lab.submit(range(58), 40)]
    while not all(map(times, requests)):
        lab.scheduler.step()
    read = Read(lab, 2 * PagePool.PAGE, most=16, pages=True)
    lab.run()
    assert read.reading.result() == "read"
    assert len(read.slices) > 4
    lab.check_ended(*requests)
    assert [sink_of(request).stats.moved_out for request in requests] == [0, 0]  # type: ignore[union-attr]


def test_an_error_in_a_slice_is_that_of_its_caller_alone() -> None:
    lab = Lab()
    request = lab.submit(range(5), 10)

    def slices() -> Slices[None]:
        yield 0, 1
        raise ValueError("torn")

    reading = Reading("test", 64, slices())
    lab.scheduler.read(reading)
    lab.run()
    with pytest.raises(ValueError, match="torn"):
        reading.result()
    lab.check_ended(request)


def test_texts_end_with_an_error_that_ends_all() -> None:
    lab = Lab()
    read, waits = Read(lab, 3000, pages=True), Read(lab, 10)
    lab.scheduler.step()
    lab.scheduler.end_all(UsageError("over"))
    for each in (read, waits):
        with pytest.raises(UsageError, match="over"):
            each.reading.result()
    assert read.left
    assert not waits.slices
    assert not lab.scheduler.busy
    lab.check_owners()


def test_nothing_is_read_any_more_when_nobody_waits() -> None:
    lab = Lab()
    read = Read(lab, 3000, pages=True)
    lab.scheduler.step()
    slices = len(read.slices)
    read.reading.give_up()
    lab.run()
    assert 0 < len(read.slices) == slices
    assert read.left
    lab.check_owners()


def test_an_interrupted_wait_gives_its_reading_up(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, given_up = StepLoop(Scheduler(FakeExecutor())), threading.Event()

    def slices() -> Slices[None]:
        try:
            yield 0, 1
            while True:
                yield 1, 1
        finally:
            given_up.set()

    reading = Reading("test", 64, slices())

    def interrupted(timeout: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(reading, "result", interrupted)
    with pytest.raises(KeyboardInterrupt):
        loop.read(reading)
    assert given_up.wait(60)
    loop.close()


def test_a_reading_of_a_loop_that_closes_is_answered() -> None:
    loop, in_slice, closing = StepLoop(Scheduler(FakeExecutor())), threading.Event(), threading.Event()
    errors = list[BaseException]()

    def slices() -> Slices[None]:
        yield 0, 2
        in_slice.set()
        assert closing.wait(60)
        yield 1, 1
        raise AssertionError("a slice ran after the close")

    def read() -> None:
        try:
            loop.read(Reading("test", 64, slices()))
        except UsageError as error:
            errors.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    assert in_slice.wait(60)
    closer = threading.Thread(target=loop.close)
    closer.start()
    while not loop.closed:
        closer.join(0.001)
    closing.set()
    for thread in (reader, closer):
        thread.join(60)
    assert "closed" in str(errors[0])
    with pytest.raises(UsageError, match="closed"):
        loop.read(Reading("test", 64, slices()))


# ---- models ----------------------------------------------------------------------------------------------------------


def outputs_of_steps(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The output of each step from now on. After the second one, steps wait until there is a reading."""
    seen, gate = list[str](), threading.Event()
    submit, read = model.engine.submit, model.running.scheduler.read

    def noted(batch: Any) -> None:
        seen.append(batch.output)
        assert len(seen) < 3 or gate.wait(60)
        submit(batch)

    def opened(reading: Any) -> None:
        read(reading)
        gate.set()

    monkeypatch.setattr(model.engine, "submit", noted)
    monkeypatch.setattr(model.running.scheduler, "read", opened)
    return seen


def between(seen: list[str], kind: str) -> list[int]:
    """The number of other steps between two steps of a kind, each."""
    at = [i for i, output in enumerate(seen) if output == kind]
    return [b - a - 1 for a, b in pairwise(at)]


@pytest.mark.parametrize("name", ["llama", "qwen35"])
def test_a_generation_goes_on_while_a_prompt_is_scored(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [(7 * i) % 250 + 1 for i in range(400)]
    with zincmetal.load(reference_models(name)[0], device="cpu", context=512, kv="f32", threads=1) as model:
        model.text.id_tokenizer.eog_ids = frozenset()
        alone, text = model.prompt_logprobs(ids), model.generate([1, 2, 3], 400).tokens
        seen = outputs_of_steps(model, monkeypatch)
        with model.submit([1, 2, 3], max_tokens=400) as running:
            scored = model.prompt_scores(ids, 2)
            assert running.result().tokens == text
        assert min(between(seen, "all")) >= 1
        np.testing.assert_allclose([score.logprob for score in scored], alone, atol=2e-4)
        figures = model.figures()
        model.clear_cache()
        assert model.figures()["pages"]["free"] == figures["pages"]["all"]


def test_a_generation_goes_on_while_texts_get_vectors(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = Tiny("qwen3", keys={"pooling_type": 3, "context_length": 1200})
    texts = [np.random.default_rng(i).integers(0, 40, n).tolist() for i, n in enumerate((900, 3, 70))]
    with zincmetal.load(tiny.save(tmp_path / "m.gguf"), device="cpu", kv="f32", context=1200) as model:
        model.text.id_tokenizer.eog_ids = frozenset()
        alone = model.embed(texts)
        seen = outputs_of_steps(model, monkeypatch)
        with model.submit([1, 2, 3], max_tokens=600) as running:
            np.testing.assert_allclose(model.embed(texts), alone, atol=1e-5)
            assert len(running.result().tokens) == 600
        assert len(between(seen, "hidden")) >= 2
        assert min(between(seen, "hidden")) >= 1
