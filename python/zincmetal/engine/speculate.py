"""Speculation: several tokens of a sequence in one step.

1. A drafter (``drafters.py``) proposes tokens. The governor (``governor.py``) says how many of them a step verifies.
2. The step has a row for each known token and for each drafted one. From the last known token on, each row is an
   output. Its token is drawn as always: with the penalties of all tokens up to the row, which count the drafts before
   it, and with the noise of its position.
3. A drafted token is accepted if it is the token that was drawn in its place. The first token that was drawn and not
   drafted comes after the accepted ones. The device counts them.
4. So the device also knows the first row of the next draft. If the model's own block drafts, that step is submitted
   before the verdict is known here.

So the text is the text without drafts, greedy or sampled: each token is the one that is drawn after the tokens before
it. The noise belongs to the position, so a step with drafts draws the same. Only the order of sums can differ, since a
step of several rows has other kernels than one of a single row.

Keys and values after the accepted tokens are overwritten by the next rows. Recurrent states cannot be taken back. The
step leaves them in another slot. If all of the draft is accepted, the sequence takes that slot. If not, it keeps the
old one, and its accepted tokens are rows of the next step once more. No state is copied.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from .batch import Builder, Executor, accepted_of
from .block_drafts import BlockDrafter, BlockDrafts, Row
from .drafters import NO_DRAFT, Draft
from .governor import Account, Bid, Governor, Kind, kind_of
from .pages import PoolEmptyError
from .pools import Pools
from .request import Job
from .sequence import Sequence as TokenSequence

_log = logging.getLogger("zincmetal.engine")


class Chooser(Protocol):
    """Governor, or what stands in for it in tests."""

    def lengths(self, bids: Sequence[Bid], output: str) -> list[int]:
        """Return the number of tokens of each bid's draft that the next step verifies."""

    def goes_on(self, bids: Sequence[Bid], output: str, verifying: int) -> bool:
        """Return True if drafts may begin behind a step in flight of so many rows with drafts; 0: without."""

    def measured(self, accounts: Sequence[tuple[Account, int]], kind: Kind, seconds: float) -> None:
        """Learn from a step: the tokens that it made for each account, and its seconds."""


@dataclass
class Verify:
    """Rows of a job in flight: ``known`` tokens from position ``begin`` on, then those of the draft.

    With recurrent layers ``before`` and ``after`` are the slots of the states before and after the rows, and one of
    them is the sequence's.
    """

    draft: Draft
    begin: int
    known: int
    before: int | None = None
    after: int | None = None
    left: int | None = None  # the slot that is not the sequence's: whoever takes the verdict releases it

    def rewind(self, job: Job, accepted: int) -> None:
        """Let the sequence have the rows of the known tokens and of so many drafted ones."""
        sequence, whole = job.sequence, accepted == len(self.draft.tokens)
        rows = self.known + accepted
        if self.after is not None:
            slots = (self.after, self.before) if whole else (self.before, self.after)
            (sequence.slot, self.left), rows = slots, rows if whole else 0
        sequence.computed = sequence.submitted = self.begin + rows


