"""The attention kernels against float64 NumPy, over pages in no order whose unused rows are poison."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
from numpy.typing import NDArray

from support.kernel_lab import Guarded, Lab, assert_close, assert_untouched, every_lane, tiles
from support.kv_cache import ALIGN, KV_TYPES, Pages, decoded, holds, poisoned, random_heads

F64 = NDArray[np.float64]

KERNELS = ("attention_decode", "attention_prefill")
HEAD_CLASSES = (32, 64, 96, 128, 256)  # a kernel serves head sizes up to its class

every_kernel = pytest.mark.parametrize("kernel", KERNELS)
every_kv = pytest.mark.parametrize("kv", KV_TYPES)


@dataclass(frozen=True)
class Shape:
    """Sizes of one dispatch: made for ``rows`` rows, of which a step has ``n_tokens``, the first at ``pos``.

    A row sees the last ``window`` positions, or all if 0; ``gate``: its heads are gated.
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
        """The parts of row t's keys, which come in runs of ``keys``; of a row past the step's there is none."""
        last = self.pos + t
        first = max(0, last + 1 - self.window) if self.window else 0
        return min(n_split, last // keys - first // keys + 1) if t < self.n_tokens else 0

    def __str__(self) -> str:
        text = f"hd{self.head_dim}-kv{self.n_head_kv}x{self.group}-T{self.n_tokens}of{self.rows}-pos{self.pos}"
        return text + (f"-window{self.window}" if self.window else "") + ("-gate" if self.gate else "")


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
        (64, 1, 2, 3, 3, 100, 0, True),
        (256, 1, 2, 17, 16, 40, 0, True),
        # Multiples of 4 that are none of 8, in every class.
        (4, 2, 2, 9, 9, 70),
        (12, 3, 1, 33, 17, 0, 0, True),
        (20, 2, 2, 1, 1, 130),
        (36, 3, 2, 17, 17, 60),
        (60, 1, 3, 3, 3, 515, 100, True),
        (68, 3, 1, 33, 33, 1),
        (100, 1, 2, 8, 5, 100),
        (132, 3, 1, 17, 17, 31, 20),
        (252, 1, 2, 17, 16, 40, 0, True),
    ]
]

# Windows of one position, below and above n_kv, and across tiles and pages, for one row and for several tiles of them.
WINDOWS = [
    Shape(64, 1, 2, rows, rows, pos, window)
    for rows, pos in [(1, 0), (1, 200), (3, 127), (70, 0), (40, 150)]
    for window in (1, 2, 37, 64, 100, 1000)
] + [
    Shape(256, 1, 2, 1, 1, 300, 70, True),
    Shape(256, 2, 1, 33, 19, 90, 33, True),
    Shape(32, 1, 1, 50, 33, 63, 1),
]


