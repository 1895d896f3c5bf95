"""What the metadata of a file says about the model: a frozen :class:`ModelConfig`, checked once, here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import GGUFError, UnsupportedModelError, UsageError, abbreviate
from .gguf import File

# Head sizes that the attention kernels are compiled for: each serves those up to it. The last is the largest.
HEAD_CLASSES = (32, 64, 96, 128, 256)
SSM_CLASSES = (64, 128, 256)  # the same of the recurrent layers' kernels
# Architectures whose feed-forward is a mixture of experts, and those with recurrent layers.
MIXTURES = frozenset({"qwen3moe", "qwen35moe"})
HYBRIDS = frozenset({"qwen35", "qwen35moe"})
# Architectures in which some layers attend to a window, with rotary frequencies of their own.
WINDOWED = frozenset({"gemma3"})
# What the routing and convolution kernels are made for.
EXPERT_CLASSES = (256, 1024)  # experts that the kernels which choose among them are built for
MAX_EXPERTS_USED, MAX_CONV = 32, 8


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
    recurrent: tuple[bool, ...]
    attention_scale: float  # of q·k
    windows: tuple[int, ...]  # by layer: the positions that attention sees, 0 for all
    rope_local: Rope | None = None  # of the layers with a window
    experts: Experts | None = None
    ssm: Ssm | None = None
    n_draft: int = 0  # blocks after the last layer that only draft tokens: not run


@dataclass(frozen=True)
class Experts:
    """A mixture: of ``n`` experts of width ``n_ff`` a token takes ``n_used``, and the shared one if there is any."""

    n: int
    n_used: int
    n_ff: int
    n_ff_shared: int
    scale: float


@dataclass(frozen=True)
class Ssm:
    """A gated-DeltaNet layer: heads of ``d_state`` keys and as many values, behind a causal convolution."""

    n_k_head: int
    n_v_head: int
    d_state: int
    d_conv: int

    @property
    def d_inner(self) -> int:
        """Values of all heads."""
        return self.n_v_head * self.d_state

    @property
    def channels(self) -> int:
        """What the convolution runs over: q, k and v of all heads."""
        return 2 * self.n_k_head * self.d_state + self.d_inner


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
    if n_ctx is not None and not (isinstance(n_ctx, int) and 0 < n_ctx < 2**31):
        raise UsageError(f"context must be a positive number of tokens, not {n_ctx!r}")
    _refuse_what_is_not_computed(keys)
    # Blocks for multi-token prediction come last.
    n_block, n_draft = keys.size("block_count"), keys.size("nextn_predict_layers", 0, least=0)
    if n_block > len(file.tensors):
        raise keys.bad("block_count", f"{n_block} blocks cannot be in a file of {len(file.tensors)} tensors")
    if n_draft >= n_block:
        raise keys.bad("nextn_predict_layers", f"{n_draft} leaves none of the {n_block} blocks")
    n_layer = n_block - n_draft
    n_embd = keys.size("embedding_length")
    n_head = keys.size("attention.head_count")
    n_head_kv = keys.size("attention.head_count_kv", n_head)
    if n_head % n_head_kv:
        raise keys.bad("attention.head_count_kv", f"{n_head_kv} does not divide the {n_head} query heads")
    head_dim = keys.size("attention.key_length", n_embd // n_head)
    if head_dim % 8 or head_dim > HEAD_CLASSES[-1]:
        raise UnsupportedModelError(
            f"{arch}.attention.key_length is {head_dim}; multiples of 8 up to {HEAD_CLASSES[-1]} are supported"
        )
    if keys.size("attention.value_length", head_dim) != head_dim:
        raise UnsupportedModelError(f"{arch}.attention.value_length differs from the key length {head_dim}")
    n_rot = keys.size("rope.dimension_count", head_dim)
    if n_rot > head_dim or n_rot % 2:
        raise keys.bad("rope.dimension_count", f"{n_rot} must be even and at most the head's {head_dim}")
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if keys.number(name, 0.0):
            raise UnsupportedModelError(f"{arch}.{name} is set; zincmetal does not cap logits")
    n_ctx_train = keys.size("context_length")
    embd = file.tensors.get("token_embd.weight")
    if embd is None or len(embd.shape) != 2:
        raise GGUFError(f"{file.path}: tensor token_embd.weight is missing or not a matrix")
    return ModelConfig(
        arch=arch,
        n_layer=n_layer,
        n_embd=n_embd,
        n_ff=0 if arch in MIXTURES else keys.size("feed_forward_length"),
        n_head=n_head,
        n_head_kv=n_head_kv,
        head_dim=head_dim,
        n_rot=n_rot,
        n_vocab=embd.shape[0],
        n_ctx_train=n_ctx_train,
        n_ctx=n_ctx if n_ctx is not None else min(4096, n_ctx_train),
        norm_eps=keys.positive("attention.layer_norm_rms_epsilon"),
        rope=_rope(keys, n_ctx_train),
        recurrent=_recurrent(keys, n_block)[:n_layer] if arch in HYBRIDS else (False,) * n_layer,
        attention_scale=_attention_scale(keys, n_layer, n_embd / n_head, head_dim),
        windows=_windows(keys, n_block)[:n_layer] if arch in WINDOWED else (0,) * n_layer,
        rope_local=Rope(_rope_base(keys, "rope.freq_base_swa")) if arch in WINDOWED else None,
        experts=_experts(keys) if arch in MIXTURES else None,
        ssm=_ssm(keys) if arch in HYBRIDS else None,
        n_draft=n_draft,
    )


# Keys that change the result and are not implemented, with the value at which they change nothing.
_NEUTRAL = {
    "expert_gating_func": 1,  # softmax
    "expert_weights_norm": True,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
    "rope.scaling.yarn_log_multiplier": 0.0,
    "rope.scaling.yarn_beta_fast": 32.0,
    "rope.scaling.yarn_beta_slow": 1.0,
}


def _refuse_what_is_not_computed(keys: _Keys) -> None:
    for name, neutral in _NEUTRAL.items():
        value = keys.get(name, neutral)
        if not isinstance(value, (bool, int, float)) or value != neutral:
            found = abbreviate(value)
            raise UnsupportedModelError(f"{keys.arch}.{name} is {found}; zincmetal computes with {neutral!r} alone")


def _experts(keys: _Keys) -> Experts:
    n, n_used = keys.size("expert_count"), keys.size("expert_used_count")
    if n > EXPERT_CLASSES[-1]:
        raise UnsupportedModelError(f"{keys.arch}.expert_count is {n}; at most {EXPERT_CLASSES[-1]} are supported")
    if n_used > min(n, MAX_EXPERTS_USED):
        raise keys.bad("expert_used_count", f"{n_used} of {n} experts; at most {min(n, MAX_EXPERTS_USED)} can be used")
    scale = keys.number("expert_weights_scale", 0.0)
    if scale < 0:
        raise keys.bad("expert_weights_scale", f"{scale} is negative")
    return Experts(
        n=n,
        n_used=n_used,
        n_ff=keys.size("expert_feed_forward_length"),
        n_ff_shared=keys.size("expert_shared_feed_forward_length", 0, least=0),
        scale=scale or 1.0,  # converters write 0 for none
    )


def _ssm(keys: _Keys) -> Ssm:
    n_k_head, n_v_head = keys.size("ssm.group_count"), keys.size("ssm.time_step_rank")
    d_state, d_inner = keys.size("ssm.state_size"), keys.size("ssm.inner_size")
    d_conv = keys.size("ssm.conv_kernel")
    if n_v_head % n_k_head:
        raise keys.bad("ssm.group_count", f"{n_k_head} does not divide the {n_v_head} value heads (ssm.time_step_rank)")
    if n_v_head * d_state != d_inner:
        raise keys.bad("ssm.inner_size", f"{d_inner} is not {n_v_head} heads of ssm.state_size {d_state}")
    if d_state % 32 or d_state > SSM_CLASSES[-1]:
        raise UnsupportedModelError(
            f"{keys.arch}.ssm.state_size is {d_state}; multiples of 32 up to {SSM_CLASSES[-1]} are supported"
        )
    if not 2 <= d_conv <= MAX_CONV:
        raise UnsupportedModelError(f"{keys.arch}.ssm.conv_kernel is {d_conv}; 2 to {MAX_CONV} are supported")
    return Ssm(n_k_head, n_v_head, d_state, d_conv)


def _recurrent(keys: _Keys, n_block: int) -> tuple[bool, ...]:
    """Which blocks are recurrent: as listed, or all but every ``full_attention_interval``-th."""
    if not keys.has("attention.recurrent_layers"):
        interval = keys.size("full_attention_interval", 4)
        return tuple((i + 1) % interval != 0 for i in range(n_block))
    return keys.flags("attention.recurrent_layers", n_block)


def _windows(keys: _Keys, n_block: int) -> tuple[int, ...]:
    """The window of each block, or 0: as listed, or all but every ``sliding_window_pattern``-th have one."""
    window = keys.size("attention.sliding_window", 0, least=0)
    name = "attention.sliding_window_pattern"
    if isinstance(keys.get(name, 6), np.ndarray):
        windowed = keys.flags(name, n_block)
    else:
        period = keys.size(name, 6)
        windowed = tuple((i + 1) % period != 0 for i in range(n_block))
    return tuple(window if w else 0 for w in windowed)


def _attention_scale(keys: _Keys, n_layer: int, embd_per_head: float, head_dim: int) -> float:
    """As the file says, or head_dim^-0.5; no file says it of Gemma 3 27B, which scales by (n_embd / n_head)^-0.5."""
    is_27b = keys.arch == "gemma3" and n_layer == 62
    return keys.positive("attention.scale", (embd_per_head if is_27b else head_dim) ** -0.5)


def _rope(keys: _Keys, n_ctx_train: int) -> Rope:
    scaling = keys.get("rope.scaling.type", "none")
    # Local frequencies are not scaled, and kernels know one magnitude.
    supported = ("none", "linear") if keys.arch in WINDOWED else ("none", "linear", "yarn")
    if not isinstance(scaling, str) or scaling not in supported:
        raise UnsupportedModelError(f"{keys.arch}.rope.scaling.type {abbreviate(scaling)} is not supported")
    base = _rope_base(keys, "rope.freq_base")
    if scaling == "none":
        return Rope(base)
    return Rope(
        base,
        scaling,
        keys.positive("rope.scaling.factor", 1.0),
        keys.size("rope.scaling.original_context_length", n_ctx_train),
    )


def _rope_base(keys: _Keys, name: str) -> float:
    base = keys.positive(name, 10000.0)
    if base <= 1:
        raise keys.bad(name, f"{base} must be above 1")
    return base


class _Keys:
    """Reads ``<arch>.<name>`` with checks whose errors name the key."""

    def __init__(self, file: File, arch: str) -> None:
        self.file, self.arch = file, arch

    def has(self, name: str) -> bool:
        return f"{self.arch}.{name}" in self.file.metadata

    def get(self, name: str, default: Any = None) -> Any:
        value = self.file.metadata.get(f"{self.arch}.{name}", default)
        if value is None:
            raise GGUFError(f"{self.file.path}: key {self.arch}.{name} is missing")
        return value

    def size(self, name: str, default: int | None = None, least: int = 1) -> int:
        """A count from ``least`` to 2^31 - 1."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**31:
            raise self.bad(name, f"{abbreviate(value)} is not an integer from {least} to 2^31 - 1")
        return value

    def positive(self, name: str, default: float | None = None) -> float:
        """A finite number above 0."""
        value = self.number(name, default)
        if value <= 0:
            raise self.bad(name, f"{abbreviate(value)} is not a positive number")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self.bad(name, f"{abbreviate(value)} is not a finite number")
        return float(value)

    def flags(self, name: str, n: int) -> tuple[bool, ...]:
        """A list of ``n`` booleans, one for each block."""
        value = self.get(name)
        if not isinstance(value, np.ndarray) or value.dtype != np.bool_ or value.size != n:
            raise self.bad(name, f"it must be {n} booleans, one for each block")
        return tuple(value.tolist())

    def bad(self, name: str, why: str) -> GGUFError:
        return GGUFError(f"{self.file.path}: key {self.arch}.{name}: {why}")
