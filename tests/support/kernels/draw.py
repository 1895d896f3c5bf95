"""Launches the kernels of a draw for some outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from support.kernel_lab import Guarded, Lab, assert_untouched, tiles
from zincmetal.sampling.draws import bias_records, draw_record, mask_words, noise_key
from zincmetal.sampling.noise import NoiseSource
from zincmetal.sampling.params import SamplingParams
from zincmetal.sampling.sampler import Sampler

F32 = NDArray[np.float32]


@dataclass
class Output:
    """Logits after ``history``, which is not empty, and how a token is drawn. ``allowed``: a mask."""

    logits: F32
    history: Sequence[int]
    params: SamplingParams
    allowed: NDArray[np.bool_] | None = None
    n_logprobs: int = 0

    def reference(self) -> int:
        """Returns the token that the Sampler draws."""
        params = self.params
        if self.allowed is not None:
            allowed = self.allowed
            params = replace(params, logits_processors=[lambda _, x: np.where(allowed, x, np.float32(-np.inf))])
        return Sampler(params).sample(self.logits, self.history)


class Drawn(NamedTuple):
    """Results of the outputs: Choice [O], and Logprobs [O]."""

    choices: NDArray[Any]
    logprobs: NDArray[Any]

    @property
    def ids(self) -> list[int]:
        return list(self.choices["id"].tolist())


@dataclass
class _Host:
    """Buffers that the host fills: draws, biases, masks, pages and history."""

    lab: Lab
    draws: list[NDArray[Any]] = field(default_factory=list)
    biases: list[NDArray[Any]] = field(default_factory=list)
    masks: list[NDArray[np.uint32]] = field(default_factory=list)
    n_biases: int = 3  # in front of the first
    n_words: int = 1

    def add(self, o: Output, pages: int) -> None:
        dtype = self.lab.core.params_dtype
        pos = len(o.history) - 1
        self.draws.append(
            draw_record(
                dtype("Draw"),
                o.params,
                pos,
                noise_key(NoiseSource(o.params.seed), pos),
                pages=pages,
                bias_at=self.n_biases,
                mask_at=None if o.allowed is None else self.n_words,
                n_logprobs=o.n_logprobs,
            )
        )
        self.biases.append(bias_records(dtype("Bias"), o.params))
        self.n_biases += len(self.biases[-1])
        if o.allowed is not None:
            self.masks.append(mask_words(o.allowed))
            self.n_words += len(self.masks[-1])

    def inputs(self, poison_biases: NDArray[Any]) -> list[Guarded]:
        biases = np.concatenate([poison_biases, *self.biases])
        masks = np.concatenate([np.zeros(1, np.uint32), *self.masks])
        return [self.lab.input(x, align=4) for x in (np.concatenate(self.draws), biases, masks)]


def run_draws(lab: Lab, outputs: Sequence[Output], rows: int | None = None, number: int = 0) -> Drawn:
    """Runs all kernels for these outputs, in a plan of ``rows`` outputs; returns what they chose."""
    shapes, dtype, n_out = lab.core.shapes(), lab.core.params_dtype, len(outputs)
    rows, n, page = rows or n_out, outputs[0].logits.size, shapes["KV_PAGE"]
    n_part, n_tries = tiles(n, shapes["DRAW_COLUMNS"]), shapes["DRAW_TRIES"]
    logits = np.full((rows, n), np.nan, np.float32)
    logits[:n_out] = [o.logits for o in outputs]
    host = _Host(lab)
    each = max(tiles(len(o.history), page) for o in outputs)
    tables = lab.rng.permutation(n_out * each + 2)[: n_out * each].astype(np.uint32)
    history = np.full((n_out * each + 2) * page, -1, np.int32)
    for i, o in enumerate(outputs):
        places = np.arange(len(o.history))
        history[tables[i * each + places // page] * page + places % page] = o.history
        host.add(o, i * each)
    draws, biases, masks = host.inputs(np.zeros(3, dtype("Bias")))
    step = lab.step(rows, n_out)
    step.array["number"] = number
    source = [
        lab.input(step.array),
        lab.input(logits, align=4),
        draws,
        *(lab.input(x, align=4) for x in (tables, history)),
        biases,
        masks,
    ]
    parts = lab.output(rows, n_part, dtype=dtype("DrawPart"), align=4)
    states = lab.output(rows, n_tries + 1, dtype=dtype("DrawState"), align=4)
    tries = lab.output(rows, n_tries, n_part, dtype=dtype("DrawTry"), align=4)
    chosen = lab.output(rows, dtype=np.int32, align=4)
    ring = shapes["STEP_RING"], shapes["MAX_OUT"]
    results, logprobs = (lab.output(*ring, dtype=dtype(name), align=4) for name in ("Choice", "Logprobs"))

    def launch(kernel: str, rest: list[Guarded], grid: tuple[int, ...], tried: int = 0) -> None:
        params = {"n": n, "n_part": n_part, "tried": tried}
        lab.run(kernel, params, "DrawParams", [*source, *rest], grid, shapes["DRAW_THREADS"])

    launch("draw_scan", [parts], (n_part, rows))
    launch("draw_choose", [parts, states, chosen, results, logprobs], (rows,))
    for tried in range(n_tries):
        launch("draw_try", [states, tries, chosen, results], (n_part, rows), tried)
    launch("draw_finish", [states, tries, chosen, results], (rows,))

    place = number % shapes["STEP_RING"]
    for array in (parts.array, states.array, chosen.array, results.array[place], logprobs.array[place]):
        assert_untouched(array[n_out:])
    assert_untouched(np.delete(results.array, place, axis=0))
    found = Drawn(results.array[place, :n_out], logprobs.array[place, :n_out])
    assert chosen.array[:n_out].tolist() == found.ids
    return found
