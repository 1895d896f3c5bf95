"""The examples of docs/tools.md run, and what it says of schemas is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import zincmetal
from support import text_model
from zincmetal.api.tools import MAX_ROUNDS
from zincmetal.sampling.constrain import schema

PAGE = (Path(__file__).parents[2] / "docs" / "tools.md").read_text("utf-8")
FORMS, TOOLS = (re.findall(r"^```python\n(.*?)^```", part, re.M | re.S) for part in PAGE.split("\n## Tools\n"))
TEMPLATE = (
    "{%- if tools %}<tool_call>{{ tools | tojson }}</tool_call>{% endif %}"
    "{%- for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def run(example: str, model: zincmetal.Model) -> None:
    exec(compile(example, "docs/tools.md", "exec", dont_inherit=True), {"m": model})


@pytest.mark.parametrize("number", range(len(FORMS)))
def test_the_examples_of_forms_run(number, smollm2):
    with zincmetal.load(smollm2, device="cpu", context=512) as model:
        run(FORMS[number], model)


@pytest.mark.parametrize("number", range(len(TOOLS)))
def test_the_examples_of_tools_run(number, tmp_path):
    """The demo model's template reads no tools: a model of random weights takes its place."""
    path = text_model.save(tmp_path / "m.gguf", template=TEMPLATE, general={"llama.context_length": 4096})
    with zincmetal.load(path, device="cpu", context=4096) as model:
        run(TOOLS[number], model)


def test_there_are_examples():
    assert (len(FORMS), len(TOOLS)) == (2, 2)


def test_every_keyword_and_format_of_the_page_is_followed_and_the_others_are_named():
    table = PAGE.split("## What schemas may say")[1].split("\n## ")[0]
    followed = {*schema.PLAIN, *schema.ONE, *schema.MANY, "properties", "patternProperties"}
    rows = "\n".join(line for line in table.splitlines() if line.startswith("|"))
    assert followed - {"$id", "$anchor", "additionalItems"} == set(re.findall(r"`([\w$]+)`", rows)) - {"propertyNames"}
    assert set(re.findall(r"format`: (.*?) \|", rows)[0].split(", ")) == schema.FORMATS
    refused = re.findall(r"`(\w+)`", table.split("are refused: ")[1].split(".")[0])
    assert set(refused) <= set(schema.UNSUPPORTED)


def test_the_bounds_of_the_page():
    assert f"at most {schema.MAX_BYTES // 10**6} MB, {schema.MAX_DEPTH} schemas" in PAGE
    assert f"{schema.MAX_PROPERTIES:,} properties" in PAGE
    assert f"`max_rounds` ({MAX_ROUNDS})" in PAGE
