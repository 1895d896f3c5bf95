"""RMSNorm, RoPE with K/V write and the element-wise kernels: launches, and the expected outputs in float64 NumPy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from support.kernel_lab import Guarded, Lab, assert_close, assert_untouched, tiles
from support.kv_cache import ALIGN, Array, Pages, decoded, poisoned
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


@dataclass(frozen=True)
class Rope:
    """Sizes of a rope_kv dispatch of ``rows`` rows, ``n_tokens`` of them tokens. ``gated``: each head is [q | gate]."""

    head_dim: int
    n_rot: int
    n_head: int
    n_head_kv: int
    rows: int
    n_tokens: int
    pos: int
    magnitude: float = 1.0
    gated: bool = False


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

    def __init__(self, lab: Lab, rope: Rope, kind: str, kv: str, qk_norm: bool, in_place: bool = False) -> None:
        self.lab, self.rope, self.kv = lab, rope, kv
        self.kernel = f"rope_kv_{kind}_{kv}" + ("_qknorm" if qk_norm else "")
        n, hd, pos = rope.n_tokens, rope.head_dim, rope.pos
        q, k, v = (padded(lab, rope.rows, n, heads, hd) for heads in (rope.n_head, rope.n_head_kv, rope.n_head_kv))
        freqs = (10_000.0 ** (-np.arange(rope.n_rot // 2) * 2 / rope.n_rot)).astype(np.float32)
        norms = [lab.normal(hd) if qk_norm else lab.normal(1) for _ in range(2)]
        # Angles are float32 by contract: at large positions their rounding changes the result.
        angles = (np.arange(pos, pos + n).astype(np.float32)[:, None] * freqs).astype(np.float64)

        def expected(x: F32, norm: F32) -> F64:
            x64 = x[:n].astype(np.float64)
            if qk_norm:
                x64 = rms_norm(x64, norm.astype(np.float64), float(np.float32(1e-6)))
            return rotate(x64, angles, kind, rope.magnitude)

        self.want_q, self.want_k, self.v = expected(q, norms[0]), expected(k, norms[1]), v
        with_gates = np.concatenate([q, np.full_like(q, np.nan)], axis=2) if rope.gated else q
        self.q = lab.in_out(with_gates) if in_place else lab.input(with_gates)
        self.q_out = self.q if in_place else lab.output(*q.shape)
        self.pages = Pages(lab, pos + n)
        cache = poisoned(kv, self.pages.cache_rows, rope.n_head_kv, hd)
        self.caches = [lab.in_out(cache, align=ALIGN[kv]) for _ in range(2)]
        pages = lab.input(self.pages.table, align=4)
        inputs = [lab.step(n, pos), pages, self.q, lab.input(k), lab.input(v), lab.input(freqs, align=4)]
        self.bindings = [*inputs, *(lab.input(w, align=4) for w in norms), self.q_out, *self.caches]

    def run(self) -> None:
        r = self.rope
        params = {
            "n_head": r.n_head,
            "n_head_kv": r.n_head_kv,
            "head_dim": r.head_dim,
            "q_stride": 2 * r.head_dim if r.gated else r.head_dim,
            "n_rot": r.n_rot,
            "eps": 1e-6,
            "magnitude": r.magnitude,
        }
        self.lab.run(self.kernel, params, "RopeKvParams", self.bindings, (r.n_head + 2 * r.n_head_kv, r.rows), 32)

    def check(self) -> None:
        n, new = self.rope.n_tokens, self.pages.rows(self.rope.pos, self.rope.pos + self.rope.n_tokens)
        k_cache, v_cache = (c.array for c in self.caches)
        assert_close(self.q_out.array[:n], self.want_q, 1e-6)
        v = self.v[:n]
        if self.kv == "q8_0":
            assert_quantised(k_cache[new], self.want_k, 2e-6)
            assert_quantised(v_cache[new], v.astype(np.float64), 1e-7)
        else:
            # f16 rounds relative to each element.
            k_scale = np.maximum(np.abs(self.want_k), 1.0)
            assert_close(k_cache[new], self.want_k, 1e-6 if self.kv == "f32" else 5e-4, k_scale)
            assert np.array_equal(v_cache[new], v.astype(v_cache.dtype))
        for cache in (k_cache, v_cache):
            assert_untouched(np.delete(cache, new, axis=0))


def run_elementwise(lab: Lab, kernel: str, inputs: list[F32], n_tokens: int, out: Guarded) -> None:
    """Runs an element-wise kernel over inputs [rows, n]."""
    shapes, (rows, n) = lab.core.shapes(), inputs[0].shape
    bindings = [lab.step(n_tokens), *map(lab.input, inputs), out]
    grid = (tiles(n, shapes["ELEMENTWISE_COLUMNS"]), 1 if kernel == "take_last_row" else rows)
    lab.run(kernel, {"n": n}, "ElementwiseParams", bindings, grid, shapes["ELEMENTWISE_THREADS"])
