"""zincmetal beside llama.cpp on the same file and threads: load, prefill, decode, memory.

    python bench/versus.py FILE.gguf [--threads 2] [--rounds 5] [--prompt 512] [--tokens 64]

The two sides take turns, each run in a process of its own. Needs the package `llama-cpp-python` for the peer (or its
sources on PYTHONPATH and LLAMA_CPP_LIB_PATH naming a folder with its libraries). Prints medians, and the median of
the ratios round by round.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from statistics import median

SIDES = ("zincmetal", "llama.cpp")
# Larger is better, except where the unit says seconds or bytes.
FIGURES = ("load_seconds", "prefill_tps", "decode_tps", "peak_bytes")


def timed_zincmetal(args: argparse.Namespace) -> dict[str, float]:
    """One run of our side; times in seconds."""
    began = time.perf_counter()
    import numpy as np

    import zincmetal

    model = zincmetal.load(args.file, context=args.prompt + args.tokens + 8, threads=args.threads, device="cpu")
    core, session = model.core, model.session
    ids = (np.arange(args.prompt) * 7919 % model.config.n_vocab).astype(np.int32)
    token = model._prefill(ids[:1].tolist())
    loaded = time.perf_counter()

    model.reset()
    model._prefill(ids.tolist())  # records the plan
    model.reset()
    started = time.perf_counter()
    token = model._prefill(ids.tolist())
    prefilled = time.perf_counter()
    plan = model._plans[1, False][1]
    for _ in range(args.tokens):
        token = core.decode_step(session, plan, token)
    decoded = time.perf_counter()
    return figures(args, began, loaded, started, prefilled, decoded)


def timed_peer(args: argparse.Namespace) -> dict[str, float]:
    """One run of llama.cpp through its Python binding's low-level calls."""
    began = time.perf_counter()
    import llama_cpp
    import numpy as np

    global _quiet  # the library calls it until the process ends
    _quiet = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(_quiet, None)
    llm = llama_cpp.Llama(
        args.file,
        n_ctx=args.prompt + args.tokens + 8,
        n_batch=512,
        n_ubatch=512,
        n_threads=args.threads,
        n_threads_batch=args.threads,
        flash_attn=True,
        verbose=False,
    )
    n_vocab = llm.n_vocab()

    def best() -> int:
        logits = llama_cpp.llama_get_logits_ith(llm.ctx, -1)
        return int(np.ctypeslib.as_array(logits, (n_vocab,)).argmax())

    ids = [i * 7919 % n_vocab for i in range(args.prompt)]
    llm.eval(ids[:1])
    best()
    loaded = time.perf_counter()

    llm.reset()
    llm.eval(ids)
    llm.reset()
    started = time.perf_counter()
    llm.eval(ids)
    token = best()
    prefilled = time.perf_counter()
    for _ in range(args.tokens):
        llm.eval([token])
        token = best()
    decoded = time.perf_counter()
    return figures(args, began, loaded, started, prefilled, decoded)


def figures(args: argparse.Namespace, began: float, loaded: float, started: float, prefilled: float, decoded: float):
    """The figures of one run from its time stamps."""
    return {
        "load_seconds": loaded - began,
        "prefill_tps": args.prompt / (prefilled - started),
        "decode_tps": args.tokens / (decoded - prefilled),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0,
    }


def run_side(side: str, argv: list[str]) -> dict[str, float]:
    """One side in a fresh process."""
    command = [sys.executable, __file__, "--side", side, *argv]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    if done.returncode:
        sys.exit(f"{side} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Take turns, print the table."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("file")
    p.add_argument("--threads", type=int, default=os.cpu_count())
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--prompt", type=int, default=512)
    p.add_argument("--tokens", type=int, default=64)
    p.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.side:
        print(json.dumps(timed_zincmetal(args) if args.side == SIDES[0] else timed_peer(args)), flush=True)
        return
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(args.rounds):
        for side in SIDES:
            runs[side].append(run_side(side, sys.argv[1:]))
    print(f"{'':14s}" + "".join(f"{side:>14s}" for side in SIDES) + f"{'ratio':>10s}")
    for name in FIGURES:
        ours, peers = ([r[name] for r in runs[side]] for side in SIDES)
        ratio = median(a / b for a, b in zip(ours, peers, strict=True))
        print(f"{name:14s}{median(ours):14.4g}{median(peers):14.4g}{ratio:10.2f}")


if __name__ == "__main__":
    main()
