"""The reader of the cache's folder: a prompt waits for its files, and nobody else but those behind it."""

from __future__ import annotations

import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest

import zincmetal
from support.fake_executor import FakeExecutor
from support.paths import DATA
from support.scheduler_lab import PAGE_BYTES, Recorded, sink_of
from support.scheduler_lab import Lab as QueueLab
from support.thread_starts import refused
from support.tier_lab import LABS, LARGE, MODEL, TIMEOUT, A, B, GatedFolder, Lab, files_of, warnings_of
from zincmetal.engine import cache_reader
from zincmetal.engine.cache_folder import CacheFolder, Loaded
from zincmetal.engine.cache_keys import chain, page_name
from zincmetal.engine.cache_reader import PATIENCE
from zincmetal.engine.request import Request
from zincmetal.engine.sequence import Sequence
from zincmetal.engine.step_loop import StepLoop
from zincmetal.errors import DeadlineError, UsageError
from zincmetal.sampling.params import SamplingParams

READER = "zincmetal-cache-reader"
PROMPT = A[:330]  # five pages, and on hybrids the states after 329 tokens


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    while LABS:
        lab = LABS.pop()
        if isinstance(lab.folder, GatedFolder):
            lab.gate.give()
        lab.tier.close()
    for thread in threading.enumerate():
        if thread.name == READER:
            thread.join(TIMEOUT)
            assert not thread.is_alive()


@pytest.fixture(autouse=True)
def _files_may_take_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_reader, "PATIENCE", 1000)


