"""Whether a model fits this machine, and how fast it can be: before anything of it is downloaded.

The planner plans a stand-in for the file, so the memory is what ``load`` would check. The speed is a projection: each
token reads the weights that it computes with, so the bandwidth of the memory bounds the tokens a second. Every model
reaches less, and a small one much less.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .. import gguf
from ..device import backend
from ..plan.estimate import MemoryEstimate, device_budget
from ..plan.planner import Planner
from ..plan.target import Target
from .catalogue import Entry, Offer
from .shape import stand_in

#: GB/s of memory as the makers publish them, by the beginning of a device's name: the longest that fits counts. Of
#: chips that are sold with several, the least.
PUBLISHED = {
    "Apple M1": 68,
    "Apple M1 Pro": 200,
    "Apple M1 Max": 400,
    "Apple M1 Ultra": 800,
    "Apple M2": 100,
    "Apple M2 Pro": 200,
    "Apple M2 Max": 400,
    "Apple M2 Ultra": 800,
    "Apple M3": 100,
    "Apple M3 Pro": 150,
    "Apple M3 Max": 300,
    "Apple M3 Ultra": 819,
    "Apple M4": 120,
    "Apple M4 Pro": 273,
    "Apple M4 Max": 410,
    "Apple M5": 153,
    "NVIDIA H100": 2000,
    "NVIDIA H200": 4800,
    "NVIDIA A100": 1555,
    "NVIDIA GeForce RTX 3090": 936,
    "NVIDIA GeForce RTX 4090": 1008,
}
PROBE_BYTES, PROBES = 96 << 20, 3


@dataclass(frozen=True)
class Bandwidth:
    """Bandwidth of a device's memory in GB/s, and where the number is from: "measured", "published" or "given"."""

    gb_s: float
    source: str


@dataclass(frozen=True)
class Fit:
    """Verdict on one file for one machine. ``memory`` is None if the weights alone are more than the budget.

    ``token_bytes`` are the bytes that a token reads at the start of a context, ``kv_read`` those of the K/V at its end.
    """

    nbytes: int
    budget: int
    memory: MemoryEstimate | None = None
    token_bytes: int = 0
    kv_read: int = 0
    bandwidth: Bandwidth | None = None

    @property
    def fits(self) -> bool:
        """True if one sequence of the context fits."""
        return self.memory is not None and self.memory.fits()

    @property
    def largest_context(self) -> int:
        """Longest context that fits, in tokens; 0 if none does."""
        return self.memory.largest_context if self.memory else 0

    @property
    def verdict(self) -> str:
        """Verdict in a few words."""
        if self.fits:
            return "fits"
        return f"fits up to {self.largest_context} tokens" if self.largest_context else "does not fit"

    @property
    def tokens_per_second(self) -> tuple[float, float] | None:
        """Most tokens a second at the start of the context and at its end: a projection. None if nothing is known."""
        if self.bandwidth is None or not self.token_bytes:
            return None
        rate = self.bandwidth.gb_s * 1e9
        return rate / self.token_bytes, rate / (self.token_bytes + self.kv_read)


@dataclass(frozen=True)
class Machine:
    """Device that verdicts are for."""

    name: str
    target: Target
    bandwidth: Bandwidth | None

    @classmethod
    def of(cls, device: str | None = None, gb_s: float | None = None) -> Machine:
        """Open a device, and find its bandwidth: as given in GB/s, published, or on a CPU measured in about 0.1 s."""
        core, opened = backend.open_device(device)
        info = opened.info
        found = Bandwidth(gb_s, "given") if gb_s is not None else published(info["name"])
        if found is None and info["backend"] == "cpu":
            found = measure()
        return cls(info["name"], Target.of(core, info), found)

    @property
    def budget(self) -> int:
        """Bytes that a model may take here."""
        return device_budget(self.target.free_bytes)

    def fit(self, entry: Entry, offer: Offer, context: int | None = None, kv: str = "f16") -> Fit:
        """Judge files of the catalogue for a context (default: 4096 tokens, or the model's if less)."""
        if offer.nbytes > self.budget:
            return Fit(offer.nbytes, self.budget)
        return self._planned(stand_in(entry.shape, offer.quant, entry.name), context, kv)

    def fit_file(self, path: Path, context: int | None = None, kv: str = "f16") -> Fit:
        """Judge a file. Raises GGUFError and UnsupportedModelError for a file that does not run."""
        with gguf.open(path) as file:
            return self._planned(file, context, kv)

    def judge(self, header: Path) -> None:
        """Refuse a file that does not run here: what a download does when the header has arrived.

        Raises UnsupportedModelError, and OutOfMemoryError if not even the shortest context fits.
        """
        memory = self.fit_file(header).memory
        if memory and not memory.largest_context:
            memory.check()

    def _planned(self, file: gguf.File, context: int | None, kv: str) -> Fit:
        planner = Planner(file, self.target, context, kv)
        memory = planner.memory((1, planner.prompt_rows))
        plan = planner.plan()
        token = sum(plan.weight_bytes().values()) + plan.recurrent_bytes()
        nbytes = sum(t.nbytes for t in file.tensors.values())
        return Fit(nbytes, memory.budget, memory, token, planner.kv_read(), self.bandwidth)


def published(name: str) -> Bandwidth | None:
    """Return the bandwidth that the maker of a device publishes, or None."""
    fitting = [known for known in PUBLISHED if name == known or name.startswith((f"{known} ", f"{known},"))]
    return Bandwidth(PUBLISHED[max(fitting, key=len)], "published") if fitting else None


def measure() -> Bandwidth | None:
    """Measure how fast all cores together read memory: the best of a few short runs. None: they got no threads."""
    threads = os.cpu_count() or 1
    blocks = [np.ones(PROBE_BYTES // threads // 4, np.float32) for _ in range(threads)]
    try:
        with ThreadPoolExecutor(threads) as pool:
            seconds = list(_timed(pool, blocks))
    except RuntimeError:  # the system starts no thread now
        return None
    return Bandwidth(sum(b.nbytes for b in blocks) / min(seconds) / 1e9, "measured")


def _timed(pool: ThreadPoolExecutor, blocks: list[NDArray[np.float32]]) -> Iterator[float]:
    """Yield the seconds of each run. A maximum reads every number, and computes next to nothing."""
    for _ in range(PROBES):
        began = time.perf_counter()
        list(pool.map(np.max, blocks))
        yield time.perf_counter() - began
