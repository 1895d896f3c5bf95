"""attention_decode and attention_prefill against float64 NumPy, over caches whose unused rows are poison."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from kernel_lab import Guarded, Lab, assert_close, assert_untouched, every_lane, tiles

F64 = NDArray[np.float64]

KERNELS = ("attention_decode", "attention_prefill")
HEAD_CLASSES = (32, 64, 96, 128, 256)  # a kernel serves head sizes up to its class
KV_TYPES = {"f32": np.float32, "f16": np.float16}

every_kernel = pytest.mark.parametrize("kernel", KERNELS)
every_kv = pytest.mark.parametrize("kv", KV_TYPES)


@dataclass(frozen=True)
class Shape:
    """Sizes of one dispatch: made for ``rows`` rows, of which a step has ``n_tokens``, the first at ``pos``."""

    head_dim: int
    n_head_kv: int
    group: int
    rows: int
    n_tokens: int
    pos: int

    @property
    def n_head(self) -> int:
        return self.n_head_kv * self.group

    @property
    def n_kv(self) -> int:
        return self.pos + self.n_tokens

    def __str__(self) -> str:
        return f"hd{self.head_dim}-kv{self.n_head_kv}x{self.group}-T{self.n_tokens}of{self.rows}-pos{self.pos}"


SHAPES = [
    Shape(*sizes)
    for sizes in [
        (64, 1, 1, 1, 1, 0),
        (64, 2, 2, 3, 3, 100),
        (64, 1, 4, 33, 33, 31),
        (64, 1, 1, 1, 1, 515),
        (80, 2, 1, 8, 8, 1),
        (80, 1, 2, 33, 17, 0),
        (80, 1, 1, 3, 2, 515),
        (128, 1, 8, 3, 3, 1),
        (128, 1, 4, 17, 17, 31),
        (128, 1, 2, 33, 33, 0),
        (128, 1, 2, 8, 5, 100),
        (256, 1, 2, 1, 1, 100),
        (256, 2, 1, 17, 16, 1),
        (256, 1, 1, 33, 33, 31),
        (256, 1, 2, 3, 3, 0),
        (8, 2, 1, 33, 33, 515),
        (16, 3, 1, 70, 65, 3),
        (40, 1, 2, 8, 8, 0),
        (96, 1, 1, 17, 3, 31),
        (160, 1, 1, 8, 7, 31),
    ]
]


def causal_attention(q: F64, k: F64, v: F64, pos: int, scale: float) -> F64:
    """[T, n_head, head_dim] of q over k and v [n_kv, n_head_kv, head_dim]; row t sees positions up to pos + t."""
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    scores = np.einsum("thd,khd->htk", q, k) * scale
    seen = np.arange(len(k)) <= pos + np.arange(len(q))[:, None]
    scores = np.where(seen, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.asarray(np.einsum("htk,khd->thd", weights, v))


class Attention:
    """One dispatch: random q, k and v on a device, NaN in all rows past the step's, and the expected output."""

    def __init__(self, lab: Lab, shape: Shape, kv: str, q_scale: float = 1.0, k_shift: float = 0.0) -> None:
        self.lab, self.shape, self.kv = lab, shape, kv
        n_ctx, n, used = shape.n_kv + 9, shape.n_tokens, shape.n_kv
        q = np.full((shape.rows, shape.n_head, shape.head_dim), np.nan, np.float32)
        k = np.full((n_ctx, shape.n_head_kv, shape.head_dim), np.nan, KV_TYPES[kv])
        v = k.copy()
        q[:n] = lab.normal(*q[:n].shape, scale=q_scale)
        k[:used] = lab.normal(*k[:used].shape) + k_shift
        v[:used] = lab.normal(*v[:used].shape)
        self.scale = float(np.float32(shape.head_dim**-0.5))
        self.want = causal_attention(
            q[:n].astype(np.float64),
            k[:used].astype(np.float64),
            v[:used].astype(np.float64),
            shape.pos,
            self.scale,
        )
        align = 4 * k.itemsize  # kernels load four values at a time
        self.inputs = [
            lab.step(n, shape.pos),
            lab.input(q),
            lab.input(k, align=align),
            lab.input(v, align=align),
        ]

    def launch(self, kernel: str) -> tuple[tuple[int, int], int]:
        """The grid and the threads."""
        shapes = self.lab.core.shapes()
        if kernel == "attention_decode":
            return (self.shape.n_head, self.shape.rows), shapes["ATTENTION_DECODE_THREADS"]
        groups = tiles(self.shape.rows, shapes["ATTENTION_PREFILL_QUERIES"])
        return (self.shape.n_head, groups), shapes["ATTENTION_PREFILL_THREADS"]

    def run(self, kernel: str, grid: tuple[int, int] | None = None, threads: int | None = None) -> Guarded:
        shape = self.shape
        usual_grid, usual_threads = self.launch(kernel)
        out = self.lab.output(shape.rows, shape.n_head, shape.head_dim)
        head_class = min(c for c in HEAD_CLASSES if c >= shape.head_dim)
        params = {
            "n_head": shape.n_head,
            "n_head_kv": shape.n_head_kv,
            "head_dim": shape.head_dim,
            "scale": self.scale,
        }
        self.lab.run(
            f"{kernel}_{self.kv}_{head_class}",
            params,
            "AttentionParams",
            [*self.inputs, out],
            grid or usual_grid,
            threads or usual_threads,
        )
        return out

    def check(self, out: Guarded, rel: float = 2e-6) -> None:
        n = self.shape.n_tokens
        assert_close(out.array[:n], self.want, rel)
        assert_untouched(out.array[n:])


