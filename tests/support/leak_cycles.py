"""``python -m support.leak_cycles`` under AddressSanitizer: loads, asks and closes a model again and again.

Then LeakSanitizer looks for memory that nothing points to, without waiting for the end of the process. The exit status
is 1 if it finds some. With ``--plant`` it must find the memory that is lost on purpose.
"""

from __future__ import annotations

import ctypes
import gc
import sys

import zincmetal
from support.paths import DATA

CYCLES = 5
FILES = ("llama-q4_k_m.gguf", "qwen35-q4_k_m.gguf")


def cycle(name: str) -> None:
    """Load a model, generate, cancel a stream halfway, fail a call, and close."""
    with zincmetal.load(DATA / name, device="cpu", context=256, cache_dir=None) as model:
        model.generate([1, 2, 3], max_tokens=4)
        stream = model.stream_generate([1, 2, 3], max_tokens=50)
        next(iter(stream))
        try:
            model.generate([10**9], max_tokens=1)
        except zincmetal.ZincError:
            pass
        else:
            raise AssertionError("a token outside the vocabulary was taken")


def main() -> int:
    """Runs the cycles, plants a leak if asked to, and returns what LeakSanitizer says."""
    for _ in range(CYCLES):
        for name in FILES:
            cycle(name)
    gc.collect()
    process = ctypes.CDLL(None)
    if "--plant" in sys.argv:
        process.malloc.restype = ctypes.c_void_p
        process.malloc(12345)
    found = int(process["__lsan_do_recoverable_leak_check"]())
    print(f"{CYCLES} cycles of {len(FILES)} models: {'leaks' if found else 'no leak'}", flush=True)
    return int(found != 0)


if __name__ == "__main__":
    sys.exit(main())
