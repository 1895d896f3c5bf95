"""Launches the candidates kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from support.kernel_lab import Guarded, Lab, tiles
from zincmetal.device import backend

F32 = NDArray[np.float32]
DTYPE = backend.load("cpu").params_dtype("Candidates")


def parts_of(n: int, lab: Lab) -> int:
    return tiles(n, lab.core.shapes()["CANDIDATES_COLUMNS"])


def run_partial(lab: Lab, logits: F32, n_part: int) -> Guarded:
    parts = lab.output(n_part, dtype=DTYPE, align=4)
    params = {"n": len(logits), "n_part": n_part}
    inputs = [lab.input(logits, align=4), parts]
    lab.run(
        "candidates_partial", params, "CandidatesParams", inputs, (n_part,), lab.core.shapes()["CANDIDATES_THREADS"]
    )
    return parts


def run(lab: Lab, logits: F32, n_part: int | None = None, final_threads: int | None = None) -> Any:
    """Runs both kernels; returns the Candidates of these logits."""
    n_part = n_part or parts_of(len(logits), lab)
    parts, out = run_partial(lab, logits, n_part), lab.output(1, dtype=DTYPE, align=4)
    for i, n in enumerate(parts.array["n"]):  # entries past a part's candidates must not be read
        parts.array["logit"][i, n:], parts.array["id"][i, n:] = 3e38, 1
    params = {"n": len(logits), "n_part": n_part}
    threads = final_threads or lab.core.shapes()["CANDIDATES_FINAL_THREADS"]
    lab.run("candidates_final", params, "CandidatesParams", [parts, out], (1,), threads)
    return out.array[0]
