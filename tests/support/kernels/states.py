"""States of recurrent layers for kernel tests: rings and states in slots, runs over them, and what may change.

A sequence is one array of inputs. A run of a step works on some of its positions; the ring of convolution inputs and
the recurrent state of a slot carry the earlier ones. Everything that a step must not read is NaN.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from support.kernel_lab import Guarded, Lab, assert_close
from support.step_rows import Run, StepRows

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
#: The slot of a run at position 0, which has no meaning: a kernel that uses it touches memory far away.
NOWHERE = 0xFFFFFFF0


class States(ABC):
    """A layer's rings [d_conv, channels] and states of slots. ``state_shape``: of one slot."""

    def __init__(self, lab: Lab, ring_shape: tuple[int, int], state_shape: tuple[int, ...]) -> None:
        self.lab, self.ring_shape, self.state_shape = lab, ring_shape, state_shape

    @abstractmethod
    def add(self, length: int, source: int = 0, same: int = 0) -> int:
        """Adds a sequence, whose first ``same`` inputs are those of ``source``. Returns its number."""

    @abstractmethod
    def conv_inputs(self, sequence: int) -> F32:
        """Returns the inputs of the convolution at all positions of a sequence, [P, channels]."""

    @abstractmethod
    def expected(self, sequence: int) -> tuple[F64, F64, F64]:
        """Computes a sequence's outputs, its states after the last position, and the scale of each output's error."""

    @abstractmethod
    def step(self, batch: StepRows, conv_state: Guarded, state: Guarded) -> F32:
        """Runs a step of runs of one row by the kernels for these. Returns the outputs of its rows."""

    @abstractmethod
    def chunk(self, batch: StepRows, conv_state: Guarded, state: Guarded, n_z: int = 1) -> F32:
        """Runs a step by the kernels for any runs. Returns the outputs of its rows."""

    def run(self, runs: Sequence[Run], conv_state: Guarded, state: Guarded, rows: int = 0) -> F32:
        """Runs a step by ``step`` if each of its runs is of one row, else by ``chunk``."""
        batch = StepRows(self.lab, runs, max(rows, sum(run.n for run in runs)))
        if batch.n_single == batch.n_tokens:
            return self.step(batch, conv_state, state)
        return self.chunk(batch, conv_state, state, n_z=int(self.lab.rng.integers(1, 6)))

    def rows_of(self, batch: StepRows, arrays: Sequence[F32]) -> Guarded:
        """Makes an input of a step from the sequences' arrays: a row for each of its rows, then NaN."""
        out = np.full((len(batch.rows), arrays[0].shape[1]), np.nan, np.float32)
        for t, (sequence, pos) in enumerate(zip(batch.sequences, batch.positions, strict=True)):
            out[t] = arrays[sequence][pos]
        return self.lab.input(out)

    def poisoned(self, n_slots: int = 1) -> tuple[Guarded, Guarded]:
        """Makes rings and states of slots, poisoned: their content must not be read."""
        rings, states = (self.lab.output(n_slots, *shape) for shape in (self.ring_shape, self.state_shape))
        return rings, states

    def states_before(self, runs: Sequence[Run], n_slots: int) -> tuple[Guarded, Guarded]:
        """Makes rings and random states of the slots that runs begin with, NaN where nothing may be read."""
        conv_state, state = self.poisoned(n_slots)
        for slot, run in {run.slot: run for run in runs if run.pos > 0}.items():
            self.set_inputs(conv_state.array[slot], run.sequence, run.pos - self.ring_shape[0] + 1, run.pos)
            state.array[slot] = self.lab.normal(*state.array.shape[1:])
        return conv_state, state

    def set_inputs(self, ring: F32, sequence: int, first: int, end: int) -> None:
        """Sets the entries of the positions [first, end) in a ring."""
        for p in range(max(0, first), end):
            ring[p % len(ring)] = self.conv_inputs(sequence)[p]

    def rings_after(self, rings: F32, runs: Sequence[Run]) -> F32:
        """Returns the rings after a step: with the runs' inputs, and in slots that runs moved to with older ones."""
        after = rings.copy()
        for run in runs:
            first = run.end - self.ring_shape[0]
            first = max(first, run.pos) if run.slot == run.slot_out else first
            self.set_inputs(after[run.slot_out], run.sequence, first, run.end)
        return after


# ---- what a step may change


def assert_same_bits(got: F32, want: F32) -> None:
    """Fails unless the numbers are the same bit for bit, NaN too."""
    a, b = (np.ascontiguousarray(x).view(np.uint32) for x in (got, want))
    assert np.array_equal(a, b), f"{np.count_nonzero(a != b)} of {a.size} numbers differ"


def assert_untouched_slots(after: F32, before: F32, runs: Sequence[Run]) -> None:
    """Fails if a slot changed that no run writes."""
    others = [slot for slot in range(len(before)) if slot not in {run.slot_out for run in runs}]
    assert_same_bits(after[others], before[others])


def state_scales(state: F64) -> F64:
    """Returns the scales of a state's errors, [n_v, d_v, d_k]: the magnitude plus the head's root mean square."""
    return np.asarray(np.abs(state) + np.sqrt(np.mean(state * state, axis=(1, 2), keepdims=True)))


# ---- runs


class Sequenced(Protocol):
    """A layer that takes sequences of random inputs."""

    lab: Lab

    def add(self, length: int, source: int = 0, same: int = 0) -> int: ...


