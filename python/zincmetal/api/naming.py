"""Loaded model in a few words: "qwen35moe 35B-A3B Q4_K"."""

from __future__ import annotations

from collections import Counter
from math import prod

from ..config import ModelConfig
from ..gguf import File

UNITS = ((1e9, "B"), (1e6, "M"), (1e3, "K"))


def model_name(file: File, config: ModelConfig) -> str:
    """Name architecture, parameters (of a mixture also the parameters of a token), and the type of most weights."""
    total, active, types = 0, 0.0, Counter[str]()
    for tensor in file.tensors.values():
        n = prod(tensor.shape)
        total += n
        active += n * _share(tensor.name, file, config)
        types[tensor.type.name] += n
    size = rounded(total, digits=1) + (f"-A{rounded(active)}" if config.experts else "")
    return f"{config.arch} {size} {types.most_common(1)[0][0].upper()}"


def _share(name: str, file: File, config: ModelConfig) -> float:
    """Return the share of a tensor that a token computes with."""
    if config.experts and "_exps." in name:
        return config.experts.n_used / config.experts.n
    if name == "token_embd.weight" and "output.weight" in file.tensors:
        return 0.0  # a row of it is looked up
    return 1.0


def rounded(n: float, digits: int = 0) -> str:
    """Round a number of parameters: 34.66e9 is "35B", 134e6 "134M"; with a digit after the point 1.54e9 is "1.5B"."""
    unit, letter = next(((u, name) for u, name in UNITS if n >= u), (1, ""))
    amount = f"{n / unit:.{digits if n < 9.95 * unit else 0}f}"
    return amount.removesuffix(".0") + letter
