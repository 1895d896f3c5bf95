"""The short convolution: its formula in float64 NumPy, and launches of the kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from support.kernel_lab import Guarded, Lab, assert_untouched, tiles
from support.step_rows import Run, StepRows

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]


@dataclass(frozen=True)
class ConvShape:
    """Channels and taps of a layer."""

    n: int
    taps: int

    def __str__(self) -> str:
        return f"n{self.n}-taps{self.taps}"


class ConvLayer:
    """A layer of short convolution: random weights, and random inputs [positions, 3 n] of sequences."""

    def __init__(self, lab: Lab, shape: ConvShape, *lengths: int) -> None:
        self.lab, self.shape = lab, shape
        self.sequences: list[F32] = []
        for length in lengths:
            self.add(length)
        self.conv_w = lab.normal(shape.n, shape.taps)

    def add(self, length: int, source: int = 0, same: int = 0) -> int:
        """Adds a sequence, whose first ``same`` inputs are those of ``source``. Returns its number."""
        new = self.lab.normal(length, 3 * self.shape.n)
        new[:same] = self.sequences[source][:same] if same else new[:same]
        self.sequences.append(new)
        return len(self.sequences) - 1

    def products(self, sequence: int) -> F64:
        """Computes b * x of all positions, after taps - 1 positions of zero."""
        b, _, x = np.split(self.sequences[sequence].astype(np.float64), 3, axis=1)
        return np.concatenate([np.zeros((self.shape.taps - 1, self.shape.n)), b * x])

    def expected(self, sequence: int) -> tuple[F64, F64]:
        """Returns the outputs [positions, n] of a sequence, and the scales of their errors."""
        inputs, c = self.products(sequence), self.sequences[sequence][:, self.shape.n : 2 * self.shape.n]
        terms = [inputs[i : i + len(c)] * self.conv_w[:, i] for i in range(self.shape.taps)]
        return c * np.sum(terms, axis=0), np.abs(c) * np.sqrt(np.sum(np.square(terms), axis=0))

    def state(self, sequence: int, pos: int) -> F64:
        """Returns what a slot holds before position ``pos``, [taps - 1, n]: the newest input first."""
        return self.products(sequence)[pos : pos + self.shape.taps - 1][::-1]

    def states_before(self, runs: Sequence[Run], n_slots: int) -> Guarded:
        """Makes the states of the slots that runs begin with, NaN where nothing may be read."""
        states = self.lab.output(n_slots, self.shape.taps - 1, self.shape.n)
        for run in (run for run in runs if run.pos):
            states.array[run.slot] = self.state(run.sequence, run.pos)
        return states

    def run(self, runs: Sequence[Run], states: Guarded, rows: int = 0) -> F32:
        """Runs one dispatch over these runs. Returns the outputs of their rows."""
        lab, shape, sizes = self.lab, self.shape, self.lab.core.shapes()
        batch = StepRows(lab, runs, max(rows, sum(run.n for run in runs)))
        bcx = np.full((len(batch.rows), 3 * shape.n), np.nan, np.float32)
        for t, (sequence, pos) in enumerate(zip(batch.sequences, batch.positions, strict=True)):
            bcx[t] = self.sequences[sequence][pos]
        out = lab.output(len(batch.rows), shape.n)
        threads = sizes["SHORT_CONV_THREADS"]
        grid = (tiles(shape.n, threads), tiles(len(batch.rows), sizes["SHORT_CONV_TOKENS"]))
        inputs = [lab.input(bcx), lab.input(self.conv_w, align=4)]
        bindings = [batch.input(lab, "step"), batch.input(lab, "rows"), *inputs, states, out]
        params = {"n": shape.n, "taps": shape.taps}
        lab.run("short_conv", params, "ShortConvParams", bindings, grid, threads)
        assert_untouched(out.array[batch.n_tokens :])
        return out.array[: batch.n_tokens].copy()
