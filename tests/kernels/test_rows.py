"""RMSNorm, RoPE with KV write, the element-wise kernels and argmax against float64 NumPy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray
from test_products import gelu, silu

from support.kernel_lab import Guarded, Lab, assert_close, assert_untouched, every_lane, tiles
from support.kv_cache import ALIGN, KV_TYPES, Array, Pages, decoded, holds, poisoned
from zincmetal import quants

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]


def padded(lab: Lab, rows: int, n_tokens: int, *width: int, scale: float = 1.0) -> F32:
    """[rows, *width] with the rows past the step's NaN: never to be read."""
    x = np.full((rows, *width), np.nan, np.float32)
    x[:n_tokens] = lab.normal(n_tokens, *width, scale=scale)
    return x


# ---- rms_norm -----------------------------------------------------------------------------------------------


def rms_norm(x: F64, weight: F64, eps: float) -> F64:
    return np.asarray(x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight)


def run_rms_norm(lab: Lab, x: F32, n_tokens: int, eps: float) -> tuple[Guarded, F64]:
    rows, n = x.shape
    weight = lab.normal(n)
    out = lab.output(rows, n)
    bindings = [lab.step(n_tokens), lab.input(x), lab.input(weight, align=4), out]
    threads = lab.core.shapes()["NORM_THREADS"]
    lab.run("rms_norm", {"n": n, "eps": eps}, "NormParams", bindings, (rows,), threads)
    want = rms_norm(x[:n_tokens].astype(np.float64), weight.astype(np.float64), float(np.float32(eps)))
    return out, want


@every_lane
@pytest.mark.parametrize("n", [1, 2, 31, 32, 33, 255, 256, 257, 576, 1030, 4099])
def test_rms_norm(lane: str, n: int) -> None:
    lab = Lab(lane)
    out, want = run_rms_norm(lab, padded(lab, 4, 3, n), 3, 1e-5)
    assert_close(out.array[:3], want, 1e-6)
    assert_untouched(out.array[3:])


@every_lane
@pytest.mark.parametrize("scale", [0.0, 1e-25, 1e-3, 1e15])
def test_rms_norm_of_small_and_large_rows(lane: str, scale: float) -> None:
    """eps carries rows whose squares vanish; float32 squares of 1e15 still have room."""
    lab = Lab(lane)
    out, want = run_rms_norm(lab, padded(lab, 1, 1, 300, scale=scale), 1, 1e-6)
    assert_close(out.array, want, 1e-6)


@every_lane
@pytest.mark.parametrize("again", [False, True], ids=["", "norm"])
@pytest.mark.parametrize("n", [1, 31, 33, 256, 640, 1030])
def test_rms_norm_add(lane: str, n: int, again: bool) -> None:
    """The sum of a residual and a normalised row, and that sum normalised again."""
    lab, eps = Lab(lane), 1e-6
    x, residual = padded(lab, 4, 3, n, scale=5), padded(lab, 4, 3, n)
    weights = [lab.normal(n) for _ in range(1 + again)]
    sums, out = lab.output(4, n), lab.output(4, n)
    first, *second = (lab.input(w, align=4) for w in weights)
    bindings = [lab.step(3), lab.input(x), first, lab.input(residual), *second, sums, *([out] if again else [])]
    kernel = "rms_norm_add_norm" if again else "rms_norm_add"
    lab.run(kernel, {"n": n, "eps": eps}, "NormParams", bindings, (4,), lab.core.shapes()["NORM_THREADS"])
    x64, r64, *w64 = (a[:3].astype(np.float64) for a in (x, residual, *(np.tile(w, (3, 1)) for w in weights)))
    want = r64 + rms_norm(x64, w64[0], eps)
    assert_close(sums.array[:3], want, 1e-6)
    assert_untouched(sums.array[3:])
    assert_untouched(out.array[3:])
    if again:
        # What cancelled in the sum leaves the rounding of its terms.
        scale = np.abs(rms_norm(want, w64[1], eps)) + np.abs(w64[1]) * np.maximum(1, 1 / np.sqrt(np.mean(want**2)))
        assert_close(out.array[:3], rms_norm(want, w64[1], eps), 1e-6, scale)


@every_lane
def test_rms_norm_may_add_in_place(lane: str) -> None:
    lab, n = Lab(lane), 300
    x, residual = lab.normal(2, n), lab.in_out(lab.normal(2, n))
    weight = lab.normal(n)
    want = residual.array + rms_norm(x.astype(np.float64), weight.astype(np.float64), 1e-6)
    bindings = [lab.step(2), lab.input(x), lab.input(weight, align=4), residual, residual]
    lab.run("rms_norm_add", {"n": n, "eps": 1e-6}, "NormParams", bindings, (2,), lab.core.shapes()["NORM_THREADS"])
    assert_close(residual.array, want, 1e-6)


