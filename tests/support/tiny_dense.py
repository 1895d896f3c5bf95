"""Makes dense models of a few thousand random weights: files of any keys and tensors, and their logits in float64.

The reference uses nothing of the package: the test states the meaning of the file's keys, in :class:`Meaning`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from support import gguf_builder as b

F64 = NDArray[np.float64]
Raw = bytes  # a key's type and value as the file has them: see value()
GEMMAS = ("gemma3", "gemma-embedding")
TYPES = {"f32": 0, "f16": 1, "bf16": 30, "nvfp4": 40}


@dataclass
class Tensor:
    """Values that are exact in ``kind``. ``dims`` replaces the dimensions that the file states."""

    values: NDArray[np.float32]
    kind: str = "f32"
    dims: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.kind == "f16":
            self.values = self.values.astype(np.float16).astype(np.float32)
        elif self.kind == "bf16":
            self.values = (self.values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)

    def raw(self) -> bytes:
        if self.kind == "bf16":
            return (self.values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
        return self.values.astype({"f32": np.float32, "f16": np.float16}[self.kind]).tobytes()


@dataclass
class Meaning:
    """The meaning of a file's keys, for the parts that tests vary."""

    windows: tuple[int, ...] = ()  # a window for each layer, 0 for all positions; (): no layer has one
    rope_factor: float = 1.0
    rope_base: float = 10000.0
    rope_base_local: float | None = None  # in layers with a window
    attention_scale: float | None = None
    embedding_scale: float = 1.0
    both_ways: bool = False  # tokens see later ones too, and a window reaches half of it to each side


