"""Sizes and constants of a model, read from its metadata and checked once: a frozen :class:`ModelConfig`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from .errors import GGUFError, UnsupportedModelError, UsageError, abbreviate
from .gguf import File, TensorInfo
from .gguf.metadata import USUAL_ACTIVATION, Keys, sized

__all__ = ["Experts", "ModelConfig", "Rope", "Ssm", "Traits", "from_file"]

# Types of rotary scaling that leave text as it is: "mrope" turns sections by an image's axes.
UNSCALED = ("none", "default", "mrope")


def _by_head_dim(n_layer: int, embd_per_head: float, head_dim: int) -> float:
    return float(head_dim**-0.5)


@dataclass(frozen=True)
class Traits:
    """Facts of a model family that its files do not hold. The defaults are Llama's."""

    mixture: bool = False  # the feed-forward of every block is a mixture of experts
    hybrid: bool = False  # some blocks are recurrent
    window_period: int = 0  # if the file lists no windows: every so many-th block has none, the others have one
    local_rope: bool = False  # blocks with a window have rotary frequencies of their own
    activations: tuple[str, ...] = USUAL_ACTIVATION  # names that files may give to the feed-forward's activation
    embedding_scale: Callable[[int], float] = lambda n_embd: 1.0  # the factor of embeddings
    attention_scale: Callable[[int, float, int], float] = _by_head_dim  # of q·k: (n_layer, n_embd / n_head, head_dim)


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: its base, and the scaling for contexts longer than the trained one."""

    base: float
    scaling: str = "none"  # none, linear, yarn
    factor: float = 1.0
    n_ctx_orig: int = 0

    @property
    def magnitude(self) -> float:
        """Factor of cos and sin: 1, or YaRN's 0.1 ln(factor) + 1 (arXiv 2309.00071, eq. 22)."""
        return 0.1 * math.log(self.factor) + 1.0 if self.scaling == "yarn" and self.factor > 1 else 1.0

    def frequencies(self, n_rot: int, factors: NDArray[np.float32] | None) -> NDArray[np.float32]:
        """Return the radians per position of each pair, float32 [n_rot / 2]: base^(-2i / n_rot), scaled.

        ``factors``, the file's ``rope_freqs.weight`` (Llama 3.1), divide the frequencies. YaRN counts the turns of a
        pair in the original context. It keeps pairs of 32 turns or more, scales pairs of 1 turn or fewer, and blends
        the others.
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
        """Return the (fractional) pair that makes this many turns in the original context."""
        return n_rot * math.log(self.n_ctx_orig / (turns * 2 * math.pi)) / (2 * math.log(self.base))


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and constants of a model. Keys are ``<arch>.<name>`` in the file's metadata."""

    arch: str
    n_layer: int
    n_embd: int
    n_ff: tuple[int, ...]  # by layer; 0 in mixtures
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
    rope_local: Rope | None = None  # of the layers with a window, if it differs from ``rope``
    embedding_scale: float = 1.0
    experts: Experts | None = None
    ssm: Ssm | None = None
    n_draft: int = 0  # blocks after the last layer that only draft tokens: not run


@dataclass(frozen=True)
class Experts:
    """Mixture: a token takes ``n_used`` of ``n`` experts of width ``n_ff``, and the shared expert if there is one."""

    n: int
    n_used: int
    n_ff: int
    n_ff_shared: int
    scale: float


@dataclass(frozen=True)
class Ssm:
    """Gated-DeltaNet layer: heads of ``d_state`` keys and as many values, behind a causal convolution."""

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
        """Channels of the convolution: q, k and v of all heads."""
        return 2 * self.n_k_head * self.d_state + self.d_inner


