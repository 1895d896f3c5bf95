"""Latent attention: the sizes of its vectors and heads, and the scale of its scores."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ..errors import UnsupportedModelError
from ..gguf.metadata import Keys
from .rope import Rope


@dataclass(frozen=True)
class Latent:
    """Sizes of multi-head latent attention (arXiv 2405.04434, section 2.1).

    The cache has one row for each position: ``n_latent`` numbers, which stand for keys and values of all heads, and a
    key that rotates. A key of a head has ``n_still`` dimensions beside the rotating ones, a value ``n_value``. Queries
    come from a vector of ``n_q`` numbers, or directly if it is 0. ``scale`` is that of q·k.
    """

    n_latent: int
    n_still: int
    n_value: int
    n_q: int
    scale: float


def read_latent(keys: Keys, rope: Rope) -> tuple[Latent, int, Rope]:
    """Read the sizes of latent attention, the dimensions that rotate, and how: YaRN scales the scores in its place.

    Raises UnsupportedModelError for files of old converters, which have the key and value projections in one tensor.
    """
    for name in ("attention.key_length_mla", "attention.value_length_mla"):
        if not keys.has(name):
            why = "an old converter wrote it, with the projections of keys and values in one tensor attn_kv_b"
            raise UnsupportedModelError(f"{keys.file.path} has no key {keys.spelled(name)}: {why}. Convert it again")
    n_latent, n_rot = keys.size("attention.kv_lora_rank"), keys.size("rope.dimension_count")
    n_key = keys.size("attention.key_length_mla")
    if n_rot >= n_key or n_rot % 2:
        raise keys.bad("rope.dimension_count", f"{n_rot} must be even and below the key's {n_key}")
    keys.must_be("attention.head_count_kv", 1)
    keys.must_be("attention.causal", True)
    keys.must_be("attention.key_length", n_latent + n_rot)
    keys.must_be("attention.value_length", n_latent)
    latent = Latent(
        n_latent=n_latent,
        n_still=n_key - n_rot,
        n_value=keys.size("attention.value_length_mla"),
        n_q=keys.size("attention.q_lora_rank", 0, least=0),
        scale=_growth(keys, rope) ** 2 / math.sqrt(n_key),
    )
    return latent, n_rot, replace(rope, log_multiplier=1.0) if rope.scaling == "yarn" else rope


def _growth(keys: Keys, rope: Rope) -> float:
    """Return the factor of queries and of keys under YaRN: 1 + 0.1 mscale_all_dim ln(factor).

    Files have 0.1 mscale_all_dim as ``yarn_log_multiplier``. DeepSeek's code multiplies cos and sin by the quotient
    of two such factors, which is 1 in all its models: mscale and mscale_all_dim are equal.
    """
    if rope.scaling != "yarn" or rope.factor <= 1:
        return 1.0
    multiplier = keys.positive("rope.scaling.yarn_log_multiplier")
    return 1.0 + multiplier * math.log(rope.factor)
