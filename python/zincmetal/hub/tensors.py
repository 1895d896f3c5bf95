"""Tensors of a model, by its family: the name and the shape of each, before any file of it is here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .shape import Shape

Row = tuple[str, tuple[int, ...]]

_BIASES = ("qwen2", "gpt-oss", "seed_oss", "glm4moe")  # of q, k and v
_NO_QK_NORMS = ("llama", "mistral3", "smollm3", "granite", *_BIASES)
_NORM_AFTER_ATTENTION = ("gpt-oss", "seed_oss", "glm4moe")  # the name of the feed-forward's norm
_SELECTION_BIAS = ("glm4moe", "minimax-m2")


def tensors(s: Shape) -> Iterator[Row]:
    """Yield every tensor: its name, and its shape with the slowest dimension first."""
    yield "token_embd.weight", (s.n_vocab, s.n_embd)
    yield f"{'token_embd_norm' if s.convolutions else 'output_norm'}.weight", (s.n_embd,)
    if not s.tied:
        yield "output.weight", (s.n_vocab, s.n_embd)
    if s.gemma4:
        yield from _beside_blocks(s)
    for i in range(s.n_layer):
        yield from ((f"blk.{i}.{name}", shape) for name, shape in _block(s, i))
    for i in range(s.n_layer, s.n_layer + s.n_draft):
        yield from ((f"blk.{i}.{name}", shape) for name, shape in _draft(s))


def _block(s: Shape, i: int) -> Iterator[Row]:
    if s.gemma4:
        yield from _gemma4(s, i)
        return
    recurrent = s.delta is not None and (i + 1) % s.delta.interval != 0
    if s.convolutions and i not in s.convolutions.attend:
        yield from _short_convolution(s, s.convolutions.l_cache)
    else:
        yield from _recurrent(s) if recurrent else _attention(s)
    yield from _experts(s) if s.moe and i >= s.n_dense else _feed_forward(s)


def _draft(s: Shape) -> Iterator[Row]:
    """Yield a block for multi-token prediction: one that attends, and what joins the token to the last rows."""
    yield from _attention(s)
    yield from _experts(s) if s.moe else _feed_forward(s)
    yield "nextn.eh_proj.weight", (s.n_embd, 2 * s.n_embd)
    yield from ((f"nextn.{name}.weight", (s.n_embd,)) for name in ("enorm", "hnorm", "shared_head_norm"))


def _attention(s: Shape) -> Iterator[Row]:
    n_q, n_kv = s.n_head * s.head_dim, s.n_head_kv * s.head_dim
    yield "attn_norm.weight", (s.n_embd,)
    yield "attn_q.weight", (n_q * (2 if s.delta else 1), s.n_embd)  # hybrids: a gate for each query
    yield "attn_k.weight", (n_kv, s.n_embd)
    yield "attn_v.weight", (n_kv, s.n_embd)
    yield "attn_output.weight", (s.n_embd, n_q)
    if s.arch in _BIASES:
        yield from (("attn_q.bias", (n_q,)), ("attn_k.bias", (n_kv,)), ("attn_v.bias", (n_kv,)))
    if s.arch == "minimax-m2":  # over all heads at once
        yield from (("attn_q_norm.weight", (n_q,)), ("attn_k_norm.weight", (n_kv,)))
    elif s.arch not in _NO_QK_NORMS:
        yield from (("attn_q_norm.weight", (s.head_dim,)), ("attn_k_norm.weight", (s.head_dim,)))
    if s.arch == "gpt-oss":
        yield from (("attn_output.bias", (s.n_embd,)), ("attn_sinks.weight", (s.n_head,)))


def _recurrent(s: Shape) -> Iterator[Row]:
    assert s.delta
    d_inner = s.delta.n_v_head * s.delta.d_state
    channels = 2 * s.delta.n_k_head * s.delta.d_state + d_inner
    yield "attn_norm.weight", (s.n_embd,)
    yield "attn_qkv.weight", (channels, s.n_embd)
    yield "attn_gate.weight", (d_inner, s.n_embd)
    if s.arch == "qwen3next":
        yield "ssm_ba.weight", (2 * s.delta.n_v_head, s.n_embd)
    else:
        yield "ssm_alpha.weight", (s.delta.n_v_head, s.n_embd)
        yield "ssm_beta.weight", (s.delta.n_v_head, s.n_embd)
    yield "ssm_conv1d.weight", (channels, s.delta.d_conv)
    yield "ssm_a", (s.delta.n_v_head,)
    yield "ssm_dt.bias", (s.delta.n_v_head,)
    yield "ssm_norm.weight", (s.delta.d_state,)
    yield "ssm_out.weight", (s.n_embd, d_inner)


def _short_convolution(s: Shape, l_cache: int) -> Iterator[Row]:
    yield "attn_norm.weight", (s.n_embd,)
    yield "shortconv.in_proj.weight", (3 * s.n_embd, s.n_embd)
    yield "shortconv.conv.weight", (s.n_embd, l_cache)
    yield "shortconv.out_proj.weight", (s.n_embd, s.n_embd)


def _feed_forward(s: Shape) -> Iterator[Row]:
    yield _norm_of_feed_forward(s)
    yield "ffn_gate.weight", (s.n_ff, s.n_embd)
    yield "ffn_up.weight", (s.n_ff, s.n_embd)
    yield "ffn_down.weight", (s.n_embd, s.n_ff)
    if s.arch in ("gemma3", "gemma-embedding"):
        yield from (("post_attention_norm.weight", (s.n_embd,)), ("post_ffw_norm.weight", (s.n_embd,)))


def _experts(s: Shape) -> Iterator[Row]:
    assert s.moe
    n, _, n_ff, n_shared = s.moe
    yield _norm_of_feed_forward(s)
    yield "ffn_gate_inp.weight", (n, s.n_embd)
    yield "ffn_gate_exps.weight", (n, n_ff, s.n_embd)
    yield "ffn_up_exps.weight", (n, n_ff, s.n_embd)
    yield "ffn_down_exps.weight", (n, s.n_embd, n_ff)
    if s.arch == "gpt-oss":
        yield "ffn_gate_inp.bias", (n,)
        yield from (("ffn_gate_exps.bias", (n, n_ff)), ("ffn_up_exps.bias", (n, n_ff)))
        yield "ffn_down_exps.bias", (n, s.n_embd)
    if s.arch in _SELECTION_BIAS:
        yield "exp_probs_b.bias", (n,)
    if n_shared and s.arch != "glm4moe":
        yield "ffn_gate_inp_shexp.weight", (s.n_embd,)
    if n_shared:
        yield "ffn_gate_shexp.weight", (n_shared, s.n_embd)
        yield "ffn_up_shexp.weight", (n_shared, s.n_embd)
        yield "ffn_down_shexp.weight", (s.n_embd, n_shared)


def _norm_of_feed_forward(s: Shape) -> Row:
    after = s.delta or s.arch in _NORM_AFTER_ATTENTION
    return ("post_attention_norm.weight" if after else "ffn_norm.weight"), (s.n_embd,)


# ---- Gemma 4 --------------------------------------------------------------------------------------------------


def _beside_blocks(s: Shape) -> Iterator[Row]:
    assert s.gemma4
    yield "rope_freqs.weight", (s.gemma4.head_dim // 2,)
    if n := s.gemma4.n_per_layer:
        yield "per_layer_token_embd.weight", (s.n_vocab, n * s.n_layer)
        yield "per_layer_model_proj.weight", (n * s.n_layer, s.n_embd)
        yield "per_layer_proj_norm.weight", (n,)


def _gemma4(s: Shape, i: int) -> Iterator[Row]:
    g = s.gemma4
    assert g
    sees_all = (i + 1) % g.period == 0
    head_dim, n_kv = (g.head_dim, g.n_head_kv) if sees_all else (s.head_dim, s.n_head_kv)
    own_kv = i < s.n_layer - g.n_shared
    yield "attn_q.weight", (s.n_head * head_dim, s.n_embd)
    yield "attn_q_norm.weight", (head_dim,)
    yield "attn_output.weight", (s.n_embd, s.n_head * head_dim)
    if own_kv:
        yield "attn_k.weight", (n_kv * head_dim, s.n_embd)
        yield "attn_k_norm.weight", (head_dim,)
        if not (sees_all and g.v_is_k):
            yield "attn_v.weight", (n_kv * head_dim, s.n_embd)
    yield "layer_output_scale.weight", (1,)
    norms = ["attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"]
    norms += ["pre_ffw_norm_2", "post_ffw_norm_1", "post_ffw_norm_2"] if s.moe else []
    norms += ["post_norm"] if g.n_per_layer else []
    yield from ((f"{norm}.weight", (s.n_embd,)) for norm in norms)
    yield from (("ffn_gate.weight", (s.n_ff, s.n_embd)), ("ffn_up.weight", (s.n_ff, s.n_embd)))
    yield "ffn_down.weight", (s.n_embd, s.n_ff)
    if s.moe:
        n, _, n_ff, _ = s.moe
        yield from (("ffn_gate_inp.weight", (n, s.n_embd)), ("ffn_gate_inp.scale", (s.n_embd,)))
        yield "ffn_gate_up_exps.weight", (n, 2 * n_ff, s.n_embd)
        yield from (("ffn_down_exps.weight", (n, s.n_embd, n_ff)), ("ffn_down_exps.scale", (n,)))
    if g.n_per_layer:
        yield from (("inp_gate.weight", (g.n_per_layer, s.n_embd)), ("proj.weight", (s.n_embd, g.n_per_layer)))
