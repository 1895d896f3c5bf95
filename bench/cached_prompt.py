"""Times a long prompt that the prefix cache has: seconds from the call to the first token.

    python bench/cached_prompt.py MODEL.gguf --device cuda --tokens 32768
    python bench/cached_prompt.py MODEL.gguf --tokens 8192 --folder cache

The first call computes the prompt. The others take it over: with the same tokens, then with 20 tokens more.

With ``--folder`` the prompt comes from files, in a process of its own for each time: once alone, and once beside a
sequence that decodes. Then it also prints the longest gap between two tokens of that sequence.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

import zincmetal
from zincmetal.hub.demo import demo_model

WARM = 40  # tokens of the sequence beside, before the prompt comes


def main() -> None:
    """Print the seconds of each call, and what the cache gave."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", nargs="?", help="the demo model if it is left out")
    p.add_argument("--device")
    p.add_argument("--tokens", type=int, default=32768)
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--kv", default="f16")
    p.add_argument("--folder", type=Path)
    p.add_argument("--once", choices=["cold", "alone", "beside"], help=argparse.SUPPRESS)
    args = p.parse_args()
    args.model = args.model or demo_model()
    if args.folder is None:
        from_memory(args)
    elif args.once is None:
        for once in ["cold", *["alone", "beside"] * args.repeats]:
            subprocess.run([sys.executable, *sys.argv, "--once", once], check=True)
    else:
        from_folder(args)


def from_memory(args: argparse.Namespace) -> None:
    """Time a prompt that the pools have."""
    with load(args) as model:
        rng, ids = prompt_of(model, args.tokens)
        for name, prompt in [
            ("cold", ids),
            *[("again", ids)] * args.repeats,
            *[("20 tokens more", [*ids, *rng.integers(1, model.config.n_vocab, 20).tolist()]) for _ in range(3)],
        ]:
            print_first(name, model, prompt)


def from_folder(args: argparse.Namespace) -> None:
    """Time a prompt that files have. Linux has forgotten their contents."""
    for path in args.folder.glob("*/*") if hasattr(os, "posix_fadvise") else ():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with load(args, cache_dir=args.folder) as model:
        _, ids = prompt_of(model, args.tokens + 1)  # whole pages, and a token that is computed
        if args.once != "beside":
            print_first(args.once, model, ids)
            return
        with Beside(model) as beside:
            began, ended = print_first("beside another", model, ids)
        before, during = beside.gaps(began, ended)
        print(f"{'':16s} longest gap of the other: {before * 1e3:.1f} ms before, {during * 1e3:.1f} ms meanwhile")


def load(args: argparse.Namespace, cache_dir: Path | None = None) -> zincmetal.Model:
    """Load the model with room for the prompt and a sequence beside it."""
    return zincmetal.load(args.model, context=args.tokens + 1024, device=args.device, kv=args.kv, cache_dir=cache_dir)


def prompt_of(model: zincmetal.Model, tokens: int) -> tuple[np.random.Generator, list[int]]:
    """Return the prompt, which is the same in all processes."""
    rng = np.random.default_rng(7)
    return rng, rng.integers(1, model.config.n_vocab, tokens).tolist()


def print_first(name: str, model: zincmetal.Model, ids: list[int]) -> tuple[float, float]:
    """Ask for one token, and print its seconds. Return the times of the call and of the token."""
    began = time.perf_counter()
    with model.submit(ids, 1) as handle:
        next(handle)
        first = time.perf_counter()
        result = handle.result()
    print(f"{name:16s} {(first - began) * 1e3:10.1f} ms to the first token; {result.cache}", flush=True)
    return began, first


class Beside:
    """Sequence that decodes until the block ends. ``times`` has that of each token."""

    def __init__(self, model: zincmetal.Model) -> None:
        self.times: list[float] = []
        self._model, self._over, self._warm = model, threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Beside:
        self._thread.start()
        self._warm.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        never = dict.fromkeys(self._model.tokenizer.eog_ids, -1e9)
        with self._model.submit([5, 6, 7], -1, logit_bias=never) as handle:
            for _ in handle:
                self.times.append(time.perf_counter())
                if len(self.times) >= WARM:
                    self._warm.set()
                if self._over.is_set():
                    return

    def gaps(self, began: float, ended: float) -> tuple[float, float]:
        """Return the longest gaps between two tokens before a time span, and within it."""
        times = np.asarray(self.times[WARM // 2 :])
        gaps = np.diff(times)
        before, during = times[1:] < began, (times[1:] >= began) & (times[:-1] <= ended)
        return float(gaps[before].max(initial=0)), float(gaps[during].max(initial=0))


if __name__ == "__main__":
    main()
