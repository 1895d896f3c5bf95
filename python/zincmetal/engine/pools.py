"""Pools: who owns pages, slots and seats, and the ways to make room: grow, evict, move out.

Nobody is moved out for the sake of the cache: a running job gets back what the cache shares with it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as AnySequence
from enum import Enum

from .batch import Executor
from .cache_folder import CLOSE_SECONDS
from .cache_tier import Transfer
from .pace import Pace
from .pages import PagePool, Seats, StateSlots
from .prefix_cache import Cache, Mark, Match
from .request import Job, Saved
from .sequence import Sequence, common

HOST_BYTES = 2 << 30  # of sequences that are moved out
DISK_SECONDS = 0.02  # after which a disk that was behind is asked again
Clock = Callable[[], float]
_log = logging.getLogger("zincmetal.engine")


class Wait(Enum):
    """What a job waits for that is not admitted."""

    FILES = "files are read for it"
    IDLE = "what it needs is copied from an idle device, or to one"
    STEP = "it needs more than is copied at once: others have a step first"
    ROOM = "others have the pages or slots that it needs"


class Pools:
    """Pages, slots and seats of the running jobs. The executor must be idle, unless a method says otherwise."""

    def __init__(
        self,
        executor: Executor,
        cache: Cache,
        pages: PagePool,
        slots: StateSlots,
        seats: Seats,
        clock: Clock,
        tier: Transfer | None = None,
    ) -> None:
        assert executor.page == PagePool.PAGE
        self._executor, self._cache, self._clock = executor, cache, clock
        self.pages, self.slots, self.seats = pages, slots, seats
        self._tier = tier
        self._host_bytes = 0
        self._moved_out: set[Job] = set()  # jobs whose pages are in host memory
        self._full_grown = False  # the device had no memory for more
        self.layout = 0  # of pages now, as sequences have it
        self._shared = 0  # times that a running job has shown the cache what others may take over
        self._full: tuple[int, int, int, int, int] | None = None  # what there was when a job had to wait for room

    def figures(self) -> dict[str, dict[str, int]]:
        """Return the sizes of the pools: what there is, what is free, and what they may grow to."""
        executor, pages, slots = self._executor, self.pages, self.slots
        return {
            "pages": {"all": pages.size, "free": pages.free, "most": executor.pages_most},
            "slots": {"all": slots.size, "free": slots.free, "most": executor.slots_most},
        }

    # ---- room ----------------------------------------------------------------------------------------------------

    def missing(self, sequence: Sequence, end: int, new_slot: bool = False) -> tuple[int, int]:
        """Return the pages and slots that are not free and that rows up to position ``end`` need."""
        first = sequence.submitted // self.pages.PAGE
        shared = sum(map(self.pages.shared, sequence.pages[first:]))
        pages = max(0, self.pages.needed(end) - len(sequence.pages)) + shared
        has_own = sequence.slot is not None and not new_slot and not self.slots.shared(sequence.slot)
        slots = int(self._executor.recurrent and not has_own)
        return max(0, pages - self.pages.free), max(0, slots - self.slots.free)

    def make_room(self, sequence: Sequence, end: int) -> bool:
        """Let the pools grow, else evict from the cache. Return True if nothing is missing now."""
        pages, slots = self.missing(sequence, end)
        if pages or slots:
            self._grow(pages, slots)
            pages, slots = self.missing(sequence, end)
        if pages or slots:
            self._evict_idle(pages, slots)
        return self._has_room(sequence, end)

    def make_room_for_draft(self, sequence: Sequence, end: int) -> bool:
        """Make room for rows of which the last are drafted: they leave states in a new slot. The cache evicts for it.

        Once there is such a slot, it is free again after each step.
        """
        self._grow(*self.missing(sequence, end, new_slot=True))
        self._evict_idle(*self.missing(sequence, end, new_slot=True))
        return self.missing(sequence, end, new_slot=True) == (0, 0)

    def _evict_idle(self, pages: int, slots: int) -> bool:
        """Evict. The device is idle, so a lower tier may copy what goes."""
        return (self._tier or self._cache).evict(pages, slots)

    def _has_room(self, sequence: Sequence, end: int) -> bool:
        """Return True if nothing is missing, after the cache has given up what only it shares with the sequence."""
        if self.missing(sequence, end) == (0, 0):
            return True
        shared = [page for page in sequence.pages[sequence.submitted // self.pages.PAGE :] if self.pages.shared(page)]
        self._cache.let_go(shared, sequence.slot)
        return self.missing(sequence, end) == (0, 0)

    def evict(self, sequence: Sequence, end: int) -> bool:
        """Evict for rows up to ``end``, also while steps are in flight. Return False if the device must be idle."""
        pages, slots = self.missing(sequence, end)
        if (pages and self._growth_of_pages()) or (slots and self._growth_of_slots()):
            return False
        if self._tier is not None:  # it copies what is evicted, from an idle device
            return (pages, slots) == (0, 0)
        self._cache.evict(pages, slots)
        return self._has_room(sequence, end)

    def may_hold(self, mark: Mark) -> bool:
        """Return True if a checkpoint can have a slot that no running job has. One of a grid evicts no other."""
        if self.slots.free or self._growth_of_slots():
            return True
        return mark > Mark.GRID and self._cache.evict(0, 1)

    def _growth_of_pages(self) -> int:
        return 0 if self._full_grown else max(0, self._executor.pages_most - self._executor.pages_now)

    def _growth_of_slots(self) -> int:
        return 0 if self._full_grown else max(0, self._executor.slots_most - self._executor.slots_now)

    def _grow(self, pages: int, slots: int) -> None:
        """Let the pools grow by at least so many, if there is memory: to twice their size, since growing is slow."""
        executor = self._executor
        now = executor.pages_now, executor.slots_now
        more_pages = min(self._growth_of_pages(), max(now[0], pages)) if pages else 0
        more_slots = min(self._growth_of_slots(), max(now[1], slots)) if slots else 0
        if not more_pages and not more_slots:
            return
        for more in (more_pages, more_slots), (min(pages, more_pages), min(slots, more_slots)):
            if executor.grow(now[0] + more[0], now[1] + more[1]):
                self.pages.grow(executor.pages_now)
                self.slots.grow(executor.slots_now)
                return
        self._full_grown = True

    # ---- in and out ----------------------------------------------------------------------------------------------

    def admit(self, job: Job, running: AnySequence[Job], idle: bool, wake: Callable[[], None]) -> Wait | None:
        """Give a job its seat, and the pages and the slot of what is computed of it. Return why it must wait, if so.

        It waits unless the pages for all its known tokens are free, beside those that running jobs still need. A job
        that runs alone waits for nobody. If the device is not ``idle``, steps are in flight. ``wake`` is called when
        files are there: what they hold is kept until the job is admitted or ends, or another one needs files.
        """
        if running and self._is_full_for(job, running):
            return Wait.ROOM
        waits = self._admit(job, running, idle, wake)
        if waits is Wait.ROOM:
            self._full = job.order, self._shared, len(running), self.pages.free, self.slots.free
        return waits

    def _is_full_for(self, job: Job, running: AnySequence[Job]) -> bool:
        """Return True if there was no room for a job, and there cannot be more now: a look costs time for each page."""
        if self._full is None:
            return False
        order, shared, n_running, pages, slots = self._full
        same = (job.order, self._shared) == (order, shared)
        return same and len(running) >= n_running and self.pages.free <= pages and self.slots.free <= slots

    def _admit(self, job: Job, running: AnySequence[Job], idle: bool, wake: Callable[[], None]) -> Wait | None:
        sequence = job.sequence
        waits = self._bring(job, running, idle, wake)
        if waits is not None:
            return waits
        if job.saved is None:
            self._reuse(job)
        waits = self._make_fit(sequence, running, idle)
        if waits is not None:
            sequence.release(self.pages, self.slots)
            return waits
        if job.saved is not None and not self._bring_back(job):
            return Wait.ROOM
        self._end_fetch(job)
        sequence.sit(self.seats.take())
        return None

    def _reuse(self, job: Job) -> None:
        """Take over the longest beginning of the job's tokens that is computed: of its own start, or of the cache."""
        sequence, begin = job.sequence, job.begin
        most = len(sequence.ids) - 1
        length = 0
        if begin is not None:
            length = min(common(begin.ids, sequence.ids), most)
            if self._executor.recurrent and length < begin.computed:
                length = 0
        match = Match() if job.anew else self._cache.match(sequence.ids[:most])
        if begin is not None and length >= match.length:
            match.release(self.pages, self.slots)
            share = begin.fork(self.pages, self.slots, length)
            pages, slot, source, miss = share.pages, share.slot, "start", None
            sequence.layout = share.layout
        else:
            sequence.layout = self.layout
            length, pages, slot, source, miss = match.length, match.pages, match.slot, match.source, match.miss
        sequence.pages, sequence.slot = pages, slot
        sequence.computed = sequence.submitted = length
        if job.admitted is None:
            source = job.brought or source
            job.stats.reused, job.stats.source, job.stats.miss = length, source if length else "", miss

    def _end_fetch(self, job: Job) -> None:
        if self._tier:
            self._tier.release(job)

    def _tier_of(self, job: Job) -> Transfer | None:
        """Return the lower tier if a job may use it."""
        return None if job.saved is not None or job.anew or job.begin is not None else self._tier

    def _bring(self, job: Job, running: AnySequence[Job], idle: bool, wake: Callable[[], None]) -> Wait | None:
        """Write what a job needs from the lower tier into the pools, if there is room for the job.

        Beside others this is a portion, and they keep a page and a slot each.
        """
        if job.saved is not None:
            return None if idle else Wait.IDLE
        tier, ids = self._tier_of(job), job.sequence.ids[:-1]
        found, reads = tier.fetch(job, ids, wake) if tier else (None, False)
        if reads:
            return Wait.FILES
        if tier is None or found is None:
            return None
        if self._room_for(job, running, idle) is Wait.ROOM:
            return Wait.ROOM
        if not idle:
            return Wait.IDLE
        self._grow(max(0, len(found.wanted) + len(running) - self.pages.free), 0)  # once: it copies what there is
        take = lambda page: self._take_idle(page, len(running))  # noqa: E731
        source, more = tier.bring(ids, take, (self.pages, self.slots), whole=not running)
        job.brought = "disk" if "disk" in (job.brought, source) else source or job.brought
        return Wait.STEP if more else None

    def _room_for(self, job: Job, running: AnySequence[Job], idle: bool) -> Wait | None:
        """Make room for a job beside those that run. What it could share is not evicted for it."""
        self._reuse(job)
        waits = self._make_fit(job.sequence, running, idle)
        job.sequence.release(self.pages, self.slots)
        return waits

    def _take_idle(self, page: bool, reserve: int) -> int | None:
        """Return a new page, or a new slot, if more than ``reserve`` can be free. The device is idle."""
        pool = self.pages if page else self.slots
        for make in (self._grow, self._evict_idle):
            more = reserve + 1 - pool.free
            if more > 0:
                make(more if page else 0, 0 if page else more)
        return pool.take() if pool.free > reserve else None

    def _make_fit(self, sequence: Sequence, running: AnySequence[Job], idle: bool) -> Wait | None:
        """Make room for what the sequence and the running jobs need. Return what it waits for, if so.

        Each running job counts with one page more. So a job that was moved out does not come back too early. Nothing
        is evicted unless that is enough.
        """
        if not running:
            return None
        pages, slots = len(running), 0
        for each in (sequence, *(job.sequence for job in running)):
            pages += max(0, self.pages.needed(len(each.ids) + 1) - len(each.pages))
            slots += each.slot is None
        slots += sequence.slot is not None and self.slots.shared(sequence.slot)  # its first step needs another
        pages = max(0, pages - self.pages.free - self._growth_of_pages())
        slots = max(0, slots - self.slots.free - self._growth_of_slots()) if self._executor.recurrent else 0
        if not pages and not slots:
            return None
        if not self._cache.can_evict(pages, slots):
            return Wait.ROOM
        if self._tier is not None and not idle:  # it copies what is evicted
            return Wait.IDLE
        return None if self._evict_idle(pages, slots) else Wait.ROOM

    def retire(self, sequence: Sequence, store: bool) -> None:
        """Give back all that a sequence has, first to the cache if ``store``. Steps of others may be in flight."""
        if store and sequence.computed and sequence.layout == self.layout:
            assert len(sequence.ids) >= sequence.computed, "nobody knows what the pages hold"
            ids = sequence.ids[: sequence.computed]
            self._cache.store(ids, sequence.pages[: self.pages.needed(len(ids))], len(ids))
            if sequence.slot is not None:
                self._cache.checkpoint(ids, sequence.slot)
            if self._tier:
                self._tier.note(ids)
        self.leave_seat(sequence)
        sequence.release(self.pages, self.slots)

    def share_prompt(self, job: Job) -> None:
        """Let others use the whole pages of a prompt from now on. With recurrent layers marks do that."""
        page, sequence = self.pages.PAGE, job.sequence
        whole = job.stats.prompt - job.stats.prompt % page
        if whole and not self._executor.recurrent and sequence.layout == self.layout:
            self._shared += 1
            self._cache.store(sequence.ids[:whole], sequence.pages[: whole // page], whole)

    def leave_seat(self, sequence: Sequence) -> None:
        """Give back the seat alone."""
        if sequence.seat is not None:
            self.seats.release(sequence.seat)
            sequence.seat = None

    def move_out(self, job: Job, pace: Pace) -> None:
        """Take all pages from a job: to host memory if that is the faster way, else to be computed again.

        The others wait for the copy. So it takes no longer than they may wait for a step: of a longer sequence only
        the beginning is copied, and with recurrent layers, whose states are those of its end, nothing.
        """
        job.stats.moved_out += 1
        job.saved = self._save(job.sequence, pace)
        if job.saved is not None:
            self._moved_out.add(job)
        self.retire(job.sequence, store=job.saved is None)

    def _save(self, sequence: Sequence, pace: Pace) -> Saved | None:
        """Read pages and states. Return None if computing them again is faster, by the time of the first page."""
        executor, length = self._executor, sequence.computed
        numbers = sequence.pages[: self.pages.needed(length)]
        if not pace.seconds_per_row or len(numbers) < 2:
            return None
        began = self._clock()
        first = executor.read_page(numbers[0])
        each = self._clock() - began
        most = pace.copies(each)
        if len(numbers) > most:
            numbers, length = numbers[:most], most * self.pages.PAGE
            if executor.recurrent or most < 2:
                return None
        seconds = 2 * each * len(numbers)  # out and in
        if seconds > pace.seconds_per_row * length or self._host_bytes + len(first) * len(numbers) > HOST_BYTES:
            return None
        slot = None if sequence.slot is None else executor.read_slot(sequence.slot)
        saved = Saved(length, [first, *map(executor.read_page, numbers[1:])], slot)
        self._host_bytes += saved.nbytes
        return saved

    def _bring_back(self, job: Job) -> bool:
        """Write saved pages and states into new ones. Return False if there are not enough."""
        saved, sequence, executor = job.saved, job.sequence, self._executor
        assert saved is not None
        if not self.make_room(sequence, saved.length):
            return False
        for data in saved.pages:
            sequence.pages.append(self.pages.take())
            executor.write_page(sequence.pages[-1], data)
        if saved.slot is not None:
            sequence.slot = self.slots.take()
            executor.write_slot(sequence.slot, saved.slot)
        sequence.computed = sequence.submitted = saved.length
        self._forget_saved(job)
        return True

    def forget_copies_for(self, job: Job) -> None:
        """Give up what host memory holds for a job that has ended."""
        self._end_fetch(job)
        self._forget_saved(job)

    def _forget_saved(self, job: Job) -> None:
        """Give up what was moved out to host memory."""
        if job.saved is not None:
            self._host_bytes -= job.saved.nbytes
            self._moved_out.discard(job)
            job.saved = None

    def forget(self, sequence: Sequence) -> Sequence:
        """Forget what is cached of a sequence whose numbers are not finite: others would reuse them. Return it."""
        self._cache.forget(sequence.ids)
        if self._tier:
            self._tier.forget(sequence.ids)
        return sequence

    def forget_cache(self) -> None:
        """Forget all that is cached: after an error of the device nobody knows what the pages hold."""
        self._cache.clear()

    def forget_copies(self, tier: Transfer | None) -> None:
        """Forget what is cached and what was moved out: pages hold more from now on. ``tier`` is the lower one then.

        Sequences that go on have pages without it. They are not cached.
        """
        self.layout += 1
        self.forget_cache()
        for job in list(self._moved_out):
            self._forget_saved(job)
        if self._tier:
            self._tier.release()
        self._tier = tier

    # ---- the lower tier ------------------------------------------------------------------------------------------

    @property
    def saving(self) -> bool:
        """True if ended turns are to be copied to the lower tier."""
        return self._tier is not None and self._tier.pending

    @property
    def may_save(self) -> bool:
        """True if some of them can be copied now: the disk takes them."""
        return self._tier is not None and self._tier.may_save

    def save(self) -> None:
        """Copy some of what ended turns have left to the lower tier."""
        if self._tier:
            self._tier.save()

    def save_all(self) -> None:
        """Copy all of it, before the pools go. A device that fails now has nothing to copy.

        A disk that does not answer, or that is too slow, is not waited for.
        """
        until = time.monotonic() + CLOSE_SECONDS
        try:
            while self.saving:
                self.save()
                if self.saving and not self.may_save:
                    if self._tier is None or self._tier.hangs or time.monotonic() > until:
                        _log.warning("the last turns are not copied to the cache's folder: its disk is behind")
                        return
                    time.sleep(DISK_SECONDS)
        except Exception:
            _log.exception("the last turns were not copied to the cache's folder")

    def checkpoint(self, sequence: Sequence, length: int, slot: int, mark: Mark) -> None:
        """Offer a slot with the states after ``length`` tokens to the cache, with its pages."""
        if sequence.layout != self.layout:
            return
        self._shared += 1
        ids = sequence.ids[:length]
        self._cache.store(ids, sequence.pages[: self.pages.needed(length)], length)
        self._cache.checkpoint(ids, slot, mark)
