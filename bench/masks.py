"""Times grammars and their masks on a real vocabulary: python bench/masks.py [MODEL.gguf] [--answers N]

Answers are drawn at random from what the masks allow. Times are of the processor, so that other work on the machine
counts little: its caches are shared all the same.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from zincmetal import gguf
from zincmetal.api.text import vocabulary
from zincmetal.hub import demo_model
from zincmetal.sampling.constrain.compiler import Compiler
from zincmetal.sampling.constrain.grammar import Grammar
from zincmetal.sampling.constrain.vocabulary import Vocabulary
from zincmetal.text.tokenizer import Tokenizer
from zincmetal.text.tools.format import Wanted, format_of

MOST = 300  # tokens of an answer
TEXT, NUMBER = {"type": "string"}, {"type": "integer"}
READ = {
    "type": "object",
    "properties": {"path": TEXT, "offset": NUMBER, "limit": NUMBER},
    "required": ["path"],
    "additionalProperties": False,
}
LIST = {"type": "array", "items": {"type": "object", "properties": {"name": TEXT, "age": NUMBER}, "required": ["name"]}}
XML_TEMPLATE = "<|im_start|><tool_call><function=f><parameter=p></parameter></function></tool_call>"


def grammars() -> Mapping[str, Grammar]:
    """Grammars of the kinds that servers see."""
    wanted = Wanted({"read": READ, "list": {"type": "object", "properties": {"folder": TEXT}}}, mode="required")
    calls = format_of(XML_TEMPLATE).grammar(wanted, "")
    assert calls is not None
    return {
        "a JSON object": Grammar.of_object(),
        "arguments of a tool": Grammar.of_schema(READ),
        "a list of objects": Grammar.of_schema(LIST),
        "a date": Grammar.of_regex(r"[0-9]{4}-[0-9]{2}-[0-9]{2}"),
        "calls with tags": calls,
    }


def measured(vocab: Vocabulary, compiler: Compiler, grammar: Grammar, answers: int) -> tuple[float, list[float]]:
    """Return the seconds of compiling, and of each mask of some answers."""
    chance, seconds = random.Random(1), list[float]()
    began = time.thread_time()
    compiler.constraint(grammar, 0)
    compiled = time.thread_time() - began
    for _ in range(answers):
        constraint, ids = compiler.constraint(grammar, 0), list[int]()
        while len(ids) < MOST:
            began = time.thread_time()
            words = constraint(ids)
            seconds.append(time.thread_time() - began)
            if words is None:
                break
            allowed = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")[: len(vocab)])
            ids.append(int(chance.choice(allowed)))
            if ids[-1] in vocab.ends:
                break
    return compiled, seconds


def main() -> None:
    """Print a line for each grammar."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--answers", type=int, default=40)
    args = parser.parse_args()
    with gguf.open(args.model or demo_model()) as file:
        tokenizer = Tokenizer.from_metadata(file.metadata)
    began = time.thread_time()
    vocab = vocabulary(tokenizer, tokenizer.vocab_size)
    compiler = Compiler(vocab)
    print(f"{len(vocab):,} tokens; the vocabulary and the compiler take {time.thread_time() - began:.2f} s, once")
    print(f"{'grammar':24} {'compile ms':>10} {'masks':>7} {'median µs':>10} {'p95':>7} {'worst':>8}")
    for name, grammar in grammars().items():
        compiled, seconds = measured(vocab, compiler, grammar, args.answers)
        median, most, worst = (1e6 * float(q) for q in np.quantile(seconds, (0.5, 0.95, 1.0)))
        print(f"{name:24} {1e3 * compiled:10.2f} {len(seconds):7,} {median:10.1f} {most:7.0f} {worst:8.0f}")


if __name__ == "__main__":
    main()