def from_file(file: File, traits: Traits, n_ctx: int | None = None) -> ModelConfig:
    """Read the configuration of a file whose family has these traits.

    ``n_ctx`` is its context in tokens, by default the trained one, but 4096 at most. Raises GGUFError for a missing or
    impossible value, UnsupportedModelError for a value that zincmetal does not run. Both name the key. One warning
    lists all assumptions. ``Target.check`` checks the limits of kernels.
    """
    arch = file.require("general.architecture", str)
    keys = Keys(file, arch)
    if n_ctx is not None and not sized(n_ctx):
        raise UsageError(f"context must be a positive number of tokens below 2^31, not {abbreviate(n_ctx)}")
    _refuse_what_is_no_model(file)
    # Blocks for multi-token prediction come last.
    n_block, n_draft = keys.size("block_count"), keys.size("nextn_predict_layers", 0, least=0)
    if n_block > len(file.tensors):
        raise keys.bad("block_count", f"{n_block} blocks cannot be in a file of {len(file.tensors)} tensors")
    if n_draft >= n_block:
        raise keys.bad("nextn_predict_layers", f"{n_draft} leaves 0 of the {n_block} blocks")
    n_layer = n_block - n_draft
    n_embd = keys.size("embedding_length")
    n_head, n_head_kv, head_dim = _heads(keys, traits, n_block, n_embd)
    n_rot = keys.size("rope.dimension_count", head_dim)
    if n_rot > head_dim or n_rot % 2:
        raise keys.bad("rope.dimension_count", f"{n_rot} must be even and at most the head's {head_dim}")
    keys.must_be("rope.dimension_count_swa", n_rot)
    _check_sections(keys)
    n_ctx_train = keys.size("context_length")
    windows = _windows(keys, traits, n_block)[:n_layer]
    cfg = ModelConfig(
        arch=arch,
        n_layer=n_layer,
        n_embd=n_embd,
        n_ff=_feed_forward(keys, traits, n_block)[:n_layer],
        n_head=n_head,
        n_head_kv=n_head_kv,
        head_dim=head_dim,
        n_rot=n_rot,
        n_vocab=_n_vocab(keys),
        n_ctx_train=n_ctx_train,
        n_ctx=n_ctx if n_ctx is not None else min(4096, n_ctx_train),
        norm_eps=keys.positive("attention.layer_norm_rms_epsilon"),
        rope=_rope(keys, traits, n_ctx_train),
        recurrent=_recurrent(keys, n_block)[:n_layer] if traits.hybrid else (False,) * n_layer,
        attention_scale=_attention_scale(keys, traits.attention_scale(n_layer, n_embd / n_head, head_dim)),
        windows=windows,
        rope_local=_rope_local(keys, traits, windows),
        embedding_scale=keys.number("embedding_scale", 0.0)
        or traits.embedding_scale(n_embd),  # 0: the file does not give it
        experts=_experts(keys, n_block) if traits.mixture else None,
        ssm=_ssm(keys) if traits.hybrid else None,
        n_draft=n_draft,
    )
    keys.account(traits.activations)
    return cfg


def _refuse_what_is_no_model(file: File) -> None:
    kind = file.metadata.get("general.type", "model")
    if kind in ("adapter", "imatrix", "mmproj"):
        raise UnsupportedModelError(f"general.type is {abbreviate(kind)}: this file is not a model by itself")


