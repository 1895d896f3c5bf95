"""Request: a prompt and how to go on from it. ``Job`` is the request on its way through the scheduler."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from collections.abc import Sequence as AnySequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import ContextFullError, DeadlineError, UsageError
from ..plan.chunks import VERIFY_ROWS
from ..sampling.draws import unpacked
from ..sampling.noise import NoiseSource
from ..sampling.params import SamplingParams
from ..sampling.sampler import Sampler
from .batch import Drawing, Executor
from .drafters import DRAFT_TOKENS, NO_DRAFT, Drafter
from .governor import Account
from .pages import PagePool
from .prefix_cache import Mark, Miss
from .sequence import Sequence

#: Returns the bits of the tokens that may follow the ids, uint32, or None if all may. If it has a method ``ahead`` that
#: returns True for the ids, then it also returns None one token later, whichever that is: steps may run ahead of it.
#: If it has a method ``draft``, that returns the masks after each of some tokens that may follow the ids of the last
#: call, up to the first that may not, and changes nothing.
Mask = Callable[[AnySequence[int]], NDArray[np.uint32] | None]

PAUSE = 8  # tokens after a wrong guess: where a mask begins, it goes on for some
REPLAYED = VERIFY_ROWS[-1]  # tokens that may be rows of a decode step once more, after a draft was rejected
GRID = 4096  # tokens between checkpoints of a long prompt: a multiple of a page
_log = logging.getLogger("zincmetal.engine")
STOP, LENGTH, CANCELLED = "stop", "length", "cancelled"  # reasons of an end
NO_ROOM = "the K/V cache is full and no other sequence can leave it; load the model with more memory for it"


@dataclass
class Stats:
    """Cost of a request. ``reused`` tokens of the prompt came from ``source``, and ``miss`` says why no more.

    Seconds: ``queue`` until it was admitted, ``prefill`` from there to its first token, ``decode`` from there to its
    end; ``sampling`` of these, if the host draws. ``moved_out`` counts how often it had to leave its pages to others.
    ``sequence``: of a request with ``keep``.
    ``drafts``: (drafted, accepted) tokens, by their place in a draft. Those behind the end are not accepted.
    """

    prompt: int = 0
    reused: int = 0
    source: str = ""
    miss: Miss | None = None
    generated: int = 0
    queue: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    sampling: float = 0.0
    moved_out: int = 0
    sequence: Sequence | None = None
    drafts: list[tuple[int, int]] = field(default_factory=list)

    def count(self, drafted: int) -> None:
        """Count a draft that was verified."""
        self.drafts += [(0, 0)] * (drafted - len(self.drafts))
        for i in range(drafted):
            self.drafts[i] = self.drafts[i][0] + 1, self.drafts[i][1]

    def accept(self, place: int) -> None:
        """Count a drafted token, by its place, as accepted: it becomes the text's next one."""
        self.drafts[place] = self.drafts[place][0], self.drafts[place][1] + 1


class Sink(Protocol):
    """Receiver of a request's events. The step thread calls it, so each call is short and waits for nothing.

    After ``done`` or ``failed``, of which one comes once, nothing comes any more.
    """

    def progress(self, done: int, total: int) -> None:
        """Take the number of tokens of the prompt that are computed, of those that were not reused. The first is 0."""

    def started(self, stats: Stats) -> None:
        """Take the cost of the prompt, right before the first token."""

    def token(self, id: int, choice: Any) -> str | None:
        """Take a token, with its ``Choice``. A text that is returned ends the request, as its reason."""

    def done(self, reason: str, stats: Stats) -> None:
        """Take the end: "stop" after an end token, "length", "cancelled", or the text that ended it."""

    def failed(self, error: BaseException) -> None:
        """Take the error that ended the request."""


