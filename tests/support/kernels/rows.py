"""RMSNorm, RoPE with K/V write and the element-wise kernels: launches, and the expected outputs in float64 NumPy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from support.kernel_lab import Guarded, Lab, assert_close, assert_untouched, tiles
from support.kv_cache import ALIGN, Array, decoded, poisoned
from support.step_rows import Run, StepRows
from zincmetal.check.inputs import POISON
from zincmetal.gguf import quants

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]


def padded(lab: Lab, rows: int, n_tokens: int, *width: int, scale: float = 1.0) -> F32:
    """Makes inputs [rows, *width]. Rows past the step's tokens are NaN: kernels must not read them."""
    x = np.full((rows, *width), np.nan, np.float32)
    x[:n_tokens] = lab.normal(n_tokens, *width, scale=scale)
    return x


def rms_norm(x: F64, weight: F64, eps: float) -> F64:
    return np.asarray(x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight)


TEMPERATURE_LENGTH = 64


@dataclass(frozen=True)
class Rope:
    """Sizes of a rope_kv dispatch of ``rows`` rows: a run of ``n_tokens`` from ``pos`` on.

    ``others``: the runs before it. ``gated``: each head is [q | gate]. ``temperature``: of q, which grows every
    TEMPERATURE_LENGTH positions.
    """

    head_dim: int
    n_rot: int
    n_head: int
    n_head_kv: int
    rows: int
    n_tokens: int
    pos: int
    magnitude: float = 1.0
    gated: bool = False
    others: tuple[Run, ...] = ()
    temperature: float = 0.0

    @property
    def runs(self) -> tuple[Run, ...]:
        return (*self.others, Run(0, self.pos, self.n_tokens))


ROPES = [
    Rope(64, 64, 3, 1, 1, 1, 0),
    Rope(64, 64, 4, 2, 3, 3, 1),
    Rope(80, 32, 2, 2, 8, 5, 31),
    Rope(128, 128, 2, 1, 3, 2, 100, magnitude=1.25),
    Rope(256, 64, 2, 1, 2, 2, 515),
    Rope(96, 66, 1, 1, 17, 17, 3),
    Rope(8, 8, 2, 1, 2, 2, 100_000),
    Rope(16, 2, 1, 3, 2, 1, 7, magnitude=0.5),
    Rope(256, 64, 3, 1, 70, 69, 60, gated=True),
    Rope(96, 96, 2, 2, 3, 3, 62, gated=True),
    Rope(4, 4, 3, 1, 3, 3, 60),
    Rope(20, 20, 3, 1, 5, 4, 62),
    Rope(36, 34, 2, 2, 3, 3, 9, gated=True),
    Rope(252, 62, 1, 3, 2, 2, 515),
    Rope(32, 16, 2, 1, 4, 4, 126, magnitude=1.25, temperature=0.1),  # q grows within the run
    Rope(48, 32, 2, 1, 4, 3, 62, gated=True, temperature=0.5),
    Rope(64, 64, 2, 1, 12, 5, 62, others=(Run(3, 700), Run(1, 0), Run(4, 63), Run(2, 126, 3))),
]


def rotate(x: F64, angles: F64, kind: str, magnitude: float) -> F64:
    """Rotates the first dimensions of x [T, n_head, head_dim] by angles [T, n_rot / 2]."""
    n_rot = 2 * angles.shape[-1]
    pairs = np.arange(n_rot).reshape(-1, 2) if kind == "norm" else np.arange(n_rot).reshape(2, -1).T
    z = (x[..., pairs[:, 0]] + 1j * x[..., pairs[:, 1]]) * magnitude * np.exp(1j * angles)[:, None, :]
    out = x.copy()
    out[..., pairs[:, 0]], out[..., pairs[:, 1]] = z.real, z.imag
    return out


def assert_quantised(stored: Array, want: F64, error: float) -> None:
    """Fails unless each block's scale is its largest magnitude / 127 as a half, and its quants are the nearest.

    ``error``: the error of the quantised values, relative to the largest magnitude.
    """
    assert quants.Q8_0.block is not None
    blocks, x = stored.reshape(-1).view(quants.Q8_0.block), want.reshape(-1, 32)
    largest = np.abs(x).max(axis=1)
    scale, d = largest / 127, blocks["d"].astype(np.float64)
    assert (np.abs(d - scale) <= scale * (2.0**-11 + 2 * error) + 2.0**-25).all()
    steps = x[d > 0] / scale[d > 0, None]
    assert np.abs(blocks["qs"][d > 0] - steps).max(initial=0) <= 0.5 + 127 * 4 * error
    assert np.isfinite(decoded("q8_0", stored)).all()


