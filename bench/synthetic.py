"""Writes a GGUF file with the shapes, types and metadata of Qwen3.6-35B-A3B UD-Q4_K_XL, and random weights.

    python bench/synthetic.py OUT.gguf --layers 4        # 3.2 GB; all 40 layers are 22.1 GB
    python bench/synthetic.py OUT.gguf --empty           # 40 layers that take no disk space, for memory plans
    python bench/synthetic.py OUT.gguf --tiny            # the same structure in a megabyte or two, for tests
    python bench/synthetic.py OUT.gguf --layers 4 --draft   # and a block that drafts (nextn)
    python bench/synthetic.py OUT.gguf --model gpt-oss-20b --quant MXFP4 --layers 4
    python bench/synthetic.py OUT.gguf --draft --counting   # the text is known, and how often the block is right

``--model`` takes a model of the catalogue (``hub/catalogue.py``), with the types that its files are known to have.
``--counting`` changes weights and no shape or type (``counting.py``), to measure drafts.
Speed and memory are the real model's; the text is not. Weights are scaled so that activations keep size one through
any number of layers. The same seed gives the same bytes, and a tensor's bytes do not depend on the number
of layers. Needs the package `gguf`, which writes the header.
"""

from __future__ import annotations

import argparse
import os
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter
from numpy.typing import NDArray

import counting
from zincmetal.gguf.quants import F32, Q4_K, Q5_K, Q6_K, Q8_0, QuantType
from zincmetal.gguf.random_weights import random_bits, random_weights, spread
from zincmetal.graph.ops import Weight
from zincmetal.hub.catalogue import ENTRIES
from zincmetal.hub.mixes import types_of
from zincmetal.hub.shape import Delta, MoE, Shape, keys_of
from zincmetal.hub.tensors import tensors as shape_tensors
from zincmetal.text.vocabulary import BYTE_OF_LETTER, TokenType

ARCH = "qwen35moe"
CHUNK = 16 << 20  # bytes made and written at a time
ALIGNMENT = 32

MERGES = ["t h", "i n", "a n", "e r", "Ġ t", "Ġ a"]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model of this family; by default of 35B-A3B."""

    n_layer: int = 40
    n_embd: int = 2048
    n_vocab: int = 248320
    n_text: int = 248044  # the first special token's id; padding follows the special tokens
    n_head: int = 16
    n_head_kv: int = 2
    head_dim: int = 256
    n_rot: int = 64
    rope_sections: tuple[int, int, int, int] = (11, 11, 10, 0)
    n_ctx: int = 262144
    n_expert: int = 256
    n_used: int = 8
    n_ff_expert: int = 512
    n_ff_shared: int = 512
    d_conv: int = 4
    d_state: int = 128
    n_k_head: int = 16
    n_v_head: int = 32
    interval: int = 4  # every 4th layer is full attention
    n_draft: int = 0  # blocks that draft, after the layers
    mixed_layers: int = 0  # last layers whose experts have one more bit a weight: q5_K, q5_K, q6_K

    @property
    def n_channels(self) -> int:
        """Returns the channels of the convolution: q, k and v of an SSM layer."""
        return (2 * self.n_k_head + self.n_v_head) * self.d_state

    @property
    def d_inner(self) -> int:
        """Returns the width of v, z and the SSM's output."""
        return self.n_v_head * self.d_state


TINY = Sizes(
    n_layer=4,
    n_embd=256,
    n_vocab=512,
    n_text=496,
    n_head=4,
    n_head_kv=1,
    head_dim=64,
    n_rot=32,
    rope_sections=(6, 5, 5, 0),
    n_ctx=1024,
    n_expert=8,
    n_used=2,
    n_ff_expert=256,
    n_ff_shared=256,
    d_state=64,
    n_k_head=2,
    n_v_head=4,
)


# ---- the tensors ------------------------------------------------------------------------------------------------