def causal_attention(q: F64, k: F64, v: F64, pos: int, scale: float, window: int = 0) -> F64:
    """[T, n_head, head_dim] of q over k and v [n_kv, n_head_kv, head_dim]; row t sees positions up to pos + t."""
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    scores = np.einsum("thd,khd->htk", q, k) * scale
    age = pos + np.arange(len(q))[:, None] - np.arange(len(k))
    scores = np.where((age >= 0) & ((age < window) | (window == 0)), scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.asarray(np.einsum("htk,khd->thd", weights, v))


class Attention:
    """One dispatch: random q, k and v on a device, NaN in all that no row sees, and the expected output.

    ``climb``: by how much a key's score is above that of the key before.
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
        """The grid and the threads."""
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
        """attention_split and attention_merge."""
        shape, params = self.shape, self.params(n_split)
        parts = self.lab.output(shape.rows, shape.n_head, n_split, shape.head_dim + 4)
        grid = (shape.n_head_kv, n_split, shape.rows)
        name, threads = f"attention_split_{self.kv}_{self.head_class}", 32 * (heads_at_once or shape.group)
        self.lab.run(name, params, "AttentionParams", [*self.inputs[:5], parts], grid, threads)
        for t, row in enumerate(parts.array):
            assert_untouched(row[:, shape.n_parts(t, self.lab.core.shapes()["ATTENTION_SPLIT_KEYS"], n_split) :])
        parts.array[shape.n_tokens :] = 1  # NaN that comes out as NaN looks untouched
        out = self.lab.output(shape.rows, shape.n_head, shape.head_dim)
        bindings = [self.inputs[0], self.lab.input(parts.array), self.inputs[5], out]
        threads = merge_threads or self.lab.core.shapes()["ATTENTION_DECODE_THREADS"]
        self.lab.run("attention_merge", params, "AttentionParams", bindings, (shape.n_head, shape.rows), threads)
        return out

    @property
    def head_class(self) -> int:
        return min(c for c in HEAD_CLASSES if c >= self.shape.head_dim)

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

    # The error of a score of 256 products goes through exp: one random case in thousands has 2.4e-6.
    def check(self, out: Guarded, rel: float = 4e-6) -> None:
        n = self.shape.n_tokens
        assert_close(out.array[:n], self.want, rel)
        assert_untouched(out.array[n:])


@every_lane
@every_kv
@every_kernel
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention(lane: str, kv: str, kernel: str, shape: Shape) -> None:
    if not holds(kv, shape.head_dim):
        pytest.skip(f"{kv} holds no heads of {shape.head_dim}")
    case = Attention(Lab(lane), shape, kv)
    case.check(case.run(kernel))


@every_lane
@pytest.mark.parametrize("kv", ["f16", "q8_0"])
@every_kernel
@pytest.mark.parametrize("shape", WINDOWS, ids=str)
def test_sliding_window(lane: str, kv: str, kernel: str, shape: Shape) -> None:
    case = Attention(Lab(lane), shape, kv)
    case.check(case.run(kernel))


@every_lane
@every_kernel
@pytest.mark.parametrize("size", [0.0, 90.0, 1e4])
def test_gates_open_and_shut(lane: str, kernel: str, size: float) -> None:
    """exp() of the gates overflows; their sigmoid is 0 or 1."""
    case = Attention(Lab(lane), Shape(64, 1, 1, 2, 2, 70, gate=True), "f32")
    signs = np.sign(case.inputs[5].array[:, :, 64:])
    case.inputs[5] = case.lab.input(np.concatenate([signs, signs * np.float32(size)], axis=2))
    ungated = Attention(Lab(lane), replace(case.shape, gate=False), "f32").want
    case.want = ungated * (0.5 if size == 0 else signs > 0)
    case.check(case.run(kernel))


@every_lane
@pytest.mark.parametrize("kv", ["f32", "f16"])
@every_kernel
@pytest.mark.parametrize("head_dim", [64, 256])
def test_a_key_that_is_not_seen_may_have_any_score(lane: str, kv: str, kernel: str, head_dim: int) -> None:
    """That of the next position is so far above all that a row sees that beside it their weights are zero."""
    case = Attention(Lab(lane), Shape(head_dim, 1, 2, 40, 37, 3), kv, climb=300.0)
    case.check(case.run(kernel))


@every_lane
@every_kernel
def test_long_context(lane: str, kernel: str) -> None:
    case = Attention(Lab(lane), Shape(64, 1, 1, 2, 2, 3001), "f16")
    case.check(case.run(kernel))


SPLITS = [
    Shape(64, 2, 2, 1, 1, 1000),
    Shape(80, 1, 3, 2, 2, 300),
    Shape(256, 2, 4, 1, 1, 700, gate=True),
    Shape(128, 1, 2, 3, 2, 63, gate=True),
    Shape(32, 1, 1, 1, 1, 0),
    Shape(64, 1, 2, 2, 2, 500, 170),
    Shape(20, 3, 2, 1, 1, 400, gate=True),
    Shape(100, 1, 3, 2, 2, 300),
    Shape(252, 2, 2, 1, 1, 200, 90),
]


@every_lane
@pytest.mark.parametrize("kv", ["f16", "q8_0"])
@pytest.mark.parametrize("n_split", [1, 3, 16])
@pytest.mark.parametrize("shape", SPLITS, ids=str)
def test_split(lane: str, kv: str, n_split: int, shape: Shape) -> None:
    """More parts than pages, pages that do not divide, a window that begins within a page."""
    if not holds(kv, shape.head_dim):
        pytest.skip(f"{kv} holds no heads of {shape.head_dim}")
    case = Attention(Lab(lane), shape, kv)
    case.check(case.run_split(n_split))


@every_lane
def test_split_with_fewer_simdgroups(lane: str) -> None:
    case = Attention(Lab(lane), Shape(96, 1, 5, 1, 1, 400), "f32")
    case.check(case.run_split(7, heads_at_once=2, merge_threads=96))


@every_lane
def test_split_of_scores_far_apart(lane: str) -> None:
    """What most parts have vanishes beside the part with the largest score."""
    case = Attention(Lab(lane), Shape(32, 1, 2, 1, 1, 600), "f32", 300.0, 40.0)
    case.check(case.run_split(5), rel=2e-6 * 300 * 41 * 32**0.5)


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
@pytest.mark.parametrize("head_dim", [64, 80, 256])
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
