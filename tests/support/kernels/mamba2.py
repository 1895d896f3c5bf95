"""Mamba2: formulas in float64 NumPy, and launches of the kernels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from support.kernel_lab import Guarded, Lab, assert_untouched, tiles
from support.kernels.recurrent import CLASSES, f64, silu
from support.kernels.states import F32, F64, States
from support.step_rows import StepRows

EPS = float(np.float32(1e-5))


@dataclass(frozen=True)
class Shape:
    """Heads and sizes of a Mamba2 layer."""

    n_head: int
    n_group: int
    d_head: int
    d_state: int
    d_conv: int = 4

    @property
    def d_inner(self) -> int:
        return self.n_head * self.d_head

    @property
    def channels(self) -> int:
        return self.d_inner + 2 * self.n_group * self.d_state

    @property
    def width(self) -> int:
        """Inputs of a token: z, the channels, and dt of each head."""
        return self.d_inner + self.channels + self.n_head

    @property
    def params(self) -> dict[str, float]:
        heads = {"n_head": self.n_head, "n_group": self.n_group, "d_head": self.d_head, "d_state": self.d_state}
        return {**heads, "d_conv": self.d_conv, "norm_eps": EPS}

    @property
    def state_class(self) -> int:
        return min(c for c in CLASSES if c >= self.d_state)

    def split(self, xbc: F64) -> tuple[F64, F64, F64]:
        """Splits the channels into x [T, n_head, d_head], and B and C of each head, [T, n_head, d_state]."""
        x, b, c = np.split(xbc, [self.d_inner, self.d_inner + self.n_group * self.d_state], axis=1)
        groups = np.arange(self.n_head) // (self.n_head // self.n_group)
        b, c = (of.reshape(-1, self.n_group, self.d_state)[:, groups] for of in (b, c))
        return x.reshape(-1, self.n_head, self.d_head), b, c

    def __str__(self) -> str:
        return f"h{self.n_head}x{self.d_head}-g{self.n_group}x{self.d_state}-conv{self.d_conv}"


SHAPES = [
    Shape(1, 1, 16, 32),
    Shape(3, 1, 48, 64, 2),
    Shape(6, 2, 64, 128),
    Shape(4, 4, 80, 96, 3),
    Shape(2, 1, 256, 256, 8),
]


def convolved(shape: Shape, inputs: F64, weight: F64, bias: F64) -> F64:
    """Computes mamba2_conv1d of a whole sequence: inputs [P, channels], weight [channels, d_conv], bias [channels]."""
    history = np.concatenate([np.zeros((shape.d_conv - 1, shape.channels)), inputs])
    taps = [history[i : i + len(inputs)] * weight[:, i] for i in range(shape.d_conv)]
    return silu(np.sum(taps, axis=0) + bias)


def scan(shape: Shape, xbc: F64, dt: F64, a: F64, d: F64, state: F64) -> tuple[F64, F64, F64]:
    """Returns outputs [T, n_head, d_head], the state after them, and the scales of the outputs' errors.

    xbc is convolved, dt [T, n_head] is after softplus. ``state`` is [n_head, d_head, d_state].
    """
    x, b, c = shape.split(xbc)
    s, outputs, scales = state.copy(), [], []
    for t in range(len(xbc)):
        s = s * np.exp(dt[t] * a)[:, None, None] + (dt[t][:, None] * x[t])[:, :, None] * b[t][:, None, :]
        outputs.append(np.einsum("hpn,hn->hp", s, c[t]) + d[:, None] * x[t])
        squares = np.einsum("hpn,hn->hp", s * s, c[t] ** 2) + (d[:, None] * x[t]) ** 2
        scales.append(np.sqrt(squares))
    return np.array(outputs), s, np.array(scales)


def grouped_norm(shape: Shape, o: F64, z: F64, weight: F64, x: F64 | None = None) -> F64:
    """Gates o by z, both [T, d_inner], and normalises each group. With ``x``, does to x what it does to o."""
    gated = (o * silu(z)).reshape(len(o), shape.n_group, -1)
    size = np.sqrt(np.mean(gated**2, axis=-1, keepdims=True) + EPS)
    of = gated if x is None else (x * silu(z)).reshape(gated.shape)
    return np.asarray((of / size).reshape(o.shape) * weight)


class Layer(States):
    """A Mamba2 layer: random weights, random inputs of sequences of these lengths, and the expected outputs."""

    def __init__(self, lab: Lab, shape: Shape, *lengths: int, dt_scale: float = 1.0) -> None:
        super().__init__(lab, (shape.d_conv, shape.channels), (shape.n_head, shape.d_head, shape.d_state))
        self.shape, self.dt_scale = shape, dt_scale
        self.sequences: list[F32] = []
        for length in lengths:
            self.add(length)
        self.conv_w, self.conv_b = lab.normal(shape.channels, shape.d_conv, scale=0.5), lab.normal(shape.channels)
        self.a = -np.exp(lab.normal(shape.n_head)).astype(np.float32)
        self.d, self.dt_bias = lab.normal(shape.n_head), lab.normal(shape.n_head)
        self.norm_w = lab.normal(shape.d_inner)

    def add(self, length: int, source: int = 0, same: int = 0) -> int:
        new = self.lab.normal(length, self.shape.width)
        new[:, -self.shape.n_head :] *= self.dt_scale
        if same:
            new[:same] = self.sequences[source][:same]
        self.sequences.append(new)
        return len(self.sequences) - 1

    def conv_inputs(self, sequence: int) -> F32:
        return self.sequences[sequence][:, self.shape.d_inner : -self.shape.n_head]

    # ---- what is expected

    def dt(self, sequence: int = 0) -> F64:
        """Computes dt [P, n_head]. The bias is added in float32, as in the kernels."""
        raw = self.sequences[sequence][:, -self.shape.n_head :]
        return np.asarray(np.logaddexp(0.0, f64(raw + self.dt_bias)))

    def convolved(self, sequence: int = 0) -> F64:
        return convolved(self.shape, f64(self.conv_inputs(sequence)), f64(self.conv_w), f64(self.conv_b))

    def expected(self, sequence: int = 0) -> tuple[F64, F64, F64]:
        """Returns outputs [P, d_inner] of all positions, the state after them, and the scales of the outputs' errors.

        A group that nearly cancels is as large as the others once it is normalised, and so is its error.
        """
        shape = self.shape
        xbc, start = self.convolved(sequence), np.zeros(self.state_shape)
        o, state, scales = scan(shape, xbc, self.dt(sequence), f64(self.a), f64(self.d), start)
        o, scales = o.reshape(len(o), -1), scales.reshape(len(o), -1)
        z, weight = f64(self.sequences[sequence][:, : shape.d_inner]), f64(self.norm_w)
        want = grouped_norm(shape, o, z, weight)
        spread = np.sqrt(np.mean(scales.reshape(len(o), shape.n_group, -1) ** 2, axis=2))
        spread = np.repeat(spread, shape.d_inner // shape.n_group, axis=1)
        return want, state, np.abs(grouped_norm(shape, o, z, weight, spread))

    # ---- dispatches: each of the methods below runs one

    def inputs(self, batch: StepRows) -> list[Guarded]:
        """Makes the inputs of a step. Rows need no better alignment than a float's."""
        content = self.rows_of(batch, self.sequences).array
        return [batch.input(self.lab, "step"), batch.input(self.lab, "rows"), self.lab.input(content, align=4)]

    def weights(self, *names: str) -> list[Guarded]:
        return [self.lab.input(getattr(self, name), align=4) for name in names]

    def conv1d(self, batch: StepRows, conv_state: Guarded) -> Guarded:
        lab, shape, sizes = self.lab, self.shape, self.lab.core.shapes()
        out = lab.output(len(batch.rows), shape.channels)
        threads = sizes["MAMBA2_CONV_THREADS"]
        grid = (tiles(shape.channels, threads), tiles(len(batch.rows), sizes["SSM_CONV_TOKENS"]))
        bindings = [*self.inputs(batch), *self.weights("conv_w", "conv_b"), lab.input(conv_state.array), out]
        lab.run("mamba2_conv1d", shape.params, "Mamba2Params", bindings, grid, threads)
        return out

    def scan(self, batch: StepRows, xbc: Guarded, conv_state: Guarded, state: Guarded, n_z: int = 1) -> Guarded:
        lab, shape, sizes = self.lab, self.shape, self.lab.core.shapes()
        out = lab.output(len(batch.rows), shape.d_inner)
        grid = (tiles(shape.d_head * shape.state_class, sizes["SSM_DELTA_FLOATS"]), shape.n_head, n_z)
        bindings = [*self.inputs(batch), xbc, *self.weights("a", "d", "dt_bias"), conv_state, state, out]
        kernel = f"mamba2_scan_{shape.state_class}"
        lab.run(kernel, shape.params, "Mamba2Params", bindings, grid, sizes["SSM_DELTA_THREADS"])
        return out

    def norm(self, batch: StepRows, o: Guarded) -> Guarded:
        lab, shape, threads = self.lab, self.shape, self.lab.core.shapes()["MAMBA2_NORM_THREADS"]
        out, (step, _, inputs) = lab.output(*o.array.shape), self.inputs(batch)
        grid = (shape.n_group, len(o.array))
        lab.run(
            "mamba2_norm", shape.params, "Mamba2Params", [step, o, inputs, *self.weights("norm_w"), out], grid, threads
        )
        return out

    def chunk(self, batch: StepRows, conv_state: Guarded, state: Guarded, n_z: int = 1) -> F32:
        xbc = self.conv1d(batch, conv_state)
        o = self.scan(batch, xbc, conv_state, state, n_z)
        return self._normed(batch, xbc, o)

    def step(self, batch: StepRows, conv_state: Guarded, state: Guarded, threads: int = 0) -> F32:
        lab, shape = self.lab, self.shape
        o = lab.output(len(batch.rows), shape.d_inner)
        weights = self.weights("conv_w", "conv_b", "a", "d", "dt_bias")
        threads = threads or lab.core.shapes()["MAMBA2_STEP_THREADS"]
        kernel, bindings = f"mamba2_step_{shape.state_class}", [*self.inputs(batch), *weights, conv_state, state, o]
        lab.run(kernel, shape.params, "Mamba2Params", bindings, (shape.n_head, len(batch.rows)), threads)
        return self._normed(batch, o, o)

    def _normed(self, batch: StepRows, first: Guarded, o: Guarded) -> F32:
        """Runs the norm of o. No kernel may have written a row that is not real."""
        out = self.norm(batch, o)
        for result in (first, o, out):
            assert_untouched(result.array[batch.n_tokens :])
        return out.array[: batch.n_tokens].copy()
