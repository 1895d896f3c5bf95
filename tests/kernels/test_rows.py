"""RMSNorm, RoPE with KV write, and the element-wise kernels against float64 NumPy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from support.kernel_lab import Guarded, Lab, assert_close, assert_untouched, every_lane
from support.kernels.products import gelu, silu
from support.kernels.rows import F32, F64, ROPES, Rope, RopeKv, padded, rms_norm, run_elementwise
from support.kv_cache import KV_TYPES, skip_unless_held

# ---- rms_norm -----------------------------------------------------------------------------------------------


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
    """eps carries rows whose squares underflow; the squares of 1e15 still fit float32."""
    lab = Lab(lane)
    out, want = run_rms_norm(lab, padded(lab, 1, 1, 300, scale=scale), 1, 1e-6)
    assert_close(out.array, want, 1e-6)


@every_lane
@pytest.mark.parametrize("again", [False, True], ids=["", "norm"])
@pytest.mark.parametrize("n", [1, 31, 33, 256, 640, 1030])
def test_rms_norm_add(lane: str, n: int, again: bool) -> None:
    """A residual plus a normalised row, and that sum normalised again."""
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
        # Where the sum cancels, the rounding of its terms remains.
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


every_kind = pytest.mark.parametrize("kind", ["norm", "neox"])


@every_lane
@every_kind
@pytest.mark.parametrize("kv", KV_TYPES)
@pytest.mark.parametrize("qk_norm", [False, True], ids=["", "qknorm"])
@pytest.mark.parametrize("rope", ROPES, ids=lambda r: f"hd{r.head_dim}-rot{r.n_rot}-pos{r.pos}")
def test_rope_kv(lane: str, kind: str, kv: str, qk_norm: bool, rope: Rope) -> None:
    skip_unless_held(kv, rope.head_dim)
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
    """Blocks of zeros, of values too small for a half scale, of one large value, of equal values."""
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