def random_runs(layer: Sequenced, n_single: int, n_long: int, longest: int) -> tuple[list[Run], int]:
    """Makes runs for the slots of the number returned; the layer gets a sequence for each.

    A run is in place, or it moves. It is at the start of a sequence, or it begins with a slot of its own, or with the
    slot that another run of the same beginning reads. A move is often to the next slot or the one before.
    """
    rng, n_runs = layer.lab.rng, n_single + n_long
    n_slots = 2 * n_runs + 1
    pairs, runs = rng.permutation(n_runs).tolist(), list[Run]()
    for i in range(n_runs):
        n = 1 if i < n_single else int(rng.integers(2, longest + 1))
        pos, (slot, slot_out) = int(rng.integers(1, 12)), rng.permutation(2) + 2 * pairs[i]
        slot, slot_out = int(slot), int(slot_out)
        kind = rng.choice(["start", "start in place", "in place", "moved", "moved", "shared", "shared"])
        read = [run for run in runs if run.pos and run.slot != run.slot_out]
        if kind == "shared" and read:
            other = read[rng.integers(len(read))]
            pos, slot = other.pos, other.slot
            sequence = layer.add(pos + n, other.sequence, same=pos)
        else:
            pos = 0 if kind.startswith("start") else pos
            sequence = layer.add(pos + n)
        if kind == "start":
            slot = NOWHERE
        runs.append(Run(sequence, pos, n, slot, slot if "in place" in kind else slot_out))
    return runs, n_slots


class Sequences:
    """Sequences that advance side by side in random steps, in slots that several of them may hold."""

    def __init__(self, layer: States, n_sequences: int, n_slots: int) -> None:
        self.layer, self.rng = layer, layer.lab.rng
        self.conv_state, self.state = layer.poisoned(n_slots)
        self.slots: dict[int, int] = {}  # of a sequence that has begun
        self.ends = [0] * n_sequences
        self.parts: list[list[F32]] = [[] for _ in range(n_sequences)]

    def length(self, sequence: int) -> int:
        return len(self.layer.conv_inputs(sequence))

    def fork(self, sequence: int, length: int) -> None:
        """Begins another sequence with the inputs so far, and the slot, of this one."""
        new = self.layer.add(length, sequence, same=self.ends[sequence])
        self.slots[new] = self.slots[sequence]
        self.ends.append(self.ends[sequence])
        self.parts.append([])

    def advance(self, most: int) -> None:
        """Runs a step of some of the sequences that have not ended, at most ``most`` rows of each."""
        left = [s for s, end in enumerate(self.ends) if end < self.length(s)]
        chosen = self.rng.permutation(left)[: self.rng.integers(1, len(left) + 1)].tolist()
        held = list(self.slots.values())
        free = [int(slot) for slot in self.rng.permutation(len(self.state.array)) if slot not in held]
        runs = []
        for s in chosen:
            n = min(int(self.rng.integers(1, most + 1)), self.length(s) - self.ends[s])
            slot = self.slots.get(s, -1)
            moves = slot < 0 or held.count(slot) > 1 or self.rng.random() < 0.3
            runs.append(Run(s, self.ends[s], n, max(slot, 0), free.pop() if moves else slot))
        runs.sort(key=lambda run: run.n > 1)
        out = self.layer.run(runs, self.conv_state, self.state, rows=int(self.rng.integers(1, 40)))
        for run in runs:
            self.parts[run.sequence].append(out[: run.n])
            out = out[run.n :]
            self.slots[run.sequence], self.ends[run.sequence] = run.slot_out, run.end

    def finish(self) -> None:
        """Advances all sequences to their ends. Two of them are forked on the way."""
        n_forks = 0
        while any(end < self.length(s) for s, end in enumerate(self.ends)):
            self.advance(most=int(self.rng.choice([1, 1, 12])))
            begun = [s for s, end in enumerate(self.ends) if end]
            if n_forks < 2:
                sequence = begun[n_forks % len(begun)]
                self.fork(sequence, self.ends[sequence] + 8)
                n_forks += 1


def check_empty_step(layer: States, kernel: str) -> None:
    """Runs a step without rows by ``step`` or by ``chunk``: nothing changes."""
    conv_state, state = layer.states_before([Run(0, 8)], 1)
    before = conv_state.array.copy(), state.array.copy()
    batch = StepRows(layer.lab, [], 3)
    out = layer.step(batch, conv_state, state) if kernel == "step" else layer.chunk(batch, conv_state, state)
    assert out.size == 0
    assert_same_bits(conv_state.array, before[0])
    assert_same_bits(state.array, before[1])


def check_end(layer: States, sequence: int, out: F32, ring: F32, state: F32) -> None:
    """Compares a sequence's last outputs, and its slot after the last position."""
    want, want_state, scales = layer.expected(sequence)
    first = len(want) - len(out)
    assert_close(out, want[first:], 2e-6, scales[first:])
    assert_close(state, want_state, 2e-6, state_scales(want_state))
    inputs = layer.conv_inputs(sequence)
    for p in range(max(0, len(inputs) - len(ring)), len(inputs)):
        assert np.array_equal(ring[p % len(ring)], inputs[p])


def check_side_by_side(layer: States) -> None:
    """Runs four sequences and their forks in slots, and compares the end of each."""
    sequences = Sequences(layer, n_sequences=4, n_slots=12)
    sequences.finish()
    for s, slot in sequences.slots.items():
        out = np.concatenate(sequences.parts[s])
        check_end(layer, s, out, sequences.conv_state.array[slot], sequences.state.array[slot])