@dataclass
class Tiny:
    """A model: its keys and tensors. A key without a prefix stands under the architecture."""

    arch: str
    n_layer: int = 2
    n_embd: int = 24
    n_head: int = 3
    n_head_kv: int = 1
    head_dim: int = 8
    n_ff: tuple[int, ...] = (28, 28)
    n_vocab: int = 40
    keys: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(len(self.arch) + 10 * self.head_dim)
        self.keys = {
            "general.architecture": self.arch,
            "block_count": self.n_layer,
            "context_length": 96,
            "embedding_length": self.n_embd,
            "feed_forward_length": self.n_ff[0] if len(set(self.n_ff)) == 1 else list(self.n_ff),
            "attention.head_count": self.n_head,
            "attention.head_count_kv": self.n_head_kv,
            "attention.key_length": self.head_dim,
            "attention.value_length": self.head_dim,
            "attention.layer_norm_rms_epsilon": 1e-5,
            **self.keys,
        }
        self._rng = rng
        self.matrix("token_embd", self.n_vocab, self.n_embd, scale=0.5)
        self.matrix("output", self.n_vocab, self.n_embd)
        self.norm("output_norm", self.n_embd)
        for i in range(self.n_layer):
            self._block(f"blk.{i}", self.n_ff[i])

    def _block(self, blk: str, n_ff: int) -> None:
        n_q, n_kv = self.n_head * self.head_dim, self.n_head_kv * self.head_dim
        for name, m, k in [
            ("attn_q", n_q, self.n_embd),
            ("attn_k", n_kv, self.n_embd),
            ("attn_v", n_kv, self.n_embd),
            ("attn_output", self.n_embd, n_q),
            ("ffn_gate", n_ff, self.n_embd),
            ("ffn_up", n_ff, self.n_embd),
            ("ffn_down", self.n_embd, n_ff),
        ]:
            self.matrix(f"{blk}.{name}", m, k, scale=1.5 if name in ("attn_q", "attn_k") else 1.0)
        gemma = ("post_attention_norm", "post_ffw_norm") if self.arch in GEMMAS else ()
        for name in ("attn_norm", "ffn_norm", *gemma):
            self.norm(f"{blk}.{name}", self.n_embd)
        if self.arch in ("qwen3", *GEMMAS):
            for name in ("attn_q_norm", "attn_k_norm"):
                self.norm(f"{blk}.{name}", self.head_dim)
        if self.arch == "qwen2":
            self.add_biases("attn_q", "attn_k", "attn_v", blocks=(blk,))

    def matrix(self, name: str, m: int, k: int, scale: float = 1.0) -> None:
        values = self._rng.normal(size=(m, k)) * scale * k**-0.5
        self.tensors[f"{name}.weight"] = Tensor(values.astype(np.float32))

    def norm(self, name: str, n: int) -> None:
        self.tensors[f"{name}.weight"] = Tensor(self._rng.uniform(0.5, 1.5, n).astype(np.float32))

    def add_biases(self, *names: str, blocks: tuple[str, ...] | None = None, kind: str = "f32") -> None:
        """Adds a bias to these products in every block, large enough to change the logits."""
        for blk in blocks or [f"blk.{i}" for i in range(self.n_layer)]:
            for name in names:
                n = len(self.tensors[f"{blk}.{name}.weight"].values)
                values = self._rng.normal(size=n).astype(np.float32)
                self.tensors[f"{blk}.{name}.bias"] = Tensor(values, kind)

    def add_tokenizer(self, n_tokens: int | None = None) -> None:
        """Adds a vocabulary of made-up tokens, by default one for each row of the embedding."""
        n = self.n_vocab if n_tokens is None else n_tokens
        self.keys |= {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "qwen2",
            "tokenizer.ggml.tokens": ["t", "1", *(f"t{i}" for i in range(1, n - 1))],
            "tokenizer.ggml.token_type": [1] * n,
            "tokenizer.ggml.merges": ["t 1"],
        }

    def convert(self, ending: str, kind: str) -> None:
        """Converts the tensors whose names end so to another type."""
        for name, t in self.tensors.items():
            if name.endswith(ending):
                self.tensors[name] = Tensor(t.values, kind)

    def save(self, path: Path) -> Path:
        table, data = [], bytearray()
        for name, t in self.tensors.items():
            data += bytes(-len(data) % 32)
            table.append(b.tensor(name, t.dims or t.values.shape[::-1], TYPES[t.kind], len(data)))
            data += t.raw()
        keys = [b.key(self._full(name), *value(v)) for name, v in self.keys.items() if v is not None]
        path.write_bytes(b.gguf(keys, table, bytes(data)))
        return path

    def _full(self, name: str) -> str:
        return name if name.startswith(("general.", "tokenizer.", "other.")) else f"{self.arch}.{name}"

    def hidden(self, ids: list[int], meaning: Meaning | None = None) -> F64:
        """Computes the rows after the final norm, float64 [T, n_embd]."""
        return _Reference(self, meaning or Meaning()).hidden(ids)

    def logits(self, ids: list[int], meaning: Meaning | None = None) -> F64:
        """Computes the logits after every id, float64 [T, n_vocab]."""
        return _Reference(self, meaning or Meaning()).logits(ids)


def value(v: Any) -> tuple[int, bytes]:
    """Returns type id and bytes of a value as converters write it. A pair of both is returned unchanged."""
    if isinstance(v, tuple):
        return v
    if isinstance(v, bool):
        return b.BOOL, bytes([v])
    if isinstance(v, (str, bytes)):
        return b.STR, b.string(v)
    if isinstance(v, float):
        return b.F32, b.scalar(b.F32, v)
    if isinstance(v, int):
        return (b.U32 if v >= 0 else b.I32), b.scalar(b.U32 if v >= 0 else b.I32, v)
    if isinstance(v[0], (str, bytes)):
        return b.ARRAY, b.strings(v)
    if isinstance(v[0], bool):
        return b.ARRAY, b.array(b.BOOL, bytes(v), len(v))
    kind = b.F32 if isinstance(v[0], float) else b.I32
    return b.ARRAY, b.numbers(kind, v)


