"""Cases from bug reports and robustness tests that need a whole model or a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import zincmetal
from support.naming import case_name
from support.text_model import END, HELLO, START, save
from support.tiny_dense import Tiny
from support.vocab_builder import CONTROL, LETTERS, NORMAL, USER_DEFINED, letters
from zincmetal.errors import ChatTemplateError, TokenizerError, UsageError
from zincmetal.text.chat.template import CHATML

PROMPT = [5, 6, 7]
GEMMA = (
    "{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def bytes_of(text: str) -> list[int]:
    """Returns the ids of the text's bytes, none of them merged."""
    return [LETTERS.index(c) for c in letters(text)]


@pytest.fixture
def model(tmp_path: Path) -> Iterator[Any]:
    with zincmetal.load(save(tmp_path / "m.gguf", template=CHATML), device="cpu") as m:
        yield m


# ---- tokens around a text -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [CONTROL, USER_DEFINED, NORMAL])
def test_turn_tokens_of_any_type_are_one_token_and_end_a_turn(kind: int, tmp_path: Path) -> None:
    path = save(tmp_path / "m.gguf", {"<start_of_turn>": kind, "<end_of_turn>": kind}, GEMMA)
    with zincmetal.load(path, device="cpu") as m:
        m.chat(HELLO, 0)
        start, end = 257, 258
        assert m.last == [
            start,
            *bytes_of("user\nhi"),
            end,
            *bytes_of("\n"),
            start,
            *bytes_of("model\n"),
        ]
        result = m.generate("hi", 3, logit_bias={end: 1e4})
        assert (result.finish_reason, result.text, result.stop_token) == ("stop", "", end)


def test_a_prompt_that_a_template_would_make_is_read_on_request(tmp_path: Path) -> None:
    prompt = "<|im_start|>user\nhi<|im_end|>\n"
    with zincmetal.load(save(tmp_path / "m.gguf"), device="cpu") as m:
        with pytest.raises(ChatTemplateError, match=r"parse_special=True \(--special in a shell\)"):
            m.chat(HELLO)
        m.generate(prompt, 0, parse_special=True)
        assert m.last == [START, *bytes_of("user\nhi"), END, *bytes_of("\n")]
        m.generate(prompt, 0)
        assert START not in m.last


def test_an_end_token_that_the_file_does_not_have_is_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with zincmetal.load(save(tmp_path / "m.gguf", {}, eos_token_id=257), device="cpu") as m:
        assert m.generate([2, 256], 3).finish_reason == m.generate("he", 3).finish_reason == "length"
        assert m.logits([2, 256]).shape == (2, 257)
    assert sum("eos_token_id is 257" in r.getMessage() for r in caplog.records) == 1


def test_a_seed_gives_the_same_text_with_and_without_its_prompt_computed(model: Any) -> None:
    prompt = "once upon a time there was"
    for options in ({}, {"top_p": 0.9}, {"repeat_penalty": 1.1, "top_k": 40}):
        for seed in range(3):
            model.reset()
            texts = {model.generate(prompt, 30, temperature=1.5, seed=seed, **options).text for _ in range(3)}
            assert len(texts) == 1


# ---- arguments ------------------------------------------------------------------------------------------------


class Raises:
    def __index__(self) -> int:
        raise RuntimeError("no")


HUGE = 10**400
WRONG: dict[str, list[Any]] = {
    "max_tokens": [True, -2, 1.0, "3", HUGE * -1, Raises(), 10**5000 * -1],
    "stop": [5, [5], b"x"],
    "temperature": [HUGE, -1, True, np.array([0.5]), "1", float("nan")],
    "top_p": [HUGE, 1.1, Decimal("NaN")],
    "top_k": [HUGE, -2, 1.5, Raises()],
    "min_p": [-0.1, HUGE],
    "repeat_penalty": [HUGE, 0],
    "presence_penalty": [HUGE],
    "frequency_penalty": [HUGE],
    "logit_bias": [{0: HUGE}, {0.5: 1}, 5, {HUGE: 1}],
    "seed": [-2, 10**5000 * -1, Raises(), True],
    "progress": [5],
    "logits_processors": [5, [5]],
    "hide_special": [1, "x"],
    "parse_special": [1],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, vs in WRONG.items() for v in vs], ids=case_name)
def test_a_wrong_option_is_refused_before_anything_runs(model: Any, name: str, value: Any) -> None:
    model.reset()
    for call in (model.generate, model.stream_generate):
        with pytest.raises(UsageError, match=name) as caught:
            call(PROMPT, **{name: value})
        assert len(str(caught.value)) < 300
    assert model.last == []


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": Fraction(1, 2), "top_p": Decimal("0.5"), "min_p": Fraction(1, 9)},
        {"temperature": np.float32(1), "top_k": np.int64(5), "seed": np.array(3)},
        {"stop": None, "temperature": None, "seed": None, "progress": None, "parse_special": None},
        {"max_tokens": np.int64(3), "seed": -1, "temperature": 1, "top_p": 0},
    ],
    ids=range(4),
)
def test_numbers_of_any_kind_are_taken(model: Any, options: dict[str, Any]) -> None:
    assert 0 < len(model.generate(PROMPT, **({"max_tokens": 3} | options)).tokens) <= 3


