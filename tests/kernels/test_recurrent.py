"""The gated delta rule and what surrounds it (kernels/ssm.metal) against its formulas in float64 NumPy.

A sequence is one array of inputs; a step works on some of its positions, with what the kernels keep of the others in
the ring of convolution inputs and in the recurrent state. Whatever a step has no business to read is NaN.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray
from test_rows import padded

from support.kernel_lab import Guarded, Lab, assert_close, assert_untouched, every_lane, tiles

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

EPS = float(np.float32(1e-6))
#: A kernel serves head sizes d_k up to its class.
CLASSES = (64, 128, 256)


@dataclass(frozen=True)
class Shape:
    """Heads and sizes of a recurrent layer."""

    n_k: int
    n_v: int
    d_k: int
    d_v: int
    d_conv: int = 4

    @property
    def channels(self) -> int:
        return 2 * self.n_k * self.d_k + self.n_v * self.d_v

    @property
    def params(self) -> dict[str, float]:
        heads = {"n_k_head": self.n_k, "n_v_head": self.n_v, "d_k": self.d_k, "d_v": self.d_v}
        return {**heads, "d_conv": self.d_conv, "norm_eps": EPS, "l2_eps": EPS}

    @property
    def head_class(self) -> int:
        return min(c for c in CLASSES if c >= self.d_k)

    def split(self, qkv: F64) -> tuple[F64, F64, F64]:
        """q, k [T, n_k, d_k] and v [T, n_v, d_v] of qkv [T, channels]."""
        q, k, v = np.split(qkv, [self.n_k * self.d_k, 2 * self.n_k * self.d_k], axis=1)
        return q.reshape(-1, self.n_k, self.d_k), k.reshape(-1, self.n_k, self.d_k), v.reshape(-1, self.n_v, self.d_v)

    def __str__(self) -> str:
        return f"k{self.n_k}x{self.d_k}-v{self.n_v}x{self.d_v}-conv{self.d_conv}"


SHAPES = [
    Shape(1, 1, 32, 32),
    Shape(2, 4, 64, 64),
    Shape(1, 3, 64, 96, 2),
    Shape(2, 2, 96, 32, 3),
    Shape(2, 4, 128, 128),
    Shape(1, 2, 128, 256, 5),
    Shape(1, 1, 160, 64, 8),
    Shape(1, 2, 256, 32, 6),
    Shape(1, 1, 224, 224, 7),
    Shape(1, 1, 256, 256),
]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
every_class = pytest.mark.parametrize("shape", [SHAPES[i] for i in (2, 4, 6)], ids=str)


# ---- the formulas ------------------------------------------------------------------------------------------------


def sigmoid(x: F64) -> F64:
    return np.asarray(np.exp(-np.logaddexp(0.0, -x)))


def silu(x: F64) -> F64:
    return x * sigmoid(x)


def unit(x: F64) -> F64:
    """x / sqrt(|x|^2 + eps) along the last axis."""
    return np.asarray(x / np.sqrt(np.sum(x * x, axis=-1, keepdims=True) + EPS))


def convolved(shape: Shape, inputs: F64, weight: F64) -> F64:
    """What ssm_conv1d makes of a whole sequence, inputs [P, channels], weight [channels, d_conv]."""
    before = np.zeros((shape.d_conv - 1, shape.channels))
    history = np.concatenate([before, inputs])
    y = silu(sum(history[i : i + len(inputs)] * weight[:, i] for i in range(shape.d_conv)))
    q, k, v = shape.split(y)
    heads = (unit(q) / np.sqrt(shape.d_k), unit(k), v)
    return np.concatenate([x.reshape(len(inputs), -1) for x in heads], axis=1)


def delta_rule(shape: Shape, qkv: F64, decay: F64, beta: F64, state: F64) -> tuple[F64, F64, F64]:
    """Outputs [T, n_v, d_v], the state after them and the scales of the outputs' errors; state is S transposed."""
    q, k, v = shape.split(qkv)
    k_head = np.arange(shape.n_v) % shape.n_k
    s, outputs, scales = state.copy(), [], []
    for t in range(len(qkv)):
        s *= decay[t, :, None, None]
        d = (v[t] - np.einsum("hvk,hk->hv", s, k[t, k_head])) * beta[t, :, None]
        s += d[:, :, None] * k[t, k_head][:, None, :]
        outputs.append(np.einsum("hvk,hk->hv", s, q[t, k_head]))
        scales.append(np.sqrt(np.einsum("hvk,hk->hv", s * s, q[t, k_head] ** 2)))
    return np.array(outputs), s, np.array(scales)


