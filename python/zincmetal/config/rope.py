"""Rotary embedding: its base, its scaling, and the frequencies of its pairs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import GGUFError, UnsupportedModelError, abbreviate
from ..gguf.metadata import Keys
from .traits import Traits

# Types of rotary scaling that leave text as it is: "mrope" turns sections by an image's axes.
UNSCALED = ("none", "default", "mrope")
#: Tensors that divide the frequencies: Llama 3.1's, and LongRoPE's for contexts up to the trained one and beyond it.
DIVISORS, SHORT_DIVISORS, LONG_DIVISORS = "rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: its base, and the scaling for contexts longer than the trained one.

    ``divisors``: the tensor that divides the frequencies, if the file has it; "" for none.
    """

    base: float
    scaling: str = "none"  # none, linear, yarn
    factor: float = 1.0
    n_ctx_orig: int = 0
    divisors: str = DIVISORS
    attn_factor: float = 1.0  # of cos and sin, beside YaRN's own
    # YaRN: turns in the original context from which a pair is kept, and up to which it is scaled
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    log_multiplier: float = 0.0
    whole_pairs: bool = True  # the ends of the blend are rounded to whole pairs, outwards

    @property
    def magnitude(self) -> float:
        """Factor of cos and sin.

        YaRN's is 0.1 ln(factor) + 1 (arXiv 2309.00071, eq. 22), divided by 0.1 log_multiplier ln(factor) + 1 as in
        DeepSeek-V2. Any other is 1, times ``attn_factor``.
        """
        growth = 0.1 * math.log(self.factor) if self.scaling == "yarn" and self.factor > 1 else 0.0
        return (growth + 1.0) / (self.log_multiplier * growth + 1.0) * self.attn_factor

    def frequencies(self, n_rot: int, divisors: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """Return the radians per position of each pair, float32 [n_rot / 2]: base^(-2i / n_rot), scaled.

        ``divisors`` [n_rot / 2] divide them. YaRN counts the turns of a pair in the original context. It keeps pairs of
        ``beta_fast`` turns or more, scales pairs of ``beta_slow`` or fewer, and blends the others.
        """
        i = np.arange(n_rot // 2, dtype=np.float64)
        freqs = self.base ** (-2.0 * i / n_rot)
        if divisors is not None:
            freqs = freqs / divisors.astype(np.float64)
        if self.scaling == "linear":
            freqs = freqs / self.factor
        if self.scaling == "yarn":
            low, high = (self._pair_with_turns(turns, n_rot) for turns in (self.beta_fast, self.beta_slow))
            if self.whole_pairs:
                low, high = math.floor(low), math.ceil(high)
            low, high = max(low, 0), min(high, n_rot - 1)
            keep = 1.0 - np.clip((i - low) / max(high - low, 0.001), 0.0, 1.0)
            freqs = freqs * keep + freqs / self.factor * (1.0 - keep)
        return freqs.astype(np.float32)

    def _pair_with_turns(self, turns: float, n_rot: int) -> float:
        """Return the (fractional) pair that makes this many turns in the original context."""
        return n_rot * math.log(self.n_ctx_orig / (turns * 2 * math.pi)) / (2 * math.log(self.base))


@dataclass(frozen=True)
class Temperature:
    """Growth of queries with their position: by 1 + scale · ln(1 + floor(position / length)) (Llama 4)."""

    scale: float
    length: int


def read_rope(keys: Keys, traits: Traits, n_ctx: int, n_ctx_train: int) -> Rope:
    """Read the global rotary embedding, as a context of ``n_ctx`` tokens has it.

    A factor without a type scales linearly, as in the format; 0 is no factor.
    """
    factor = keys.number("rope.scaling.factor", 0.0)
    if factor < 0:
        raise keys.bad("rope.scaling.factor", f"{factor} is negative")
    scaling = keys.get("rope.scaling.type", "linear" if factor else "none")
    # Local frequencies are not scaled, and LongRoPE's divisors are the scaling.
    local = traits.local_rope or keys.has("rope.freq_base_swa")
    supported = {*UNSCALED, "linear"} if local else {*UNSCALED, "linear", "yarn", "longrope"}
    if not isinstance(scaling, str) or scaling not in supported:
        raise UnsupportedModelError(f"{keys.arch}.rope.scaling.type {abbreviate(scaling)} is not supported")
    if scaling == "longrope" and factor not in (0, 1):
        raise UnsupportedModelError(f"{keys.arch}.rope.scaling.factor is {factor}, and longrope scales by its tensors")
    n_ctx_orig = _original_context(keys, n_ctx_train)
    fast, slow = (
        keys.positive(f"rope.scaling.yarn_beta_{end}", usual) for end, usual in (("fast", 32.0), ("slow", 1.0))
    )
    if slow > fast:
        raise keys.bad("rope.scaling.yarn_beta_slow", f"{slow} turns are more than yarn_beta_fast, {fast}")
    log_multiplier = keys.number("rope.scaling.yarn_log_multiplier", 0.0)
    if log_multiplier < 0:
        raise keys.bad("rope.scaling.yarn_log_multiplier", f"{log_multiplier} is negative")
    scaled = scaling in ("linear", "yarn")
    return Rope(
        base=_rope_base(keys, "rope.freq_base"),
        scaling=scaling if scaled else "none",
        factor=factor or 1.0 if scaled else 1.0,
        n_ctx_orig=n_ctx_orig if scaled else 0,
        divisors=_divisors(keys, scaling, n_ctx > n_ctx_orig),
        attn_factor=keys.positive("rope.scaling.attn_factor", 1.0),
        beta_fast=fast,
        beta_slow=slow,
        log_multiplier=log_multiplier,
        whole_pairs=traits.whole_pairs,
    )


def _divisors(keys: Keys, scaling: str, is_long: bool) -> str:
    """Return the name of the tensor that divides the frequencies, if there is one.

    LongRoPE has two. The context that is opened chooses, and not the length of a text: caches keep what was turned.
    """
    there = [name for name in (SHORT_DIVISORS, LONG_DIVISORS) if name in keys.file.tensors]
    if not there and scaling != "longrope":
        return DIVISORS
    if len(there) < 2:
        missing = next(name for name in (SHORT_DIVISORS, LONG_DIVISORS) if name not in there)
        raise GGUFError(
            f"{keys.file.path}: tensor {missing} is missing; {keys.arch}.rope.scaling.type longrope needs it"
        )
    return LONG_DIVISORS if is_long else SHORT_DIVISORS


def read_local_rope(keys: Keys, traits: Traits) -> Rope | None:
    """Read the rotary embedding of blocks with a window, or None if all blocks have one."""
    if traits.local_rope or keys.has("rope.freq_base_swa"):
        return Rope(_rope_base(keys, "rope.freq_base_swa"), divisors="")
    keys.get("rope.freq_base_swa", 0.0)  # no layer to use it
    return None


def read_temperature(keys: Keys, n_ctx_train: int) -> Temperature | None:
    """Read how queries grow with their position, or None if they do not."""
    scale = keys.number("attention.temperature_scale", 0.0)
    if scale < 0:
        raise keys.bad("attention.temperature_scale", f"{scale} is negative")
    length = keys.size("attention.temperature_length", 0, least=0) or _original_context(keys, n_ctx_train)
    return Temperature(scale, length) if scale else None


def _original_context(keys: Keys, n_ctx_train: int) -> int:
    """Read the context before it was extended: the trained one if the file does not give it, which 0 means too."""
    return keys.size("rope.scaling.original_context_length", 0, least=0) or n_ctx_train


def _rope_base(keys: Keys, name: str) -> float:
    base = keys.positive(name, 10000.0)
    if base <= 1:
        raise keys.bad(name, f"{base} must be above 1")
    return base


def check_sections(keys: Keys) -> None:
    """Refuse sections of rotary dimensions that do not turn by the position of a token.

    The first three sections turn by time, row and column of an image. For text all three are the position. A fourth
    section has no meaning for text.
    """
    name = "rope.dimension_sections"
    if not keys.has(name):
        return
    sections = keys.get(name)
    if not isinstance(sections, np.ndarray) or sections.dtype.kind not in "iu" or sections.size > 4:
        raise keys.bad(name, f"{abbreviate(sections)} are not up to 4 integers")
    if sections.size and (sections.min() < 0 or sections[3:].any()):
        raise UnsupportedModelError(f"{keys.spelled(name)} is {abbreviate(sections)}; zincmetal turns only the first 3")
