"""Loads Hugging Face models in float32 with the dequantised weights of a GGUF file: the reference of the make_*.py.

Needs torch, transformers and gguf; the tests need only the files that those scripts write.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers

from zincmetal import gguf as our_gguf

NAMES = {
    "token_embd": "model.embed_tokens",
    "output": "lm_head",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GEMMA3_NAMES = NAMES | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def load(path: Path) -> transformers.PreTrainedModel:
    """Loads the model of a llama, qwen2 or gemma3 file, every weight dequantised by the gguf package."""
    meta = our_gguf.open(path).metadata
    arch = meta["general.architecture"]
    make = {"llama": _llama, "qwen2": _qwen2, "gemma3": _gemma3}[arch]
    tensors = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}
    tied = "output.weight" not in tensors
    model = make({k.removeprefix(f"{arch}."): v for k, v in meta.items()}, tensors["token_embd.weight"].shape[0], tied)
    model = model.float().eval()
    state = {_hf_name(name, arch): torch.from_numpy(_hf_weight(name, w, meta)) for name, w in tensors.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"] if tied else [], []), "the names do not match"
    model.tie_weights()
    return model


def _hf_name(name: str, arch: str) -> str:
    *layer, part, kind = name.split(".")
    prefix = f"model.layers.{layer[1]}." if layer else ""
    return f"{prefix}{(GEMMA3_NAMES if arch == 'gemma3' else NAMES)[part]}.{kind}"


def _hf_weight(name: str, w: np.ndarray, meta: Mapping[str, Any]) -> np.ndarray:
    part, arch = name.split(".")[-2], meta["general.architecture"]
    if arch == "gemma3" and part.endswith("norm"):
        w = w - np.float32(1)  # the file holds 1 + weight
    if arch == "llama" and part in ("attn_q", "attn_k"):  # the file holds rotary pairs, the model rotary halves
        n_head = meta[f"llama.attention.head_count{'_kv' if part == 'attn_k' else ''}"]
        w = w.reshape(n_head, w.shape[0] // n_head // 2, 2, -1).swapaxes(1, 2).reshape(w.shape)
    return np.array(w, np.float32, order="C")


def _sizes(meta: Mapping[str, Any], n_vocab: int, tied: bool) -> dict[str, Any]:
    """Returns the sizes that all configurations share."""
    return {
        "vocab_size": n_vocab,
        "hidden_size": meta["embedding_length"],
        "intermediate_size": meta["feed_forward_length"],
        "num_hidden_layers": meta["block_count"],
        "num_attention_heads": meta["attention.head_count"],
        "num_key_value_heads": meta["attention.head_count_kv"],
        "rms_norm_eps": meta["attention.layer_norm_rms_epsilon"],
        "max_position_embeddings": meta["context_length"],
        "tie_word_embeddings": tied,
    }


def _llama(meta: Mapping[str, Any], n_vocab: int, tied: bool) -> transformers.PreTrainedModel:
    sizes = _sizes(meta, n_vocab, tied)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, rope_theta=meta["rope.freq_base"]))


def _qwen2(meta: Mapping[str, Any], n_vocab: int, tied: bool) -> transformers.PreTrainedModel:
    sizes = _sizes(meta, n_vocab, tied)
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes, rope_theta=meta["rope.freq_base"]))


def _gemma3(meta: Mapping[str, Any], n_vocab: int, tied: bool) -> transformers.PreTrainedModel:
    full = {"rope_type": "default", "rope_theta": meta["rope.freq_base"]}
    if "rope.scaling.factor" in meta:
        full |= {"rope_type": meta["rope.scaling.type"], "factor": meta["rope.scaling.factor"]}
    config = transformers.Gemma3TextConfig(
        **_sizes(meta, n_vocab, tied),
        head_dim=meta["attention.key_length"],
        query_pre_attn_scalar=meta["attention.key_length"],
        sliding_window=meta["attention.sliding_window"],
        rope_parameters={
            "full_attention": full,
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    )
    return transformers.Gemma3ForCausalLM(config)


def logits(model: transformers.PreTrainedModel, ids: list[int]) -> np.ndarray:
    """Computes the logits after every token, float32 [len(ids), vocab]."""
    with torch.no_grad():
        out: np.ndarray = model(torch.tensor([ids])).logits[0].numpy()
    return out


def greedy(model: transformers.PreTrainedModel, ids: list[int], n: int) -> np.ndarray:
    """Generates n tokens greedily, int32 [n]. End tokens do not end the text."""
    with torch.no_grad():
        out = model.generate(torch.tensor([ids]), max_new_tokens=n, do_sample=False, eos_token_id=-1)
    return out[0, len(ids) :].numpy().astype(np.int32)
