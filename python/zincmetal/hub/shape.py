"""Architecture of a model before any file of it is here: its sizes, its tensors, and the types that they will have.

:func:`stand_in` makes of them what the planner takes in place of an open file. It has no data.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .. import gguf
from .mixes import QUANTS, types_of
from .tensors import tensors

__all__ = ["QUANTS", "Convolutions", "Delta", "Gemma4", "MoE", "Shape", "file_bytes", "stand_in", "tensors"]

ALIGNMENT = 32


class MoE(NamedTuple):
    """Mixture: a token takes ``used`` of ``n`` experts of width ``n_ff``; ``n_shared`` is the shared expert's, or 0."""

    n: int
    used: int
    n_ff: int
    n_shared: int = 0


class Delta(NamedTuple):
    """Recurrent layers: heads of keys and of values, of ``d_state`` each. Every ``interval``-th layer attends."""

    n_k_head: int
    n_v_head: int
    d_state: int = 128
    d_conv: int = 4
    interval: int = 4


class Gemma4(NamedTuple):
    """Heads of the layers of Gemma 4 that see all positions: every ``period``-th.

    ``v_is_k``: these have no values of their own. The last ``n_shared`` layers take the keys and values of earlier
    ones. ``n_per_layer``: width of the embedding that each layer has for a token, or 0.
    """

    n_head_kv: int
    head_dim: int = 512
    period: int = 6
    v_is_k: bool = True
    n_shared: int = 0
    n_per_layer: int = 0


class Convolutions(NamedTuple):
    """Layers that mix ``l_cache`` positions by a short convolution: all but those that attend."""

    attend: tuple[int, ...]
    l_cache: int = 3


@dataclass(frozen=True)
class Shape:
    """Sizes of a model. ``tied``: the LM head is the token table. ``window``: positions that local attention sees.

    ``n_dense``: the first blocks of a mixture, without experts. ``n_draft`` blocks after the layers draft tokens.
    ``pooling``: how texts become vectors, as files number it.
    """

    arch: str
    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_vocab: int
    n_ctx: int
    tied: bool = False
    window: int = 0
    moe: MoE | None = None
    delta: Delta | None = None
    gemma4: Gemma4 | None = None
    convolutions: Convolutions | None = None
    n_dense: int = 0
    n_draft: int = 0
    pooling: int = 0

    @property
    def n_params(self) -> int:
        """Weights of all tensors."""
        return sum(prod(shape) for _, shape in tensors(self))


# ---- the stand-in ---------------------------------------------------------------------------------------------


class _Absent:
    """Part of a file that is not here. Plans read sizes and places, and no data."""

    size = 0
    path = Path()