@pytest.fixture(params=[False, True], ids=["dense", "hybrid"])
def recurrent(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def gated(folder: Path, recurrent: bool, **options: Any) -> Lab:
    """A lab whose prompt is in files, which wait to be given."""
    first = Lab(folder, recurrent)
    first.ask(PROMPT)
    first.close()
    return Lab(folder, recurrent, gated=True, **options)


def blocked(lab: Lab, prompt: Request) -> str:
    """Steps until the reader waits for a file of a prompt, which has not begun. Returns the name of the file."""
    lab.scheduler.step()
    name = lab.gate.asked.get(timeout=TIMEOUT)
    lab.scheduler.step()
    assert prompt in lab.scheduler.state().waiting
    return name


def reused(request: Request) -> tuple[int, str]:
    stats = sink_of(request).stats
    assert stats is not None
    return stats.reused, stats.source


def whole(recurrent: bool) -> int:
    """Tokens of the prompt that its files have."""
    return len(PROMPT) - 1 if recurrent else 320


# ---- others go on --------------------------------------------------------------------------------------------------


def test_others_have_tokens_while_a_file_is_read(tmp_path: Path, recurrent: bool):
    lab = gated(tmp_path, recurrent)
    other = lab.submit(B[:20], 60)
    lab.until(lambda: sink_of(other).tokens)
    prompt = lab.submit(PROMPT)
    blocked(lab, prompt)
    before = len(sink_of(other).tokens)
    for _ in range(20):
        lab.scheduler.step()
    assert len(sink_of(other).tokens) >= before + 18
    assert prompt in lab.scheduler.state().waiting
    lab.gate.give()
    lab.run()
    lab.check(other)
    lab.check(prompt)
    assert reused(prompt) == (whole(recurrent), "disk")
    lab.check_owners()


def test_those_behind_a_prompt_keep_their_order(tmp_path: Path, recurrent: bool):
    lab = gated(tmp_path, recurrent)
    prompt, behind = lab.submit(PROMPT), lab.submit(B[:30])
    blocked(lab, prompt)
    for _ in range(5):
        lab.scheduler.step()
    assert lab.scheduler.state().waiting == [prompt, behind]
    lab.gate.give()
    lab.run()
    lab.check(prompt)
    lab.check(behind)
    assert sink_of(prompt).times[0] <= sink_of(behind).times[0]


def test_two_prompts_with_one_beginning_share_the_read(tmp_path: Path, recurrent: bool):
    lab = gated(tmp_path, recurrent)
    one, two = lab.submit(PROMPT), lab.submit([*PROMPT, 5, 6])
    blocked(lab, one)
    lab.gate.give()
    lab.run()
    lab.check(one)
    lab.check(two)
    assert reused(one) == (whole(recurrent), "disk")
    assert reused(two)[1] == "memory"
    assert set(lab.gate.loads.values()) == {1}


def test_the_next_prompt_takes_what_was_read_for_one_that_was_cancelled(tmp_path: Path, recurrent: bool):
    lab = gated(tmp_path, recurrent)
    one, two = lab.submit(PROMPT), lab.submit([*PROMPT, 5, 6])
    blocked(lab, one)
    lab.gate.give(2)
    lab.gate.asked.get(timeout=TIMEOUT)
    third = lab.gate.asked.get(timeout=TIMEOUT)
    lab.scheduler.cancel(one)
    lab.scheduler.step()
    assert sink_of(one).reason == "cancelled"
    lab.gate.give()
    lab.run()
    lab.check(two)
    assert reused(two) == (whole(recurrent), "disk")
    assert [name for name, n in lab.gate.loads.items() if n != 1] == [third]  # it was not there yet
    lab.check_owners()


def test_the_first_prompt_may_have_one_token(tmp_path: Path, recurrent: bool):
    """Nothing of it is computed before: it has no page, and none is asked for."""
    lab = Lab(tmp_path, recurrent)
    assert lab.ask(A[:1]) == (0, "")
    lab.check_owners()


# ---- it ends meanwhile ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["cancel", "deadline"])
def test_a_prompt_may_end_while_its_file_is_read(tmp_path: Path, recurrent: bool, end: str):
    lab = gated(tmp_path, recurrent, host=0)
    other = lab.submit(B[:20], 30)
    prompt = Request(list(PROMPT), 3, Recorded(lab.executor), deadline=5.0)
    lab.scheduler.submit(prompt)
    blocked(lab, prompt)
    if end == "cancel":
        lab.scheduler.cancel(prompt)
    else:
        lab.executor.now += 10
    lab.scheduler.step()
    assert sink_of(prompt).ends == 1
    assert sink_of(prompt).reason == "cancelled" or isinstance(sink_of(prompt).error, DeadlineError)
    lab.gate.give()
    stopped, reader = threading.Event(), lab.tier.reader
    assert reader
    assert reader.begin([], stopped.set)
    assert stopped.wait(TIMEOUT)
    assert sum(lab.gate.loads.values()) == 1  # the others are not read
    lab.run()
    lab.check(other)
    lab.check_owners()
    assert lab.ask(PROMPT) == (whole(recurrent), "disk")


def test_close_does_not_wait_for_a_file(tmp_path: Path, recurrent: bool):
    lab = gated(tmp_path, recurrent)
    loop = StepLoop(lab.scheduler, at_end=lab.tier.close)
    other, prompt = (Request(ids, n, Recorded(lab.executor)) for ids, n in ((B[:20], 2), (PROMPT, 3)))
    loop.submit(other)
    loop.submit(prompt)
    lab.gate.asked.get(timeout=TIMEOUT)
    assert loop.call(lambda: lab.scheduler.state().waiting) == [prompt]
    loop.close()
    assert sink_of(prompt).ends == 1
    assert isinstance(sink_of(prompt).error, UsageError)
    lab.check_owners()
    assert [thread.name for thread in threading.enumerate()].count(READER) == 1
    lab.gate.give()


class Ended(Recorded):
    """Sink whose end can be waited for."""

    def __init__(self, executor: FakeExecutor) -> None:
        super().__init__(executor)
        self.end = SimpleQueue[str | BaseException]()

    def done(self, reason: str, stats: Any) -> None:
        super().done(reason, stats)
        self.end.put(reason)

    def failed(self, error: BaseException) -> None:
        super().failed(error)
        self.end.put(error)


def test_the_step_thread_sleeps_and_is_woken(tmp_path: Path, recurrent: bool):
    """By the reader, and by a deadline."""
    lab = gated(tmp_path, recurrent, clock=time.perf_counter)
    loop = StepLoop(lab.scheduler, at_end=lab.tier.close)
    late, prompt = (Request(PROMPT, 3, Ended(lab.executor), deadline=d) for d in (0.05, None))
    ends = [request.sink.end for request in (late, prompt) if isinstance(request.sink, Ended)]
    loop.submit(late)
    assert isinstance(ends[0].get(timeout=TIMEOUT), DeadlineError)
    loop.submit(prompt)
    lab.gate.give()
    assert ends[1].get(timeout=TIMEOUT) == "length"
    lab.check(prompt)
    loop.close()
    lab.check_owners()


class NotedInbox(SimpleQueue[Any]):
    """Inbox that notes how long its reader would sleep."""

    def __init__(self) -> None:
        self.sleeps: list[float | None] = []

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        self.sleeps.append(timeout)
        return super().get(block, 0)


def test_it_sleeps_only_without_other_work(tmp_path: Path, recurrent: bool):
    lab = gated(tmp_path, recurrent)
    lab.scheduler.inbox = inbox = NotedInbox()
    other = lab.submit(B[:20], 10)
    lab.until(lambda: sink_of(other).tokens)
    prompt = lab.submit(PROMPT)
    blocked(lab, prompt)
    assert lab.scheduler.rest() is None
    assert inbox.sleeps == []
    lab.until(lambda: sink_of(other).ends)
    assert lab.scheduler.step()
    message = lambda: None  # noqa: E731
    inbox.put(message)
    assert lab.scheduler.rest() is message
    assert inbox.sleeps == [PATIENCE]
    lab.scheduler.submit(Request([1], 1, Recorded(lab.executor), deadline=7.0))
    assert lab.scheduler.step()
    lab.executor.now += 3
    assert lab.scheduler.rest() is None
    assert inbox.sleeps[1:] == [pytest.approx(4.0)]
    lab.gate.give()


def test_it_does_not_sleep_when_the_files_came_in_a_step_that_admits_nobody(recurrent: bool):
    """A token of the host must be known before the next step. So the step that takes it does not look at the queue.

    It fails, so there is nothing to save, either.
    """

    def fail(ids: list[int], logits: Any) -> Any:
        raise LookupError("the processor fails here")

    lab = QueueLab(FakeExecutor(recurrent=recurrent), host=0)
    lab.submit(PROMPT)
    lab.run()
    lab.scheduler.pools.forget_cache()
    one, two = lab.submit(B[:1], 1, params=SamplingParams(logits_processors=[fail])), lab.submit(PROMPT)
    lab.scheduler.step()
    assert lab.reader.reads
    lab.reader.go()
    lab.scheduler.step()
    assert isinstance(sink_of(one).error, LookupError)
    assert lab.scheduler.state().waiting == [two]
    assert not lab.scheduler.resting
    lab.run()
    lab.check_ended(two)
    assert reused(two) == (whole(recurrent), "disk")


# ---- what was read -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["checksum", "size"])
def test_a_damaged_file_is_forgotten_while_others_decode(
    tmp_path: Path, recurrent: bool, damage: str, caplog: pytest.LogCaptureFixture
):
    """A right checksum over another size is of no use either. The file stays, and is written anew."""
    first = Lab(tmp_path, recurrent)
    first.ask(PROMPT, marks=[70])
    first.close()
    third = page_name(chain(MODEL, PROMPT, 64)[3])
    path = next(path for path in files_of(tmp_path) if path.name == third)
    if damage == "checksum":
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    else:
        path.unlink()
        folder = CacheFolder(tmp_path, MODEL, LARGE)
        folder.write(third, bytes(100))
        folder.close()
    lab = Lab(tmp_path, recurrent, gated=True)
    other = lab.submit(B[:20], 60)
    lab.until(lambda: sink_of(other).tokens)
    prompt = lab.submit(PROMPT)
    blocked(lab, prompt)
    lab.gate.give()
    lab.run()
    lab.check(other)
    lab.check(prompt)
    assert reused(prompt) == (70 if recurrent else 128, "disk")
    assert set(lab.gate.loads.values()) == {1}
    assert lab.gate.threads == {READER}
    assert [line.startswith(str(path)) for line in warnings_of(caplog)] == [True] * (damage == "checksum")
    lab.check_owners()


def holding(folder: Path, recurrent: bool) -> tuple[Lab, Request, Request]:
    """A lab that holds what it has read for a prompt, until the pages of another request are free: (lab, it, other)."""
    lab = gated(folder, recurrent, host=0, pages=7, pages_most=7, slots=6, slots_most=6)
    lab.gate.give()
    other = lab.submit(B[:100], 60)
    lab.until(lambda: sink_of(other).tokens)
    prompt = lab.submit(PROMPT)
    lab.until(lambda: lab.tier.pinned)
    return lab, prompt, other


def test_what_was_read_is_held_until_there_is_room(tmp_path: Path, recurrent: bool):
    """Also if host memory has no budget for it, and the files are deleted meanwhile. They are read once."""
    lab, prompt, other = holding(tmp_path, recurrent)
    held = lab.tier.pinned
    assert held == 5 + recurrent
    for name in [*lab.gate.names]:
        lab.gate.delete(name)
    while not sink_of(other).ends:
        assert lab.tier.pinned == held
        lab.scheduler.step()
    lab.run()
    lab.check(other)
    lab.check(prompt)
    assert reused(prompt) == (whole(recurrent), "disk")
    assert set(lab.gate.loads.values()) == {1}
    lab.check_owners()


def test_what_is_held_is_given_up_when_it_is_taken_or_its_prompt_ends(tmp_path: Path, recurrent: bool):
    lab, prompt, _ = holding(tmp_path, recurrent)
    lab.scheduler.cancel(prompt)
    lab.scheduler.step()
    assert lab.tier.pinned == 0
    lab.run()
    prompt = lab.submit(PROMPT, 20)
    lab.until(lambda: sink_of(prompt).tokens)
    assert not sink_of(prompt).ends
    assert lab.tier.pinned == 0
    lab.run()
    assert reused(prompt) == (whole(recurrent), "disk")
    lab.check_owners()


def test_entries_are_held_for_one_prompt_at_a_time(recurrent: bool):
    """A sequence that was moved out comes before one that waits for its files."""
    lab = QueueLab(FakeExecutor(recurrent=recurrent), host=0)
    assert lab.tier
    lab.submit(PROMPT)
    lab.submit(B[:200])
    lab.run()
    lab.scheduler.pools.forget_cache()
    transfer, wake = lab.transfer, lambda: None

    def reads(*prompt: Any) -> bool:
        return transfer.fetch(*prompt)[1]

    assert reads("one", PROMPT[:-1], wake)
    lab.reader.go()
    assert not reads("one", PROMPT[:-1], wake)
    assert lab.tier.pinned == 5 + recurrent
    assert not reads("another", [1, 2, 3], wake)  # it needs no files
    assert lab.tier.pinned == 5 + recurrent
    assert reads("two", B[:199], wake)
    assert lab.tier.pinned == 0
    lab.reader.go()
    assert not reads("two", B[:199], wake)
    assert lab.tier.pinned == 3 + recurrent
    transfer.release("one")
    assert lab.tier.pinned == 3 + recurrent
    transfer.release("two")
    assert lab.tier.pinned == 0
    assert reads("two", B[:199], wake)
    lab.reader.go()
    assert not reads("two", B[:199], wake)
    lab.scheduler.pools.forget_copies(None)  # a block that drafts was loaded: pages have another layout
    assert lab.tier.pinned == 0


def test_what_is_forgotten_meanwhile_is_not_taken(tmp_path: Path, recurrent: bool):
    """Its numbers are not finite, as another sequence has found out."""
    lab = gated(tmp_path, recurrent)
    prompt = lab.submit(PROMPT)
    blocked(lab, prompt)
    lab.gate.give(1)
    lab.gate.asked.get(timeout=TIMEOUT)
    lab.scheduler.pools.forget(Sequence(list(PROMPT)))
    lab.gate.give()
    lab.run()
    lab.check(prompt)
    assert reused(prompt) == (0, "")
    lab.check_owners()


def test_a_thread_that_does_not_start_lets_the_step_thread_read(
    tmp_path: Path, recurrent: bool, caplog: pytest.LogCaptureFixture
):
    lab = gated(tmp_path, recurrent, host=0)
    lab.gate.give()
    with refused(1) as failed:
        assert lab.ask(PROMPT) == (whole(recurrent), "disk")
    assert failed == [READER]
    assert lab.gate.threads == {threading.current_thread().name}
    assert len(warnings_of(caplog)) == 1
    assert READER not in [thread.name for thread in threading.enumerate()]
    lab.scheduler.pools.forget_cache()
    assert lab.ask(PROMPT) == (whole(recurrent), "disk")
    assert READER in [thread.name for thread in threading.enumerate()]
    lab.check_owners()


def test_a_disk_that_does_not_answer_is_not_waited_for(
    tmp_path: Path, recurrent: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """Nobody is admitted behind a prompt that waits for its files. What has come of them is used."""
    monkeypatch.setattr(cache_reader, "PATIENCE", 0.1)
    lab = gated(tmp_path, recurrent)
    prompt, behind = lab.submit(PROMPT), lab.submit(B[:40])
    lab.gate.give(2)
    while lab.step():
        time.sleep(0.001)
    lab.check(prompt)
    lab.check(behind)
    assert reused(prompt) == ((0, "") if recurrent else (128, "disk"))
    lab.scheduler.pools.forget_cache()
    lab.ask(PROMPT)  # host memory has it, or some of it
    assert len(warnings_of(caplog)) == 1
    lab.gate.give()
    fetch = lab.transfer._hung  # noqa: SLF001
    assert fetch
    while not fetch.over:
        time.sleep(0.001)
    lab.scheduler.pools.forget_cache()
    assert lab.ask(PROMPT)[0] == whole(recurrent)
    lab.check_owners()


def test_the_thread_holds_nothing_while_it_sleeps(tmp_path: Path):
    lab = gated(tmp_path, False)
    lab.gate.give()
    over, reader = threading.Event(), lab.tier.reader
    assert reader
    fetch = reader.begin([page_name(chain(MODEL, PROMPT, 64)[1])], over.set)
    assert over.wait(TIMEOUT)
    assert fetch
    assert [type(data) for data in fetch.loaded.values()] == [bytes]
    held, until = weakref.ref(fetch), time.monotonic() + TIMEOUT
    del fetch
    while held() and time.monotonic() < until:
        time.sleep(0.001)
    assert held() is None


def test_an_error_that_is_not_of_the_disk_is_a_miss(
    tmp_path: Path, recurrent: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """The thread goes on with the next prompt."""
    lab = gated(tmp_path, recurrent)
    lab.gate.give()
    second, load = page_name(chain(MODEL, PROMPT, 64)[2]), lab.gate.load

    def fail(name: str) -> Any:
        if name == second:
            raise MemoryError
        return load(name)

    monkeypatch.setattr(lab.folder, "load", fail)
    other = lab.submit(B[:20], 40)
    prompt = lab.submit(PROMPT)
    lab.run()
    lab.check(other)
    lab.check(prompt)
    assert reused(prompt)[0] == (0 if recurrent else 64)
    assert len(warnings_of(caplog)) == 1
    lab.check_owners()


# ---- portions ------------------------------------------------------------------------------------------------------


def copies(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """Counts the pages and slots that are written between two steps, by the number of steps before them."""
    found, executor = Counter[int](), lab.executor

    def counted(inner: Any) -> Any:
        def write(number: int, data: bytes) -> None:
            found[len(executor.batches)] += 1
            inner(number, data)

        return write

    for name in ("write_page", "write_slot"):
        monkeypatch.setattr(executor, name, counted(getattr(executor, name)))
    return found


@pytest.mark.parametrize("portion", [1, 2])
def test_a_long_prompt_is_copied_in_portions_while_others_decode(
    tmp_path: Path, recurrent: bool, portion: int, monkeypatch: pytest.MonkeyPatch
):
    """The states come last, with a page of their own. If that is too much beside other pages, they come alone."""
    lab = gated(tmp_path, recurrent, portion=portion * PAGE_BYTES)
    lab.gate.give()
    other = lab.submit(B[:20], 60)
    lab.until(lambda: sink_of(other).tokens)
    found = copies(lab, monkeypatch)
    prompt = lab.submit(PROMPT)
    lab.run()
    lab.check(other)
    lab.check(prompt)
    assert reused(prompt) == (whole(recurrent), "disk")
    assert [*found.values()] == {1: [1] * 5 + [2] * recurrent, 2: [2, 2, 1 + 2 * recurrent]}[portion]
    lab.check_owners()


def test_a_prompt_that_is_alone_is_copied_at_once(tmp_path: Path, recurrent: bool, monkeypatch: pytest.MonkeyPatch):
    lab = gated(tmp_path, recurrent, portion=2 * PAGE_BYTES)
    lab.gate.give()
    found = copies(lab, monkeypatch)
    assert lab.ask(PROMPT) == (whole(recurrent), "disk")
    assert [*found.values()] == [7 if recurrent else 5]


# ---- real models ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama-q4_k_m", "qwen35-q4_k_m"])
def test_a_model_makes_tokens_while_a_file_is_read(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch):
    given, asked, load = threading.Event(), threading.Event(), CacheFolder.load
    ids = [3 + i * 7 % 200 for i in range(200)]

    def slow(folder: CacheFolder, entry: str) -> Any:
        asked.set()
        assert given.wait(TIMEOUT)
        return load(folder, entry)

    def open_model(**options: Any) -> zincmetal.Model:
        return zincmetal.load(DATA / f"{name}.gguf", device="cpu", context=512, **options)

    with open_model(cache_dir=tmp_path) as model:
        plain = model.generate(ids, max_tokens=4)
    monkeypatch.setattr(CacheFolder, "load", slow)
    with open_model(cache_dir=tmp_path) as model, model.submit([5, 6, 7], 250) as other:
        next(other)
        with model.submit(ids, 4) as prompt:
            assert asked.wait(TIMEOUT)
            for _ in range(20):
                next(other)
            given.set()
            result = prompt.result()
    assert result.tokens == plain.tokens
    assert result.cache.source == "disk"


def test_a_slow_disk_is_waited_for_while_it_gives_files(monkeypatch: pytest.MonkeyPatch):
    """The patience begins anew with each file, and an end is no silence."""
    now, hangs = [0.0], list[bool]()

    class Slow:
        folder = Path("slow")

        def load(self, name: str) -> Loaded:
            for _ in range(2):
                now[0] += cache_reader.PATIENCE * 0.5
                hangs.append(fetch.hangs)
            return name.encode()

    monkeypatch.setattr(cache_reader.time, "monotonic", lambda: now[0])
    fetch = cache_reader.Fetch(["a", "b", "c"], lambda: None)
    fetch.run(Slow())  # type: ignore[arg-type]
    assert list(fetch.loaded) == ["a", "b", "c"]
    assert hangs == [False] * 6
    now[0] += 10 * cache_reader.PATIENCE
    assert not fetch.hangs
    waits = cache_reader.Fetch(["a"], lambda: None)
    now[0] += cache_reader.PATIENCE + 0.5
    assert waits.hangs
