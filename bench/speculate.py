"""Times generation with drafts beside generation without: an editing task, and prose.

    python bench/speculate.py [MODEL.gguf] --rounds 5 --tokens 256 --threads 2

Both sides take turns, in one process. ``bench/data/edit.txt`` asks for a file with one change, greedy.
``bench/data/prose.txt`` is the beginning of a tale, which goes on with a temperature of 0.8 and a fixed seed. Prints
the tokens per second of each side, the ratio of each round, and what was accepted.

``--rates 0,0.5,0.75,0.9`` measures the curve of speed against acceptance instead: a drafter knows the text, and is
wrong as often as it is told. Drafts of each of ``--lengths`` are verified always. ``--mtp`` measures the model's own
block that drafts: always with drafts of ``--lengths``, and as the governor chooses. "none" is a model without the
block, which takes turns with them, and "off" one that has loaded it. Speeds are beside "none", medians of rounds.
"waits" are the steps for which the host waited, for a token, and "waiting" is the share of time that it took.

Random weights let a step of several rows choose other tokens than steps of one row. Files of ``bench/synthetic.py
--counting`` do not: their text is known, and the block is right for a known share of it, in each of their sections.
Rates are those that were accepted, by the place in a draft.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from statistics import median

import numpy as np

import counting
import zincmetal
from zincmetal.api.generation import SamplingOptions
from zincmetal.engine.drafters import Draft, Drafter
from zincmetal.engine.governor import Bid, Governor, Kind
from zincmetal.engine.request import Request, Stats
from zincmetal.engine.speculate import Chooser
from zincmetal.hub import demo_model

DATA = Path(__file__).parent / "data"
TASKS: dict[str, SamplingOptions] = {"edit": {}, "prose": {"temperature": 0.8, "seed": 1}}
GOVERNOR = "governor"


def compare(model: zincmetal.Model, task: str, args: argparse.Namespace) -> None:
    """Prints both sides of a task, round by round."""
    prompt = (DATA / f"{task}.txt").read_text("utf-8").rstrip("\n ")
    seconds: dict[str, list[float]] = {"off": [], "auto": []}
    of_cpu: dict[str, list[float]] = {"off": [], "auto": []}  # on a machine that others use too, they vary less
    texts = {}
    for round_ in range(args.rounds + 1):  # the first one makes plans and fills the cache
        for draft in ("off", "auto") if round_ % 2 else ("auto", "off"):
            began = time.process_time()
            result = model.generate(prompt, args.tokens, draft=draft, **TASKS[task])
            texts[draft] = result
            if round_:
                of_cpu[draft].append(time.process_time() - began)
                seconds[draft].append(result.decode_seconds / max(1, len(result.tokens) - 1))
    in_cpu = sorted(round(plain / drafted, 3) for plain, drafted in zip(of_cpu["off"], of_cpu["auto"], strict=True))
    ratios = [plain / drafted for plain, drafted in zip(seconds["off"], seconds["auto"], strict=True)]
    rates = {draft: 1 / median(found) for draft, found in seconds.items()}
    print(f"{task}: {rates['off']:.1f} -> {rates['auto']:.1f} tokens/s, ratios {sorted(round(r, 3) for r in ratios)}")
    print(f"  median ratio {median(ratios):.3f}; of CPU time {in_cpu}, median {median(in_cpu):.3f}")
    print(f"  by place (drafted, accepted) {texts['auto'].drafts}")
    print(f"  texts are {'the same' if texts['off'].tokens == texts['auto'].tokens else 'different'}")
    if args.show:
        print(texts["auto"].text)


# ---- forced acceptance ----------------------------------------------------------------------------------------------


class Forced(Drafter):
    """Drafter that proposes a known text, of which each token is right with a probability of ``rate``."""

    def __init__(self, known: Sequence[int], rate: float) -> None:
        wrong = counting.wrong(len(known), rate, np.random.default_rng(3))
        self._proposed = [(t + 1) % 256 if bad else t for t, bad in zip(known, wrong, strict=True)]

    def propose(self, ids: Sequence[int], n: int) -> Draft:
        """Returns the next ``n`` tokens, some of them wrong."""
        return Draft(self._proposed[len(ids) : len(ids) + n])


class Fixed(Governor):
    """Governor that verifies drafts of one length."""

    def __init__(self, length: int) -> None:
        super().__init__(replays=False)
        self.length = length

    def lengths(self, bids: Sequence[Bid], output: str) -> list[int]:
        """Returns the length, or less where a draft is shorter or a step has no room."""
        return [min(self.length, bid.drafted, 16 - bid.known) for bid in bids]

    def goes_on(self, bids: Sequence[Bid], output: str, verifying: int) -> bool:
        """Returns True: drafts begin behind each step in flight."""
        return True

    def measured(self, accounts: object, kind: Kind, seconds: float) -> None:
        """Learns nothing."""


class Sink:
    """Receiver that keeps tokens and the statistics."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.stats: Stats | None = None

    def progress(self, done: int, total: int) -> None:
        """Takes nothing."""

    def started(self, stats: Stats) -> None:
        """Takes nothing."""

    def token(self, token: int, choice: object) -> None:
        """Takes a token."""
        self.tokens.append(token)

    def done(self, reason: str, stats: Stats) -> None:
        """Takes the end."""
        self.stats = stats

    def failed(self, error: BaseException) -> None:
        """Raises the error."""
        raise error