class _Reference:
    def __init__(self, tiny: Tiny, meaning: Meaning) -> None:
        self.tiny, self.meaning, self.gemma = tiny, meaning, tiny.arch in GEMMAS

    def weight(self, name: str) -> F64 | None:
        t = self.tiny.tensors.get(name)
        return None if t is None else t.values.astype(np.float64)

    def linear(self, x: F64, name: str) -> F64:
        w, bias = self.weight(f"{name}.weight"), self.weight(f"{name}.bias")
        assert w is not None
        return x @ w.T + (0.0 if bias is None else bias)

    def norm(self, x: F64, name: str) -> F64:
        w = self.weight(f"{name}.weight")
        assert w is not None
        eps = float(np.float32(1e-5))
        return np.asarray(x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * w)

    def rotate(self, x: F64, local: bool) -> F64:
        """Rotates x [T, heads, head_dim]: Llama rotates neighbours, the others the two halves."""
        hd, m = x.shape[-1], self.meaning
        base, factor = m.rope_base, m.rope_factor
        if local and m.rope_base_local is not None:
            base, factor = m.rope_base_local, 1.0
        angles = np.arange(len(x))[:, None] * base ** (-2.0 * np.arange(hd // 2) / hd) / factor
        c, s = np.cos(angles)[:, None], np.sin(angles)[:, None]
        out = np.empty_like(x)
        first, second = (slice(0, None, 2), slice(1, None, 2))
        if self.tiny.arch != "llama":
            first, second = slice(0, hd // 2), slice(hd // 2, None)
        out[..., first] = x[..., first] * c - x[..., second] * s
        out[..., second] = x[..., first] * s + x[..., second] * c
        return out

    def attention(self, i: int, h: F64) -> F64:
        t, blk, n = self.tiny, f"blk.{i}", len(h)
        q, k, v = (self.linear(h, f"{blk}.attn_{p}").reshape(n, -1, t.head_dim) for p in "qkv")
        if f"{blk}.attn_q_norm.weight" in t.tensors:
            q, k = self.norm(q, f"{blk}.attn_q_norm"), self.norm(k, f"{blk}.attn_k_norm")
        window = self.meaning.windows[i] if self.meaning.windows else 0
        q, k = self.rotate(q, window > 0), self.rotate(k, window > 0)
        k, v = (np.repeat(x, t.n_head // t.n_head_kv, axis=1) for x in (k, v))
        scale = self.meaning.attention_scale or t.head_dim**-0.5
        scores = np.einsum("thd,khd->htk", q, k) * scale
        age = np.arange(n)[:, None] - np.arange(n)
        if self.meaning.both_ways:
            seen = (np.abs(age) <= window // 2) | (window == 0)
        else:
            seen = (age >= 0) & ((age < window) | (window == 0))
        scores = np.where(seen, scores, -np.inf)
        p = np.exp(scores - scores.max(axis=-1, keepdims=True))
        out = np.einsum("htk,khd->thd", p / p.sum(axis=-1, keepdims=True), v)
        return self.linear(out.reshape(n, -1), f"{blk}.attn_output")

    def feed_forward(self, i: int, h: F64) -> F64:
        gate, up = (self.linear(h, f"blk.{i}.ffn_{p}") for p in ("gate", "up"))
        if self.gemma:
            act = 0.5 * gate * (1 + np.tanh((2 / np.pi) ** 0.5 * (gate + 0.044715 * gate**3)))
        else:
            act = gate / (1 + np.exp(-gate))
        return self.linear(act * up, f"blk.{i}.ffn_down")

    def logits(self, ids: list[int]) -> F64:
        output = self.weight("output.weight")
        assert output is not None
        return self.hidden(ids) @ output.T

    def hidden(self, ids: list[int]) -> F64:
        table = self.weight("token_embd.weight")
        assert table is not None
        x = table[ids] * self.meaning.embedding_scale
        for i in range(self.tiny.n_layer):
            blk = f"blk.{i}"
            h = self.attention(i, self.norm(x, f"{blk}.attn_norm"))
            x = x + (self.norm(h, f"{blk}.post_attention_norm") if self.gemma else h)
            h = self.feed_forward(i, self.norm(x, f"{blk}.ffn_norm"))
            x = x + (self.norm(h, f"{blk}.post_ffw_norm") if self.gemma else h)
        return self.norm(x, "output_norm")
