"""What Python costs per token: stream_generate beside a bare loop of decode_step, in one process.

    python bench/overhead.py [FILE.gguf] [--threads 2] [--rounds 15] [--tokens 96]

Without a file, the demo model. The two take turns, over the same tokens and with the same steps ahead; the figure is
the median over the rounds of the difference in wall time per token. It is small beside the time of a step, so the
machine must be quiet: the quartiles say how quiet it was.
"""

from __future__ import annotations

import argparse
import json
import time
from statistics import median, quantiles

import zincmetal
from zincmetal.generate import demo_model

PROMPT = "Once upon a time there was"


def bare(model: zincmetal.Model, ids: list[int], n: int, ahead: bool) -> float:
    """Seconds a token of decode_step alone, n tokens after the first."""
    model.reset()
    token, step = model._prefill(ids), model.core.decode_step
    session, plan = model.session, model._plans[1, False][1]
    began = time.perf_counter()
    for left in range(n, 0, -1):
        token = step(session, plan, token, ahead and left > 1)
    return (time.perf_counter() - began) / n


def streamed(model: zincmetal.Model, ids: list[int], n: int) -> float:
    """The same of stream_generate."""
    model.reset()
    stream = iter(model.stream_generate(ids, max_tokens=n + 1))
    next(stream)
    began = time.perf_counter()
    for _ in stream:
        pass
    return (time.perf_counter() - began) / n


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with zincmetal.load(args.file or demo_model(), context=args.tokens + 64, threads=args.threads) as model:
        model.tokenizer.eog_ids = frozenset()  # both run the same number of steps
        ids, ahead = model.tokenize(PROMPT), bool(model.device.info["asynchronous"])
        streamed(model, ids, args.tokens)  # plans are recorded, pages touched
        rounds = []
        for i in range(args.rounds):
            order = [bare(model, ids, args.tokens, ahead)] if i % 2 else []
            with_python = streamed(model, ids, args.tokens)
            without = order[0] if order else bare(model, ids, args.tokens, ahead)
            rounds.append((with_python * 1e6, without * 1e6))
        device = model.device.info["name"]
    extra = [a - b for a, b in rounds]
    low, _, high = quantiles(extra, n=4)
    result = {
        "device": device,
        "step_us": round(median(b for _, b in rounds), 1),
        "python_us": round(median(extra), 1),
        "quartiles_us": [round(low, 1), round(high, 1)],
    }
    print(json.dumps(result) if args.json else "\n".join(f"{key:14s}{value}" for key, value in result.items()))


if __name__ == "__main__":
    main()
