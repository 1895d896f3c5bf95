"""The scheduler under random arrivals, cancels, forks, tiny pools and failures, against rules that always hold.

``ZINCMETAL_SCHEDULER_STEPS=100000`` runs at least so many steps.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from support.drafts import Guesses
from support.fake_executor import VOCAB, FakeExecutor
from support.scheduler_lab import EOG_HEAVY, Lab, sink_of
from zincmetal.engine.block_drafts import BlockDrafter
from zincmetal.engine.governor import Always
from zincmetal.engine.request import Request
from zincmetal.errors import ContextFullError, DeadlineError, DeviceError, QueueFullError
from zincmetal.sampling.params import SamplingParams

STEPS = int(os.environ.get("ZINCMETAL_SCHEDULER_STEPS", "8000"))
#: Prompts begin with a part of one of these, so that they share pages.
STEMS = [[(7 * i + 13 * k) % VOCAB for i in range(260)] for k in range(2)]
STEPS_DONE = Counter[str]()
PROCESSOR_FAILS_AT = 211
DRAFTS = [None, 0.0, 0.5, 0.9, 1.0]
HOSTS = [None, 0, 4000, 1 << 20]  # bytes of the lower tier's memory, None without a tier


def processor(ids: list[int], logits: np.ndarray) -> np.ndarray:
    """Changes nothing. Raises at one length."""
    if len(ids) == PROCESSOR_FAILS_AT:
        raise LookupError("the processor fails here")
    return logits


def mask(ids: list[int]) -> np.ndarray:
    """Allows all tokens."""
    return np.full(VOCAB // 32 + 1, 0xFFFFFFFF, np.uint32)


PARAMS = (
    SamplingParams(),
    SamplingParams(temperature=0.7, seed=3),
    SamplingParams(temperature=1.3, seed=4, presence_penalty=0.5),
    SamplingParams(logits_processors=[processor]),
)
EXECUTORS = st.fixed_dictionaries(
    {
        "n_ctx": st.sampled_from([256, 512]),
        "pages": st.integers(3, 8),
        "pages_most": st.sampled_from([8, 10, 12, 30]),
        "slots": st.integers(1, 4),
        "slots_most": st.integers(4, 8),
        "seats": st.integers(1, 6),
        "max_rows": st.sampled_from([8, 32, 100]),
        "max_singles": st.integers(1, 4),
        "recurrent": st.booleans(),
        "runs_ahead": st.booleans(),
        "damaged": st.sampled_from([0, 0, 50]),
        "seconds": st.sampled_from([lambda rows: 0.01 + 0.001 * rows, lambda rows: 2.0 * rows]),
    }
)


class Machine(RuleBasedStateMachine):
    """Rules are calls of a caller, and steps. Invariants hold between any two."""

    @initialize(
        executor=EXECUTORS,
        cached=st.booleans(),
        host=st.sampled_from(HOSTS),
        queue_limit=st.integers(2, 12),
        drafts=st.sampled_from(DRAFTS),
        block=st.booleans(),
        always=st.booleans(),
    )
    def open(
        self,
        executor: dict[str, Any],
        cached: bool,
        host: int | None,
        queue_limit: int,
        drafts: float | None,
        block: bool,
        always: bool,
    ) -> None:
        """``drafts``: the share of drafted tokens that are right, None without drafts. ``host``: as in ``HOSTS``.

        ``block``: most requests have their drafts by the block of the model.
        """
        self.drafts, self.block, governor = drafts, block, Always() if always else None
        spoils = 0.0 if drafts is None else 1 - drafts
        self.lab = Lab(
            FakeExecutor(**executor, spoils=spoils), cached, host, queue_limit=queue_limit, governor=governor
        )
        self.requests: list[Request] = []
        self.cancelled: set[Request] = set()
        self.released: list[Any] = []
        self.failures = 0
        self.admitted: list[int] = []  # arrivals, in the order of their admission

    # ---- calls ---------------------------------------------------------------------------------------------------

    @rule(
        stem=st.integers(0, 1),
        n=st.integers(0, 230),
        tail=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=40),
        max_tokens=st.sampled_from([0, 1, 2, 5, 9, 20, 40, -1]),
        params=st.integers(0, 3),
        ends=st.booleans(),
        marks=st.lists(st.integers(1, 240), max_size=3),
        options=st.sampled_from(["", "", "", "keep", "mask", "deadline"]),
    )
    def submit(
        self,
        stem: int,
        n: int,
        tail: list[int],
        max_tokens: int,
        params: int,
        ends: bool,
        marks: list[int],
        options: str,
    ) -> None:
        more: dict[str, Any] = {"keep": {"keep": True}, "mask": {"mask": mask}, "deadline": {"deadline": 1.5}}.get(
            options, {}
        )
        self._submit(
            [*STEMS[stem][:n], *tail],
            max_tokens,
            params=PARAMS[params],
            eog_ids=EOG_HEAVY if ends else (),
            marks=marks,
            **more,
        )

    @precondition(lambda self: self.requests)
    @rule(
        which=st.integers(0, 99),
        tail=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=9),
        max_tokens=st.integers(1, 60),
    )
    def go_on(self, which: int, tail: list[int], max_tokens: int) -> None:
        """A second turn, after an answer."""
        before = self.requests[-1 - which % len(self.requests)]
        self._submit([*before.ids, *sink_of(before).tokens, *tail], max_tokens)

    @precondition(lambda self: self.lab.kept)
    @rule(which=st.integers(0, 99), cut=st.integers(0, 90), max_tokens=st.integers(1, 60))
    def fork(self, which: int, cut: int, max_tokens: int) -> None:
        start = self.lab.kept[which % len(self.lab.kept)]
        ids = start.ids[: start.computed]
        self._submit([*ids[: max(0, len(ids) - cut)], 5], max_tokens, start=start, keep=cut == 0)

    @precondition(lambda self: self.lab.kept)
    @rule(which=st.integers(0, 99))
    def release(self, which: int) -> None:
        kept = self.lab.kept[which % len(self.lab.kept)]
        self.lab.kept.remove(kept)
        self.released.append(kept)
        self.lab.scheduler.release(kept)

    @precondition(lambda self: self.requests)
    @rule(which=st.integers(0, 99), dice=st.integers(0, 2))
    def cancel(self, which: int, dice: int) -> None:
        if dice != 2:
            return
        request = self.requests[-1 - which % len(self.requests)]
        self.cancelled.add(request)
        self.lab.scheduler.cancel(request)

    @rule(where=st.sampled_from(["submit", "collect", "copy_page", "read_page"]), dice=st.integers(0, 12))
    def fail(self, where: str, dice: int) -> None:
        if dice != 7:
            return
        self.lab.executor.fail = where
        self.failures += 1

    @rule(
        n=st.integers(2, 6),
        stem=st.integers(0, 1),
        length=st.integers(1, 150),
        max_tokens=st.integers(3, 120),
        params=st.integers(0, 3),
        marks=st.lists(st.integers(1, 140), max_size=2),
    )
    def submit_some(self, n: int, stem: int, length: int, max_tokens: int, params: int, marks: list[int]) -> None:
        """Requests that together need more pages than there are."""
        for i in range(n):
            ids = [*STEMS[stem][: length if i % 2 else length // 3], i]
            self._submit(ids, max_tokens, params=PARAMS[params], marks=marks)

    @precondition(lambda self: not self.lab.executor.fail)
    @rule()
    def refuse_to_grow(self) -> None:
        self.lab.executor.fail = "grow"

    @precondition(lambda self: self.lab.tier)
    @rule(files=st.sampled_from([1, 2, None, None]))
    def read(self, files: int | None) -> None:
        """The reader goes on, by so many files or to the end."""
        self.lab.reader.go(files)

    @precondition(lambda self: self.lab.tier and self.lab.folder.files)
    @rule(which=st.integers(0, 99))
    def damage(self, which: int) -> None:
        names = sorted(self.lab.folder.files)
        self.lab.folder.damaged.add(names[which % len(names)])

    @rule(n=st.integers(1, 150))
    def step(self, n: int) -> None:
        for _ in range(n):
            if not self._step():
                return

    def _submit(self, ids: list[int], max_tokens: int, **options: Any) -> None:
        request = self.lab.request(ids, max_tokens, **options)
        if self.drafts is not None:
            right = lambda: [token for token in self._wanted(request) if token >= 0]  # noqa: E731
            by_block = self.block and len(self.requests) % 4
            guesses = Guesses(len(ids), right, self.drafts, VOCAB, len(self.requests))
            request.drafter = BlockDrafter() if by_block else guesses
        try:
            self.lab.scheduler.submit(request)
        except (QueueFullError, ContextFullError):
            assert not sink_of(request).ends
            return
        self.requests.append(request)

    def _step(self) -> bool:
        lab, before = self.lab, self.lab.scheduler.steps
        busy = lab.scheduler.step()
        STEPS_DONE["steps"] += lab.scheduler.steps - before
        for request in self.requests:
            stats = sink_of(request).stats
            kept = stats.sequence if stats else None
            if kept is not None and kept not in (*lab.kept, *self.released):
                lab.kept.append(kept)
        self.check()
        return busy

    # ---- what always holds ---------------------------------------------------------------------------------------

    @invariant()
    def nothing_is_lost_or_owned_twice(self) -> None:
        if hasattr(self, "lab"):
            self.check()

    def check(self) -> None:
        lab, state = self.lab, self.lab.scheduler.state()
        cache, pools = lab.cache, lab.pools
        kept = [s for s in (*lab.kept, *self.released) if s.pages or s.slot is not None]
        pages = Counter([*state.pages, *(cache.owned_pages() if cache else []), *(p for s in kept for p in s.pages)])
        slots = Counter([*state.slots, *(cache.owned_slots() if cache else [])])
        slots.update(s.slot for s in kept if s.slot is not None)
        for pool, owned in ((pools.pages, pages), (pools.slots, slots)):
            assert [pool.count(i) for i in range(pool.size)] == [owned[i] for i in range(pool.size)]
            assert pool.free == pool.size - len(owned)
        assert len(state.seats) == len(set(state.seats)) == lab.executor.seats - pools.seats.free
        live = {*state.running, *state.waiting}
        for request in self.requests:
            sink = sink_of(request)
            assert sink.ends <= 1
            assert not (sink.ends and request in live)
        rests = lab.scheduler.resting and lab.scheduler.inbox.empty()
        assert not rests or (lab.tier and lab.reader.reads), "it sleeps, and nobody will wake it"
        arrivals = {request: i for i, request in enumerate(self.requests)}
        admitted = sorted(arrivals[r] for r in state.running if arrivals[r] not in self.admitted)
        self.admitted += admitted
        assert [arrivals[r] for r in state.waiting] == sorted(arrivals[r] for r in state.waiting)
        assert self.admitted == sorted(self.admitted), "a later request was admitted first"

    def teardown(self) -> None:
        if not hasattr(self, "lab"):
            return
        lab = self.lab
        if lab.executor.fail != "grow":
            lab.executor.fail = ""
        for _ in range(40 * sum(len(r.ids) + 300 for r in self.requests) + 10):
            if lab.tier:
                lab.reader.go()
            if not self._step():
                break
        else:
            raise AssertionError("a request does not end")
        for request in self.requests:
            self._check_end(request)
            sink = sink_of(request)
            if sink.stats:
                STEPS_DONE["moved out"] += sink.stats.moved_out
                STEPS_DONE["reused " + sink.stats.source] += sink.stats.reused > 0
                STEPS_DONE["accepted"] += sum(right for _, right in sink.stats.drafts)
                STEPS_DONE["rejected"] += sum(tried - right for tried, right in sink.stats.drafts)
            STEPS_DONE[sink.reason or type(sink.error).__name__] += 1
        for kept in lab.kept:
            lab.scheduler.release(kept)
        lab.kept.clear()
        lab.scheduler.step()
        lab.check_owners()
        assert lab.tier is None or lab.tier.pinned == 0

    def _wanted(self, request: Request) -> list[int]:
        """The tokens of a request that is alone."""
        lab, n = self.lab, request.max_tokens if request.max_tokens >= 0 else self.lab.executor.n_ctx
        n = min(n, lab.executor.n_ctx - len(request.ids) + 1)
        return lab.expected(lab.request(request.ids, n, params=request.params, eog_ids=request.eog_ids))

    def _check_end(self, request: Request) -> None:
        """It has ended once, and its tokens are its own, up to its end."""
        sink, lab = sink_of(request), self.lab
        assert sink.ends == 1
        wanted = self._wanted(request)
        good = [token for token in wanted if token >= 0]
        assert sink.tokens == good[: len(sink.tokens)]
        error = sink.error
        if error is None:
            full = len(sink.tokens) + len(request.ids) > 64 * lab.executor.pages_now - 1
            full = full or any(r.keep for r in self.requests)  # pages that their callers keep
            assert len(sink.tokens) == len(good) or request in self.cancelled or full
        elif isinstance(error, LookupError):
            assert request.params.logits_processors
            assert len(request.ids) + len(sink.tokens) == PROCESSOR_FAILS_AT
        elif isinstance(error, DeviceError):
            assert self.failures or wanted[-1] < 0, (error, len(sink.tokens), wanted)
        else:
            assert request.deadline is not None or not isinstance(error, DeadlineError)
            assert isinstance(error, (DeadlineError, ContextFullError))


def test_requests_end_once_and_nothing_is_lost() -> None:
    """Hypothesis chooses, and makes a failure small."""
    STEPS_DONE.clear()
    while STEPS_DONE["steps"] < STEPS // 4:
        run_state_machine_as_test(
            Machine,
            settings=settings(
                max_examples=10,
                stateful_step_count=40,
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
            ),
        )


def test_requests_end_once_under_load() -> None:
    """More requests at once than Hypothesis chooses, and fewer failures."""
    STEPS_DONE.clear()
    while STEPS_DONE["steps"] < STEPS:
        seed = random.randrange(2**32)
        try:
            run_under_load(random.Random(seed))
        except BaseException as error:
            error.args = (f"seed {seed}", *error.args)
            raise
    assert STEPS_DONE["accepted"] > 20
    assert STEPS_DONE["rejected"] > 20
    wanted = {"length", "stop", "cancelled", "moved out"} | {f"reused {x}" for x in ("memory", "start", "host", "disk")}
    assert STEPS < 50_000 or not wanted - {what for what, n in STEPS_DONE.items() if n}


@pytest.mark.parametrize("seed", [2130020226])
def test_a_seed_that_found_a_fault(seed: int) -> None:
    """A page that the cache knew was evicted for a prompt that went on from it, and another one took its place."""
    run_under_load(random.Random(seed))


def run_under_load(rng: random.Random) -> None:
    """Runs one machine. All that happens depends on ``rng``."""
    machine = Machine()
    recurrent = rng.random() < 0.6
    executor = {
        "n_ctx": rng.choice([256, 512]),
        "pages": rng.randint(3, 12),
        "pages_most": rng.choice([8, 12, 16, 30]),
        "slots": rng.randint(1, 4),
        "slots_most": rng.randint(4, 12),
        "seats": rng.randint(1, 6),
        "max_rows": rng.choice([8, 32, 100]),
        "max_singles": rng.randint(1, 5),
        "recurrent": recurrent,
        "runs_ahead": rng.random() < 0.7,
        "damaged": rng.choice([0, 0, 200]),
        "seconds": rng.choice([lambda rows: 0.01 + 0.001 * rows, lambda rows: 2.0 * rows]),
    }
    executor["pages"] = min(executor["pages"], executor["pages_most"])
    machine.open(
        executor, rng.random() < 0.7, rng.choice(HOSTS), 12, rng.choice(DRAFTS), rng.random() < 0.5, rng.random() < 0.7
    )
    for _ in range(rng.randint(20, 80)):
        marks = [rng.randint(1, 200) for _ in range(rng.randint(0, 3))]
        what = rng.random()
        if what < 0.25:
            option = rng.choice(["", "", "", "keep", "mask", "deadline"])
            tail = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 30))]
            machine.submit(
                rng.randrange(2),
                rng.randint(0, 200),
                tail,
                rng.choice([0, 1, 5, 20, 60]),
                rng.randrange(4),
                rng.random() < 0.2,
                marks,
                option,
            )
        elif what < 0.35 and machine.requests:
            machine.go_on(rng.randrange(5), [rng.randrange(VOCAB)], rng.randint(1, 60))
        elif what < 0.42:
            machine.submit_some(
                rng.randint(2, 6), rng.randrange(2), rng.randint(1, 150), rng.randint(3, 200), rng.randrange(4), marks
            )
        elif what < 0.46 and machine.lab.kept:
            machine.fork(rng.randrange(9), rng.choice([0, 0, 1, 50]), rng.randint(1, 40))
        elif what < 0.49 and machine.lab.kept:
            machine.release(rng.randrange(9))
        elif what < 0.53 and machine.requests:
            machine.cancel(rng.randrange(5), 2)
        elif what < 0.54:
            machine.fail(rng.choice(["submit", "collect", "copy_page", "read_page"]), 7)
        elif what < 0.55 and not machine.lab.executor.fail:
            machine.refuse_to_grow()
        elif what < 0.65 and machine.lab.tier:
            machine.read(rng.choice([1, 2, None, None]))
        elif what < 0.66 and machine.lab.tier and machine.lab.folder.files:
            machine.damage(rng.randrange(100))
        else:
            machine.step(rng.choice([1, 2, 5, 30, 100]))
    machine.teardown()