@dataclass(eq=False)
class Request:
    """Prompt ``ids``, and how to go on: at most ``max_tokens`` (-1: until the context is full) and up to an end token.

    - ``deadline``: seconds from now to its end.
    - ``marks``: the numbers of tokens after which checkpoints of recurrent states are wanted, and their worth.
    - ``mask``: called before each token, with all ids so far. An error of it ends this request alone.
    - ``start``: a sequence whose common beginning with the prompt is not computed again. The caller keeps it.
    - ``keep``: the sequence is not released at the end. ``Stats.sequence`` has it, for ``Scheduler.release``.
    - ``drafter``: proposes at most ``draft_tokens`` tokens, which a step verifies. Not used with a mask that has no
      ``draft``, nor where the host draws: the token after a draft depends on calls that cannot be taken back.

    With ``max_tokens`` 0 the prompt is computed and nothing is drawn.
    """

    ids: list[int]
    max_tokens: int
    sink: Sink
    params: SamplingParams = field(default_factory=SamplingParams)
    eog_ids: frozenset[int] = frozenset()
    deadline: float | None = None
    marks: Mapping[int, Mark] = field(default_factory=dict)
    mask: Mask | None = None
    n_logprobs: int = 0
    start: Sequence | None = None
    keep: bool = False
    drafter: Drafter | None = None
    draft_tokens: int = DRAFT_TOKENS

    def check(self, executor: Executor) -> None:
        """Raise UsageError for an empty prompt, ContextFullError for one that the executor has no room for."""
        n = len(self.ids)
        if not n:
            raise UsageError("the prompt has no tokens; pass some text, or a BOS token")
        if n > executor.n_ctx:
            raise ContextFullError(
                f"the prompt has {n} tokens and the context {executor.n_ctx}; load the model with a larger context"
            )
        if PagePool.needed(n) > executor.pages_most:
            raise ContextFullError(f"the prompt has {n} tokens, and {NO_ROOM}")


class Saved(NamedTuple):
    """Pages and states of a sequence that was moved out to host memory."""

    length: int
    pages: list[bytes]
    slot: bytes | None

    @property
    def nbytes(self) -> int:
        """Host memory that it takes."""
        return sum(map(len, self.pages)) + len(self.slot or b"")