def gated_norm(o: F64, z: F64, weight: F64, x: F64 | None = None) -> F64:
    """o and z [T, n_v, d_v]; what becomes of ``x``, by default o, where o is normalised."""
    size = np.sqrt(np.mean(o * o, axis=-1, keepdims=True) + EPS)
    return np.asarray((o if x is None else x) / size * weight * silu(z))


def state_scales(state: F64) -> F64:
    """The scales of a state's errors, [n_v, d_v, d_k]: its elements', and the root mean square of each head."""
    return np.abs(state) + np.sqrt(np.mean(state * state, axis=(1, 2), keepdims=True))


# ---- a layer on a device -----------------------------------------------------------------------------------------


def f64(x: F32) -> F64:
    return x.astype(np.float64)


class Layer:
    """Random weights, a sequence of ``length`` random inputs, and what all of its positions should give."""

    def __init__(self, lab: Lab, shape: Shape, length: int, alpha_scale: float = 2.0, qkv_scale: float = 1.0) -> None:
        self.lab, self.shape = lab, shape
        self.qkv = lab.normal(length, shape.channels, scale=qkv_scale)
        self.z = lab.normal(length, shape.n_v * shape.d_v)
        self.alpha = lab.normal(length, shape.n_v, scale=alpha_scale)
        self.beta = lab.normal(length, shape.n_v, scale=alpha_scale)
        self.conv_w = lab.normal(shape.channels, shape.d_conv, scale=0.5)
        self.a = -np.exp(lab.normal(shape.n_v)).astype(np.float32)
        self.dt_bias = lab.normal(shape.n_v)
        self.norm_w = lab.normal(shape.d_v)

    @property
    def gates(self) -> tuple[F64, F64]:
        """decay and beta of all positions [P, n_v]; alpha and dt_bias are added in float32, as the kernels do."""
        g = f64(self.a) * np.logaddexp(0.0, f64(self.alpha + self.dt_bias))
        return np.exp(g), sigmoid(f64(self.beta))

    def expected(self) -> tuple[F64, F64, F64]:
        """Outputs [P, n_v * d_v] of the whole sequence from its beginning, the state after it, and the outputs' scales:
        a head that all but cancels is as large as others once it is normalised, and so are its errors.
        """
        shape = self.shape
        start = np.zeros((shape.n_v, shape.d_v, shape.d_k))
        o, state, scale = delta_rule(shape, convolved(shape, f64(self.qkv), f64(self.conv_w)), *self.gates, start)
        z, weight = f64(self.z).reshape(o.shape), f64(self.norm_w)
        want = gated_norm(o, z, weight)
        scales = np.abs(gated_norm(o, z, weight, np.sqrt(np.mean(scale * scale, axis=-1, keepdims=True))))
        return want.reshape(len(o), -1), state, scales.reshape(len(o), -1)

    def ring(self, pos: int) -> F32:
        """The ring before position ``pos``: the inputs of the last d_conv - 1 positions, NaN where there are none."""
        ring = np.full((self.shape.d_conv, self.shape.channels), np.nan, np.float32)
        for p in range(max(0, pos - self.shape.d_conv + 1), pos):
            ring[p % self.shape.d_conv] = self.qkv[p]
        return ring

    def rows(self, x: F32, pos: int, n_tokens: int, rows: int) -> Guarded:
        """Positions pos .. of x as the input of a step made for ``rows`` rows."""
        out = np.full((rows, x.shape[1]), np.nan, np.float32)
        out[:n_tokens] = x[pos : pos + n_tokens]
        return self.lab.input(out)

    # Each of these runs one dispatch.

    def conv1d(self, pos: int, n_tokens: int, rows: int, conv_state: Guarded) -> Guarded:
        lab, shape, sizes = self.lab, self.shape, self.lab.core.shapes()
        out = lab.output(rows, shape.channels)
        qkv, weight = self.rows(self.qkv, pos, n_tokens, rows), lab.input(self.conv_w, align=4)
        grid = (2 * shape.n_k + shape.n_v, tiles(rows, sizes["SSM_CONV_TOKENS"]))
        bindings = [lab.step(n_tokens, pos), qkv, weight, conv_state, out]
        lab.run("ssm_conv1d", shape.params, "SsmParams", bindings, grid, sizes["SSM_CONV_THREADS"])
        return out

    def delta(self, pos: int, n_tokens: int, qkv: Guarded, state: Guarded) -> Guarded:
        lab, shape, sizes = self.lab, self.shape, self.lab.core.shapes()
        rows = len(qkv.array)
        out = lab.output(rows, shape.n_v * shape.d_v)
        gates = [self.rows(x, pos, n_tokens, rows) for x in (self.alpha, self.beta)]
        heads = [lab.input(x, align=4) for x in (self.a, self.dt_bias)]
        grid = (tiles(shape.d_v * shape.head_class, sizes["SSM_DELTA_FLOATS"]), shape.n_v)
        bindings = [lab.step(n_tokens, pos), qkv, *gates, *heads, state, out]
        kernel = f"ssm_delta_{shape.head_class}"
        lab.run(kernel, shape.params, "SsmParams", bindings, grid, sizes["SSM_DELTA_THREADS"])
        return out

    def norm(self, pos: int, n_tokens: int, o: Guarded) -> Guarded:
        lab, shape, threads = self.lab, self.shape, self.lab.core.shapes()["SSM_NORM_THREADS"]
        out = lab.output(*o.array.shape)
        z = self.rows(self.z, pos, n_tokens, len(o.array))
        bindings = [lab.step(n_tokens, pos), o, z, lab.input(self.norm_w, align=4), out]
        grid = (tiles(shape.n_v, threads // 32), len(o.array))
        lab.run("ssm_norm", shape.params, "SsmParams", bindings, grid, threads)
        return out

    def chunk(self, pos: int, n_tokens: int, rows: int, conv_state: Guarded, state: Guarded) -> F32:
        """A step of ``n_tokens`` by the three kernels for many tokens."""
        qkv = self.conv1d(pos, n_tokens, rows, conv_state)
        out = self.norm(pos, n_tokens, self.delta(pos, n_tokens, qkv, state))
        for result in (qkv, out):
            assert_untouched(result.array[n_tokens:])
        return out.array[:n_tokens].copy()

    def step(self, pos: int, conv_state: Guarded, state: Guarded, n_tokens: int = 1, threads: int = 0) -> F32:
        """A step of one token by ssm_step."""
        lab, shape = self.lab, self.shape
        out = lab.output(1, shape.n_v * shape.d_v)
        inputs = [self.rows(x, pos, n_tokens, 1) for x in (self.qkv, self.z, self.alpha, self.beta)]
        weights = [lab.input(x, align=4) for x in (self.conv_w, self.a, self.dt_bias, self.norm_w)]
        bindings = [lab.step(n_tokens, pos), *inputs, *weights, conv_state, state, out]
        threads = threads or lab.core.shapes()["SSM_STEP_THREADS"]
        lab.run(f"ssm_step_{shape.head_class}", shape.params, "SsmParams", bindings, (shape.n_v,), threads)
        return out.array.copy()

    def poisoned(self) -> tuple[Guarded, Guarded]:
        """Ring and state before the first position: whatever they hold."""
        shape = self.shape
        return self.lab.in_out(self.ring(0)), self.lab.output(shape.n_v, shape.d_v, shape.d_k)


# ---- kernel by kernel --------------------------------------------------------------------------------------------

STEPS = [(0, 1, 1), (0, 2, 5), (3, 1, 1), (5, 3, 3), (1, 17, 17), (7, 33, 40), (2, 40, 40)]
every_step = pytest.mark.parametrize(("pos", "n_tokens", "rows"), STEPS, ids=[f"pos{p}-T{n}of{r}" for p, n, r in STEPS])


@every_lane
@every_shape
@every_step
def test_ssm_conv1d(lane: str, shape: Shape, pos: int, n_tokens: int, rows: int) -> None:
    lab = Lab(lane)
    layer = Layer(lab, shape, pos + n_tokens)
    ring = layer.ring(pos)
    conv_state = lab.in_out(ring)
    out = layer.conv1d(pos, n_tokens, rows, conv_state)
    want = convolved(shape, f64(layer.qkv), f64(layer.conv_w))[pos:]
    for got_heads, want_heads in zip(shape.split(out.array[:n_tokens]), shape.split(want), strict=True):
        assert_close(got_heads, want_heads, 1e-6)
    assert_untouched(out.array[n_tokens:])
    for p in range(max(pos, pos + n_tokens - shape.d_conv), pos + n_tokens):
        ring[p % shape.d_conv] = layer.qkv[p]
    assert np.array_equal(conv_state.array, ring, equal_nan=True)


@every_lane
@every_shape
@every_step
def test_ssm_delta(lane: str, shape: Shape, pos: int, n_tokens: int, rows: int) -> None:
    lab = Lab(lane)
    layer = Layer(lab, shape, pos + n_tokens)
    q, k, v = (f64(lab.normal(n_tokens, *x.shape[1:])) for x in shape.split(np.zeros((1, shape.channels))))
    qkv = np.full((rows, shape.channels), np.nan, np.float32)
    heads = [unit(q) / np.sqrt(shape.d_k), unit(k), v]
    qkv[:n_tokens] = np.concatenate([x.reshape(n_tokens, -1) for x in heads], axis=1)
    before = lab.normal(shape.n_v, shape.d_v, shape.d_k)
    if pos == 0:
        before[...] = np.nan
    state = lab.in_out(before)
    out = layer.delta(pos, n_tokens, lab.input(qkv), state)
    decay, beta = (gate[pos:] for gate in layer.gates)
    want, want_state, scale = delta_rule(shape, f64(qkv[:n_tokens]), decay, beta, np.nan_to_num(f64(before)))
    assert_close(out.array[:n_tokens].reshape(want.shape), want, 1e-6, scale)
    assert_untouched(out.array[n_tokens:])
    assert_close(state.array, want_state, 1e-6)


@every_lane
@every_shape
@pytest.mark.parametrize(("n_tokens", "rows"), [(1, 1), (3, 5)])
@pytest.mark.parametrize("scale", [0.0, 1e-6, 1.0, 1e6])
def test_ssm_norm(lane: str, shape: Shape, n_tokens: int, rows: int, scale: float) -> None:
    lab = Lab(lane)
    layer = Layer(lab, shape, n_tokens)
    o = padded(lab, rows, n_tokens, shape.n_v * shape.d_v, scale=scale)
    out = layer.norm(0, n_tokens, lab.input(o))
    heads = (n_tokens, shape.n_v, shape.d_v)
    want = gated_norm(f64(o[:n_tokens]).reshape(heads), f64(layer.z).reshape(heads), f64(layer.norm_w))
    assert_close(out.array[:n_tokens], want.reshape(n_tokens, -1), 1e-6)
    assert_untouched(out.array[n_tokens:])


# ---- sequences: the same in whatever steps -----------------------------------------------------------------------


@every_lane
@every_class
@pytest.mark.parametrize("chunks", [(40,), (1, 1, 3, 2, 20, 13), (16, 17, 7)], ids=str)
def test_chunks_and_single_tokens_give_the_whole(lane: str, shape: Shape, chunks: tuple[int, ...]) -> None:
    """Prefill in chunks of a plan for 32 rows or more, then ssm_step for some tokens, from poisoned state."""
    lab = Lab(lane)
    n_single = 5
    layer = Layer(lab, shape, sum(chunks) + n_single)
    conv_state, state = layer.poisoned()
    pos, parts = 0, []
    for n in chunks:
        parts.append(layer.chunk(pos, n, max(n, 32), conv_state, state))
        pos += n
    for _ in range(n_single):
        parts.append(layer.step(pos, conv_state, state))
        pos += 1
    want, want_state, scales = layer.expected()
    assert_close(np.concatenate(parts), want, 2e-6, scales)
    assert_close(state.array, want_state, 2e-6, state_scales(want_state))
    for p in range(pos - shape.d_conv, pos):
        assert np.array_equal(conv_state.array[p % shape.d_conv], layer.qkv[p])


@every_lane
@every_class
@pytest.mark.parametrize("threads", [32, 0, 1024], ids=["32 threads", "as launched", "1024 threads"])
def test_token_by_token(lane: str, shape: Shape, threads: int) -> None:
    lab = Lab(lane)
    layer = Layer(lab, shape, 12)
    if threads > lab.device.limits(f"ssm_step_{shape.head_class}")[0]:
        pytest.skip("more threads than this kernel may have on this device")
    conv_state, state = layer.poisoned()
    out = np.concatenate([layer.step(pos, conv_state, state, threads=threads) for pos in range(12)])
    want, want_state, scales = layer.expected()
    assert_close(out, want, 2e-6, scales)
    assert_close(state.array, want_state, 2e-6, state_scales(want_state))


@every_lane
def test_an_empty_step_changes_nothing(lane: str) -> None:
    lab, shape = Lab(lane), SHAPES[1]
    layer = Layer(lab, shape, 9)
    ring, before = layer.ring(8), lab.normal(shape.n_v, shape.d_v, shape.d_k)
    conv_state, state = lab.in_out(ring), lab.in_out(before)
    assert layer.chunk(8, 0, 3, conv_state, state).size == 0
    assert_untouched(layer.step(8, conv_state, state, n_tokens=0))
    assert np.array_equal(conv_state.array, ring, equal_nan=True)
    assert np.array_equal(state.array, before)


# ---- values ------------------------------------------------------------------------------------------------------


@every_lane
@pytest.mark.parametrize("kernel", ["delta", "step"])
def test_gates_keep_their_precision_everywhere(lane: str, kernel: str) -> None:
    """With beta at 0 a step only decays the state, by e^(a softplus(x)); a makes relative errors of softplus show."""
    lab = Lab(lane)
    x = np.array([-1e30, -200, -103, -88, -50, -30, -20, -10, -3, -1, -1e-3, 0, 1e-6, 0.3, 2, 10, 19, 21, 60, 3e38])
    shape = Shape(1, len(x), 32, 32, 2)
    layer = Layer(lab, shape, 2)
    layer.alpha[:] = x
    layer.dt_bias[:] = 0
    layer.beta[:] = -1e30
    soft = np.logaddexp(0.0, f64(layer.alpha[0]))
    layer.a = (-1.0 / np.maximum(soft, 1e-30)).astype(np.float32)
    before = lab.normal(shape.n_v, shape.d_v, shape.d_k)
    state = lab.in_out(before)
    if kernel == "step":
        layer.step(1, lab.in_out(layer.ring(1)), state)
    else:
        layer.delta(1, 1, lab.input(layer.qkv[:1]), state)
    assert_close(state.array, layer.gates[0][1][:, None, None] * f64(before), 1e-6)


@every_lane
@pytest.mark.parametrize("scale", [0.0, 1e-8, 1e-4, 1e4])
def test_heads_of_any_length(lane: str, scale: float) -> None:
    """eps carries q and k of no length, and large inputs still become unit vectors."""
    lab, shape = Lab(lane), SHAPES[1]
    layer = Layer(lab, shape, 20, qkv_scale=scale)
    conv_state, state = layer.poisoned()
    parts = [layer.chunk(0, 17, 17, conv_state, state)]
    parts += [layer.step(pos, conv_state, state) for pos in range(17, 20)]
    want, want_state, _ = layer.expected()
    assert_close(np.concatenate(parts), want, 1e-5)
    assert_close(state.array, want_state, 1e-5)


@every_lane
@pytest.mark.parametrize("alpha_scale", [30.0, 1e4, 1e30])
def test_extreme_gates(lane: str, alpha_scale: float) -> None:
    """Gates that forget all or nothing, learn all or nothing."""
    lab, shape = Lab(lane), SHAPES[1]
    layer = Layer(lab, shape, 36, alpha_scale=alpha_scale)
    conv_state, state = layer.poisoned()
    parts = [layer.chunk(0, 33, 33, conv_state, state)]
    parts += [layer.step(pos, conv_state, state) for pos in range(33, 36)]
    want, want_state, _ = layer.expected()
    assert_close(np.concatenate(parts), want, 1e-5)
    assert_close(state.array, want_state, 1e-5)