def curve(model: zincmetal.Model, args: argparse.Namespace) -> None:
    """Prints the speed against plain decoding, by length of draft and forced acceptance."""
    ids = prompt_of(model, args.prompt, counting.SHARES[-1])
    scheduler = model.running.scheduler
    own = scheduler.speculation.governor

    def run(drafter: Forced | None, n: int) -> tuple[float, Sink]:
        scheduler.speculation.governor = Fixed(n)
        sink = Sink()
        request = Request(list(ids), args.tokens, sink, drafter=drafter, draft_tokens=max(1, n))
        model.running.loop.submit(request)
        while sink.stats is None:
            model.running.loop.call(lambda: None)
        return sink.stats.decode / (len(sink.tokens) - 1), sink

    _, known = run(None, 0)
    text = [*ids, *known.tokens]
    print(f"{'draft':>6} {'forced':>7} {'speed':>7} {'text':>6}  accepted by place")
    for n in args.lengths:
        for rate in args.rates:
            ratios, sink = [], Sink()
            for _ in range(args.rounds + 1):
                plain, _ = run(None, 0)
                drafted, sink = run(Forced(text, rate), n)
                ratios.append(plain / drafted)
            drafts = sink.stats.drafts if sink.stats else []
            same = "same" if sink.tokens == known.tokens else "other"
            print(f"{n:6} {rate:7.2f} {median(ratios[1:]):7.3f} {same:>6}  {by_place(drafts)}", flush=True)
    scheduler.speculation.governor = own


def prompt_of(model: zincmetal.Model, n: int, share: float) -> list[int]:
    """Returns any prompt. Of a file that counts, its text has this share of tokens after which the block is right."""
    ids = [int(i * 7919 % 250) + 3 for i in range(n - 1)]
    return [*ids, counting.section(model.config.n_vocab, share).start]


def by_place(drafts: Sequence[tuple[int, int]]) -> str:
    """Returns the share that was accepted of the first tokens of drafts, of the second ones, and so on."""
    return " ".join(f"{right / tried:.2f}" for tried, right in drafts)


# ---- the model's own block ------------------------------------------------------------------------------------------


