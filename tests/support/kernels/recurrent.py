"""The gated delta rule and the steps around it: formulas in float64 NumPy, and launches of the kernels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from support.kernel_lab import Guarded, Lab, assert_untouched, tiles
from support.kernels.states import F32, F64, States
from support.step_rows import StepRows

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
    grouped: bool = False  # v heads with one k head lie side by side, and their betas and alphas in one matrix

    @property
    def repeat(self) -> int:
        return self.n_v // self.n_k if self.grouped else 1

    @property
    def k_heads(self) -> NDArray[np.int64]:
        """The k head of each v head."""
        return np.arange(self.n_v) // self.repeat % self.n_k

    @property
    def channels(self) -> int:
        return 2 * self.n_k * self.d_k + self.n_v * self.d_v

    @property
    def params(self) -> dict[str, float]:
        heads = {"n_k_head": self.n_k, "n_v_head": self.n_v, "d_k": self.d_k, "d_v": self.d_v}
        heads |= {"repeat": self.repeat, "gate_step": 2 * self.repeat if self.grouped else 1}
        return {**heads, "d_conv": self.d_conv, "norm_eps": EPS, "l2_eps": EPS}

    @property
    def head_class(self) -> int:
        return min(c for c in CLASSES if c >= self.d_k)

    def split(self, qkv: F64) -> tuple[F64, F64, F64]:
        """Splits qkv [T, channels] into q, k [T, n_k, d_k] and v [T, n_v, d_v]."""
        q, k, v = np.split(qkv, [self.n_k * self.d_k, 2 * self.n_k * self.d_k], axis=1)
        return q.reshape(-1, self.n_k, self.d_k), k.reshape(-1, self.n_k, self.d_k), v.reshape(-1, self.n_v, self.d_v)

    def __str__(self) -> str:
        grouped = "-grouped" if self.grouped else ""
        return f"k{self.n_k}x{self.d_k}-v{self.n_v}x{self.d_v}-conv{self.d_conv}{grouped}"


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
    Shape(2, 6, 64, 32, grouped=True),
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
    k_head = shape.k_heads
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


@dataclass
class Inputs:
    """Inputs of a layer at all positions of one sequence."""

    qkv: F32
    z: F32
    alpha: F32
    beta: F32


class Layer(States):
    """A recurrent layer: random weights, random inputs of sequences of these lengths, and the expected outputs."""

    def __init__(self, lab: Lab, shape: Shape, *lengths: int, alpha_scale: float = 2.0, qkv_scale: float = 1.0) -> None:
        super().__init__(lab, (shape.d_conv, shape.channels), (shape.n_v, shape.d_v, shape.d_k))
        self.shape = shape
        self.scales = {"qkv": qkv_scale, "alpha": alpha_scale, "beta": alpha_scale}
        self.sequences: list[Inputs] = []
        for length in lengths:
            self.add(length)
        self.conv_w = lab.normal(shape.channels, shape.d_conv, scale=0.5)
        self.a = -np.exp(lab.normal(shape.n_v)).astype(np.float32)
        self.dt_bias = lab.normal(shape.n_v)
        self.norm_w = lab.normal(shape.d_v)

    def add(self, length: int, source: int = 0, same: int = 0) -> int:
        """Adds a sequence, whose first ``same`` inputs are those of ``source``. Returns its number."""
        shape = self.shape
        widths = {"qkv": shape.channels, "z": shape.n_v * shape.d_v, "alpha": shape.n_v, "beta": shape.n_v}
        new = Inputs(**{name: self.lab.normal(length, n, scale=self.scales.get(name, 1)) for name, n in widths.items()})
        for name in widths if same else ():
            getattr(new, name)[:same] = getattr(self.sequences[source], name)[:same]
        self.sequences.append(new)
        return len(self.sequences) - 1

    def conv_inputs(self, sequence: int) -> F32:
        return self.sequences[sequence].qkv

    # ---- what is expected

    def gates(self, sequence: int = 0) -> tuple[F64, F64]:
        """Computes decay and beta [P, n_v]. alpha and dt_bias are added in float32, as in the kernels."""
        of = self.sequences[sequence]
        g = f64(self.a) * np.logaddexp(0.0, f64(of.alpha + self.dt_bias))
        return np.exp(g), sigmoid(f64(of.beta))

    def convolved(self, sequence: int = 0) -> F64:
        return convolved(self.shape, f64(self.sequences[sequence].qkv), f64(self.conv_w))

    def expected(self, sequence: int = 0) -> tuple[F64, F64, F64]:
        """Returns outputs [P, n_v * d_v] of all positions, the state after them, and the scales of the outputs' errors.

        A head that nearly cancels is as large as the others once it is normalised, and so is its error.
        """
        shape = self.shape
        start = np.zeros((shape.n_v, shape.d_v, shape.d_k))
        o, state, scale = delta_rule(shape, self.convolved(sequence), *self.gates(sequence), start)
        z, weight = f64(self.sequences[sequence].z).reshape(o.shape), f64(self.norm_w)
        want = gated_norm(o, z, weight)
        scales = np.abs(gated_norm(o, z, weight, np.sqrt(np.mean(scale * scale, axis=-1, keepdims=True))))
        return want.reshape(len(o), -1), state, scales.reshape(len(o), -1)

    # ---- dispatches: each of the methods below runs one

    def input(self, batch: StepRows, name: str) -> Guarded:
        """Makes the input of a step: a row for each of its rows, then NaN."""
        return self.rows_of(batch, [getattr(of, name) for of in self.sequences])

    def gate_inputs(self, batch: StepRows) -> list[Guarded]:
        """Makes alpha and beta of a step. Of grouped heads both are one matrix: betas of a group, then its alphas."""
        alpha, beta = (self.input(batch, name) for name in ("alpha", "beta"))
        if not self.shape.grouped:
            return [alpha, beta]
        n, groups = self.shape.repeat, (len(batch.rows), self.shape.n_k, self.shape.repeat)
        both = np.concatenate([beta.array.reshape(groups), alpha.array.reshape(groups)], axis=2).reshape(-1)
        return [self.lab.input(both[n:], align=4), self.lab.input(both[:-n], align=4)]

    def conv1d(self, batch: StepRows, conv_state: Guarded) -> Guarded:
        lab, shape, sizes = self.lab, self.shape, self.lab.core.shapes()
        out = lab.output(len(batch.rows), shape.channels)
        grid = (2 * shape.n_k + shape.n_v, tiles(len(batch.rows), sizes["SSM_CONV_TOKENS"]))
        inputs = [self.input(batch, "qkv"), lab.input(self.conv_w, align=4), lab.input(conv_state.array)]
        bindings = [batch.input(lab, "step"), batch.input(lab, "rows"), *inputs, out]
        lab.run("ssm_conv1d", shape.params, "SsmParams", bindings, grid, sizes["SSM_CONV_THREADS"])
        return out

    def delta(self, batch: StepRows, qkv: Guarded, conv_state: Guarded, state: Guarded, n_z: int = 1) -> Guarded:
        lab, shape, sizes = self.lab, self.shape, self.lab.core.shapes()
        out = lab.output(len(batch.rows), shape.n_v * shape.d_v)
        gates = self.gate_inputs(batch)
        heads = [lab.input(x, align=4) for x in (self.a, self.dt_bias)]
        grid = (tiles(shape.d_v * shape.head_class, sizes["SSM_DELTA_FLOATS"]), shape.n_v, n_z)
        step = [batch.input(lab, "step"), batch.input(lab, "rows")]
        bindings = [*step, self.input(batch, "qkv"), qkv, *gates, *heads, conv_state, state, out]
        kernel = f"ssm_delta_{shape.head_class}"
        lab.run(kernel, shape.params, "SsmParams", bindings, grid, sizes["SSM_DELTA_THREADS"])
        return out

    def norm(self, batch: StepRows, o: Guarded) -> Guarded:
        lab, shape, threads = self.lab, self.shape, self.lab.core.shapes()["SSM_NORM_THREADS"]
        out = lab.output(*o.array.shape)
        bindings = [batch.input(lab, "step"), o, self.input(batch, "z"), lab.input(self.norm_w, align=4), out]
        grid = (tiles(shape.n_v, threads // 32), len(o.array))
        lab.run("ssm_norm", shape.params, "SsmParams", bindings, grid, threads)
        return out

    def ungroup(self, batch: StepRows, x: Guarded) -> tuple[Guarded, Guarded]:
        lab, shape, sizes = self.lab, self.shape, self.lab.core.shapes()
        outs = (lab.output(len(x.array), shape.channels), lab.output(len(x.array), shape.n_v * shape.d_v))
        grid = (tiles(x.array.shape[1], sizes["ELEMENTWISE_COLUMNS"]), len(x.array))
        bindings = [batch.input(lab, "step"), x, *outs]
        lab.run("ssm_ungroup", shape.params, "SsmParams", bindings, grid, sizes["ELEMENTWISE_THREADS"])
        return outs

    def chunk(self, batch: StepRows, conv_state: Guarded, state: Guarded, n_z: int = 1) -> F32:
        """Runs a step by the three kernels for any runs."""
        qkv = self.conv1d(batch, conv_state)
        out = self.norm(batch, self.delta(batch, qkv, conv_state, state, n_z))
        for result in (qkv, out):
            assert_untouched(result.array[batch.n_tokens :])
        return out.array[: batch.n_tokens].copy()

    def step(self, batch: StepRows, conv_state: Guarded, state: Guarded, threads: int = 0) -> F32:
        """Runs a step of runs of one row by ssm_step."""
        lab, shape = self.lab, self.shape
        out = lab.output(len(batch.rows), shape.n_v * shape.d_v)
        inputs = [self.input(batch, "qkv"), self.input(batch, "z"), *self.gate_inputs(batch)]
        weights = [lab.input(x, align=4) for x in (self.conv_w, self.a, self.dt_bias, self.norm_w)]
        bindings = [batch.input(lab, "step"), batch.input(lab, "rows"), *inputs, *weights, conv_state, state, out]
        threads = threads or lab.core.shapes()["SSM_STEP_THREADS"]
        kernel = f"ssm_step_{shape.head_class}"
        lab.run(kernel, shape.params, "SsmParams", bindings, (shape.n_v, len(batch.rows)), threads)
        assert_untouched(out.array[batch.n_tokens :])
        return out.array[: batch.n_tokens].copy()