def tensors(s: Sizes) -> Iterator[Weight]:
    """Yields every tensor in the file's order, shapes with the slowest dimension first."""
    yield Weight("token_embd.weight", Q8_0, (s.n_vocab, s.n_embd))
    yield Weight("output_norm.weight", F32, (s.n_embd,))
    yield Weight("output.weight", Q8_0, (s.n_vocab, s.n_embd))
    for i in range(s.n_layer):
        full = i % s.interval == s.interval - 1
        rows = [*(_attention(s) if full else _ssm(s)), *_experts(s, mixed=i >= s.n_layer - s.mixed_layers)]
        yield from (Weight(f"blk.{i}.{name}", qtype, shape) for name, qtype, shape in rows)
    for i in range(s.n_layer, s.n_layer + s.n_draft):
        rows = [*_attention(s), *_experts(s, mixed=False), *_nextn(s)]
        yield from (Weight(f"blk.{i}.{name}", qtype, shape) for name, qtype, shape in rows)


Rows = list[tuple[str, QuantType, tuple[int, ...]]]


def _attention(s: Sizes) -> Rows:
    n_q, n_kv = s.n_head * s.head_dim, s.n_head_kv * s.head_dim
    return [
        ("attn_norm.weight", F32, (s.n_embd,)),
        ("attn_q.weight", Q8_0, (2 * n_q, s.n_embd)),  # per head: query, gate
        ("attn_k.weight", Q8_0, (n_kv, s.n_embd)),
        ("attn_v.weight", Q8_0, (n_kv, s.n_embd)),
        ("attn_q_norm.weight", F32, (s.head_dim,)),
        ("attn_k_norm.weight", F32, (s.head_dim,)),
        ("attn_output.weight", Q8_0, (s.n_embd, n_q)),
    ]


def _ssm(s: Sizes) -> Rows:
    return [
        ("attn_norm.weight", F32, (s.n_embd,)),
        ("attn_qkv.weight", Q8_0, (s.n_channels, s.n_embd)),
        ("attn_gate.weight", Q8_0, (s.d_inner, s.n_embd)),
        ("ssm_alpha.weight", F32, (s.n_v_head, s.n_embd)),
        ("ssm_beta.weight", F32, (s.n_v_head, s.n_embd)),
        ("ssm_conv1d.weight", F32, (s.n_channels, s.d_conv)),
        ("ssm_a", F32, (s.n_v_head,)),
        ("ssm_dt.bias", F32, (s.n_v_head,)),
        ("ssm_norm.weight", F32, (s.d_state,)),
        ("ssm_out.weight", Q8_0, (s.n_embd, s.d_inner)),
    ]


def _experts(s: Sizes, mixed: bool) -> Rows:
    gate_up, down = (Q5_K, Q6_K) if mixed else (Q4_K, Q5_K)
    return [
        ("post_attention_norm.weight", F32, (s.n_embd,)),
        ("ffn_gate_inp.weight", F32, (s.n_expert, s.n_embd)),
        ("ffn_gate_exps.weight", gate_up, (s.n_expert, s.n_ff_expert, s.n_embd)),
        ("ffn_up_exps.weight", gate_up, (s.n_expert, s.n_ff_expert, s.n_embd)),
        ("ffn_down_exps.weight", down, (s.n_expert, s.n_embd, s.n_ff_expert)),
        ("ffn_gate_inp_shexp.weight", F32, (s.n_embd,)),
        ("ffn_gate_shexp.weight", Q8_0, (s.n_ff_shared, s.n_embd)),
        ("ffn_up_shexp.weight", Q8_0, (s.n_ff_shared, s.n_embd)),
        ("ffn_down_shexp.weight", Q8_0, (s.n_embd, s.n_ff_shared)),
    ]


def _nextn(s: Sizes) -> Rows:
    norms = [(f"nextn.{name}.weight", F32, (s.n_embd,)) for name in ("enorm", "hnorm", "shared_head_norm")]
    return [("nextn.eh_proj.weight", Q8_0, (s.n_embd, 2 * s.n_embd)), *norms]


# ---- the metadata -----------------------------------------------------------------------------------------------