@every_lane
@every_kv
@every_kernel
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention(lane: str, kv: str, kernel: str, shape: Shape) -> None:
    case = Attention(Lab(lane), shape, kv)
    case.check(case.run(kernel))


@every_lane
@every_kernel
def test_long_context(lane: str, kernel: str) -> None:
    case = Attention(Lab(lane), Shape(64, 1, 1, 2, 2, 3001), "f16")
    case.check(case.run(kernel))


@every_lane
@every_kernel
@pytest.mark.parametrize("q_scale", [1e-3, 300.0])
@pytest.mark.parametrize("k_shift", [0.0, 40.0])
def test_scores_far_from_zero(lane: str, kernel: str, q_scale: float, k_shift: float) -> None:
    """Scores of some 1e5 of either sign: exp() of any would be infinite or zero, their softmax is neither."""
    case = Attention(Lab(lane), Shape(32, 1, 2, 17, 17, 40), "f32", q_scale, k_shift)
    largest_score = q_scale * (1 + k_shift) * 32**0.5
    case.check(case.run(kernel), rel=max(2e-6, 2e-6 * largest_score))


@every_lane
@pytest.mark.parametrize("threads", [32, 96])
def test_decode_with_fewer_simdgroups(lane: str, threads: int) -> None:
    case = Attention(Lab(lane), Shape(80, 1, 2, 2, 2, 150), "f32")
    case.check(case.run("attention_decode", threads=threads))


@every_lane
@pytest.mark.parametrize("head_dim", [64, 256])
def test_prefill_with_fewer_threadgroups_than_tiles(lane: str, head_dim: int) -> None:
    case = Attention(Lab(lane), Shape(head_dim, 1, 1, 70, 70, 5), "f16")
    case.check(case.run("attention_prefill", grid=(1, 1)))


@every_lane
@every_kernel
def test_a_step_without_tokens_writes_nothing(lane: str, kernel: str) -> None:
    lab, shape = Lab(lane), Shape(64, 1, 2, 33, 33, 4)
    case = Attention(lab, shape, "f32")
    case.inputs[0] = lab.step(0, shape.pos)
    assert_untouched(case.run(kernel).array)
