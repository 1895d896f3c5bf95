"""RMSNorm, RoPE with KV write, and the element-wise kernels against float64 NumPy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from support.kernel_lab import Guarded, Lab, assert_close, assert_untouched, every_lane, tiles
from support.kernels.products import gelu, silu
from support.kernels.rows import F32, F64, ROPES, Rope, RopeKv, padded, rms_norm, run_elementwise, run_take_rows
from support.kv_cache import KV_TYPES, skip_unless_held
from support.step_rows import Run, StepRows

# ---- rms_norm -----------------------------------------------------------------------------------------------


def run_norm(lab: Lab, kernel: str, bindings: list[Guarded], rows: int, **params: float) -> None:
    """Runs a kernel of NormParams over ``rows`` rows. By default a row is one vector with a weight."""
    given = {"groups": 1, "weighted": 1, "scaled": 0, "eps": 1e-6, "next_eps": 1e-3, "scale": 1.0, **params}
    grid, threads = (rows * int(given["groups"]),), lab.core.shapes()["NORM_THREADS"]
    lab.run(kernel, given, "NormParams", bindings, grid, threads)


def run_rms_norm(lab: Lab, x: F32, n_tokens: int, eps: float) -> tuple[Guarded, F64]:
    rows, n = x.shape
    weight = lab.normal(n)
    out = lab.output(rows, n)
    run_norm(lab, "rms_norm", [lab.step(n_tokens), lab.input(x), lab.input(weight, align=4), out], rows, n=n, eps=eps)
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
@pytest.mark.parametrize("groups", [1, 5])
@pytest.mark.parametrize("n", [1, 33, 256, 4099])
def test_rms_norm_without_a_weight(lane: str, n: int, groups: int) -> None:
    """A norm of each group of a row, times a number. The place of the weight is not read."""
    lab = Lab(lane)
    x, out = padded(lab, 4, 3, groups, n), lab.output(4, groups, n)
    bindings = [lab.step(3), lab.input(x), lab.input(np.full(1, np.nan, np.float32)), out]
    run_norm(lab, "rms_norm", bindings, 4, n=n, groups=groups, weighted=0, scale=0.25)
    assert_close(out.array[:3], rms_norm(x[:3].astype(np.float64), np.float64(0.25), 1e-6), 1e-6)
    assert_untouched(out.array[3:])


@every_lane
def test_groups_share_a_weight_and_a_factor_scales_the_sum(lane: str) -> None:
    lab, n, groups = Lab(lane), 70, 3
    x, residual, weight = padded(lab, 4, 3, groups, n), padded(lab, 4, 3, groups, n), lab.normal(n)
    factor, out = lab.normal(1), lab.output(4, groups, n)
    weights = (lab.input(w, align=4) for w in (weight, residual, factor))
    run_norm(lab, "rms_norm_add", [lab.step(3), lab.input(x), *weights, out], 4, n=n, groups=groups, scaled=1)
    normed = rms_norm(x[:3].astype(np.float64), weight.astype(np.float64), 1e-6)
    assert_close(out.array[:3], (residual[:3] + normed) * factor, 1e-6)
    assert_untouched(out.array[3:])


@every_lane
@pytest.mark.parametrize("again", [False, True], ids=["", "norm"])
@pytest.mark.parametrize("scaled", [0, 1], ids=["", "scaled"])
@pytest.mark.parametrize("n", [1, 31, 33, 256, 640, 1030])
def test_rms_norm_add(lane: str, n: int, again: bool, scaled: int) -> None:
    """A residual plus a normalised row, maybe times a factor, and that sum normalised again."""
    lab, eps, factor = Lab(lane), 1e-6, np.float32(0.3)
    x, residual = padded(lab, 4, 3, n, scale=5), padded(lab, 4, 3, n)
    weights = [lab.normal(n) for _ in range(1 + again)]
    sums, out = lab.output(4, n), lab.output(4, n)
    first, *second = (lab.input(w, align=4) for w in weights)
    factors = lab.input(np.full(1, factor if scaled else np.nan), align=4)
    bindings = [lab.step(3), lab.input(x), first, lab.input(residual), *second, factors, sums]
    if again:
        bindings.append(out)
    run_norm(lab, "rms_norm_add_norm" if again else "rms_norm_add", bindings, 4, n=n, scaled=scaled)
    x64, r64, *w64 = (a[:3].astype(np.float64) for a in (x, residual, *(np.tile(w, (3, 1)) for w in weights)))
    want = (r64 + rms_norm(x64, w64[0], eps)) * (float(factor) if scaled else 1)
    assert_close(sums.array[:3], want, 1e-6)
    assert_untouched(sums.array[3:])
    assert_untouched(out.array[3:])
    if again:
        # Where the sum cancels, the rounding of its terms remains.
        want_next = rms_norm(want, w64[1], float(np.float32(1e-3)))
        scale = np.abs(want_next) + np.abs(w64[1]) * np.maximum(1, 1 / np.sqrt(np.mean(want**2)))
        assert_close(out.array[:3], want_next, 1e-6, scale)


@every_lane
def test_rms_norm_may_add_in_place(lane: str) -> None:
    lab, n = Lab(lane), 300
    x, residual = lab.normal(2, n), lab.in_out(lab.normal(2, n))
    weight = lab.normal(n)
    want = residual.array + rms_norm(x.astype(np.float64), weight.astype(np.float64), 1e-6)
    run_norm(
        lab,
        "rms_norm_add",
        [lab.step(2), lab.input(x), lab.input(weight, align=4), residual, residual, residual],
        2,
        n=n,
    )
    assert_close(residual.array, want, 1e-6)


# ---- rope_kv ------------------------------------------------------------------------------------------------


every_kind = pytest.mark.parametrize("kind", ["norm", "neox"])


@every_lane
@every_kind
@pytest.mark.parametrize("kv", KV_TYPES)
@pytest.mark.parametrize("qk_norm", [False, True], ids=["", "qknorm"])
@pytest.mark.parametrize("rope", ROPES, ids=lambda r: f"hd{r.head_dim}-rot{r.n_rot}-pos{r.pos}-runs{len(r.runs)}")
def test_rope_kv(lane: str, kind: str, kv: str, qk_norm: bool, rope: Rope) -> None:
    skip_unless_held(kv, rope.head_dim)
    case = RopeKv(Lab(lane), rope, kind, kv, qk_norm)
    case.run()
    case.check()
    assert_untouched(case.q_out.array[case.batch.n_tokens :])


@every_lane
@pytest.mark.parametrize("kv", KV_TYPES)
def test_a_row_of_a_batch_is_as_if_alone(lane: str, kv: str) -> None:
    """Bit for bit: q, and the places of the caches that the row writes."""
    lab = Lab(lane)
    case = RopeKv(lab, ROPES[-1], "neox", kv, qk_norm=True)
    case.run()
    for t in range(case.batch.n_tokens):
        (q_out, caches), place = case.run_alone(t), case.batch.new_places[t]
        assert np.array_equal(q_out.array[0], case.q_out.array[t])
        for alone, cache in zip(caches, case.caches, strict=True):
            assert np.array_equal(alone.array[place].view(np.uint8), cache.array[place].view(np.uint8))
            assert_untouched(np.delete(alone.array, place, axis=0))


@every_lane
@pytest.mark.parametrize("kv", KV_TYPES)
@pytest.mark.parametrize("rope", [ROPES[4], ROPES[-1], Rope(512, 512, 3, 2, 3, 2, 515), Rope(320, 64, 1, 1, 1, 1, 3)])
def test_values_may_have_a_norm(lane: str, kv: str, rope: Rope) -> None:
    """A norm of each head without a weight; k and v may be one tensor."""
    case = RopeKv(Lab(lane), rope, "neox", kv, qk_norm=True, v_norm=True)
    case.bindings[5], case.v = case.bindings[4], case.bindings[4].array
    case.run()
    case.check()


@every_lane
@every_kind
@pytest.mark.parametrize("qk_norm", [False, True], ids=["", "qknorm"])
def test_q_may_rotate_alone(lane: str, kind: str, qk_norm: bool) -> None:
    """Without key heads nothing but q is read, and no cache is written."""
    case = RopeKv(Lab(lane), ROPES[-1], kind, "f16", qk_norm)
    nothing = case.lab.input(np.full(1, np.nan, np.float32))
    case.bindings[2] = case.bindings[4] = case.bindings[5] = case.bindings[8] = nothing
    case.run(alone=True)
    assert_close(case.q_out.array[: case.batch.n_tokens], case.want_q, 1e-6)
    for cache in case.caches:
        assert_untouched(cache.array)


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
    case.bindings[5] = lab.input(case.v)
    case.run()
    case.check()


@every_lane
def test_a_step_without_tokens_leaves_the_cache(lane: str) -> None:
    lab = Lab(lane)
    case = RopeKv(lab, ROPES[1], "neox", "f16", False)
    case.bindings[0] = lab.step(0)
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
def test_a_gate_meets_a_slice(lane: str, n: int) -> None:
    """The slice of row t begins t strides behind the first one's. What lies between is not touched."""
    lab, stride = Lab(lane), n + 70
    gate, up, out = padded(lab, 4, 3, n, scale=3), np.full((4, stride), np.nan, np.float32), lab.output(4, n)
    up[:3, :n] = lab.normal(3, n)
    bindings = [lab.step(3), lab.input(gate), lab.input(up.ravel()[: 3 * stride + n], align=4), out]
    shapes = lab.core.shapes()
    grid = (tiles(n, shapes["ELEMENTWISE_COLUMNS"]), 4)
    params = {"n": n, "stride": stride}
    lab.run("geglu_slice", params, "SliceParams", bindings, grid, shapes["ELEMENTWISE_THREADS"])
    assert_close(out.array[:3], gelu(gate[:3].astype(np.float64)) * up[:3, :n], 1e-6)
    assert_untouched(out.array[3:])