class Speculation:
    """Drafts of all jobs of a scheduler."""

    def __init__(self, executor: Executor, pools: Pools, governor: Chooser | None = None) -> None:
        self._executor, self._pools, self._n_vocab = executor, pools, executor.n_vocab
        self.block = BlockDrafts(executor, pools.pages, pools.slots)
        self.governor = governor or Governor(executor.recurrent)
        self._before: set[Job] = set()  # the jobs of the step that was collected last

    def wanted(self, jobs: Sequence[Job]) -> dict[Job, int]:
        """Return how many tokens of drafts the next step of these jobs, each with a row in it, should verify."""
        if not any(job.drafter for job in jobs):
            return {}
        bids = [self._bid(job) for job in jobs]
        if not any(bid.drafted for bid in bids):
            return {}
        lengths = self.governor.lengths(bids, output_of(jobs))
        return {job: n for job, n in zip(jobs, lengths, strict=True) if n}

    def choose(self, jobs: Sequence[Job]) -> dict[Job, Draft]:
        """Return the drafts that the next step of these jobs should verify."""
        wanted = self.wanted(jobs)
        self.draft_by_block({job: n for job, n in wanted.items() if isinstance(job.drafter, BlockDrafter)})
        drafts = {job: self._draft(job, n) for job, n in wanted.items()}
        return {job: draft for job, draft in drafts.items() if draft.tokens}

    def draft_by_block(self, wanted: Mapping[Job, int]) -> None:
        """Give jobs their drafts by the model's own block, all in the same steps."""
        if wanted:
            made = self.block.make({job.sequence: n for job, n in wanted.items()})
            for job in wanted:
                job.draft, job.drafted_at = made[job.sequence], len(job.sequence.ids)

    def begin(self, outputs: Mapping[Job, int], verifies: Mapping[Job, Verify], rows: int) -> bool:
        """Begin drafts by the block behind the only step in flight, if that is likely to pay. Return True if it did.

        ``outputs``: the first one of each job, ``verifies``: the drafts among the ``rows`` of the step.
        What the step accepts is not known: the device chooses each row's token and position. A job that ends by then
        has a row for nothing, beyond its tokens, but never beyond the tokens that it may have.
        """
        bids, behind = list[Bid](), dict[TokenSequence, Row]()
        for job, output in outputs.items():
            drafted = len(verifies[job].draft.tokens) if job in verifies else 0
            most = min(job.request.draft_tokens, job.last - job.made - drafted - 2)  # after all of them, and one more
            drafts = isinstance(job.drafter, BlockDrafter) and most > 0
            if drafts:
                behind[job.sequence] = Row(job.sequence.submitted - drafted, -1 - output, drafted)
            bids.append(Bid(job.account, 1, most if drafts else 0, 0, costly=drafts))
        if not behind or self._executor.ran_at_once:
            return False
        verifying = rows if verifies else 0
        return self.governor.goes_on(bids, output_of(outputs), verifying) and self.block.begin(behind)

    def _bid(self, job: Job) -> Bid:
        most = min(job.request.draft_tokens, job.last - job.made - 1) if job.sequence.computed else 0
        if job.drafter is None or most < 1:
            return Bid(job.account, max(1, job.left), 0, 0)
        if job.drafter.costly:
            return Bid(job.account, max(1, job.left), most, 0, costly=True)
        draft = self._draft(job, most)
        return Bid(job.account, max(1, job.left), len(draft.tokens), draft.match)

    def _draft(self, job: Job, n: int) -> Draft:
        """Return a draft of at most ``n`` tokens. It is made once for the ids that are known, and ends at an end."""
        ids = job.sequence.ids
        if job.drafter and job.drafted_at != len(ids):
            job.drafted_at = len(ids)
            try:
                job.draft = job.drafter.propose(ids, n).checked(self._n_vocab)
            except Exception:
                _log.exception("a drafter failed; its request goes on without drafts")
                job.draft = NO_DRAFT
                job.close_drafter()
        tokens = job.draft.tokens[:n]
        ends = [i for i, token in enumerate(tokens) if token in job.request.eog_ids]
        return job.draft._replace(tokens=tokens[: ends[0] + 1] if ends else tokens)

    def add(self, builder: Builder, job: Job, tokens: Sequence[int], draft: Draft) -> Verify | None:
        """Add known tokens and a draft to a step, while none is in flight. Return None if there is no room.

        The draft ends before a token that the mask forbids.
        """
        sequence, keep = job.sequence, job.sequence.slot is not None
        try:
            drawings = job.drawings(draft.tokens)
        except Exception:  # of the mask: it comes again without the draft, and ends the request
            return None
        if len(drawings) == 1:
            return None
        draft = draft._replace(tokens=draft.tokens[: len(drawings) - 1])
        rows = [*tokens, *draft.tokens]
        verify = Verify(draft, sequence.submitted, len(tokens), sequence.slot, left=sequence.slot)
        for has_room in (False, True):
            try:
                job.verifying = builder.add(sequence, rows, *drawings, keep_states=keep)
                break
            except PoolEmptyError:
                if has_room or not self._pools.make_room_for_draft(sequence, sequence.submitted + len(rows)):
                    return None
        verify.after = sequence.slot
        return verify if job.verifying else None

    def accepted(self, job: Job, verify: Verify, choice: Any) -> int:
        """Return how many drafted tokens are those that were drawn, by the first of the outputs, and learn from it.

        The job's statistics have the draft then. Accepted tokens are counted as they are taken: it may end before them.
        """
        drafted, n = len(verify.draft.tokens), accepted_of(choice)
        job.verifying = False
        job.account.learn(verify.draft.match, drafted, n)
        if not job.ended:
            job.stats.count(drafted)
        return n

    def measured(
        self, made: Mapping[Job, int], rows: int, drafts: bool, seconds: float | None, waited: bool = False
    ) -> None:
        """Learn from a step that made so many tokens for each job. ``seconds``: since the step before it ended.

        They count if both steps had the same jobs, and no row of a prompt. If not, ``seconds`` is None. ``waited``: the
        step could have run ahead, and waited for a draft.
        """
        before, self._before = self._before, set(made) if seconds is not None else set()
        if seconds is None or before != self._before or not any(job.drafter for job in made):
            return
        costly = any(job.drafter.costly for job in made if job.drafter) if drafts else waited
        kind = kind_of(rows, drafts, output_of(made), costly)
        if kind is not None:
            self.governor.measured([(job.account, n) for job, n in made.items()], kind, seconds)


def output_of(jobs: Iterable[Job]) -> str:
    """Return the output of a step's plan."""
    return "argmax" if all(job.argmax for job in jobs) else "draw"
