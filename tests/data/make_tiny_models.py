"""Makes qwen2-q8_0 and gemma3-q4_0 (.gguf and .npz): tiny random models, and Hugging Face's results on them.

They have the format of the other reference models here: ``tokens`` int64 [96], ``prefix_lengths`` int64 [7],
``logprobs`` float32 [7, vocab] of the next token after each prefix, ``greedy_from_16`` int64 [48] the greedy
continuation of the first 16 tokens, all from float32 Hugging Face on the dequantised weights. Tensors are written by
the gguf package in the layout of llama.cpp's converter (norms of Gemma hold 1 + weight). Needs torch, transformers
and gguf; the tests need only the output.

The Gemma has one layer with full attention among seven, a window of 16 and scaled RoPE on the full layer, as its
bigger relatives have.
"""

from collections.abc import Iterator
from pathlib import Path

import gguf
import hf_models
import numpy as np
import torch

N_VOCAB = 512
PREFIX_LENGTHS = np.array([1, 2, 5, 16, 33, 64, 96])
Q8_0, Q4_0, F32 = (gguf.GGMLQuantizationType[name] for name in ("Q8_0", "Q4_0", "F32"))
SIZES = {"n_embd": 64, "n_ff": 64, "n_head": 2, "n_head_kv": 1, "head_dim": 32}

Tensor = tuple[str, np.ndarray, gguf.GGMLQuantizationType]


def block(rng: np.random.Generator, i: int, kind: gguf.GGMLQuantizationType, qkv_bias: bool) -> Iterator[Tensor]:
    """Makes the tensors of block i that both architectures have."""
    n_embd, n_ff, hd = SIZES["n_embd"], SIZES["n_ff"], SIZES["head_dim"]
    n_q, n_kv = SIZES["n_head"] * hd, SIZES["n_head_kv"] * hd
    shapes = {"attn_q": (n_q, n_embd), "attn_k": (n_kv, n_embd), "attn_v": (n_kv, n_embd), "attn_output": (n_embd, n_q)}
    shapes |= {"ffn_gate": (n_ff, n_embd), "ffn_up": (n_ff, n_embd), "ffn_down": (n_embd, n_ff)}
    for part, (m, k) in shapes.items():
        yield f"blk.{i}.{part}.weight", rng.normal(size=(m, k)) * k**-0.5, kind
        if qkv_bias and part in ("attn_q", "attn_k", "attn_v"):
            yield f"blk.{i}.{part}.bias", rng.normal(size=m), F32
    for part in ("attn_norm", "ffn_norm"):
        yield f"blk.{i}.{part}.weight", rng.uniform(0.5, 1.5, n_embd), F32


def qwen2(writer: gguf.GGUFWriter, rng: np.random.Generator) -> Iterator[Tensor]:
    """Two layers, biases on q, k and v, an output matrix of its own."""
    writer.add_block_count(2)
    writer.add_rope_freq_base(1e6)
    yield "token_embd.weight", rng.normal(size=(N_VOCAB, SIZES["n_embd"])) * 0.5, Q4_0
    yield "output_norm.weight", rng.uniform(0.5, 1.5, SIZES["n_embd"]), F32
    yield "output.weight", rng.normal(size=(N_VOCAB, SIZES["n_embd"])) * 0.4, Q4_0
    for i in range(2):
        yield from block(rng, i, Q8_0, qkv_bias=True)


def gemma3(writer: gguf.GGUFWriter, rng: np.random.Generator) -> Iterator[Tensor]:
    """Seven layers, the output tied to the embedding."""
    writer.add_block_count(7)
    writer.add_key_length(SIZES["head_dim"])
    writer.add_value_length(SIZES["head_dim"])
    writer.add_sliding_window(16)
    writer.add_rope_freq_base(1e6)
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(8.0)
    yield "token_embd.weight", rng.normal(size=(N_VOCAB, SIZES["n_embd"])) * SIZES["n_embd"] ** -0.5, Q8_0
    yield "output_norm.weight", rng.uniform(1, 2, SIZES["n_embd"]), F32
    for i in range(7):
        yield from block(rng, i, Q4_0, qkv_bias=False)
        for part in ("attn_q_norm", "attn_k_norm"):
            yield f"blk.{i}.{part}.weight", rng.uniform(0.7, 1.4, SIZES["head_dim"]), F32
        for part in ("post_attention_norm", "post_ffw_norm"):
            yield f"blk.{i}.{part}.weight", rng.uniform(0.5, 1.5, SIZES["n_embd"]), F32


def write(path: Path, arch: str, tensors: object, seed: int) -> None:
    """Writes the file: sizes, a vocabulary of made-up tokens, quantised tensors."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(256)
    writer.add_embedding_length(SIZES["n_embd"])
    writer.add_feed_forward_length(SIZES["n_ff"])
    writer.add_head_count(SIZES["n_head"])
    writer.add_head_count_kv(SIZES["n_head_kv"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([f"t{i}" for i in range(N_VOCAB)])
    writer.add_token_types([gguf.TokenType.NORMAL] * N_VOCAB)
    writer.add_token_merges(["t 1"])
    writer.add_eos_token_id(0)
    for name, w, kind in tensors(writer, np.random.default_rng(seed)):
        w = w.astype(np.float32)
        writer.add_tensor(name, w if kind == F32 else gguf.quants.quantize(w, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    """Writes the files."""
    for name, tensors in (("qwen2-q8_0", qwen2), ("gemma3-q4_0", gemma3)):
        path = Path(__file__).with_name(f"{name}.gguf")
        write(path, name.split("-")[0], tensors, seed=len(name))
        model = hf_models.load(path)
        tokens = np.random.default_rng(1).integers(1, N_VOCAB, PREFIX_LENGTHS[-1])
        logits = torch.from_numpy(hf_models.logits(model, tokens.tolist()))
        logprobs = torch.log_softmax(logits.double(), dim=-1).float().numpy()
        greedy = hf_models.greedy(model, tokens[:16].tolist(), 48)
        np.savez_compressed(
            path.with_suffix(".npz"),
            tokens=tokens,
            prefix_lengths=PREFIX_LENGTHS,
            logprobs=logprobs[PREFIX_LENGTHS - 1],
            greedy_from_16=greedy.astype(np.int64),
        )
        entropy = -(np.exp(logprobs) * logprobs).sum(axis=-1)
        print(f"{name}: {path.stat().st_size} bytes, entropy {entropy.min():.2f} to {entropy.max():.2f} nats")


if __name__ == "__main__":
    main()
