"""Attention over shuffled pages whose unused rows are poison, and its output in float64 NumPy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from support.kernel_lab import Guarded, Lab, assert_close, assert_untouched, tiles
from support.kv_cache import ALIGN, Pages, decoded, poisoned, random_heads

F64 = NDArray[np.float64]


@dataclass(frozen=True)
class Shape:
    """Sizes of one dispatch: made for ``rows`` rows, of which a step has ``n_tokens``, the first at ``pos``.

    A row sees the last ``window`` positions, or all if it is 0. ``gate``: the heads are gated.
    """

    head_dim: int
    n_head_kv: int
    group: int
    rows: int
    n_tokens: int
    pos: int
    window: int = 0
    gate: bool = False

    @property
    def n_head(self) -> int:
        return self.n_head_kv * self.group

    @property
    def n_kv(self) -> int:
        return self.pos + self.n_tokens

    @property
    def first_seen(self) -> int:
        """The first position that any row sees."""
        return max(0, self.pos + 1 - self.window) if self.window else 0

    def n_parts(self, t: int, keys: int, n_split: int) -> int:
        """Counts the parts of row t's keys, which come in runs of ``keys``. A row past the step's tokens has none."""
        last = self.pos + t
        first = max(0, last + 1 - self.window) if self.window else 0
        return min(n_split, last // keys - first // keys + 1) if t < self.n_tokens else 0

    def __str__(self) -> str:
        text = f"hd{self.head_dim}-kv{self.n_head_kv}x{self.group}-T{self.n_tokens}of{self.rows}-pos{self.pos}"
        return text + (f"-window{self.window}" if self.window else "") + ("-gate" if self.gate else "")


def causal_attention(q: F64, k: F64, v: F64, pos: int, scale: float, window: int = 0) -> F64:
    """Computes attention of q [T, n_head, head_dim] over k and v [n_kv, n_head_kv, head_dim].

    Row t sees the positions up to pos + t.
    """
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    scores = np.einsum("thd,khd->htk", q, k) * scale
    age = pos + np.arange(len(q))[:, None] - np.arange(len(k))
    scores = np.where((age >= 0) & ((age < window) | (window == 0)), scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.asarray(np.einsum("htk,khd->thd", weights, v))


class Attention:
    """One dispatch: random q, k and v on a device, NaN where no row looks, and the expected output.

    ``climb``: the difference between a key's score and the score of the key before it.
    """

    def __init__(
        self, lab: Lab, shape: Shape, kv: str, q_scale: float = 1.0, k_shift: float = 0.0, climb: float = 0.0
    ) -> None:
        self.lab, self.shape, self.kv = lab, shape, kv
        n, used, hd = shape.n_tokens, shape.n_kv, shape.head_dim
        q, gates = (np.full((shape.rows, shape.n_head, width), np.nan, np.float32) for width in (hd, 2 * hd))
        q[:n] = lab.normal(*q[:n].shape, scale=q_scale)
        gates[:n, :, hd:] = lab.normal(n, shape.n_head, hd, scale=3)
        k, v = (random_heads(lab, kv, used, shape.n_head_kv, hd) for _ in range(2))
        if k_shift:
            k += k.dtype.type(k_shift)
        if climb:
            q[:n] = 1
            k += (climb * hd**-0.5 * np.arange(used)).astype(k.dtype)[:, None, None]
        self.scale = float(np.float32(hd**-0.5))
        self.want = causal_attention(
            q[:n].astype(np.float64), decoded(kv, k), decoded(kv, v), shape.pos, self.scale, shape.window
        )
        if shape.gate:
            self.want /= 1 + np.exp(-gates[:n, :, hd:].astype(np.float64))
        pages = Pages(lab, used)
        seen = slice(shape.first_seen, used)
        caches = []
        for heads in (k, v):
            cache = poisoned(kv, pages.cache_rows, shape.n_head_kv, hd)
            cache[pages.rows(seen.start, seen.stop)] = heads[seen]
            caches.append(lab.input(cache, align=ALIGN[kv]))
        q_input = lab.input(q)
        self.inputs = [
            lab.step(n, shape.pos),
            lab.input(pages.table, align=4),
            q_input,
            *caches,
            lab.input(gates) if shape.gate else q_input,
        ]

    def launch(self, kernel: str) -> tuple[tuple[int, int], int]:
        """Returns the grid and the threads."""
        shapes = self.lab.core.shapes()
        if kernel == "attention_decode":
            return (self.shape.n_head, self.shape.rows), shapes["ATTENTION_DECODE_THREADS"]
        queries = shapes["ATTENTION_PREFILL_QUERIES_256" if self.head_class == 256 else "ATTENTION_PREFILL_QUERIES"]
        groups = tiles(self.shape.rows, queries)
        return (self.shape.n_head, groups), shapes["ATTENTION_PREFILL_THREADS"]

    def run(self, kernel: str, grid: tuple[int, int] | None = None, threads: int | None = None) -> Guarded:
        shape = self.shape
        usual_grid, usual_threads = self.launch(kernel)
        out = self.lab.output(shape.rows, shape.n_head, shape.head_dim)
        name = f"{kernel}_{self.kv}_{self.head_class}"
        bindings = [*self.inputs, out]
        self.lab.run(name, self.params(), "AttentionParams", bindings, grid or usual_grid, threads or usual_threads)
        return out

    def run_split(self, n_split: int, heads_at_once: int | None = None, merge_threads: int | None = None) -> Guarded:
        """Runs attention_split, then attention_merge; returns the output."""
        shape, params = self.shape, self.params(n_split)
        parts = self.lab.output(shape.rows, shape.n_head, n_split, shape.head_dim + 4)
        grid = (shape.n_head_kv, n_split, shape.rows)
        name, threads = f"attention_split_{self.kv}_{self.head_class}", 32 * (heads_at_once or shape.group)
        self.lab.run(name, params, "AttentionParams", [*self.inputs[:5], parts], grid, threads)
        for t, row in enumerate(parts.array):
            assert_untouched(row[:, shape.n_parts(t, self.lab.core.shapes()["ATTENTION_SPLIT_KEYS"], n_split) :])
        parts.array[shape.n_tokens :] = 1  # a NaN read here would look like an untouched output
        out = self.lab.output(shape.rows, shape.n_head, shape.head_dim)
        bindings = [self.inputs[0], self.lab.input(parts.array), self.inputs[5], out]
        threads = merge_threads or self.lab.core.shapes()["ATTENTION_DECODE_THREADS"]
        self.lab.run("attention_merge", params, "AttentionParams", bindings, (shape.n_head, shape.rows), threads)
        return out

    @property
    def head_class(self) -> int:
        """The class of the kernel: it serves head sizes up to its class."""
        return min(c for c in self.lab.core.size_classes()["HEAD_CLASSES"] if c >= self.shape.head_dim)

    def params(self, n_split: int = 1) -> dict[str, float]:
        shape = self.shape
        return {
            "n_head": shape.n_head,
            "n_head_kv": shape.n_head_kv,
            "head_dim": shape.head_dim,
            "window": shape.window,
            "gate_stride": 2 * shape.head_dim if shape.gate else 0,
            "n_split": n_split,
            "scale": self.scale,
        }

    # exp enlarges the error of a score of 256 products: one random case in thousands has 2.4e-6.
    def check(self, out: Guarded, rel: float = 4e-6) -> None:
        n = self.shape.n_tokens
        assert_close(out.array[:n], self.want, rel)
        assert_untouched(out.array[n:])
