"""Latent attention over shuffled pages whose unused rows are poison, and its output in float64 NumPy."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from support.kernel_lab import Guarded, Lab, assert_close, assert_untouched, tiles
from support.kernels.rows import padded, rms_norm, rotate
from support.kv_cache import ALIGN, Array, decoded, poisoned, random_heads
from support.step_rows import Run, StepRows

F64 = NDArray[np.float64]


@dataclass(frozen=True)
class Shape:
    """Sizes of one dispatch: made for ``rows`` rows, of which a step has these runs."""

    latent: int
    n_rot: int
    n_head: int
    rows: int
    runs: tuple[Run, ...]
    n_still: int = 24

    @property
    def n_tokens(self) -> int:
        return sum(run.n for run in self.runs)

    @property
    def width(self) -> int:
        """Elements of a row of the cache."""
        return self.latent + self.n_rot

    def __str__(self) -> str:
        runs = "-".join(f"s{run.sequence}.{run.pos}+{run.n}" for run in self.runs)
        return f"{self.latent}+{self.n_rot}x{self.n_head}-T{self.n_tokens}of{self.rows}-{runs}"


def latent_attention(q: F64, rows: F64, latent: int, pos: int, scale: float) -> F64:
    """Computes attention of q [T, n_head, width] over rows [n_kv, width], whose first ``latent`` columns are values.

    Row t sees the positions up to pos + t.
    """
    scores = np.einsum("thd,kd->htk", q, rows) * scale
    scores = np.where(pos + np.arange(len(q))[:, None] >= np.arange(len(rows)), scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.asarray(np.einsum("htk,kd->thd", weights, rows[:, :latent]))


class LatentAttention:
    """One dispatch: random queries and a random cache, NaN where no row looks, and the expected output."""

    def __init__(self, lab: Lab, shape: Shape, kv: str, q_scale: float = 1.0) -> None:
        self.lab, self.shape, self.kv = lab, shape, kv
        n, self.scale = shape.n_tokens, float(np.float32(shape.width**-0.5))
        self.batch = StepRows(lab, shape.runs, shape.rows)
        self.q = padded(lab, shape.rows, n, shape.n_head, shape.latent, scale=q_scale)
        self.q_rot = padded(lab, shape.rows, n, shape.n_head, shape.n_rot, scale=q_scale)
        stored = poisoned(kv, self.batch.cache_rows, 1, shape.width)
        self.want = sum((self._fill(stored, s) for s in sorted(self.batch.tables)), np.zeros((n, *self.q.shape[1:])))
        self.cache = lab.input(stored, align=ALIGN[kv])
        self.inputs = self._bindings()

    def _fill(self, stored: Array, sequence: int) -> F64:
        """Fills the places of a sequence that its rows see; returns the output of its rows, and 0 for other rows."""
        shape, first = self.shape, 0
        used = max(run.end for run in shape.runs if run.sequence == sequence)
        heads = random_heads(self.lab, self.kv, used, 1, shape.width)
        stored[self.batch.places(sequence, 0, used)] = heads
        rows, want = decoded(self.kv, heads)[:, 0], np.zeros((shape.n_tokens, *self.q.shape[1:]))
        for run in shape.runs:
            mine, first = slice(first, first + run.n), first + run.n
            if run.sequence == sequence:
                q = np.concatenate([self.q[mine], self.q_rot[mine]], axis=2).astype(np.float64)
                want[mine] = latent_attention(q, rows[: run.end], shape.latent, run.pos, self.scale)
        return want

    def _bindings(self) -> list[Guarded]:
        step = [self.batch.input(self.lab, name) for name in ("step", "rows", "pages")]
        return [*step, self.lab.input(self.q), self.lab.input(self.q_rot), self.cache]

    def alone(self, t: int) -> LatentAttention:
        """Makes the dispatch of row t alone, over the same cache."""
        other: LatentAttention = object.__new__(LatentAttention)
        other.__dict__.update(self.__dict__)
        other.batch = self.batch.alone(t)
        other.shape = replace(self.shape, rows=1, runs=other.batch.runs)
        other.q, other.q_rot, other.want = self.q[t : t + 1], self.q_rot[t : t + 1], self.want[t : t + 1]
        other.inputs = other._bindings()
        return other

    @property
    def latent_class(self) -> int:
        """The class of the kernel: it serves latent vectors up to its class."""
        return min(c for c in self.lab.core.size_classes()["LATENT_CLASSES"] if c >= self.shape.latent)

    def params(self, n_split: int = 1) -> dict[str, float]:
        shape = self.shape
        sizes = {"n_head": shape.n_head, "latent": shape.latent, "n_rot": shape.n_rot}
        return {**sizes, "n_split": n_split, "scale": self.scale}

    def run(self, groups: int | None = None) -> Guarded:
        """Runs the kernel with so many threadgroups (default: one for each tile); returns the output."""
        shape, sizes = self.shape, self.lab.core.shapes()
        out = self.lab.output(shape.rows, shape.n_head, shape.latent)
        grid = (groups or tiles(shape.rows * shape.n_head, sizes["ATTENTION_LATENT_QUERIES"]), 1)
        name, threads = f"attention_latent_{self.kv}_{self.latent_class}", sizes["ATTENTION_LATENT_THREADS"]
        self.lab.run(name, self.params(), "LatentParams", [*self.inputs, out], grid, threads)
        return out

    def run_split(self, n_split: int) -> Guarded:
        """Runs attention_latent_split, then attention_merge; returns the output."""
        shape, lab, n = self.shape, self.lab, self.shape.n_tokens
        sizes = lab.core.shapes()
        parts = lab.output(shape.rows, shape.n_head, n_split, shape.latent + 4)
        grid = (shape.rows * tiles(shape.n_head, sizes["ATTENTION_LATENT_QUERIES"]), n_split)
        name, threads = f"attention_latent_split_{self.kv}_{self.latent_class}", sizes["ATTENTION_LATENT_THREADS"]
        lab.run(name, self.params(n_split), "LatentParams", [*self.inputs, parts], grid, threads)
        for row, pos in zip(parts.array, self.batch.positions.tolist(), strict=False):
            assert_untouched(row[:, min(n_split, pos // sizes["ATTENTION_SPLIT_KEYS"] + 1) :])
        assert_untouched(parts.array[n:])
        parts.array[n:] = 1  # a NaN read here would look like an untouched output
        out = lab.output(shape.rows, shape.n_head, shape.latent)
        bindings = [*self.inputs[:2], lab.input(parts.array), self.inputs[3], self.inputs[3], out]
        heads = {"n_head": shape.n_head, "n_head_kv": 1, "head_dim": shape.latent, "n_split": n_split}
        params = dict.fromkeys(lab.core.params_dtype("AttentionParams").names or (), 0) | heads
        name = "attention_merge" if shape.latent <= 256 else "attention_merge_512"
        lab.run(
            name, params, "AttentionParams", bindings, (shape.n_head, shape.rows), sizes["ATTENTION_DECODE_THREADS"]
        )
        return out

    def check(self, out: Guarded, rel: float = 4e-6) -> None:
        n = self.shape.n_tokens
        assert_close(out.array[:n], self.want, rel)
        assert_untouched(out.array[n:])


class RopeLatent:
    """One dispatch of rope_latent: random inputs on a device, poisoned outputs, and their expected values."""

    def __init__(self, lab: Lab, shape: Shape, kv: str, magnitude: float = 1.25, temperature: float = 0.1) -> None:
        self.lab, self.shape, self.kv, self.magnitude = lab, shape, kv, magnitude
        self.temperature = temperature
        self.batch = StepRows(lab, shape.runs, shape.rows)
        n, still = shape.n_tokens, shape.n_still
        q = padded(lab, shape.rows, n, shape.n_head, still + shape.n_rot)
        kv_rows = padded(lab, shape.rows, n, shape.width)
        norm = lab.normal(shape.latent)
        freqs = (10_000.0 ** (-np.arange(shape.n_rot // 2) * 2 / shape.n_rot)).astype(np.float32)
        angles = (self.batch.positions.astype(np.float32)[:, None] * freqs).astype(np.float64)
        scale = (1 + temperature * np.log(1 + self.batch.positions // 50))[:, None, None]
        self.want_still = q[:n, :, :still] * scale
        self.want_rot = rotate(q[:n, :, still:] * scale, angles, "norm", magnitude)
        rows = kv_rows[:n].astype(np.float64)
        latent = rms_norm(rows[:, : shape.latent], norm.astype(np.float64), float(np.float32(1e-6)))
        rotated = rotate(rows[:, None, shape.latent :], angles, "norm", magnitude)[:, 0]
        self.want_rows = np.concatenate([latent, rotated], axis=1)
        self.q_still = lab.output(shape.rows, shape.n_head, still)
        self.q_rot = lab.output(shape.rows, shape.n_head, shape.n_rot)
        self.cache = lab.in_out(poisoned(kv, self.batch.cache_rows, 1, shape.width), align=ALIGN[kv])
        step = [self.batch.input(lab, name) for name in ("step", "rows", "pages")]
        inputs = [lab.input(q), lab.input(kv_rows), lab.input(norm, align=4), lab.input(freqs, align=4)]
        self.bindings = [*step, *inputs, self.q_still, self.q_rot, self.cache]

    def run(self) -> None:
        shape = self.shape
        sizes = {"n_head": shape.n_head, "n_still": shape.n_still, "latent": shape.latent, "n_rot": shape.n_rot}
        growth = {"temperature": self.temperature, "temperature_length": 50}
        params = {**sizes, "eps": 1e-6, "magnitude": self.magnitude, **growth}
        grid = (shape.n_head + 1, shape.rows)
        self.lab.run(f"rope_latent_{self.kv}", params, "RopeLatentParams", self.bindings, grid, 32)