OTHER_CALLS: dict[str, Callable[[Any], Any]] = {
    "ids of 5,000 digits": lambda m: m.generate([10**5000]),
    "an id that raises": lambda m: m.generate([Raises()]),
    "bytes": lambda m: m.tokenize(b"a"),
    "no text": lambda m: m.tokenize(None),
    "no ids": lambda m: m.detokenize(None),
    "nothing saved": lambda m: m.restore(None),
    "rows in digits": lambda m: m.plan("1"),
    "no path": lambda m: zincmetal.load(None),  # type: ignore[arg-type]
    "a path of bytes": lambda m: zincmetal.load(b"/tmp/x"),  # type: ignore[arg-type]
    "a list of devices": lambda m: zincmetal.load(m.file.path, device=["cpu"]),  # type: ignore[arg-type]
    "messages of none": lambda m: m.chat(None),
    "tools of none": lambda m: m.chat(HELLO, tools=5),
    "a list of documents": lambda m: m.chat(HELLO, documents=["x"]),
    "no flag": lambda m: m.chat(HELLO, continue_final_message=1),
}


@pytest.mark.parametrize("name", OTHER_CALLS)
def test_a_wrong_argument_is_a_usage_error(model: Any, name: str) -> None:
    with pytest.raises(UsageError):
        OTHER_CALLS[name](model)


# ---- processes ------------------------------------------------------------------------------------------------


def run(*args: Any, module: str = "generate", **options: Any) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", f"zincmetal.{module}", *map(str, args)]
    return subprocess.run(command, capture_output=True, timeout=300, **options)


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii", "utf-16"])
def test_json_of_any_text_in_any_encoding(encoding: str, tmp_path: Path) -> None:
    path = save(tmp_path / "m.gguf", {"\U0001f600": USER_DEFINED})
    env = {**os.environ, "PYTHONIOENCODING": encoding}
    done = run("-m", path, "-p", "the", "-n", "1", "--json", "--logit-bias", "257:99", env=env)
    assert json.loads(done.stdout.decode(encoding))["text"] == "\U0001f600"


@pytest.mark.parametrize("closed", ["2", "1"])
def test_a_stream_that_was_closed_before_the_start(closed: str, tmp_path: Path) -> None:
    path = save(tmp_path / "m.gguf")
    shell = f'"$0" -m zincmetal.generate -m "$1" -p the -n 2 --logit-bias 258:-inf --logit-bias 65:99 {closed}>&-'
    done = subprocess.run(["sh", "-c", shell, sys.executable, path], capture_output=True, timeout=300)
    assert done.returncode == 0
    assert b"Traceback" not in done.stderr
    assert bool(done.stdout) == (closed == "2")


CHANGED = """
import os, sys, zincmetal
path = sys.argv[1]
model = zincmetal.load(path, device="cpu")
model.generate([5, 6, 7], 2)
if sys.argv[2] == "cut":
    os.truncate(path, int(sys.argv[3]))
else:
    with open(path, "r+b") as file:
        file.seek(4096)
        file.write(bytes(os.path.getsize(path) - 4096))
for call in (lambda: model.generate([5, 6, 7, 8], 2), lambda: model.logits([5, 6]), lambda: model.generate("x", 2)):
    try:
        call()
    except zincmetal.FileChangedError as error:
        print(path in str(error), "load" in str(error) and "again" in str(error))
model.close()
"""


@pytest.mark.parametrize(("how", "size"), [("cut", 0), ("cut", 4096), ("zeros", 0)])
def test_a_file_that_changes_while_it_is_used_is_a_typed_error(how: str, size: int, tmp_path: Path) -> None:
    path = save(tmp_path / "m.gguf")
    command = [sys.executable, "-c", CHANGED, path, how, str(size)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "True True\n" * 3), done.stderr


def test_a_first_text_while_the_model_closes(tmp_path: Path) -> None:
    path, seen = save(tmp_path / "m.gguf"), set()
    for _ in range(20):
        m = zincmetal.load(path, device="cpu", context=32)

        def work(m: Any = m) -> None:
            try:
                seen.add(type(m.tokenize("hello")))
            except Exception as error:
                seen.add(type(error))

        thread = threading.Thread(target=work)
        thread.start()
        m.close()
        thread.join()
    assert seen <= {list, UsageError}


# ---- files ----------------------------------------------------------------------------------------------------


UNUSABLE = [{"model": None}, {"model": "unheard-of"}, {"merges": ["x"]}, {"pre": "unheard-of"}, {"tokens": None}]


@pytest.mark.parametrize("keys", UNUSABLE, ids=case_name)
def test_ids_run_without_a_tokenizer_that_can_be_used(keys: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    if "tokens" in keys:
        Tiny("llama", n_vocab=259, keys={"tokenizer.ggml.eos_token_id": END}).save(path)
    else:
        save(path, eos_token_id=END, **keys)
    with zincmetal.load(path, device="cpu") as m:
        result = m.generate(PROMPT, 4, logit_bias={9: 1e4})
        assert (result.tokens, result.finish_reason) == ([9] * 4, "length")
        chunks = list(m.stream_generate(PROMPT, 4, temperature=1, logit_bias={9: 1e4}, stop="x"))
        assert [c.token for c in chunks] == result.tokens
        ended = m.generate(PROMPT, 4, logit_bias={END: 1e4})
        assert (ended.text, ended.tokens, ended.finish_reason, ended.stop_token) == ("", [END], "stop", END)
        with pytest.raises(TokenizerError):
            m.generate("text")


def test_ids_run_without_any_key_of_a_tokenizer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with zincmetal.load(Tiny("llama").save(tmp_path / "m.gguf"), device="cpu", context=32) as m:
        for options in ({}, {"temperature": 1.0}, {"hide_special": True, "stop": ["x"]}):
            result = m.generate(PROMPT, -1, **options)
            assert (len(result.tokens), result.text, result.stop_token) == (32 - 3 + 1, "", None)
        assert "".join(c.text for c in m.stream_generate(PROMPT, 5)) == ""
        for call in (lambda: m.generate("text"), lambda: m.chat(HELLO), lambda: m.tokenize("text")):
            with pytest.raises(TokenizerError):
                call()
    assert sum("runs on token ids only" in r.getMessage() for r in caplog.records) == 1
