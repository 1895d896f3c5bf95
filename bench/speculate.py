"""Times generation with drafts beside generation without: an editing task, and prose.

    python bench/speculate.py [MODEL.gguf] --rounds 5 --tokens 256 --threads 2

Both sides take turns, in one process. ``bench/data/edit.txt`` asks for a file with one change, greedy.
``bench/data/prose.txt`` is the beginning of a tale, which goes on with a temperature of 0.8 and a fixed seed. Prints
the tokens per second of each side, the ratio of each round, and what was accepted.

``--rates 0,0.5,0.75,0.9`` measures the curve of speed against acceptance instead, of any file, also one of random
weights: a drafter knows the text, and is wrong as often as it is told. Drafts of each length are verified always.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import zincmetal
from zincmetal.api.generation import SamplingOptions
from zincmetal.engine.drafters import Draft, Drafter
from zincmetal.engine.governor import Bid, Governor, Kind
from zincmetal.engine.request import Request, Stats
from zincmetal.hub import demo_model

DATA = Path(__file__).parent / "data"
TASKS: dict[str, SamplingOptions] = {"edit": {}, "prose": {"temperature": 0.8, "seed": 1}}
LENGTHS = (1, 3, 7, 15)


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
    """Drafter that proposes a known text, of which each token is wrong with a probability of 1 - ``rate``."""

    def __init__(self, known: Sequence[int], rate: float) -> None:
        self._known, self._rate, self._rng = known, rate, random.Random(3)

    def propose(self, ids: Sequence[int], n: int) -> Draft:
        """Returns the next ``n`` tokens, some of them wrong."""
        following = self._known[len(ids) : len(ids) + n]
        return Draft([t if self._rng.random() < self._rate else (t + 1) % 256 for t in following])


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
    ids = [int(i * 7919 % 250) + 3 for i in range(args.prompt)]
    scheduler = model.running.scheduler
    model.running.loop.call(lambda: None)

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
    print(f"{'draft':>6} {'forced':>7} {'accepted':>9} {'speed':>7}")
    for n in LENGTHS:
        for rate in args.rates:
            ratios, accepted = [], 0.0
            for _ in range(args.rounds + 1):
                plain, _ = run(None, 0)
                drafted, sink = run(Forced(text, rate), n)
                ratios.append(plain / drafted)
                counts = sink.stats.drafts if sink.stats else []
                accepted = sum(right for _, right in counts) / max(1, sum(tried for tried, _ in counts))
            print(f"{n:6} {rate:7.2f} {accepted:9.2f} {median(ratios[1:]):7.3f}", flush=True)


def main() -> None:
    """Compare, or measure the curve."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", nargs="?", default=None)
    p.add_argument("--device")
    p.add_argument("--threads", type=int, default=0)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--tokens", type=int, default=256)
    p.add_argument("--prompt", type=int, default=128, help="tokens of the prompt, with --rates")
    p.add_argument("--task", choices=sorted(TASKS), action="append")
    p.add_argument("--rates", type=lambda text: [float(rate) for rate in text.split(",")])
    p.add_argument("--show", action="store_true", help="print the texts too")
    args = p.parse_args()
    path = args.model or demo_model()
    with zincmetal.load(path, context=2048, device=args.device, threads=args.threads) as model:
        if args.rates:
            curve(model, args)
            return
        for task in args.task or TASKS:
            compare(model, task, args)


if __name__ == "__main__":
    main()
