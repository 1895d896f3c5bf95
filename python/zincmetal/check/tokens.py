"""Compares a model's first tokens on the device with its first tokens on the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .. import settings
from ..api.load import load
from ..api.model import Model
from ..errors import TokenizerError
from .results import FAIL, PASS, WARN, Outcome

PROMPT = "The capital of France is"
CONTEXT = 256
N_TOKENS = 16
# The CPU is compared with its own Metal text. That takes about a second a token for the smallest model.
N_TOKENS_MSL, LARGEST_MSL = 3, 256 << 20
NEAR_TIE = 0.05  # between two logits: the lanes' rounding, most of it in the cache, may swap them


def first_tokens(path: Path, device: str) -> Outcome:
    """Compare a file's first greedy tokens with the tokens of the CPU's native kernels.

    If the device is the CPU itself, the tokens are compared with its Metal text. Raises ZincError if the file does not
    run.
    """
    if device == "cpu" and path.stat().st_size > LARGEST_MSL:
        return Outcome(WARN, f"not compared: {path.name} is too large for the CPU's Metal text, the only other lane")
    n = N_TOKENS_MSL if device == "cpu" else N_TOKENS
    with load(path, context=CONTEXT, device=device) as model:
        ids = prompt_of(model)
        got = model.generate(ids, n).tokens
        replaced = model.profile()["replaced"]
    with (
        settings.override(settings.NATIVE, "0" if device == "cpu" else "1"),
        load(path, context=CONTEXT, device="cpu") as model,
    ):
        want = model.generate(ids, n).tokens
        figures = {"tokens": got, "cpu_tokens": want, "replaced": replaced}
        note = "".join(f"; {', '.join(r['by'])} instead of {kernel}" for kernel, r in replaced.items())
        if got == want:
            message = f"{path.name}: {len(want)} tokens as on the CPU: {model.detokenize(want)!r}{note}"
            return Outcome(PASS, message, figures)
        first = next(i for i, (a, b) in enumerate(zip(got, want, strict=False)) if a != b)
        margin = _margin(model, [*ids, *want[:first]], want[first], got[first])
    message = (
        f"{path.name}: token {first} is {got[first]} instead of {want[first]}, whose logit is {margin:.3g} higher{note}"
    )
    if margin <= NEAR_TIE:
        return Outcome(WARN, f"{message}; that is a near tie", figures)
    return Outcome(FAIL, message, figures)


def prompt_of(model: Model) -> list[int]:
    """Return the ids of a short prompt, or any five ids if the model has no tokenizer."""
    try:
        return model.tokenize(PROMPT)
    except TokenizerError:
        return list(range(min(5, model.config.n_vocab)))


def _margin(model: Model, ids: list[int], best: int, other: int) -> float:
    """Return the logit of ``best`` after ``ids`` minus the logit of ``other``."""
    logits = model.logits(ids)[-1].astype(np.float64)
    return float(logits[best] - logits[other])