@every_lane
@every_length
def test_scale(lane: str, n: int) -> None:
    lab, factor = Lab(lane), np.float32(0.3)
    x, out = padded(lab, 4, 3, n), lab.output(4, n)
    shapes = lab.core.shapes()
    bindings = [lab.step(3), lab.input(x), lab.input(np.full(1, factor), align=4), out]
    grid = (tiles(n, shapes["ELEMENTWISE_COLUMNS"]), 4)
    lab.run("scale", {"n": n}, "ElementwiseParams", bindings, grid, shapes["ELEMENTWISE_THREADS"])
    assert np.array_equal(out.array[:3], x[:3] * factor)
    assert_untouched(out.array[3:])


@every_lane
@every_length
def test_swiglu_clamped(lane: str, n: int) -> None:
    """Gates beyond 7, and factors beyond 7 on both sides."""
    lab = Lab(lane)
    gate, up = padded(lab, 4, 3, n, scale=8), padded(lab, 4, 3, n, scale=8)
    out = lab.output(4, n)
    run_elementwise(lab, "swiglu_clamped", [gate, up], 3, out)
    g, u = np.minimum(gate[:3].astype(np.float64), 7), np.clip(up[:3].astype(np.float64), -7, 7)
    assert_close(out.array[:3], g / (1 + np.exp(-1.702 * g)) * (u + 1), 1e-6)
    assert_untouched(out.array[3:])


