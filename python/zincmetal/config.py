"""What the metadata of a file says about the model: a frozen :class:`ModelConfig`, checked once, here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import GGUFError, UnsupportedModelError
from .gguf import File

# Head sizes that the attention kernels are compiled for: each serves those up to it. The last is the largest.
HEAD_CLASSES = (32, 64, 96, 128, 256)


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and constants of a model. Keys are ``<arch>.<name>`` in the file's metadata."""

    arch: str
    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_rot: int
    n_vocab: int
    n_ctx_train: int
    n_ctx: int
    norm_eps: float
    rope: Rope


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: base, and how a context longer than the trained one is scaled."""

    base: float
    scaling: str = "none"  # none, linear, yarn
    factor: float = 1.0
    n_ctx_orig: int = 0

    @property
    def magnitude(self) -> float:
        """What cos and sin are multiplied by: 1, or YaRN's 0.1 ln(factor) + 1 (arXiv 2309.00071, eq. 22)."""
        return 0.1 * math.log(self.factor) + 1.0 if self.scaling == "yarn" and self.factor > 1 else 1.0

    def frequencies(self, n_rot: int, factors: NDArray[np.float32] | None) -> NDArray[np.float32]:
        """Radians per position of each pair, float32 [n_rot / 2]: base^(-2i / n_rot), scaled.

        ``factors`` are the file's ``rope_freqs.weight`` (Llama 3.1), which divide. YaRN blends between scaled
        and unscaled by the number of turns that a pair makes in the original context (32 turns and more are
        left alone, 1 and fewer are scaled in full).
        """
        i = np.arange(n_rot // 2, dtype=np.float64)
        freqs = self.base ** (-2.0 * i / n_rot)
        if factors is not None:
            freqs = freqs / factors.astype(np.float64)
        if self.scaling == "linear":
            freqs = freqs / self.factor
        if self.scaling == "yarn":
            low, high = (self._pair_with_turns(turns, n_rot) for turns in (32.0, 1.0))
            low, high = max(math.floor(low), 0), min(math.ceil(high), n_rot - 1)
            keep = 1.0 - np.clip((i - low) / max(high - low, 0.001), 0.0, 1.0)
            freqs = freqs * keep + freqs / self.factor * (1.0 - keep)
        return freqs.astype(np.float32)

    def _pair_with_turns(self, turns: float, n_rot: int) -> float:
        """The (fractional) pair that makes this many turns in the original context."""
        return n_rot * math.log(self.n_ctx_orig / (turns * 2 * math.pi)) / (2 * math.log(self.base))


def from_file(file: File, n_ctx: int | None = None) -> ModelConfig:
    """The configuration of an opened file, with a context of ``n_ctx`` tokens (default: min(4096, trained)).

    Raises GGUFError for a missing or impossible value, UnsupportedModelError for one that zincmetal does not
    run; both name the key.
    """
    arch = file.require("general.architecture", str)
    keys = _Keys(file, arch)
    n_embd = keys.size("embedding_length")
    n_head = keys.size("attention.head_count")
    n_head_kv = keys.size("attention.head_count_kv", n_head)
    if n_head % n_head_kv:
        raise keys.bad("attention.head_count_kv", f"{n_head_kv} does not divide the {n_head} query heads")
    head_dim = keys.size("attention.key_length", n_embd // n_head)
    if keys.size("attention.value_length", head_dim) != head_dim:
        raise UnsupportedModelError(f"{arch}.attention.value_length differs from the key length {head_dim}")
    if head_dim % 8 or head_dim > HEAD_CLASSES[-1]:
        raise UnsupportedModelError(f"heads of {head_dim} are not supported: a multiple of 8 up to {HEAD_CLASSES[-1]}")
    n_rot = keys.size("rope.dimension_count", head_dim)
    if n_rot > head_dim or n_rot % 2:
        raise keys.bad("rope.dimension_count", f"{n_rot} must be even and at most the head's {head_dim}")
    n_ctx_train = keys.size("context_length")
    embd = file.tensors.get("token_embd.weight")
    if embd is None or len(embd.shape) != 2:
        raise GGUFError(f"{file.path}: tensor token_embd.weight is missing or not a matrix")
    return ModelConfig(
        arch=arch,
        n_layer=keys.size("block_count"),
        n_embd=n_embd,
        n_ff=keys.size("feed_forward_length"),
        n_head=n_head,
        n_head_kv=n_head_kv,
        head_dim=head_dim,
        n_rot=n_rot,
        n_vocab=embd.shape[0],
        n_ctx_train=n_ctx_train,
        n_ctx=n_ctx if n_ctx is not None else min(4096, n_ctx_train),
        norm_eps=keys.positive("attention.layer_norm_rms_epsilon"),
        rope=_rope(keys, n_ctx_train),
    )


def _rope(keys: _Keys, n_ctx_train: int) -> Rope:
    scaling = str(keys.get("rope.scaling.type", "none"))
    if scaling not in ("none", "linear", "yarn"):
        raise UnsupportedModelError(f"{keys.arch}.rope.scaling.type {scaling!r} is not supported")
    base = keys.positive("rope.freq_base", 10000.0)
    if base <= 1:
        raise keys.bad("rope.freq_base", f"{base} must be above 1")
    if scaling == "none":
        return Rope(base)
    return Rope(
        base,
        scaling,
        keys.positive("rope.scaling.factor", 1.0),
        keys.size("rope.scaling.original_context_length", n_ctx_train),
    )


class _Keys:
    """Reads ``<arch>.<name>`` with checks whose errors name the key."""

    def __init__(self, file: File, arch: str) -> None:
        self.file, self.arch = file, arch

    def get(self, name: str, default: Any = None) -> Any:
        value = self.file.metadata.get(f"{self.arch}.{name}", default)
        if value is None:
            raise GGUFError(f"{self.file.path}: key {self.arch}.{name} is missing")
        return value

    def size(self, name: str, default: int | None = None) -> int:
        """A count from 1 to 2^31 - 1."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
            raise self.bad(name, f"{value!r} is not a positive 32-bit integer")
        return value

    def positive(self, name: str, default: float | None = None) -> float:
        """A finite number above 0."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.bad(name, f"{value!r} is not a number")
        if not (math.isfinite(value) and value > 0):
            raise self.bad(name, f"{value!r} is not a positive number")
        return float(value)

    def bad(self, name: str, why: str) -> GGUFError:
        return GGUFError(f"{self.file.path}: key {self.arch}.{name}: {why}")
