"""Attention over shuffled pages whose unused rows are poison, and its output in float64 NumPy."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from support.kernel_lab import Guarded, Lab, assert_close, assert_untouched, tiles
from support.kv_cache import ALIGN, Array, decoded, poisoned, random_heads
from support.step_rows import Run, StepRows

F64 = NDArray[np.float64]


@dataclass(frozen=True)
class Shape:
    """Sizes of one dispatch: made for ``rows`` rows, of which a step has these runs.

    A row sees the last ``window`` positions, or all if it is 0. ``gate``: the heads are gated, by the second halves of
    heads [q | gate], or by heads of gates ``alone``. ``both_ways``: a row sees the later rows of its
    run too, and a window reaches half of it to each side. ``sinks``: each head has a sink.
    """

    head_dim: int
    n_head_kv: int
    group: int
    rows: int
    runs: tuple[Run, ...]
    window: int = 0
    gate: bool = False
    alone: bool = False
    both_ways: bool = False
    sinks: bool = False

    @classmethod
    def of_one(
        cls,
        head_dim: int,
        n_head_kv: int,
        group: int,
        rows: int,
        n_tokens: int,
        pos: int,
        window: int = 0,
        gate: bool = False,
        sinks: bool = False,
    ) -> Shape:
        """Makes the shape of one sequence, whose first row is at ``pos``."""
        return cls(head_dim, n_head_kv, group, rows, (Run(0, pos, n_tokens),), window, gate, sinks=sinks)

    @property
    def gate_width(self) -> int:
        return self.head_dim if self.alone else 2 * self.head_dim

    @property
    def n_head(self) -> int:
        return self.n_head_kv * self.group

    @property
    def n_tokens(self) -> int:
        return sum(run.n for run in self.runs)

    def first_seen(self, pos: int) -> int:
        """Returns the first position that the row at ``pos`` sees."""
        if self.both_ways:
            return max(0, pos - self.window // 2) if self.window else 0
        return max(0, pos + 1 - self.window) if self.window else 0

    def n_parts(self, pos: int, keys: int, n_split: int) -> int:
        """Counts the parts of the keys of the row at ``pos``, which come in groups of ``keys``."""
        return min(n_split, pos // keys - self.first_seen(pos) // keys + 1)

    def __str__(self) -> str:
        runs = "-".join(f"s{run.sequence}.{run.pos}+{run.n}" for run in self.runs)
        text = f"hd{self.head_dim}-kv{self.n_head_kv}x{self.group}-T{self.n_tokens}of{self.rows}-{runs}"
        return (
            text
            + (f"-window{self.window}" if self.window else "")
            + "-gate" * self.gate
            + "alone" * self.alone
            + "-both" * self.both_ways
            + "-sinks" * self.sinks
        )


def attention(
    q: F64,
    k: F64,
    v: F64,
    pos: int,
    scale: float,
    window: int = 0,
    both_ways: bool = False,
    sinks: F64 | None = None,
) -> F64:
    """Computes attention of q [T, n_head, head_dim] over k and v [n_kv, n_head_kv, head_dim].

    Row t sees the positions up to pos + t, or with ``both_ways`` all, within its window. ``sinks`` [n_head] are scores
    without a value.
    """
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    scores = np.einsum("thd,khd->htk", q, k) * scale
    age = pos + np.arange(len(q))[:, None] - np.arange(len(k))
    seen = np.abs(age) <= window // 2 if both_ways else (age >= 0) & (age < window)
    scores = np.where(seen if window else (age >= 0) | both_ways, scores, -np.inf)
    sink = np.full(len(scores), -np.inf) if sinks is None else sinks
    sink = np.broadcast_to(sink[:, None, None], (*scores.shape[:2], 1))
    largest = np.maximum(scores.max(axis=-1, keepdims=True), sink)
    weights = np.exp(scores - largest)
    weights /= weights.sum(axis=-1, keepdims=True) + np.exp(sink - largest)
    return np.asarray(np.einsum("htk,khd->thd", weights, v))


class Attention:
    """One dispatch: random q, k and v on a device, NaN where no row looks, and the expected output.

    ``climb``: the difference between a key's score and the score of the key before it.
    """

    def __init__(
        self,
        lab: Lab,
        shape: Shape,
        kv: str,
        q_scale: float = 1.0,
        k_shift: float = 0.0,
        climb: float = 0.0,
    ) -> None:
        self.lab, self.shape, self.kv = lab, shape, kv
        n, hd = shape.n_tokens, shape.head_dim
        self.batch = StepRows(lab, shape.runs, shape.rows)
        widths = hd, shape.gate_width
        self.q, self.gates = (np.full((shape.rows, shape.n_head, width), np.nan, np.float32) for width in widths)
        self.q[:n] = 1 if climb else lab.normal(n, shape.n_head, hd, scale=q_scale)
        self.gates[:n, :, -hd:] = lab.normal(n, shape.n_head, hd, scale=3)
        self.scale = float(np.float32(hd**-0.5))
        self.sinks = lab.normal(shape.n_head, scale=3) if shape.sinks else None
        stored = [poisoned(kv, self.batch.cache_rows, shape.n_head_kv, hd) for _ in range(2)]
        wants = [self._fill(stored, sequence, k_shift, climb) for sequence in sorted(self.batch.tables)]
        self.want = sum(wants, np.zeros((n, shape.n_head, hd)))
        if shape.gate:
            self.want /= 1 + np.exp(-self.gates[:n, :, -hd:].astype(np.float64))
        self.caches = [lab.input(cache, align=ALIGN[kv]) for cache in stored]
        self.inputs = self._bindings(self.batch, self.q, self.gates)

    def _fill(self, stored: list[Array], sequence: int, k_shift: float, climb: float) -> F64:
        """Fills the places of a sequence that its rows see; returns the output of its rows, and 0 for other rows."""
        shape, batch, hd, first = self.shape, self.batch, self.shape.head_dim, 0
        runs = [run for run in shape.runs if run.sequence == sequence]
        used, begin = max(run.end for run in runs), min(shape.first_seen(run.pos) for run in runs)
        k, v = (random_heads(self.lab, self.kv, used, shape.n_head_kv, hd) for _ in range(2))
        if k_shift:
            k += k.dtype.type(k_shift)
        if climb:
            k += (climb * hd**-0.5 * np.arange(used)).astype(k.dtype)[:, None, None]
        for cache, heads in zip(stored, (k, v), strict=True):
            cache[batch.places(sequence, begin, used)] = heads[begin:]
        want = np.zeros((shape.n_tokens, shape.n_head, hd))
        keys, values = decoded(self.kv, k), decoded(self.kv, v)
        for run in shape.runs:
            rows, first = slice(first, first + run.n), first + run.n
            if run.sequence == sequence:
                q = self.q[rows].astype(np.float64)
                seen, windowed = (keys[: run.end], values[: run.end]), (shape.window, shape.both_ways)
                sinks = None if self.sinks is None else self.sinks.astype(np.float64)
                want[rows] = attention(q, *seen, run.pos, self.scale, *windowed, sinks)
        return want

    def _bindings(self, batch: StepRows, q: Array, gates: Array) -> list[Guarded]:
        q_input = self.lab.input(q)
        step = [batch.input(self.lab, name) for name in ("step", "rows", "pages")]
        gate = self.lab.input(gates) if self.shape.gate else q_input
        return [*step, q_input, *self.caches, gate, q_input if self.sinks is None else self.lab.input(self.sinks, 4)]

    def alone(self, t: int) -> Attention:
        """Makes the dispatch of row t alone, over the same caches."""
        other: Attention = object.__new__(Attention)
        other.__dict__.update(self.__dict__)
        other.batch = self.batch.alone(t)
        other.shape = replace(self.shape, rows=1, runs=other.batch.runs)
        other.q, other.gates, other.want = self.q[t : t + 1], self.gates[t : t + 1], self.want[t : t + 1]
        other.inputs = other._bindings(other.batch, other.q, other.gates)
        return other

    def launch(self, kernel: str) -> tuple[tuple[int, int], int]:
        """Returns the grid and the threads."""
        shapes = self.lab.core.shapes()
        if kernel == "attention_decode":
            return (self.shape.n_head, self.shape.rows), shapes["ATTENTION_DECODE_THREADS"]
        queries = shapes["ATTENTION_PREFILL_QUERIES" + (f"_{self.head_class}" if self.head_class > 128 else "")]
        groups = tiles(self.shape.rows, queries)
        return (self.shape.n_head, groups), shapes["ATTENTION_PREFILL_THREADS"]

    def run(
        self,
        kernel: str,
        grid: tuple[int, int] | None = None,
        threads: int | None = None,
        *,
        out: Guarded | None = None,
        singles: bool = False,
    ) -> Guarded:
        """Runs a kernel; returns the output. ``singles``: decode takes only single rows, prefill only the others."""
        shape = self.shape
        usual_grid, usual_threads = self.launch(kernel)
        out = out or self.lab.output(shape.rows, shape.n_head, shape.head_dim)
        kernel = "attention_prefill" if self.kv == "f32" and kernel.startswith("attention_prefill") else kernel
        name, params = f"{kernel}_{self.kv}_{self.head_class}", {**self.params(), "singles": singles}
        self.lab.run(name, params, "AttentionParams", [*self.inputs, out], grid or usual_grid, threads or usual_threads)
        return out

    def run_split(self, n_split: int, heads_at_once: int | None = None, merge_threads: int | None = None) -> Guarded:
        """Runs attention_split, then attention_merge; returns the output."""
        shape, params, n = self.shape, self.params(n_split), self.shape.n_tokens
        parts = self.lab.output(shape.rows, shape.n_head, n_split, shape.head_dim + 4)
        grid = (shape.n_head_kv, n_split, shape.rows)
        name, threads = f"attention_split_{self.kv}_{self.head_class}", 32 * (heads_at_once or shape.group)
        self.lab.run(name, params, "AttentionParams", [*self.inputs[:6], parts], grid, threads)
        keys = self.lab.core.shapes()["ATTENTION_SPLIT_KEYS"]
        for row, pos in zip(parts.array, self.batch.positions.tolist(), strict=False):
            assert_untouched(row[:, shape.n_parts(pos, keys, n_split) :])
        assert_untouched(parts.array[n:])
        parts.array[n:] = 1  # a NaN read here would look like an untouched output
        out = self.lab.output(shape.rows, shape.n_head, shape.head_dim)
        bindings = [*self.inputs[:2], self.lab.input(parts.array), *self.inputs[6:], out]
        threads = merge_threads or self.lab.core.shapes()["ATTENTION_DECODE_THREADS"]
        merge = "attention_merge" if shape.head_dim <= 256 else "attention_merge_512"
        self.lab.run(merge, params, "AttentionParams", bindings, (shape.n_head, shape.rows), threads)
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
            "gate_stride": shape.gate_width if shape.gate else 0,
            "n_split": n_split,
            "singles": 0,
            "both_ways": shape.both_ways,
            "has_sinks": int(shape.sinks),
            "scale": self.scale,
        }

    def tolerance(self, kernel: str) -> float:
        """Returns the error of a kernel, relative to the norm. A prompt's operands are halves, but natively."""
        if kernel == "attention_prefill" and self.kv != "f32" and self.lab.lane != "native":
            return 1e-3
        return 4e-6

    # exp enlarges the error of a score of 256 products: one random case in thousands has 2.4e-6.
    def check(self, out: Guarded, rel: float = 4e-6) -> None:
        n = self.shape.n_tokens
        assert_close(out.array[:n], self.want, rel)
        assert_untouched(out.array[n:])
