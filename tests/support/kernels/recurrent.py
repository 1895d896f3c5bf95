"""The gated delta rule and the steps around it: formulas in float64 NumPy, and launches of the kernels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from support.kernel_lab import Guarded, Lab, assert_untouched, tiles

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
        """Splits qkv [T, channels] into q, k [T, n_k, d_k] and v [T, n_v, d_v]."""
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


def sigmoid(x: F64) -> F64:
    return np.asarray(np.exp(-np.logaddexp(0.0, -x)))


def silu(x: F64) -> F64:
    return x * sigmoid(x)


def unit(x: F64) -> F64:
    """Computes x / sqrt(|x|^2 + eps) along the last axis."""
    return np.asarray(x / np.sqrt(np.sum(x * x, axis=-1, keepdims=True) + EPS))


def convolved(shape: Shape, inputs: F64, weight: F64) -> F64:
    """Computes ssm_conv1d of a whole sequence: inputs [P, channels], weight [channels, d_conv]."""
    before = np.zeros((shape.d_conv - 1, shape.channels))
    history = np.concatenate([before, inputs])
    taps = [history[i : i + len(inputs)] * weight[:, i] for i in range(shape.d_conv)]
    y = silu(np.sum(taps, axis=0))
    q, k, v = shape.split(y)
    heads = (unit(q) / np.sqrt(shape.d_k), unit(k), v)
    return np.concatenate([x.reshape(len(inputs), -1) for x in heads], axis=1)


def delta_rule(shape: Shape, qkv: F64, decay: F64, beta: F64, state: F64) -> tuple[F64, F64, F64]:
    """Returns outputs [T, n_v, d_v], the state after them, and the scales of the outputs' errors.

    ``state`` is S transposed.
    """
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
    """Normalises o and gates it by z, both [T, n_v, d_v]. With ``x``, does to x what normalising does to o."""
    size = np.sqrt(np.mean(o * o, axis=-1, keepdims=True) + EPS)
    return np.asarray((o if x is None else x) / size * weight * silu(z))


def f64(x: F32) -> F64:
    return x.astype(np.float64)


class Layer:
    """A recurrent layer: random weights, ``length`` random inputs, and the expected outputs of all positions."""

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
        """Computes decay and beta [P, n_v]. alpha and dt_bias are added in float32, as in the kernels."""
        g = f64(self.a) * np.logaddexp(0.0, f64(self.alpha + self.dt_bias))
        return np.exp(g), sigmoid(f64(self.beta))

    def expected(self) -> tuple[F64, F64, F64]:
        """Returns outputs [P, n_v * d_v] of all positions, the state after them, and the scales of the outputs' errors.

        A head that nearly cancels is as large as the others once it is normalised, and so is its error.
        """
        shape = self.shape
        start = np.zeros((shape.n_v, shape.d_v, shape.d_k))
        o, state, scale = delta_rule(shape, convolved(shape, f64(self.qkv), f64(self.conv_w)), *self.gates, start)
        z, weight = f64(self.z).reshape(o.shape), f64(self.norm_w)
        want = gated_norm(o, z, weight)
        scales = np.abs(gated_norm(o, z, weight, np.sqrt(np.mean(scale * scale, axis=-1, keepdims=True))))
        return want.reshape(len(o), -1), state, scales.reshape(len(o), -1)

    def ring(self, pos: int) -> F32:
        """Makes the ring before position ``pos``: the inputs of the last d_conv - 1 positions, NaN before the first."""
        ring = np.full((self.shape.d_conv, self.shape.channels), np.nan, np.float32)
        for p in range(max(0, pos - self.shape.d_conv + 1), pos):
            ring[p % self.shape.d_conv] = self.qkv[p]
        return ring

    def rows(self, x: F32, pos: int, n_tokens: int, rows: int) -> Guarded:
        """Makes the input of a step made for ``rows`` rows: the positions of x from ``pos``, then NaN."""
        out = np.full((rows, x.shape[1]), np.nan, np.float32)
        out[:n_tokens] = x[pos : pos + n_tokens]
        return self.lab.input(out)

    # Each of the methods below runs one dispatch.

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
        """Runs a step of ``n_tokens`` tokens by the three kernels for many tokens."""
        qkv = self.conv1d(pos, n_tokens, rows, conv_state)
        out = self.norm(pos, n_tokens, self.delta(pos, n_tokens, qkv, state))
        for result in (qkv, out):
            assert_untouched(result.array[n_tokens:])
        return out.array[:n_tokens].copy()

    def step(self, pos: int, conv_state: Guarded, state: Guarded, n_tokens: int = 1, threads: int = 0) -> F32:
        """Runs a step of one token by ssm_step."""
        lab, shape = self.lab, self.shape
        out = lab.output(1, shape.n_v * shape.d_v)
        inputs = [self.rows(x, pos, n_tokens, 1) for x in (self.qkv, self.z, self.alpha, self.beta)]
        weights = [lab.input(x, align=4) for x in (self.conv_w, self.a, self.dt_bias, self.norm_w)]
        bindings = [lab.step(n_tokens, pos), *inputs, *weights, conv_state, state, out]
        threads = threads or lab.core.shapes()["SSM_STEP_THREADS"]
        lab.run(f"ssm_step_{shape.head_class}", shape.params, "SsmParams", bindings, (shape.n_v,), threads)
        return out.array.copy()

    def poisoned(self) -> tuple[Guarded, Guarded]:
        """Makes ring and state before the first position, poisoned: their content must not be read."""
        shape = self.shape
        return self.lab.in_out(self.ring(0)), self.lab.output(shape.n_v, shape.d_v, shape.d_k)