def add_metadata(w: GGUFWriter, s: Sizes) -> None:
    """Adds the keys of a converted Qwen3.6 file, and a made-up vocabulary of the same size and kind."""
    w.add_name("synthetic Qwen3.6-35B-A3B shapes, random weights")
    w.add_file_type(15)  # "mostly q4_K"
    w.add_quantization_version(2)
    w.add_block_count(s.n_layer + s.n_draft)
    if s.n_draft:
        w.add_uint32(f"{ARCH}.nextn_predict_layers", s.n_draft)
    w.add_context_length(s.n_ctx)
    w.add_embedding_length(s.n_embd)
    w.add_head_count(s.n_head)
    w.add_head_count_kv(s.n_head_kv)
    w.add_key_length(s.head_dim)
    w.add_value_length(s.head_dim)
    w.add_layer_norm_rms_eps(1e-6)
    w.add_rope_dimension_count(s.n_rot)
    w.add_rope_dimension_sections(s.rope_sections)
    w.add_rope_freq_base(1e7)
    w.add_expert_count(s.n_expert)
    w.add_expert_used_count(s.n_used)
    w.add_expert_feed_forward_length(s.n_ff_expert)
    w.add_expert_shared_feed_forward_length(s.n_ff_shared)
    w.add_ssm_conv_kernel(s.d_conv)
    w.add_ssm_state_size(s.d_state)
    w.add_ssm_group_count(s.n_k_head)
    w.add_ssm_time_step_rank(s.n_v_head)
    w.add_ssm_inner_size(s.d_inner)
    w.add_uint32(f"{ARCH}.full_attention_interval", s.interval)
    add_vocabulary(w, s)


def add_vocabulary(w: GGUFWriter, s: Sizes) -> None:
    """Adds byte tokens, a few merges, made-up words, ChatML's special tokens, and padding."""
    known = [*BYTE_OF_LETTER, *(merge.replace(" ", "") for merge in MERGES)]
    words = [f"Ġ{word}" for word in _words(s.n_text - len(known))]
    padding = [f"[PAD{i}]" for i in range(s.n_text + len(SPECIAL), s.n_vocab)]
    normal, control, unused = (int(t) for t in (TokenType.NORMAL, TokenType.CONTROL, TokenType.UNUSED))
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("qwen35")
    w.add_token_list([*known, *words, *SPECIAL, *padding])
    w.add_token_types([normal] * s.n_text + [control] * len(SPECIAL) + [unused] * len(padding))
    w.add_token_merges(MERGES)
    w.add_eos_token_id(s.n_text + SPECIAL.index("<|im_end|>"))
    w.add_pad_token_id(s.n_text + SPECIAL.index("<|endoftext|>"))
    w.add_add_bos_token(False)
    w.add_chat_template(CHAT_TEMPLATE)