def _heads(keys: Keys, traits: Traits, n_block: int, n_embd: int) -> tuple[int, int, int]:
    """Read the number of query heads, the number of key and value heads, and the size of a head."""
    hybrid = traits.hybrid  # recurrent blocks have no heads of this kind
    n_head = keys.same_size("attention.head_count", n_block, without=hybrid)
    n_head_kv = keys.same_size("attention.head_count_kv", n_block, n_head, without=hybrid)
    if n_head % n_head_kv:
        raise keys.bad("attention.head_count_kv", f"{n_head_kv} does not divide the {n_head} query heads")
    head_dim = keys.size("attention.key_length", n_embd // n_head)
    if keys.size("attention.value_length", head_dim) != head_dim:
        raise UnsupportedModelError(f"{keys.arch}.attention.value_length differs from the key length {head_dim}")
    for name in ("attention.key_length_swa", "attention.value_length_swa"):
        keys.must_be(name, head_dim)
    return n_head, n_head_kv, head_dim


def _feed_forward(keys: Keys, traits: Traits, n_block: int) -> tuple[int, ...]:
    """Return the width of each block's feed-forward. Mixtures have experts in its place, and 0 here."""
    if traits.mixture:
        keys.get("feed_forward_length", 0)  # of the dense blocks, which these mixtures do not have
        return (0,) * n_block
    return keys.sizes("feed_forward_length", n_block, _assumed_width(keys, "feed_forward_length", "ffn_gate", 2))


def _assumed_width(keys: Keys, name: str, tensor: str, n_dims: int) -> int | None:
    """Return the rows of the first block's tensor if the file lacks the key of this width. None if it has no tensor."""
    info = keys.file.tensors.get(f"blk.0.{tensor}.weight")
    if keys.has(name) or info is None or len(info.shape) < n_dims:
        return None
    width = info.shape[-2]
    keys.assumed.append(f"key {keys.arch}.{name} is missing, {width} is taken from tensor {info.name}")
    return width


def _n_vocab(keys: Keys) -> int:
    """Return the number of token ids: the rows of the embedding table, or the tokenizer's tokens if they are fewer.

    Some files pad the rows to a multiple. A file may have no tokenizer.
    """
    file = keys.file
    embd, output = file.tensors.get("token_embd.weight"), file.tensors.get("output.weight")
    if embd is None or not _is_matrix(embd):
        raise GGUFError(f"{file.path}: tensor token_embd.weight is missing or not a matrix")
    rows = embd.shape[-2]
    if output is not None and _is_matrix(output) and output.shape[-2] != rows:
        raise GGUFError(
            f"{file.path}: tensor token_embd.weight has {rows} rows, tensor output.weight {output.shape[-2]}"
        )
    n_tokens = file.metadata.length("tokenizer.ggml.tokens") or rows
    if n_tokens != rows:
        kept = f"the {n_tokens} of tokenizer.ggml.tokens count" if n_tokens < rows else "later tokens cannot be used"
        keys.assumed.append(f"tensor token_embd.weight has {rows} rows: {kept}")
    return min(rows, n_tokens)


def _is_matrix(tensor: TensorInfo) -> bool:
    """Return True if a tensor is a matrix. Leading dimensions of 1 do not count."""
    return len(tensor.shape) >= 2 and prod(tensor.shape[:-2]) == 1


def _check_sections(keys: Keys) -> None:
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


def _experts(keys: Keys, n_block: int) -> Experts:
    n, n_used = keys.size("expert_count"), keys.same_size("expert_used_count", n_block)
    if n_used > n:
        raise keys.bad("expert_used_count", f"{n_used} of {n} experts; at most {n} can be used")
    scale = keys.number("expert_weights_scale", 0.0)
    if scale < 0:
        raise keys.bad("expert_weights_scale", f"{scale} is negative")
    name, shared = "expert_feed_forward_length", "expert_shared_feed_forward_length"
    n_shared = 0 if keys.has(shared) else _assumed_width(keys, shared, "ffn_gate_shexp", 2) or 0
    return Experts(
        n=n,
        n_used=n_used,
        n_ff=keys.same_size(name, n_block, _assumed_width(keys, name, "ffn_gate_exps", 2)),
        n_ff_shared=keys.size(shared, n_shared, least=0),
        scale=scale or 1.0,  # converters write 0 if there is none
    )


def _ssm(keys: Keys) -> Ssm:
    n_k_head, n_v_head = keys.size("ssm.group_count"), keys.size("ssm.time_step_rank")
    d_state, d_inner = keys.size("ssm.state_size"), keys.size("ssm.inner_size")
    d_conv = keys.size("ssm.conv_kernel")
    if n_v_head % n_k_head:
        raise keys.bad("ssm.group_count", f"{n_k_head} does not divide the {n_v_head} value heads (ssm.time_step_rank)")
    if n_v_head * d_state != d_inner:
        raise keys.bad("ssm.inner_size", f"{d_inner} is not {n_v_head} heads of ssm.state_size {d_state}")
    return Ssm(n_k_head, n_v_head, d_state, d_conv)


def _recurrent(keys: Keys, n_block: int) -> tuple[bool, ...]:
    """Return for each block whether it is recurrent.

    The file lists the recurrent blocks, or gives them 0 heads, or every ``full_attention_interval``-th block attends.
    """
    if not keys.has("attention.recurrent_layers"):
        heads = keys.sizes("attention.head_count_kv", n_block, 1, least=0)
        if 0 in heads and not keys.has("full_attention_interval"):
            return tuple(n == 0 for n in heads)
        interval = keys.size("full_attention_interval", 4)
        return tuple((i + 1) % interval != 0 for i in range(n_block))
    keys.get("full_attention_interval", 0)  # the list replaces it
    return keys.flags("attention.recurrent_layers", n_block)


def _windows(keys: Keys, traits: Traits, n_block: int) -> tuple[int, ...]:
    """Return the window of each block in positions, 0 for none.

    The file lists the blocks with a window, or all but every ``sliding_window_pattern``-th have one. In files like
    Qwen2's the blocks from ``max_window_layers`` on have it, unless ``use_sliding_window`` is false. Otherwise all do.
    """
    window = keys.size("attention.sliding_window", 0, least=0)
    used = keys.flag("use_sliding_window", True)
    first = keys.size("max_window_layers", 0, least=0)
    name, usual = "attention.sliding_window_pattern", traits.window_period
    if isinstance(keys.get(name, usual or 0), np.ndarray):
        windowed = keys.flags(name, n_block)
    elif keys.has(name) or usual:
        period = keys.size(name, usual)
        windowed = tuple((i + 1) % period != 0 for i in range(n_block))
    else:
        windowed = (used,) * n_block
    windows = tuple(window if w and used and i >= first else 0 for i, w in enumerate(windowed))
    if any(windows) and traits.hybrid:
        raise UnsupportedModelError(f"{keys.spelled('attention.sliding_window')} is {window}; {keys.arch} sees all")
    return windows


def _attention_scale(keys: Keys, usual: float) -> float:
    """Read the scale of q·k from the file, or return the usual scale."""
    if keys.saved and keys.number("attention.scale", 0.0) == 0:  # llama.cpp's saver writes 0 for a missing key
        return usual
    return keys.positive("attention.scale", usual)


def _rope(keys: Keys, traits: Traits, n_ctx_train: int) -> Rope:
    """Read the global rotary embedding. A factor without a type scales linearly, as in the format; 0 is no factor."""
    factor = keys.number("rope.scaling.factor", 0.0)
    if factor < 0:
        raise keys.bad("rope.scaling.factor", f"{factor} is negative")
    scaling = keys.get("rope.scaling.type", "linear" if factor else "none")
    n_ctx_orig = keys.size("rope.scaling.original_context_length", 0, least=0) or n_ctx_train
    # Local frequencies are not scaled, and kernels know one magnitude.
    local = traits.local_rope or keys.has("rope.freq_base_swa")
    supported = (*UNSCALED, "linear") if local else (*UNSCALED, "linear", "yarn")
    if not isinstance(scaling, str) or scaling not in supported:
        raise UnsupportedModelError(f"{keys.arch}.rope.scaling.type {abbreviate(scaling)} is not supported")
    base = _rope_base(keys, "rope.freq_base")
    if scaling in UNSCALED:
        return Rope(base)
    return Rope(base, scaling, factor or 1.0, n_ctx_orig)


def _rope_local(keys: Keys, traits: Traits, windows: tuple[int, ...]) -> Rope | None:
    """Read the rotary embedding of blocks with a window, or None if all blocks have one."""
    if traits.local_rope or (keys.has("rope.freq_base_swa") and any(windows)):
        return Rope(_rope_base(keys, "rope.freq_base_swa"))
    keys.get("rope.freq_base_swa", 0.0)  # no layer to use it
    return None


def _rope_base(keys: Keys, name: str) -> float:
    base = keys.positive(name, 10000.0)
    if base <= 1:
        raise keys.bad(name, f"{base} must be above 1")
    return base
