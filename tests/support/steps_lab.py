"""Runs steps of a model without an engine: plans, memory and device are the engine's, sequences are the test's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from zincmetal import gguf
from zincmetal.device import backend
from zincmetal.device.buffers import Buffers, map_weights
from zincmetal.device.core import DeviceInfo
from zincmetal.device.fallback import KernelFallbacks
from zincmetal.device.host_routed import HostRoutedPlan
from zincmetal.device.programs import Programs
from zincmetal.plan.addresses import Room
from zincmetal.plan.chunks import StepShape, chunk_shape, decode_shape
from zincmetal.plan.planner import Planner
from zincmetal.plan.target import Target

NEXT = ("next_step", "next_rows", "next_outs", "next_pages", "next_draws")
SEQUENCES = 10
Tokens = Sequence[int]


class StepsLab:
    """Model on a device. Sequence s has seat s, slot s, and pages of its own, which tables get at its first row.

    ``options`` are those of :class:`Planner`.
    """

    def __init__(
        self,
        path: Path,
        device: str = "cpu",
        *,
        target: dict[str, Any] | None = None,
        exact: bool = False,
        **options: Any,
    ) -> None:
        self.file = gguf.open(path)
        self.core, self.device = backend.open_device(device)
        info = cast(DeviceInfo, {**self.device.info, **(target or {})})
        self.planner = Planner(self.file, replace(Target.of(self.core, info), exact=exact), **options)
        self.fallbacks = KernelFallbacks(self.device)
        self.page = self.planner.target.page
        self.table = -(-self.planner.config.n_ctx // self.page)
        first = self.planner.first_room()
        self.room = Room(SEQUENCES * self.table, SEQUENCES if first.slots else 0, first.seats)
        self.buffers = Buffers(
            self.device, map_weights(self.device, self.file, self.planner.addresses), self.planner.addresses, self.room
        )
        self.programs = Programs(self.core, self.device, self.planner, self.buffers, self.fallbacks)
        entries = self.buffers.buffer("pages").nbytes // 4
        step, *described, results = (self.buffers.buffer(name) for name in ("step", *NEXT, "results"))
        rows = (described[0], described[1], described[2], described[3], described[4])
        self.steps = self.core.Steps(self.device, step, *rows, results, self.planner.config.n_vocab, entries)
        self.lengths: dict[int, int] = {}

    def close(self) -> None:
        self.steps.close()
        self.programs.clear()
        self.buffers.close()
        self.file.close()

    def describe(self, runs: Sequence[tuple[int, Tokens]]) -> tuple[NDArray[Any], NDArray[Any], int]:
        """Makes rows and page writes of runs, each (sequence, tokens), which continue their sequences."""
        rows = np.zeros(sum(len(tokens) for _, tokens in runs), self.core.params_dtype("Row"))
        writes, first = [], 0
        for sequence, tokens in runs:
            pos = self.lengths.get(sequence, 0)
            run = rows[first : first + len(tokens)]
            run["pos"], run["token"] = np.arange(pos, pos + len(tokens)), tokens
            run["begin"], run["end"] = first, first + len(tokens)
            run["pages"], run["slot"], run["slot_out"] = sequence * self.table, sequence, sequence
            for page in range(-(-pos // self.page), -(-(pos + len(tokens)) // self.page)):
                at = sequence * self.table + page
                writes.append((at, at))
            first += len(tokens)
            self.lengths[sequence] = pos + len(tokens)
        return rows, np.array(writes, self.core.params_dtype("PageWrite")), sum(len(t) == 1 for _, t in runs)

    def step(
        self, runs: Sequence[tuple[int, Tokens]], output: str = "argmax", shape: StepShape | None = None
    ) -> NDArray[np.void]:
        """Runs a step; returns the choice of each output. The last row of each run is one; of "all", every row."""
        rows, writes, n_single = self.describe(runs)
        ends = np.cumsum([len(tokens) for _, tokens in runs]) - 1
        outs = {"none": ends[:0], "all": np.arange(len(rows))}.get(output, ends).astype(np.uint32)
        single = n_single == len(rows) and len(outs) in (0, len(rows))
        shape = shape or (
            decode_shape(len(rows), output) if single else chunk_shape(len(rows), n_single, len(outs), output)
        )
        program = self.programs.get(shape, int(rows["pos"].max()))
        if isinstance(program.compiled, HostRoutedPlan):
            return program.compiled.step(self.steps, rows, outs, writes, None, n_single)[1]
        self.core.decode_step(self.steps, program.compiled, rows, outs, writes, None, n_single)
        return self.core.collect_step(self.steps)

    def logits(self, n: int = 1) -> NDArray[np.float32]:
        """The logits of the last step's first n outputs, [n, vocab]."""
        n_vocab = self.planner.config.n_vocab
        return self.buffers.floats("logits", n * n_vocab).reshape(n, n_vocab).copy()

    def generate(self, sequence: int, prompt: Tokens, n: int) -> list[int]:
        """Greedy tokens after a prompt: chunks, the last token alone, then decode."""
        rest = list(prompt)
        while len(rest) > 1:
            self.step([(sequence, rest[: min(512, len(rest) - 1)])], "none")
            rest = rest[min(512, len(rest) - 1) :]
        out: list[int] = []
        while len(out) < n:
            out.append(int(self.step([(sequence, rest)])["id"][0]))
            rest = out[-1:]
        return out
