"""Random mixtures of sequences, run by the real scheduler over the real engine, and each sequence run alone.

A sequence alone is stepped by a session, and the host's sampler draws from its logits. A batch multiplies in another
order than a single row. So a sequence ends before its first near tie: where changes of the logits as small as the
type of K/V makes them would choose another token. Up to there all tokens are compared.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from support.drafts import Guesses
from zincmetal import gguf
from zincmetal.engine.block_drafts import BlockDrafter
from zincmetal.engine.engine import Engine
from zincmetal.engine.governor import Always
from zincmetal.engine.loaded import Loaded
from zincmetal.engine.prefix_cache import Mark, PrefixCache
from zincmetal.engine.request import Request, Stats
from zincmetal.engine.scheduler import Scheduler
from zincmetal.engine.session import Session
from zincmetal.sampling.params import SamplingParams
from zincmetal.sampling.sampler import Sampler

CONTEXT = 640
N_TOKENS = 256  # ids that a wrong draft may have: every vocabulary has them
#: Changes of a logit that other orders of summation may cause, by the type of K/V.
NEAR = {"f32": 1e-3, "f16": 1e-2, "q8_0": 5e-2}
F32 = NDArray[np.float32]


class Mask:
    """Allows about half of the tokens, others at each position."""

    def __init__(self, seed: int, n_vocab: int) -> None:
        self.seed, self.n_vocab = seed, n_vocab
        self._ids: list[int] = []

    def allowed(self, ids: Sequence[int]) -> NDArray[np.bool_]:
        return np.random.default_rng([self.seed, len(ids)]).random(self.n_vocab) < 0.5

    def __call__(self, ids: Sequence[int]) -> NDArray[np.uint32]:
        """Returns the bits of the allowed tokens."""
        self._ids = list(ids)
        return self._bits(ids)

    def draft(self, tokens: Sequence[int]) -> list[NDArray[np.uint32]]:
        """Returns the bits after each token, up to the first that is not allowed."""
        found, ids = list[NDArray[np.uint32]](), list(self._ids)
        for token in tokens:
            if not self.allowed(ids)[token]:
                break
            ids.append(token)
            found.append(self._bits(ids))
        return found

    def _bits(self, ids: Sequence[int]) -> NDArray[np.uint32]:
        bits = np.zeros(-(-self.n_vocab // 32) * 32, np.bool_)
        bits[: self.n_vocab] = self.allowed(ids)
        return np.packbits(bits, bitorder="little").view(np.uint32)

    def process(self, ids: Sequence[int], logits: F32) -> F32:
        """Forbids the others, as a processor of logits."""
        return np.where(self.allowed(ids), logits, -np.inf).astype(np.float32)


@dataclass
class Member:
    """Sequence of a mixture. ``want`` are its tokens when it runs alone.

    It arrives at the step ``arrives``, or with a ``parent`` when that one has ended. It is cancelled after
    ``cancel_after`` of its tokens, by its sink. ``drafts``: the share of drafted tokens that are right, None without
    drafts. ``block``: the model's own block drafts.
    """

    ids: list[int]
    params: SamplingParams
    want: list[int]
    arrives: int = 0
    cancel_after: int = -1
    n_logprobs: int = 0
    mask: Mask | None = None
    eog_ids: frozenset[int] = frozenset()
    marks: dict[int, Mark] = field(default_factory=dict)
    parent: Member | None = None
    keep: bool = False
    drafts: float | None = None
    block: bool = False
    request: Request | None = None
    tokens: list[int] = field(default_factory=list)
    ended: str | BaseException | None = None
    stats: Stats | None = None

    # ---- the sink ------------------------------------------------------------------------------------------------

    def progress(self, done: int, total: int) -> None:
        pass

    def started(self, stats: Stats) -> None:
        pass

    def token(self, id: int, choice: Any) -> str | None:
        self.tokens.append(id)
        return "cancelled" if len(self.tokens) == self.cancel_after else None

    def done(self, reason: str, stats: Stats) -> None:
        self.ended, self.stats = reason, stats

    def failed(self, error: BaseException) -> None:
        self.ended = error

    # ---- the request ---------------------------------------------------------------------------------------------

    @property
    def expected(self) -> list[int]:
        return self.want[: self.cancel_after] if self.cancel_after >= 0 else self.want

    def ask(self) -> Request:
        start = self.parent.stats.sequence if self.parent and self.parent.stats else None
        options: dict[str, Any] = {
            "eog_ids": self.eog_ids,
            "marks": self.marks,
            "mask": self.mask,
            "n_logprobs": self.n_logprobs,
        }
        if self.drafts is not None:
            options["drafter"] = Guesses(len(self.ids), lambda: self.want, self.drafts, N_TOKENS, len(self.ids))
        if self.block:
            options["drafter"] = BlockDrafter()
        self.request = Request(
            list(self.ids), len(self.want), self, self.params, start=start, keep=self.keep, **options
        )
        return self.request


@contextmanager
def few_pages(engine: Engine, n: int) -> Iterator[None]:
    """Leaves so many pages for all: sequences have to leave theirs to each other."""
    held = [engine.pages.take() for _ in range(engine.pages.free - n)]
    most, engine.pages_most = engine.pages_most, engine.pages_now
    try:
        yield
    finally:
        engine.pages.release_all(held)
        engine.pages_most = most


@contextmanager
def engine(path: Path, kv: str, **options: Any) -> Iterator[Engine]:
    """Opens a model without a thread that steps."""
    made = Engine(Loaded(gguf.open(path), **{"device": "cpu", "context": CONTEXT, "kv": kv, **options}))
    try:
        yield made
    finally:
        made.free()


class Mixture:
    """Random members over an engine. ``most``: sequences, prompt tokens and tokens of an answer, at most.

    ``drafts``: all that can have drafts have some. ``blocks``: most have drafts of the model's own block. They are
    verified always, whatever that costs.
    """

    def __init__(
        self, engine: Engine, seed: int, most: tuple[int, int, int], drafts: bool = False, blocks: bool = False
    ) -> None:
        self.drafts, self.blocks = drafts, blocks
        self.engine, self.rng = engine, random.Random(seed)
        self.most_members, self.most_prompt, self.most_tokens = most
        self.n_vocab = engine.config.n_vocab
        self.members: list[Member] = []
        self.together = 0  # members that ran at once
        stem = [self.rng.randrange(self.n_vocab) for _ in range(self.most_prompt)]
        for _ in range(self.rng.randint(max(1, self.most_members // 2), self.most_members)):
            self.members.append(self.member(stem))

    # ---- members -------------------------------------------------------------------------------------------------

    def member(self, stem: list[int]) -> Member:
        """Makes a member: of its own, with a beginning that others have too, or one that goes on from another."""
        rng = self.rng
        while True:
            parent = rng.choice(self.members) if self.members and rng.random() < 0.2 else None
            ids = self.prompt(stem, parent)
            params, mask = self.params(), Mask(rng.randrange(2**31), self.n_vocab) if rng.random() < 0.1 else None
            eog = frozenset(rng.sample(range(self.n_vocab), 8 if rng.random() < 0.3 else 0))
            want = self.alone(ids, params, mask, eog, rng.randint(1, self.most_tokens))
            if want:
                break
        member = Member(ids, params, want, rng.randrange(2 + len(self.members)), mask=mask, eog_ids=eog)
        member.drafts = rng.choice([0.0, 0.5, 0.9, 1.0]) if self.drafts else None
        member.block = self.blocks and rng.random() < 0.8
        member.n_logprobs = 3 if rng.random() < 0.1 else 0
        if rng.random() < 0.2:
            member.cancel_after = rng.randint(1, len(want))
        if rng.random() < 0.5 and len(ids) > 2:
            member.marks = {rng.randrange(1, len(ids)): Mark.TURN}
        if parent:
            parent.keep, member.parent = True, parent
        return member

    def prompt(self, stem: list[int], parent: Member | None) -> list[int]:
        rng = self.rng
        tail = [rng.randrange(self.n_vocab) for _ in range(rng.choice([1, 2, 9, 40]))]
        if parent:
            known = [*parent.ids, *parent.expected]
            return [*known[: rng.choice([len(known), rng.randint(1, len(known))])], *tail][: CONTEXT // 2 + 200]
        n = rng.choice([1, rng.randint(1, 20), rng.randint(1, self.most_prompt)])
        if rng.random() < 0.3:
            return [*stem[:n], *tail][: self.most_prompt]
        return [rng.randrange(self.n_vocab) for _ in range(n)]

    def params(self) -> SamplingParams:
        rng = self.rng
        options: dict[str, Any] = {}
        if rng.random() < 0.6:
            options = {"temperature": rng.choice([0.5, 1.0, 1.5]), "seed": rng.randrange(2**60)}
            options |= rng.choice([{}, {"top_k": 20}, {"top_p": 0.8}, {"min_p": 0.05}, {"typical_p": 0.9}])
        if rng.random() < 0.2:
            options |= rng.choice([{"repeat_penalty": 1.3}, {"presence_penalty": 0.7}, {"frequency_penalty": 0.4}])
        if rng.random() < 0.1:
            options["logit_bias"] = {rng.randrange(self.n_vocab): rng.choice([-5.0, 3.0, -np.inf]) for _ in range(4)}
        if rng.random() < 0.1:
            options["logits_processors"] = [Mask(rng.randrange(2**31), self.n_vocab).process]
        return SamplingParams(**options)

    # ---- alone ---------------------------------------------------------------------------------------------------

    def alone(
        self, ids: list[int], params: SamplingParams, mask: Mask | None, eog: frozenset[int], n: int
    ) -> list[int]:
        """Returns the tokens of a sequence that runs alone, up to its first near tie."""
        if mask:
            params = replace(params, logits_processors=[*params.logits_processors, mask.process])
        tokens: list[int] = []
        with Session(self.engine) as session:
            session.sync(ids)
            while len(tokens) < n:
                token = self.clear_choice(session.last_logits().copy(), [*ids, *tokens], params)
                if token is None:
                    break
                tokens.append(token)
                if token in eog:
                    break
                if len(tokens) < n:
                    session.decode(token)
        return tokens

    def clear_choice(self, logits: F32, history: list[int], params: SamplingParams) -> int | None:
        """Returns the token after ``history``, or None if logits that differ a little would choose another."""
        near = NEAR[self.engine.loaded.kv]
        token = Sampler(params).sample(logits, history)
        against = logits + np.float32(near)
        against[token] = logits[token] - near
        rng = np.random.default_rng(len(history))
        signs = [rng.choice(np.array([-near, near], np.float32), logits.size) for _ in range(6)]
        for other in (against, *(logits + change for change in signs)):
            if Sampler(params).sample(other, history) != token:
                return None
        return token

    # ---- together ------------------------------------------------------------------------------------------------

    def run(self) -> Scheduler:
        """Runs all members by a scheduler, and checks each of them. The clock is random: so are the slices."""
        now = 0.0

        def clock() -> float:
            nonlocal now
            now += self.rng.random() * 0.05
            return now

        engine = self.engine
        cache = PrefixCache(engine.pages, engine.slots, engine.page, engine.recurrent)
        scheduler = Scheduler(
            engine,
            cache,
            pages=engine.pages,
            slots=engine.slots,
            seats=engine.free_seats,
            clock=clock,
            governor=Always() if self.drafts or self.blocks else None,
        )
        waiting = list(self.members)
        for step in range(100_000):
            for member in [m for m in waiting if self.may_start(m, step)]:
                waiting.remove(member)
                scheduler.submit(member.ask())
                self.release_parent(scheduler, member, waiting)
            if not scheduler.step() and not waiting:
                break
            self.together = max(self.together, len(scheduler.state().running))
        cache.clear()
        return scheduler

    @staticmethod
    def release_parent(scheduler: Scheduler, member: Member, waiting: list[Member]) -> None:
        """Releases the sequence that the member goes on from, if it was the last one to do so."""
        parent = member.parent
        if parent and parent.stats and parent.stats.sequence and all(other.parent is not parent for other in waiting):
            scheduler.release(parent.stats.sequence)

    @staticmethod
    def may_start(member: Member, step: int) -> bool:
        return member.parent.ended is not None if member.parent else step >= member.arrives