class Job:
    """Request on its way. ``order`` counts arrivals; ``made`` tokens are known and ``expected`` ones in flight."""

    def __init__(self, request: Request, order: int, now: float, executor: Executor) -> None:
        self.request, self.order = request, order
        self.sequence = Sequence(list(request.ids))
        self.begin: Sequence | None = None  # a share of request.start
        self.stats = Stats(prompt=len(request.ids))
        room = executor.n_ctx - len(request.ids) + 1
        self.last = room if request.max_tokens < 0 else min(request.max_tokens, room)
        self.made = self.expected = 0
        self.last_turn = -1  # counts runs: the job that had one longest ago is next
        self.arrived, self.deadline = now, None if request.deadline is None else now + request.deadline
        self.admitted: float | None = None  # for the first time
        self.first: float | None = None  # token
        self.queued = self.ended = False  # queued: has a place of the queue
        self.anew = False  # the second job of its request, which reuses nothing of others
        self.replaced = False  # the request has a second job, and hears of its end alone
        self.reason = ""
        self.failure: BaseException | None = None
        self.saved: Saved | None = None
        self.brought = ""  # where the lower tier of the cache had what it gave
        self.marks = _all_marks(request) if executor.recurrent else {}
        params = request.params
        self.host = self._needs_host(executor)
        self._words: NDArray[np.uint32] | None = None  # of the mask after so many ids
        self._masked_at = -1
        self._ahead = getattr(request.mask, "ahead", None)
        # Tokens from which on a mask may be guessed. A row can only be repeated if it has changed no recurrent state.
        self._guess_from = room if executor.recurrent else 0
        self.sampler = Sampler(_with_mask(params, request.mask)) if self.host else None
        self._mask_of_draft = getattr(request.mask, "draft", None)
        self.drafter = None if self.host or (request.mask and not self._mask_of_draft) else request.drafter
        self.draft, self.drafted_at = NO_DRAFT, -1  # the draft after so many ids
        self.account = Account()
        self.verifying = False  # a draft is in flight
        self._most_replayed = min(REPLAYED, executor.max_rows)
        self._noise = None if self.host or params.temperature == 0 else NoiseSource(params.seed)

    def _needs_host(self, executor: Executor) -> bool:
        """Return True if the host must draw: after the processors, for many biases, or where the device cannot."""
        request, params = self.request, self.request.params
        if params.logits_processors or len(params.logit_bias) > executor.max_biases:
            return True
        return not executor.draws and not (params.greedy and request.mask is None and not request.n_logprobs)

    def goes_on_from(self, other: Job) -> bool:
        """Return True if the prompt begins with all of another job's prompt, as that of the next turn does."""
        mine, whole = self.request.ids, other.request.ids
        n = len(whole)
        return mine[n - 1 : n] == whole[-1:] and mine[:n] == whole

    @property
    def left(self) -> int:
        """Known tokens whose rows are not submitted."""
        return max(0, len(self.sequence.ids) - self.sequence.submitted)

    @property
    def decodes(self) -> bool:
        """True if its next rows are of a decode step: its last token, or some tokens after a draft was rejected."""
        return self.left <= 1 or (self.drafter is not None and self.made > 0 and self.left <= self._most_replayed)

    @property
    def argmax(self) -> bool:
        """True if the arg max of the logits is enough for each token."""
        request = self.request
        return self.host or (request.params.greedy and request.mask is None and not request.n_logprobs)

    @property
    def waits(self) -> bool:
        """True if no row is possible before its token is known. Asks the mask.

        Where the mask allows every token, it is taken to do so one token later too. ``confirms`` finds out.
        """
        if self.host or self.request.mask is None:
            return self.host
        try:
            if self._ahead and self._ahead(self.sequence.ids):
                return False
            return self.made < self._guess_from or self._mask() is not None
        except Exception:  # it comes again, and ends the request, when the next token is drawn
            return True

    def confirms(self, position: int) -> bool:
        """Return True if the token after the row at ``position``, which was drawn ahead without a mask, may be taken.

        Otherwise the row is to be submitted once more. Calls the mask, which may raise anything.
        """
        if self._mask() is None:
            return True
        self._guess_from = self.made + PAUSE
        self.sequence.submitted = self.sequence.computed = position
        return False

    @property
    def wants_output(self) -> bool:
        """True if one more token is to be chosen."""
        return self.made + self.expected < self.last

    def slice(self, rows: int) -> int:
        """Return the rows, at most ``rows``, of the next slice of the prompt. It ends at marks, and before the end."""
        at, known = self.sequence.submitted, len(self.sequence.ids)
        end = min(at + rows, known - 1 if self.last else known)
        return min([end, *(mark for mark in self.marks if at < mark < end)]) - at

    def drawings(self, draft: AnySequence[int] = ()) -> list[Drawing]:
        """Return how the token after the known ones is chosen, and the tokens after each of a draft.

        There are fewer if a mask forbids a token of the draft. A position has one key of noise, however often its token
        is drawn. Calls the mask, which may raise anything.
        """
        request, first = self.request, self.sequence.submitted + max(1, self.left)
        masks = [self._mask(), *self._masks_of(draft)]
        keys = [self._noise.key(first + i) if self._noise else 0 for i in range(len(masks))]
        each = zip(keys, masks, strict=True)
        return [Drawing(request.params, key, mask, request.n_logprobs, self.host) for key, mask in each]

    def _masks_of(self, draft: AnySequence[int]) -> AnySequence[NDArray[np.uint32] | None]:
        """Return the mask after each token of a draft, up to the first that the mask before it forbids."""
        if not self._mask_of_draft or not draft:
            return [None] * len(draft)
        ends = [i for i, token in enumerate(draft) if token in self.request.eog_ids]
        masks: AnySequence[NDArray[np.uint32] | None] = self._mask_of_draft(draft[: ends[0]] if ends else draft)
        return masks

    def _mask(self) -> NDArray[np.uint32] | None:
        """Return the mask of the token after the ids that are known. The request's is called once for each token."""
        mask, n = self.request.mask, len(self.sequence.ids)
        if mask is None or self.host:
            return None
        if self._masked_at != n:
            self._words, self._masked_at = mask(self.sequence.ids), n
        return self._words

    def figures(self) -> dict[str, int]:
        """Return the tokens of its prompt, those that were reused, those that are computed, and those it made."""
        stats, sequence = self.stats, self.sequence
        return {
            "id": self.order,
            "prompt": stats.prompt,
            "reused": stats.reused,
            "position": sequence.submitted,
            "made": self.made,
        }

    def finish(self, now: float) -> None:
        """Complete the statistics at the end."""
        stats, admitted = self.stats, now if self.admitted is None else self.admitted
        first = now if self.first is None else self.first
        stats.queue, stats.prefill, stats.decode = admitted - self.arrived, first - admitted, now - first
        stats.generated = self.made

    def close_drafter(self) -> None:
        """Let the drafter give back what it has."""
        drafter, self.drafter = self.drafter, None
        try:
            if drafter:
                drafter.close()
        except Exception:
            _log.exception("the drafter of request %d did not close", self.order)

    def begin_anew(self, executor: Executor) -> Job | None:
        """Return a second job of the request, which reuses nothing of others, if that can help. This one then ends.

        It cannot once a token is made, nor if this job has reused nothing. No sink hears of this job's end.
        """
        if not self.stats.reused or self.made or self.anew:
            return None
        again = Job(self.request, self.order, self.arrived, executor)
        again.anew = self.replaced = True
        again.admitted, again.stats.miss = self.admitted, Miss("damaged")
        again.drafter, self.drafter = self.drafter, None
        again.begin, self.begin = self.begin, None
        return again

    def too_late(self) -> DeadlineError:
        """Return the error of a deadline that is over."""
        where = "in the queue" if self.admitted is None else "in its prompt" if not self.made else "while decoding"
        words = f"the request had not ended after {self.request.deadline:g} seconds: it was {where}"
        return DeadlineError(f"{words}; give it more time, or ask for fewer tokens")

    def tell_progress(self) -> None:
        """Tell the sink how much of the prompt is computed. The sink may raise anything."""
        reused, total = self.stats.reused, self.stats.prompt - self.stats.reused
        self.request.sink.progress(min(max(0, self.sequence.computed - reused), total), total)

    def tell_end(self) -> None:
        """Tell the sink the last event. Errors of sinks are their own."""
        if self.replaced:
            return
        sink = self.request.sink
        try:
            if self.failure is not None:
                sink.failed(self.failure)
            else:
                sink.done(self.reason, self.stats)
        except Exception:
            _log.exception("a receiver of the end of request %d failed", self.order)


def _with_mask(params: SamplingParams, mask: Mask | None) -> SamplingParams:
    """Add the mask as the last of the processors, for a draw of the host."""
    if mask is None:
        return params

    def forbid(ids: AnySequence[int], logits: NDArray[np.float32]) -> NDArray[np.float32]:
        words = mask(ids)
        return logits if words is None else np.where(unpacked(words, logits.size), logits, np.float32(-np.inf))

    return replace(params, logits_processors=(*params.logits_processors, forbid))


def _all_marks(request: Request) -> Mapping[int, Mark]:
    """Return where checkpoints are wanted: at the marks, on the grid, and before the last token of the prompt."""
    n = len(request.ids)
    grid = dict.fromkeys(range(GRID, n, GRID), Mark.GRID)
    return {**grid, **({n - 1: Mark.TURN} if n > 1 else {}), **request.marks}