# ---- rope_kv ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rope:
    """Sizes of a rope_kv dispatch; ``rows`` rows of which a step has ``n_tokens``. Gated: q is [q | gate] by head."""

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
    """x [T, n_head, head_dim] with its first dimensions rotated by angles [T, n_rot / 2]."""
    n_rot = 2 * angles.shape[-1]
    pairs = np.arange(n_rot).reshape(-1, 2) if kind == "norm" else np.arange(n_rot).reshape(2, -1).T
    z = (x[..., pairs[:, 0]] + 1j * x[..., pairs[:, 1]]) * magnitude * np.exp(1j * angles)[:, None, :]
    out = x.copy()
    out[..., pairs[:, 0]], out[..., pairs[:, 1]] = z.real, z.imag
    return out


def assert_quantised(stored: Array, want: F64, error: float) -> None:
    """Fails unless each block has a half scale of its largest magnitude / 127 and the nearest quants.

    ``error``: relative to the largest magnitude, of the values that were quantised.
    """
    blocks, x = stored.reshape(-1).view(quants.Q8_0.block), want.reshape(-1, 32)
    largest = np.abs(x).max(axis=1)
    scale, d = largest / 127, blocks["d"].astype(np.float64)
    assert (np.abs(d - scale) <= scale * (2.0**-11 + 2 * error) + 2.0**-25).all()
    steps = x[d > 0] / scale[d > 0, None]
    assert np.abs(blocks["qs"][d > 0] - steps).max(initial=0) <= 0.5 + 127 * 4 * error
    assert np.isfinite(decoded("q8_0", stored)).all()