class RopeKv:
    """One dispatch of rope_kv: random inputs on a device, poisoned outputs, and their expected values."""

    def __init__(
        self, lab: Lab, rope: Rope, kind: str, kv: str, qk_norm: bool, in_place: bool = False, v_norm: bool = False
    ) -> None:
        self.lab, self.rope, self.kv, self.v_norm = lab, rope, kv, v_norm
        self.kernel = f"rope_kv_{kind}_{kv}" + ("_qknorm" if qk_norm else "")
        self.batch = StepRows(lab, rope.runs, rope.rows)
        n, hd = self.batch.n_tokens, rope.head_dim
        q, k, v = (padded(lab, rope.rows, n, heads, hd) for heads in (rope.n_head, rope.n_head_kv, rope.n_head_kv))
        freqs = (10_000.0 ** (-np.arange(rope.n_rot // 2) * 2 / rope.n_rot)).astype(np.float32)
        norms = [lab.normal(hd) if qk_norm else lab.normal(1) for _ in range(2)]
        # Angles are float32 by contract: at large positions their rounding changes the result.
        angles = (self.batch.positions.astype(np.float32)[:, None] * freqs).astype(np.float64)

        def expected(x: F32, norm: F32) -> F64:
            x64 = x[:n].astype(np.float64)
            if qk_norm:
                x64 = rms_norm(x64, norm.astype(np.float64), float(np.float32(1e-6)))
            return rotate(x64, angles, kind, rope.magnitude)

        self.want_q, self.want_k, self.v = expected(q, norms[0]), expected(k, norms[1]), v
        self.want_q *= 1 + rope.temperature * np.log(1 + self.batch.positions // TEMPERATURE_LENGTH)[:, None, None]
        with_gates = np.concatenate([q, np.full_like(q, np.nan)], axis=2) if rope.gated else q
        self.q = lab.in_out(with_gates) if in_place else lab.input(with_gates)
        self.q_out = self.q if in_place else lab.output(*q.shape)
        cache = poisoned(kv, self.batch.cache_rows, rope.n_head_kv, hd)
        self.caches = [lab.in_out(cache, align=ALIGN[kv]) for _ in range(2)]
        step = [self.batch.input(lab, name) for name in ("step", "rows", "pages")]
        inputs = [*step, self.q, lab.input(k), lab.input(v), lab.input(freqs, align=4)]
        self.bindings = [*inputs, *(lab.input(w, align=4) for w in norms), self.q_out, *self.caches]

    def run_alone(self, t: int) -> tuple[Guarded, list[Guarded]]:
        """Runs row t alone into other caches; returns q and the caches."""
        lab, alone, (_, _, pages, *rest) = self.lab, self.batch.alone(t), self.bindings
        q, k, v, *weights = rest[:-3]
        row = [lab.input(x.array[t : t + 1]) for x in (q, k, v)]
        q_out = lab.output(1, *self.q_out.array.shape[1:])
        caches = [
            lab.in_out(np.full_like(c.array.view(np.uint8), POISON).view(c.array.dtype), align=ALIGN[self.kv])
            for c in self.caches
        ]
        self.launch([alone.input(lab, "step"), alone.input(lab, "rows"), pages, *row, *weights, q_out, *caches], 1)
        return q_out, caches

    def run(self, alone: bool = False) -> None:
        """Runs the dispatch. ``alone``: without key heads."""
        self.launch(self.bindings, self.rope.rows, 0 if alone else self.rope.n_head_kv)

    def launch(self, bindings: list[Guarded], rows: int, n_head_kv: int | None = None) -> None:
        r = self.rope
        n_head_kv = r.n_head_kv if n_head_kv is None else n_head_kv
        params = {
            "n_head": r.n_head,
            "n_head_kv": n_head_kv,
            "head_dim": r.head_dim,
            "q_stride": 2 * r.head_dim if r.gated else r.head_dim,
            "n_rot": r.n_rot,
            "v_norm": int(self.v_norm),
            "eps": 1e-6,
            "magnitude": r.magnitude,
            "temperature": r.temperature,
            "temperature_length": TEMPERATURE_LENGTH,
        }
        self.lab.run(self.kernel, params, "RopeKvParams", bindings, (r.n_head + 2 * n_head_kv, rows), 32)

    def check(self) -> None:
        n, new = self.batch.n_tokens, self.batch.new_places
        k_cache, v_cache = (c.array for c in self.caches)
        assert_close(self.q_out.array[:n], self.want_q, 1e-6)
        self._check_stored(k_cache[new], self.want_k)
        v = self.v[:n]
        if self.v_norm:
            self._check_stored(v_cache[new], rms_norm(v.astype(np.float64), np.ones(1), float(np.float32(1e-6))))
        elif self.kv == "q8_0":
            assert_quantised(v_cache[new], v.astype(np.float64), 1e-7)
        else:
            assert np.array_equal(v_cache[new], v.astype(v_cache.dtype))
        for cache in (k_cache, v_cache):
            assert_untouched(np.delete(cache, new, axis=0))

    def _check_stored(self, stored: Array, want: F64) -> None:
        if self.kv == "q8_0":
            assert_quantised(stored, want, 2e-6)
        else:  # f16 rounds relative to each element
            assert_close(stored, want, 1e-6 if self.kv == "f32" else 5e-4, np.maximum(np.abs(want), 1.0))


def run_elementwise(lab: Lab, kernel: str, inputs: list[F32], n_tokens: int, out: Guarded) -> None:
    """Runs an element-wise kernel over inputs [rows, n]."""
    shapes, (rows, n) = lab.core.shapes(), inputs[0].shape
    bindings = [lab.step(n_tokens), *map(lab.input, inputs), out]
    grid = (tiles(n, shapes["ELEMENTWISE_COLUMNS"]), rows)
    lab.run(kernel, {"n": n}, "ElementwiseParams", bindings, grid, shapes["ELEMENTWISE_THREADS"])


def run_take_rows(lab: Lab, x: F32, outs: list[int], n_tokens: int, out: Guarded) -> None:
    """Runs take_rows for these rows of x [rows, n]; ``out`` may have more rows."""
    shapes, out_rows = lab.core.shapes(), np.full(len(out.array), 0xFFFFFFFF, np.uint32)
    out_rows[: len(outs)] = outs
    bindings = [lab.step(n_tokens, len(outs)), lab.input(out_rows, align=4), lab.input(x), out]
    grid = (tiles(x.shape[1], shapes["ELEMENTWISE_COLUMNS"]), len(out.array))
    lab.run("take_rows", {"n": x.shape[1]}, "ElementwiseParams", bindings, grid, shapes["ELEMENTWISE_THREADS"])
