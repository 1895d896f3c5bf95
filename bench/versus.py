"""Compares zincmetal with llama.cpp on the same file and threads: load, prefill, decode, memory.

    python bench/versus.py FILE.gguf [--threads 2] [--rounds 5] [--prompt 512] [--tokens 64] [--kv f16]

The two sides take turns, each run in a process of its own. Needs the package `llama-cpp-python` for the peer. Its
sources on PYTHONPATH also do, if LLAMA_CPP_LIB_PATH names a folder with its libraries. Prints the set-up, the medians
and ranges of each side, and the median of the ratios round by round. Any file that both sides open will do, also one of
bench/synthetic.py.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

SIDES = ("zincmetal", "llama.cpp")
KV_TYPES = {"f32": 0, "f16": 1, "q8_0": 8}  # by ggml's number
# Larger is better, except for seconds and bytes.
FIGURES = ("load_seconds", "prefill_tps", "decode_tps", "peak_bytes")
#: Callbacks that the peer's library calls until the process ends.
KEPT: list[Any] = []


def timed_zincmetal(args: argparse.Namespace) -> dict[str, float]:
    """Runs zincmetal once; returns its figures."""
    began = time.perf_counter()
    import numpy as np

    import zincmetal

    context = args.prompt + args.tokens + 8
    model = zincmetal.load(args.file, context=context, threads=args.threads, device="cpu", kv=args.kv)
    ids = (np.arange(args.prompt) * 7919 % model.config.n_vocab).astype(np.int32)
    with model.session() as session:
        session.prefill(ids[:1].tolist())
    loaded = time.perf_counter()

    with model.session() as session:
        session.prefill(ids.tolist())  # makes the plan
    with model.session() as session:
        started = time.perf_counter()
        token = session.prefill(ids.tolist())
        prefilled = time.perf_counter()
        for _ in range(args.tokens):
            token = session.decode(token)
        decoded = time.perf_counter()
    return figures(args, began, loaded, started, prefilled, decoded)


def timed_peer(args: argparse.Namespace) -> dict[str, float]:
    """Runs llama.cpp once, through its Python binding's low-level calls; returns its figures."""
    began = time.perf_counter()
    import llama_cpp
    import numpy as np

    quiet = llama_cpp.llama_log_callback(lambda *_: None)
    KEPT.append(quiet)
    llama_cpp.llama_log_set(quiet, None)
    llm = llama_cpp.Llama(
        args.file,
        n_ctx=args.prompt + args.tokens + 8,
        n_batch=512,
        n_ubatch=512,
        n_threads=args.threads,
        n_threads_batch=args.threads,
        flash_attn=True,
        type_k=KV_TYPES[args.kv],
        type_v=KV_TYPES[args.kv],
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


def figures(
    args: argparse.Namespace, began: float, loaded: float, started: float, prefilled: float, decoded: float
) -> dict[str, float]:
    """Computes the figures of a run from its time stamps."""
    return {
        "load_seconds": loaded - began,
        "prefill_tps": args.prompt / (prefilled - started),
        "decode_tps": args.tokens / (decoded - prefilled),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0,
    }


def run_side(side: str, argv: list[str]) -> dict[str, float]:
    """Runs one side in a fresh process."""
    command = [sys.executable, __file__, "--side", side, *argv]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    if done.returncode:
        sys.exit(f"{side} failed:\n{done.stderr}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Runs the sides in turn and prints the table."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("file")
    p.add_argument("--threads", type=int, default=os.cpu_count())
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--prompt", type=int, default=512)
    p.add_argument("--tokens", type=int, default=64)
    p.add_argument("--kv", choices=KV_TYPES, default="f16", help="type of both sides' K/V caches")
    p.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.side:
        print(json.dumps(timed_zincmetal(args) if args.side == SIDES[0] else timed_peer(args)), flush=True)
        return
    print("\n".join(describe(args)), flush=True)
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(args.rounds):
        for side in SIDES:
            runs[side].append(run_side(side, sys.argv[1:]))
    print(f"{'':14s}" + "".join(f"{side:>12s}{'range':>24s}" for side in SIDES) + f"{'ratio':>8s}")
    for name in FIGURES:
        columns = [[r[name] for r in runs[side]] for side in SIDES]
        ratio = median(a / b for a, b in zip(*columns, strict=True))
        cells = "".join(f"{median(c):12.4g}{f'{min(c):.4g} .. {max(c):.4g}':>24s}" for c in columns)
        print(f"{name:14s}{cells}{ratio:8.2f}")


def describe(args: argparse.Namespace) -> list[str]:
    """Describes the run: versions, file, machine."""
    import llama_cpp

    from zincmetal import gguf

    with gguf.open(args.file) as file:
        arch = file.metadata["general.architecture"]
        layers = file.metadata[f"{arch}.block_count"]
        types = sorted({t.type.name for t in file.tensors.values()})
        size = sum(part.size for part in file.parts)
    return [
        f"{args.file}: {arch}, {layers} layers, {', '.join(types)}, {size / 1e9:.2f} GB",
        f"{args.prompt} prompt tokens, {args.tokens} decoded, K/V in {args.kv}; {args.threads} threads of {cpu_name()}",
        f"{args.rounds} rounds, taking turns with llama-cpp-python {llama_cpp.__version__}",
    ]


def cpu_name() -> str:
    """Returns the processor's name, if the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