class RopeKv:
    """One dispatch of rope_kv: random inputs on a device, poisoned outputs, and what they should become."""

    def __init__(self, lab: Lab, rope: Rope, kind: str, kv: str, qk_norm: bool, in_place: bool = False) -> None:
        self.lab, self.rope, self.kv = lab, rope, kv
        self.kernel = f"rope_kv_{kind}_{kv}" + ("_qknorm" if qk_norm else "")
        n, hd, pos = rope.n_tokens, rope.head_dim, rope.pos
        q, k, v = (padded(lab, rope.rows, n, heads, hd) for heads in (rope.n_head, rope.n_head_kv, rope.n_head_kv))
        freqs = (10_000.0 ** (-np.arange(rope.n_rot // 2) * 2 / rope.n_rot)).astype(np.float32)
        norms = [lab.normal(hd) if qk_norm else lab.normal(1) for _ in range(2)]
        # Angles are float32 by contract: at large positions their rounding is part of the result.
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
            # Rounding to f16 is relative to each element.
            k_scale = np.maximum(np.abs(self.want_k), 1.0)
            assert_close(k_cache[new], self.want_k, 1e-6 if self.kv == "f32" else 5e-4, k_scale)
            assert np.array_equal(v_cache[new], v.astype(v_cache.dtype))
        for cache in (k_cache, v_cache):
            assert_untouched(np.delete(cache, new, axis=0))


every_kind = pytest.mark.parametrize("kind", ["norm", "neox"])


@every_lane
@every_kind
@pytest.mark.parametrize("kv", KV_TYPES)
@pytest.mark.parametrize("qk_norm", [False, True], ids=["", "qknorm"])
@pytest.mark.parametrize("rope", ROPES, ids=lambda r: f"hd{r.head_dim}-rot{r.n_rot}-pos{r.pos}")
def test_rope_kv(lane: str, kind: str, kv: str, qk_norm: bool, rope: Rope) -> None:
    if not holds(kv, rope.head_dim):
        pytest.skip(f"{kv} holds no heads of {rope.head_dim}")
    case = RopeKv(Lab(lane), rope, kind, kv, qk_norm)
    case.run()
    case.check()
    assert_untouched(case.q_out.array[rope.n_tokens :])


@every_lane
@every_kind
@pytest.mark.parametrize("qk_norm", [False, True], ids=["", "qknorm"])
def test_q_may_rotate_in_place(lane: str, kind: str, qk_norm: bool) -> None:
    case = RopeKv(Lab(lane), ROPES[2], kind, "f32", qk_norm, in_place=True)
    case.run()
    case.check()


@every_lane
def test_q8_0_cache_of_odd_blocks(lane: str) -> None:
    """All zero, too small for a half scale, one value far above the rest, all alike."""
    lab = Lab(lane)
    case = RopeKv(lab, Rope(256, 2, 1, 1, 1, 1, 5), "neox", "q8_0", False)
    v = lab.normal(8, 32)
    v[:6] *= np.array([0, 1e-38, 1e-20, 1e-8, 1e-4, 1e4], np.float32)[:, None]
    v[6, 9], v[7] = 1e3, -2.5
    case.v = v.reshape(1, 1, 256)
    case.bindings[4] = lab.input(case.v)
    case.run()
    case.check()


@every_lane
def test_a_step_without_tokens_leaves_the_cache(lane: str) -> None:
    lab = Lab(lane)
    case = RopeKv(lab, ROPES[1], "neox", "f16", False)
    case.bindings[0] = lab.step(0, 1)
    case.run()
    for written in (case.q_out, *case.caches):
        assert_untouched(written.array)


# ---- element-wise -------------------------------------------------------------------------------------------


def run_elementwise(lab: Lab, kernel: str, inputs: list[F32], n_tokens: int, out: Guarded) -> None:
    """Runs a kernel over [rows, n] inputs."""
    shapes, (rows, n) = lab.core.shapes(), inputs[0].shape
    bindings = [lab.step(n_tokens), *map(lab.input, inputs), out]
    grid = (tiles(n, shapes["ELEMENTWISE_COLUMNS"]), 1 if kernel == "take_last_row" else rows)
    lab.run(kernel, {"n": n}, "ElementwiseParams", bindings, grid, shapes["ELEMENTWISE_THREADS"])


every_gate = pytest.mark.parametrize(("kernel", "activation"), [("swiglu", silu), ("geglu", gelu)])
every_length = pytest.mark.parametrize("n", [1, 31, 257, 1023, 1024, 1025, 3000])


@every_lane
@every_length
def test_add(lane: str, n: int) -> None:
    lab = Lab(lane)
    a, b = padded(lab, 4, 3, n), padded(lab, 4, 3, n)
    out = lab.output(4, n)
    run_elementwise(lab, "add", [a, b], 3, out)
    assert np.array_equal(out.array[:3], a[:3] + b[:3])
    assert_untouched(out.array[3:])


@every_lane
@every_gate
@every_length
def test_gated(lane: str, kernel: str, activation: Callable[[F64], F64], n: int) -> None:
    lab = Lab(lane)
    gate, up = padded(lab, 4, 3, n, scale=3), padded(lab, 4, 3, n)
    out = lab.output(4, n)
    run_elementwise(lab, kernel, [gate, up], 3, out)
    assert_close(out.array[:3], activation(gate[:3].astype(np.float64)) * up[:3], 1e-6)
    assert_untouched(out.array[3:])


@every_lane
@every_gate
def test_gates_whose_exponential_overflows(lane: str, kernel: str, activation: Callable[[F64], F64]) -> None:
    lab = Lab(lane)
    gate = np.array([[-1e30, -700, -104, -88, -20, -1e-30, 0, 1e-30, 20, 88, 104, 700, 1e30]], np.float32)
    up = lab.normal(*gate.shape) + 3
    out = lab.output(*gate.shape)
    run_elementwise(lab, kernel, [gate, up], 1, out)
    with np.errstate(over="ignore"):
        want = activation(gate.astype(np.float64)) * up
    assert_close(out.array, want, 1e-6, np.abs(want) + 1e-30)


@every_lane
@every_length
def test_take_last_row(lane: str, n: int) -> None:
    lab = Lab(lane)
    x = padded(lab, 5, 3, n)
    out = lab.output(1, n)
    run_elementwise(lab, "take_last_row", [x], 3, out)
    assert np.array_equal(out.array[0], x[2])


@every_lane
def test_the_last_row_of_one_and_of_none(lane: str) -> None:
    lab = Lab(lane)
    x = padded(lab, 2, 1, 70)
    out = lab.output(1, 70)
    run_elementwise(lab, "take_last_row", [x], 0, out)
    assert_untouched(out.array)
    run_elementwise(lab, "take_last_row", [x], 1, out)
    assert np.array_equal(out.array[0], x[0])


# ---- argmax -------------------------------------------------------------------------------------------------


def argmax(logits: F32) -> int:
    """The lowest id among the largest; -1 where one is not finite."""
    return int(np.argmax(logits)) if np.isfinite(logits).all() else -1


def run_argmax(lab: Lab, logits: F32, n_part: int | None = None, n_chosen: int = 0) -> int:
    """The arg max that both kernels find."""
    shapes = lab.core.shapes()
    threads = shapes["ARGMAX_THREADS"]
    n_part = n_part or min(tiles(len(logits), shapes["ARGMAX_COLUMNS"]), threads)
    value, ids = lab.output(n_part), lab.output(n_part, dtype=np.int32, align=4)
    params = {"n": len(logits), "n_part": n_part}
    first = [lab.input(logits, align=4), value, ids]
    lab.run("argmax_partial", params, "ArgmaxParams", first, (n_part,), threads)
    return run_argmax_final(lab, value, ids, n_chosen)


def run_argmax_final(lab: Lab, value: Guarded, ids: Guarded, n_chosen: int = 0) -> int:
    """The arg max of all parts, and a step buffer that is ready for the step that follows one of 3 rows."""
    step, tokens = lab.step(3, 7, writable=True), lab.in_out(np.arange(5, dtype=np.int32), align=4)
    step.array["n_chosen"], step.array["chosen"] = n_chosen, -1
    params = {"n": 10**6, "n_part": len(value.array)}
    bindings, threads = [step, tokens, value, ids], lab.core.shapes()["ARGMAX_THREADS"]
    lab.run("argmax_final", params, "ArgmaxParams", bindings, (1,), threads)
    written = step.array[0]
    best = int(tokens.array[0])
    assert list(tokens.array[1:]) == [1, 2, 3, 4]
    assert [written[name] for name in ("n_tokens", "pos", "n_chosen")] == [1, 10, n_chosen + 1]
    assert not written["reserved"].any()
    assert list(written["chosen"][:, 0]) == [best if i == n_chosen % 4 else -1 for i in range(4)]
    assert np.all(written["chosen"][:, 1:] == -1)
    return best


@every_lane
@pytest.mark.parametrize("n", [1, 2, 31, 257, 4096, 4097, 20_011])
def test_argmax(lane: str, n: int) -> None:
    lab = Lab(lane)
    for n_chosen, n_part in enumerate((None, 1, 3, None, 2)):
        logits = lab.normal(n)
        assert run_argmax(lab, logits, n_part, n_chosen) == argmax(logits)


@every_lane
def test_argmax_takes_the_lowest_of_equals(lane: str) -> None:
    lab = Lab(lane)
    logits = lab.normal(9000)
    winners = np.sort(lab.rng.choice(9000, 50, replace=False))
    logits[winners] = 9.5
    assert run_argmax(lab, logits) == winners[0]
    assert run_argmax(lab, logits, 40) == winners[0]


@every_lane
def test_argmax_of_more_parts_than_threads(lane: str) -> None:
    """A thread of argmax_final has several parts, whose ids are in no order."""
    lab = Lab(lane)
    value = lab.rng.integers(-3, 4, 700).astype(np.float32)
    for ids in (lab.rng.permutation(700).astype(np.int32), np.arange(700, dtype=np.int32)[::-1]):
        want = ids[value == value.max()].min()
        assert run_argmax_final(lab, lab.input(value), lab.input(ids, align=4)) == want
        assert run_argmax_final(lab, lab.input(np.zeros_like(value)), lab.input(ids, align=4)) == 0


@every_lane
@pytest.mark.parametrize("value", [1.5, -1.5])
def test_argmax_of_neighbouring_floats(lane: str, value: float) -> None:
    lab = Lab(lane)
    logits = np.full(9000, value, np.float32)
    winner = int(lab.rng.integers(3000, 9000))  # where its thread has seen others
    logits[winner] = np.nextafter(logits[0], np.float32(np.inf))
    for n_part in (None, 1, 40):
        assert run_argmax(lab, logits, n_part) == winner


@every_lane
@pytest.mark.parametrize("bits", [0x7F800000, 0xFF800000, 0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF])
def test_argmax_with_a_logit_that_is_not_finite(lane: str, bits: int) -> None:
    """The id is -1 for an infinity or a NaN of any bits, wherever it stands."""
    lab = Lab(lane)
    logits = lab.normal(3000)
    for where in (0, 1, 1500, 2998, 2999):
        odd = logits.copy()
        odd.view(np.uint32)[where] = bits
        for n_part in (None, 1, 7):
            assert run_argmax(lab, odd, n_part) == -1
    logits.view(np.uint32)[:] = bits
    assert run_argmax(lab, logits) == -1


@every_lane
@pytest.mark.parametrize("n_part", [1, 4, 40])
def test_argmax_of_the_smallest_logits(lane: str, n_part: int) -> None:
    """Also where parts have no logits, which are none that could win."""
    lab = Lab(lane)
    lowest = np.finfo(np.float32).min
    assert run_argmax(lab, np.full(9, lowest, np.float32), n_part) == 0
    assert run_argmax(lab, np.array([lowest, lowest, -1e38], np.float32), n_part) == 2


@every_lane
@pytest.mark.parametrize("background", [np.nan, -np.inf, -3e38, -1.0, -0.0])
def test_argmax_of_odd_floats(lane: str, background: float) -> None:
    lab = Lab(lane)
    nan_where = lab.rng.random(9000) < 0.3
    for winner in (np.nan, -np.inf, -1e38, -1e-40, -0.0, 0.0, 1e-40, np.inf):
        logits = np.full(9000, background, np.float32)
        logits[lab.rng.integers(9000, size=3)] = winner
        assert run_argmax(lab, logits) == argmax(logits)
        logits[nan_where] = np.nan
        assert run_argmax(lab, logits) == -1