@every_lane
@every_length
def test_relu2(lane: str, n: int) -> None:
    lab = Lab(lane)
    x = padded(lab, 4, 3, n)
    out = lab.output(4, n)
    run_elementwise(lab, "relu2", [x], 3, out)
    assert np.array_equal(out.array[:3], np.maximum(x[:3], 0) ** 2)
    assert_untouched(out.array[3:])


@every_lane
@every_length
def test_take_rows(lane: str, n: int) -> None:
    lab, outs = Lab(lane), [4, 0, 5]
    x = padded(lab, 8, 6, n)
    out = lab.output(5, n)
    run_take_rows(lab, x, outs, 6, out)
    assert np.array_equal(out.array[:3], x[outs])
    assert_untouched(out.array[3:])


@every_lane
def test_a_step_without_outputs_takes_no_row(lane: str) -> None:
    lab = Lab(lane)
    out = lab.output(2, 70)
    run_take_rows(lab, padded(lab, 2, 2, 70), [], 2, out)
    assert_untouched(out.array)


# ---- rows that a block which drafts reads one position later -----------------------------------------------------


@every_lane
@every_length
@pytest.mark.parametrize("kv", ["f32", "f16"])
def test_rows_are_kept_and_paired_with_the_next_position(lane: str, n: int, kv: str) -> None:
    """Runs at the beginning of a sequence, on both sides of a page's end, and across it."""
    lab, dtype = Lab(lane), np.float32 if kv == "f32" else np.float16
    batch = StepRows(lab, (Run(0, 0), Run(1, 64), Run(2, 5, 3), Run(3, 62, 4), Run(4, 0, 2)), 12)
    x, rows, new = padded(lab, 12, batch.n_tokens, n), batch.n_tokens, batch.new_places
    kept, out = lab.in_out(lab.normal(batch.cache_rows, n).astype(dtype)), lab.output(12, 2 * n)
    want = kept.array.copy()
    want[new] = x[:rows].astype(dtype)
    step = [batch.input(lab, name) for name in ("step", "rows", "pages")]
    shapes = lab.core.shapes()
    launch = (tiles(n, shapes["ELEMENTWISE_COLUMNS"]), 12), shapes["ELEMENTWISE_THREADS"]
    lab.run(f"keep_rows_{kv}", {"n": n}, "ElementwiseParams", [*step, lab.input(x), kept], *launch)
    assert np.array_equal(kept.array, want)

    bindings = [*step, lab.input(want), lab.input(x), out]
    lab.run(f"pair_rows_{kv}", {"n": n}, "ElementwiseParams", bindings, *launch)
    at = zip(batch.sequences.tolist(), batch.positions.tolist(), strict=True)
    before = [want[batch.places(s, p - 1, p)[0]] if p else np.zeros(n, dtype) for s, p in at]
    assert np.array_equal(out.array[:rows], np.concatenate([x[:rows], np.array(before, np.float32)], axis=1))
    assert_untouched(out.array[rows:])
