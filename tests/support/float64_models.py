"""Models with gated delta rules, gated attention and mixtures, and their blocks that draft, in float64.

Written from the papers and the layout of the files, and independent of the package but for the weights: they are read
and dequantised by it. ``h`` is the model's output after its final norm, [T, n_embd].
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zincmetal import gguf
from zincmetal.gguf.quants import dequantize

F64 = NDArray[np.float64]


def sigmoid(x: F64) -> F64:
    return np.asarray(1 / (1 + np.exp(-x)))


def silu(x: F64) -> F64:
    return x * sigmoid(x)


def softmax(x: F64) -> F64:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return np.asarray(e / e.sum(axis=-1, keepdims=True))


class Float64Model:
    """File of qwen35, qwen35moe, qwen3next or glm4moe.

    ``margin``: the least distance, in all that was computed, of an expert that a row takes to the best that it does
    not take. Where it is small, a model that rounds more may take the other one.
    """

    def __init__(self, path: Path) -> None:
        self.file = gguf.open(path)
        self.arch = self.file.metadata["general.architecture"]
        self.n_draft = self.key("nextn_predict_layers", 0)
        self.n_layer = self.key("block_count") - self.n_draft
        self.n_head, self.n_kv = self.key("attention.head_count"), self.key("attention.head_count_kv")
        self.head_dim, self.n_rot = self.key("attention.key_length"), self.key("rope.dimension_count")
        self.eps = self.key("attention.layer_norm_rms_epsilon")
        self.margin = np.inf
        self._weights: dict[str, F64] = {}

    def close(self) -> None:
        self.file.close()

    def key(self, name: str, *default: Any) -> Any:
        return self.file.metadata.get(f"{self.arch}.{name}", *default)

    def has(self, name: str) -> bool:
        return name in self.file.tensors

    def weight(self, name: str) -> F64:
        if name not in self._weights:
            info = self.file.tensors[name]
            self._weights[name] = dequantize(info.type, self.file.data(name), info.shape).astype(np.float64)
        return self._weights[name]

    def norm(self, x: F64, name: str) -> F64:
        return np.asarray(x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + self.eps) * self.weight(f"{name}.weight"))

    def linear(self, x: F64, name: str) -> F64:
        y = x @ self.weight(f"{name}.weight").T
        return y + self.weight(f"{name}.bias") if self.has(f"{name}.bias") else y

    # ---- the model -----------------------------------------------------------------------------------------------

    def h(self, ids: list[int]) -> F64:
        """Computes the model's output after its final norm."""
        x = self.weight("token_embd.weight")[ids]
        for i in range(self.n_layer):
            x = self.block(i, x)
        return self.norm(x, "output_norm")

    def logits(self, h: F64) -> F64:
        return np.asarray(h @ self.weight("output.weight").T)

    def block(self, i: int, x: F64) -> F64:
        y = self.norm(x, f"blk.{i}.attn_norm")
        x = x + (self.delta_net(i, y) if self.has(f"blk.{i}.ssm_a") else self.attention(i, y))
        y = self.norm(x, f"blk.{i}.post_attention_norm")
        return x + (self.mixture(i, y) if self.has(f"blk.{i}.ffn_gate_inp.weight") else self.glu(i, y, ""))

    def attention(self, i: int, x: F64) -> F64:
        """Qwen's query matrix has the gate of each head behind its query."""
        n, blk, gated = len(x), f"blk.{i}", self.arch != "glm4moe"
        q = self.linear(x, f"{blk}.attn_q").reshape(n, self.n_head, -1)
        k, v = (self.linear(x, f"{blk}.attn_{name}").reshape(n, self.n_kv, self.head_dim) for name in "kv")
        q, gate = q[..., : self.head_dim], q[..., self.head_dim :]
        if self.has(f"{blk}.attn_q_norm.weight"):
            q, k = self.norm(q, f"{blk}.attn_q_norm"), self.norm(k, f"{blk}.attn_k_norm")
        q, k = self.rotated(q), self.rotated(k)
        k, v = (np.repeat(y, self.n_head // self.n_kv, axis=1) for y in (k, v))
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(self.head_dim)
        scores[:, np.triu(np.ones((n, n), bool), 1)] = -np.inf
        y = np.einsum("hqk,khd->qhd", softmax(scores), v)
        return self.linear((y * sigmoid(gate) if gated else y).reshape(n, -1), f"{blk}.attn_output")

    def rotated(self, x: F64) -> F64:
        """Rotates [T, heads, head_dim] by their places: the first dimensions, in pairs half of them apart."""
        half = self.n_rot // 2
        angle = np.arange(len(x))[:, None, None] * self.key("rope.freq_base") ** (-np.arange(half) / half)
        a, b = x[..., :half], x[..., half : self.n_rot]
        turned = [a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)]
        return np.concatenate([*turned, x[..., self.n_rot :]], axis=-1)

    def delta_net(self, i: int, x: F64) -> F64:
        """The gated delta rule (arXiv 2412.06464), a row after another."""
        n, blk = len(x), f"blk.{i}"
        n_k, n_v, d = (self.key(f"ssm.{name}") for name in ("group_count", "time_step_rank", "state_size"))
        of_k = np.arange(n_v) // (n_v // n_k) if self.arch == "qwen3next" else np.arange(n_v) % n_k
        channels = self.convolved(self.linear(x, f"{blk}.attn_qkv"), self.weight(f"{blk}.ssm_conv1d.weight"))
        q, k = (channels[:, at : at + n_k * d].reshape(n, n_k, d)[:, of_k] for at in (0, n_k * d))
        q, k = (y / np.sqrt((y * y).sum(axis=-1, keepdims=True) + 1e-6) for y in (q, k))
        v = channels[:, 2 * n_k * d :].reshape(n, n_v, -1)
        alpha, beta = self.gates(x, blk, n_k, n_v)
        decay = np.exp(self.weight(f"{blk}.ssm_a") * np.log1p(np.exp(alpha + self.weight(f"{blk}.ssm_dt.bias"))))
        state, out = np.zeros((n_v, d, v.shape[-1])), np.empty_like(v)
        for t in range(n):
            state *= decay[t][:, None, None]
            change = (v[t] - np.einsum("hkv,hk->hv", state, k[t])) * sigmoid(beta[t])[:, None]
            state += k[t][:, :, None] * change[:, None, :]
            out[t] = np.einsum("hkv,hk->hv", state, q[t]) / np.sqrt(d)
        z = self.linear(x, f"{blk}.attn_gate").reshape(out.shape)
        return self.linear((self.norm(out, f"{blk}.ssm_norm") * silu(z)).reshape(n, -1), f"{blk}.ssm_out")

    def gates(self, x: F64, blk: str, n_k: int, n_v: int) -> tuple[F64, F64]:
        """Computes alpha and beta of each v head. One matrix may have them by k head, the betas first."""
        if not self.has(f"{blk}.ssm_ba.weight"):
            return self.linear(x, f"{blk}.ssm_alpha"), self.linear(x, f"{blk}.ssm_beta")
        beta, alpha = np.split(self.linear(x, f"{blk}.ssm_ba").reshape(len(x), n_k, -1), 2, axis=-1)
        return alpha.reshape(len(x), n_v), beta.reshape(len(x), n_v)

    @staticmethod
    def convolved(x: F64, weight: F64) -> F64:
        """Convolves each channel over its last inputs. The last weight is that of the row itself."""
        width = weight.shape[1]
        padded = np.concatenate([np.zeros((width - 1, x.shape[1])), x])
        return silu(np.asarray(sum(padded[j : j + len(x)] * weight[:, j] for j in range(width))))

    def glu(self, i: int, x: F64, kind: str, expert: int | None = None) -> F64:
        up, gate, down = (self.weight(f"blk.{i}.ffn_{name}{kind}.weight") for name in ("up", "gate", "down"))
        if expert is not None:
            up, gate, down = up[expert], gate[expert], down[expert]
        return np.asarray((silu(x @ gate.T) * (x @ up.T)) @ down.T)

    def mixture(self, i: int, x: F64) -> F64:
        """GLM scores experts by a sigmoid, with a bias for the choice alone. Qwen gates the shared expert."""
        blk, n_used = f"blk.{i}", self.key("expert_used_count")
        logits, shared = self.linear(x, f"{blk}.ffn_gate_inp"), self.glu(i, x, "_shexp")
        if self.arch == "glm4moe":
            scores, ranked = sigmoid(logits), sigmoid(logits) + self.weight(f"{blk}.exp_probs_b.bias")
            scale = self.key("expert_weights_scale")
        else:
            scores = ranked = softmax(logits)
            shared, scale = shared * sigmoid(x @ self.weight(f"{blk}.ffn_gate_inp_shexp.weight").reshape(-1, 1)), 1.0
        order = np.argsort(-ranked, axis=-1)
        best = np.take_along_axis(ranked, order, axis=-1)
        self.margin = min(self.margin, float((best[:, n_used - 1] - best[:, n_used]).min()))
        for t, chosen in enumerate(order[:, :n_used]):
            share = scores[t, chosen] / scores[t, chosen].sum() * scale
            shared[t] += sum(w * self.glu(i, x[t], "_exps", e) for w, e in zip(share, chosen, strict=True))
        return shared

    # ---- the block that drafts -----------------------------------------------------------------------------------

    def drafted(self, ids: list[int], h: F64) -> tuple[F64, F64]:
        """Computes the block's logits and its own h, for each row. Row t has the token t, and h of the row before.

        So it takes len(ids) - 1 rows of ``h`` or more. Before the first row h is 0.
        """
        i = self.n_layer
        nextn = f"blk.{i}.nextn"
        before = np.concatenate([np.zeros((1, h.shape[1])), h[: len(ids) - 1]])
        table, head, norm = (f"{nextn}.{name}" for name in ("embed_tokens", "shared_head_head", "shared_head_norm"))
        embedded = self.weight(f"{table if self.has(f'{table}.weight') else 'token_embd'}.weight")[ids]
        pairs = [self.norm(embedded, f"{nextn}.enorm"), self.norm(before, f"{nextn}.hnorm")]
        x = self.block(i, self.linear(np.concatenate(pairs, axis=1), f"{nextn}.eh_proj"))
        own = self.norm(x, norm if self.has(f"{norm}.weight") else "output_norm")
        return self.linear(own, head if self.has(f"{head}.weight") else "output"), own
