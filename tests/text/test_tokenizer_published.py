"""Ids of published vocabularies: the test cases that llama.cpp keeps beside them.

``ZINCMETAL_TEST_VOCABULARIES`` names a folder with files ``NAME.gguf``, ``NAME.gguf.inp`` (texts) and ``NAME.gguf.out``
(their ids), such as ``models`` of llama.cpp's source. Without the folder there is nothing to test.
"""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import pytest

from zincmetal import gguf
from zincmetal.text.tokenizer import Tokenizer

FOLDER = Path(os.environ.get("ZINCMETAL_TEST_VOCABULARIES", os.devnull))
FILES = [path for path in sorted(FOLDER.glob("*.gguf")) if path.with_name(f"{path.name}.out").exists()]
BETWEEN = "\n__ggml_vocab_test__\n"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_ids_are_the_published_ones(path: Path) -> None:
    with gguf.open(path) as file:
        if file.metadata["tokenizer.ggml.model"] not in ("gpt2", "llama", "gemma4"):
            pytest.skip("a kind of vocabulary that no generative model has")
        tokenizer = Tokenizer.from_metadata(file.metadata)
        composes = file.metadata.get("tokenizer.ggml.pre") in ("qwen2", "qwen35", "mpt", "command-r")
    texts = path.with_name(f"{path.name}.inp").read_bytes().decode().split(BETWEEN)
    rows = path.with_name(f"{path.name}.out").read_text().splitlines()
    assert len(rows) > 40
    for text, row in zip(texts, rows, strict=False):  # the last text is empty, and has no row
        if composes and not unicodedata.is_normalized("NFC", text):
            continue  # llama.cpp does not compose characters, as the original tokenizers of these do
        expected = [int(i) for i in row.split()]
        assert tokenizer.encode(text, add_bos=False, add_eos=False) == expected, text