def _words(n: int) -> list[str]:
    """Makes ``n`` different words of three syllables."""
    syllables = [c + v for c in "bcdfghjklmnprstvwxyz" for v in "aeiou"]
    return [syllables[i // 10000] + syllables[i // 100 % 100] + syllables[i % 100] for i in range(n)]


# ---- the weights ------------------------------------------------------------------------------------------------


def chunks(w: Weight, seed: int, silent: bool = False) -> Iterator[NDArray[np.uint8]]:
    """Yields the bytes of a tensor in pieces. Each tensor has a random sequence of its own.

    ``silent``: its blocks have scales of zero.
    """
    rng = np.random.Generator(np.random.SFC64([seed, zlib.crc32(w.name.encode())]))
    make = _vector_maker(w) if w.type is F32 else _block_maker(w, 0.0 if silent else 1.0)
    blocks = prod(w.shape) // w.type.block_size
    step = CHUNK // (8 * w.type.block_bytes) * 8
    for at in range(0, blocks, step):
        yield make(rng, min(step, blocks - at))


Maker = Callable[[np.random.Generator, int], NDArray[np.uint8]]


def _vector_maker(w: Weight) -> Maker:
    """Makes float32 weights: matrices and convolutions normal, norms about one, the SSM's decay as if trained."""

    def make(rng: np.random.Generator, n: int) -> NDArray[np.uint8]:
        if w.name.endswith("ssm_a"):  # -exp(A_log)
            values = -rng.uniform(0.5, 8.0, n)
        elif w.name.endswith("ssm_dt.bias"):
            values = rng.uniform(-6.0, -2.0, n)
        elif w.name.endswith(("norm.weight", "norm_1.weight", "norm_2.weight", ".scale", "output_scale.weight")):
            values = rng.uniform(0.8, 1.2, n)
        elif w.name == "rope_freqs.weight":
            values = np.ones(n)
        else:
            values = rng.standard_normal(n, np.float32) / np.sqrt(w.shape[-1])
        return values.astype("<f4").view(np.uint8)

    return make


def _block_maker(w: Weight, size: float = 1.0) -> Maker:
    """Makes blocks of random quants. Random bits choose their scales from a table.

    A product with activations of size one has ``size`` again. Logits have four times it: with less, no token of 248,320
    would stand out.
    """
    size *= (4.0 if w.name == "output.weight" else 1.0) / np.sqrt(w.shape[-1])
    if w.type.block is None or "d" not in (w.type.block.names or ()) or w.type.block["d"] != np.dtype("<f2"):
        return lambda rng, n: random_weights(w.type, (n, w.type.block_size), rng, size).ravel()
    deviation, centre = spread(w.type)
    scales = np.linspace(0.5, 1.5, 256) * size / deviation
    fields = (w.type.block.names or ()) if w.type.block is not None else ()
    tables = {"d": scales.astype("<f2"), "dmin": (scales * centre).astype("<f2")}

    def make(rng: np.random.Generator, n: int) -> NDArray[np.uint8]:
        blocks = random_bits(w.type, n, rng)
        index = blocks["d"].view("<u2") & 255
        for name, table in tables.items():
            if name in fields:
                blocks[name] = table[index]
        return blocks.view(np.uint8)

    return make


# ---- the file ---------------------------------------------------------------------------------------------------


def write(path: str | os.PathLike[str], s: Sizes, seed: int = 0, empty: bool = False, counts: bool = False) -> int:
    """Writes the file; returns its size in bytes.

    ``empty``: weights are zeros, and a hole if the disk allows. ``counts``: the model counts (``counting.py``).
    """
    header = GGUFWriter(path, ARCH)
    add_metadata(header, s)
    return _write(Path(path), header, list(tensors(s)), seed, empty, counts)


def write_shape(
    path: str | os.PathLike[str], s: Shape, quant: str, seed: int = 0, empty: bool = False, counts: bool = False
) -> int:
    """Writes a file of a catalogue's shape, as :func:`write` does. ``quant`` is one of ``hub.mixes.QUANTS``."""
    header = GGUFWriter(path, s.arch)
    header.add_name(f"synthetic {s.arch} shapes, random weights")
    header.add_quantization_version(2)
    for key, value in keys_of(s).items():
        if key != "general.architecture":  # the writer has it
            add_key(header, key, value)
    n_text = s.n_vocab - len(SPECIAL)
    add_vocabulary(header, Sizes(n_vocab=s.n_vocab, n_text=n_text))
    types = types_of(s, quant)
    weights = [Weight(name, types[name], shape) for name, shape in shape_tensors(s)]
    return _write(Path(path), header, weights, seed, empty, counts)


def add_key(w: GGUFWriter, key: str, value: Any) -> None:
    """Adds a key with the type that converters give it."""
    first = value[0] if isinstance(value, list) else value
    kinds = {
        bool: GGUFValueType.BOOL,
        int: GGUFValueType.UINT32,
        float: GGUFValueType.FLOAT32,
        str: GGUFValueType.STRING,
    }
    if isinstance(value, list):
        w.add_array(key, value)
    else:
        w.add_key_value(key, value, kinds[type(first)])


def cut(s: Shape, n_layer: int) -> Shape:
    """Returns the shape with fewer layers, of every kind that it has."""
    short = replace(s, n_layer=n_layer)
    if s.gemma4:
        kept = s.gemma4._replace(period=2, n_shared=n_layer // 2 if s.gemma4.n_shared else 0)
        return replace(short, gemma4=kept)
    return short


def narrow(s: Shape) -> Shape:
    """Returns a hybrid's shape with layers as small as their kernels allow, four of them, and few tokens."""
    assert s.delta
    moe = MoE(8, 2, 256, s.moe.n_shared and 256) if s.moe else None
    small = replace(s, n_layer=4, n_embd=512, n_ff=s.n_ff and 512, n_vocab=1024, n_ctx=1024, moe=moe)
    return replace(small, n_head=4, n_head_kv=2, head_dim=128, delta=Delta(2, 4, 64))


def _write(path: Path, header: GGUFWriter, weights: list[Weight], seed: int, empty: bool, counts: bool) -> int:
    for w in weights:
        nbytes, raw = w.type.nbytes(w.shape), GGMLQuantizationType(w.type.id)
        header.add_tensor_info(w.name, w.shape, np.dtype(np.float32), nbytes, raw)
    header.write_header_to_file()
    header.write_kv_data_to_file()
    header.write_ti_data_to_file()
    header.close()
    n_vocab = next(w.shape[0] for w in weights if w.name == "token_embd.weight") if counts else 0
    with path.open("r+b") as file:
        file.seek(0, os.SEEK_END)
        for w in weights:
            _write_tensor(file, w, seed, empty, n_vocab)
        file.truncate()
        return file.tell()


def _write_tensor(file: BinaryIO, w: Weight, seed: int, empty: bool, n_counting: int) -> None:
    """Writes a tensor. ``n_counting``: tokens of the vocabulary of a model that counts, or 0."""
    file.seek(-(-file.tell() // ALIGNMENT) * ALIGNMENT)
    if empty and w.name != "rope_freqs.weight":  # frequencies are divided by these
        file.seek(w.type.nbytes(w.shape), os.SEEK_CUR)
        return
    begin = file.tell()
    for chunk in chunks(w, seed, bool(n_counting) and counting.is_silent(w.name)):
        file.write(chunk.data)
    if n_counting:
        end = file.tell()
        for at, part in counting.parts(w, n_counting, seed):
            file.seek(begin + at)
            file.write(part.data)
        file.seek(end)


def main() -> None:
    """Writes a file and prints its size."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", type=Path)
    p.add_argument("--layers", type=int, help="how many (default: all; with --tiny 4)")
    p.add_argument("--model", metavar="NAME", help="a model of the catalogue")
    p.add_argument("--quant", metavar="TYPE", help="with --model: the type of the file (default: its usual one)")
    p.add_argument("--draft", action="store_true", help="with a block that drafts after the layers")
    p.add_argument("--counting", action="store_true", help="each token is followed by the next one")
    p.add_argument("--mixed", type=int, default=0, metavar="N", help="q5_K and q6_K experts in the last N layers")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--empty", action="store_true", help="no weights: the header and a hole")
    p.add_argument("--tiny", action="store_true", help="small sizes, for tests")
    args = p.parse_args()
    began, entry = time.perf_counter(), None
    if args.model:
        entry = next((e for e in ENTRIES if e.name == args.model), None) or p.error(f"no model is {args.model}")
    shape = _shape(p, args, entry.shape) if entry else None
    arch = shape.arch if shape else ARCH
    if args.counting and (args.empty or arch not in counting.ARCHS or (shape and shape.tied)):
        p.error(f"--counting takes weights, and a model of {', '.join(counting.ARCHS)} with an LM head of its own")
    rest = args.seed, args.empty, args.counting
    if shape and entry:
        nbytes = write_shape(args.out, shape, args.quant or entry.quants[0], *rest)
    else:
        sizes = TINY if args.tiny else Sizes()
        sizes = replace(sizes, n_layer=args.layers or sizes.n_layer, mixed_layers=args.mixed, n_draft=int(args.draft))
        nbytes = write(args.out, sizes, *rest)
    print(f"{args.out}: {nbytes:,} bytes in {time.perf_counter() - began:.0f} s")


def _shape(p: argparse.ArgumentParser, args: argparse.Namespace, shape: Shape) -> Shape:
    """Returns a model's shape as the options change it."""
    if args.tiny:
        shape = narrow(shape) if shape.delta else p.error("--tiny takes a model with recurrent layers")
    shape = cut(shape, args.layers) if args.layers else shape
    return replace(shape, n_draft=int(args.draft)) if args.layers or args.draft or args.tiny else shape


if __name__ == "__main__":
    main()
