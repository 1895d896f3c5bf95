"""Times a long prompt that the prefix cache has: seconds from the call to the first token.

    python bench/cached_prompt.py MODEL.gguf --device cuda --tokens 32768

The first call computes the prompt. The others take it over: with the same tokens, then with 20 tokens more.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

import zincmetal


def main() -> None:
    """Print the seconds of each call, and what the cache gave."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model")
    p.add_argument("--device")
    p.add_argument("--tokens", type=int, default=32768)
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--kv", default="f16")
    args = p.parse_args()
    with zincmetal.load(args.model, context=args.tokens + 1024, device=args.device, kv=args.kv) as model:
        rng = np.random.default_rng(7)
        ids = rng.integers(1, model.config.n_vocab, args.tokens).tolist()
        for name, prompt in [
            ("cold", ids),
            *[("again", ids)] * args.repeats,
            *[("20 tokens more", [*ids, *rng.integers(1, model.config.n_vocab, 20).tolist()]) for _ in range(3)],
        ]:
            began = time.perf_counter()
            with model.submit(prompt, 1) as handle:
                next(handle)
                first = time.perf_counter() - began
                result = handle.result()
            print(f"{name:16s} {first * 1e3:10.1f} ms to the first token; {result.cache}")


if __name__ == "__main__":
    main()