class Side:
    """One way to go on with a prompt: what it took, and what was accepted of its drafts.

    ``draft``: "none", "off", GOVERNOR, or the length of drafts.
    """

    def __init__(self, model: zincmetal.Model, draft: str, governor: Chooser) -> None:
        self.draft, self.model, self._governor = draft, model, governor
        self._kind = "off" if draft in ("none", "off") else "mtp"
        self._length = int(draft) if draft.isdigit() else None
        self.seconds = list[float]()  # of a token, by round
        self.tokens, self.drafts = list[int](), list[tuple[int, int]]()
        self.waits, self.waiting, self.spent = 0, 0.0, 0.0

    def run(self, ids: Sequence[int], n: int, counts: bool) -> None:
        """Generates ``n`` tokens. ``counts``: the plans of its steps are made."""
        times, speculation = self.model.running.engine.host_times, self.model.running.scheduler.speculation
        waits, waiting, began, own = times.waits, times.wait, time.perf_counter(), speculation.governor
        speculation.governor = self._governor
        found = self.model.generate(list(ids), n, temperature=0, draft=self._kind, draft_tokens=self._length)
        speculation.governor = own
        self.tokens = found.tokens
        if counts:
            self.seconds.append(found.decode_seconds / (len(found.tokens) - 1))
            self.drafts += [(0, 0)] * (len(found.drafts) - len(self.drafts))
            for i, (tried, right) in enumerate(found.drafts):
                self.drafts[i] = self.drafts[i][0] + tried, self.drafts[i][1] + right
            self.waits, self.waiting = self.waits + times.waits - waits, self.waiting + times.wait - waiting
            self.spent += time.perf_counter() - began

    def row(self, none: Side) -> str:
        """Returns its figures, beside those of the model without the block."""
        speed = median(plain / mine for plain, mine in zip(none.seconds, self.seconds, strict=True))
        same = "same" if self.tokens == none.tokens else "other"
        steps, waiting = self.waits / (len(self.tokens) * len(self.seconds)), self.waiting / self.spent
        figures = f"{1 / median(self.seconds):8.1f} {speed:7.3f} {same:>6} {steps:6.2f} {waiting:8.2f}"
        return f"{self.draft:>9} {figures}  {by_place(self.drafts)}"


def sides(plain: zincmetal.Model, drafting: zincmetal.Model, lengths: Sequence[int]) -> Iterator[Side]:
    """Yields the sides. The governor goes on with what it has learned of the machine."""
    own = drafting.running.scheduler.speculation.governor
    yield Side(plain, "none", plain.running.scheduler.speculation.governor)
    yield Side(drafting, "off", own)
    for n in lengths:
        yield Side(drafting, str(n), Fixed(n))
    yield Side(drafting, GOVERNOR, own)


def blocks(plain: zincmetal.Model, drafting: zincmetal.Model, args: argparse.Namespace) -> None:
    """Prints the speed of drafts by the block, by the share of the text after which it is right."""
    drafting.running.block_drafter()
    head = f"{'draft':>9} {'tokens/s':>8} {'speed':>7} {'text':>6} {'waits':>6} {'waiting':>8}  accepted by place"
    print(f"{'right':>6} {head}")
    for share in args.shares:
        ids, found = prompt_of(plain, args.prompt, share), list(sides(plain, drafting, args.lengths))
        for round_ in range(args.rounds + 1):
            at = round_ % len(found)
            for side in [*found[at:], *islice(found, at)]:
                side.run(ids, args.tokens, counts=round_ > 0)
        for side in found:
            print(f"{share:6.2f} {side.row(found[0])}", flush=True)


def _numbers(text: str) -> list[float]:
    return [float(number) for number in text.split(",")]


def main() -> None:
    """Compare, or measure the curve or the block."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", nargs="?", default=None)
    p.add_argument("--device")
    p.add_argument("--threads", type=int, default=0)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--tokens", type=int, default=256)
    p.add_argument("--prompt", type=int, default=128, help="tokens of the prompt, with --rates and --mtp")
    p.add_argument("--task", choices=sorted(TASKS), action="append")
    p.add_argument("--rates", type=_numbers, help="shares of right tokens to force")
    p.add_argument("--mtp", action="store_true", help="measure the model's own block that drafts")
    p.add_argument(
        "--shares", type=_numbers, default=counting.SHARES, help="sections of a file that counts, with --mtp"
    )
    p.add_argument("--lengths", type=lambda text: [int(n) for n in text.split(",")], default=[1, 3, 7, 15])
    p.add_argument("--show", action="store_true", help="print the texts too")
    args = p.parse_args()
    path = args.model or demo_model()

    def load() -> zincmetal.Model:
        return zincmetal.load(path, context=2048, device=args.device, threads=args.threads)

    with load() as model:
        if args.rates:
            curve(model, args)
        if args.mtp:
            with load() as drafting:
                blocks(model, drafting, args)
        for task in () if args.rates or args.mtp else args.task or TASKS:
            compare(model, task, args)


if __name__ == "__main__":
    main()