class _WithoutData(gguf.File):
    """File whose float32 tensors hold ones: planning reads the factors of rotary frequencies."""

    def data(self, name: str) -> NDArray[np.uint8]:
        """Return the bytes of a float32 tensor."""
        return np.ones(self.tensors[name].nbytes // 4, "<f4").view(np.uint8)


def stand_in(s: Shape, quant: str, name: str = "model") -> gguf.File:
    """Make an open file without data, with the metadata and the tensor table that a file of this type would have."""
    metadata, table, offset = gguf.Metadata(), dict[str, gguf.TensorInfo](), 0
    for key, value in keys_of(s).items():
        metadata.add(key, _kind(value), np.array(value) if isinstance(value, list) else value)
    types = types_of(s, quant)
    for tensor, shape in tensors(s):
        qtype = types[tensor]
        nbytes = qtype.nbytes(shape)
        table[tensor] = gguf.TensorInfo(tensor, shape, qtype, 0, offset, nbytes)
        offset += -(-nbytes // ALIGNMENT) * ALIGNMENT
    part: Any = _Absent()
    return _WithoutData(Path(name), (part,), metadata, table)


def file_bytes(s: Shape, quant: str) -> int:
    """Return about the bytes of a file of this type: of its tensors."""
    types = types_of(s, quant)
    return sum(types[name].nbytes(shape) for name, shape in tensors(s))


def _kind(value: Any) -> str:
    """Return the GGUF type of a key's value."""
    first = value[0] if isinstance(value, list) else value
    kinds = {bool: "bool", str: "str", float: "f32", int: "u32"}
    return f"[{kinds[type(first)]}]" if isinstance(value, list) else kinds[type(first)]


def keys_of(s: Shape) -> dict[str, Any]:
    """Return the keys that the configuration is read from. Those that change no size have usual values."""
    a = s.arch
    keys: dict[str, Any] = {
        "general.architecture": a,
        f"{a}.block_count": s.n_layer + s.n_draft,
        f"{a}.context_length": s.n_ctx,
        f"{a}.embedding_length": s.n_embd,
        f"{a}.attention.head_count": s.n_head,
        f"{a}.attention.head_count_kv": s.n_head_kv,
        f"{a}.attention.key_length": s.head_dim,
        f"{a}.attention.value_length": s.head_dim,
        f"{a}.attention.layer_norm_rms_epsilon": 1e-6,
        f"{a}.rope.freq_base": 1e6,
    }
    if s.window:
        keys[f"{a}.attention.sliding_window"] = s.window
    if s.n_draft:
        keys[f"{a}.nextn_predict_layers"] = s.n_draft
    if s.pooling:
        keys[f"{a}.pooling_type"] = s.pooling
    if s.moe:
        keys |= {f"{a}.expert_count": s.moe.n, f"{a}.expert_used_count": s.moe.used}
        keys |= {f"{a}.expert_feed_forward_length": s.moe.n_ff}
        keys |= {f"{a}.expert_shared_feed_forward_length": s.moe.n_shared} if s.moe.n_shared else {}
    else:
        keys[f"{a}.feed_forward_length"] = s.n_ff
    if s.delta:
        d = s.delta
        keys |= {f"{a}.ssm.group_count": d.n_k_head, f"{a}.ssm.time_step_rank": d.n_v_head}
        keys |= {f"{a}.ssm.state_size": d.d_state, f"{a}.ssm.inner_size": d.n_v_head * d.d_state}
        keys |= {f"{a}.ssm.conv_kernel": d.d_conv, f"{a}.full_attention_interval": d.interval}
        keys[f"{a}.rope.dimension_count"] = 64 if s.head_dim > 64 else s.head_dim // 2
    if a.startswith("qwen35"):  # for text, any sections give the same; llama.cpp wants them
        keys[f"{a}.rope.dimension_sections"] = [11, 11, 10, 0]
    if a in ("glm4moe", "minimax-m2"):
        keys |= {f"{a}.expert_gating_func": 2, f"{a}.feed_forward_length": s.n_ff}
        keys[f"{a}.rope.dimension_count"] = s.head_dim // 2
    if a == "glm4moe":
        keys |= {f"{a}.expert_shared_count": 1, f"{a}.leading_dense_block_count": s.n_dense}
        del keys[f"{a}.expert_shared_feed_forward_length"]
    if c := s.convolutions:
        keys[f"{a}.attention.head_count_kv"] = [s.n_head_kv if i in c.attend else 0 for i in range(s.n_layer)]
        keys[f"{a}.shortconv.l_cache"] = c.l_cache
    if s.gemma4:
        keys |= _keys_of_gemma4(s, s.gemma4)
    if a == "gpt-oss":
        keys |= {f"{a}.rope.freq_base": 150000.0, f"{a}.rope.scaling.type": "yarn", f"{a}.rope.scaling.factor": 32.0}
        keys |= {f"{a}.rope.scaling.original_context_length": 4096, f"{a}.feed_forward_length": s.n_ff}
    return keys


def _keys_of_gemma4(s: Shape, g: Gemma4) -> dict[str, Any]:
    sees_all = [(i + 1) % g.period == 0 for i in range(s.n_layer)]
    keys: dict[str, Any] = {
        "feed_forward_length": s.n_ff,
        "attention.head_count_kv": [g.n_head_kv if whole else s.n_head_kv for whole in sees_all],
        "attention.sliding_window_pattern": [not whole for whole in sees_all],
        "attention.shared_kv_layers": g.n_shared,
        "embedding_length_per_layer_input": g.n_per_layer,
        "final_logit_softcapping": 30.0,
        "rope.freq_base_swa": 1e4,
    }
    for name in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        keys |= {name: g.head_dim, f"{name}_swa": s.head_dim}
    return {f"{s.arch}.{name}": value for name, value in keys.items()}
