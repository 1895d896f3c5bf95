"""What the calls that generate take, and what ended a text."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import zincmetal
from conftest import DATA, reference_models
from zincmetal.budget import budget
from zincmetal.door import typed_errors
from zincmetal.errors import DeviceError, FileChangedError, OutOfMemoryError, UsageError
from zincmetal.generation import SAMPLING, SamplingOptions

PATH = reference_models("llama")[0]
PROMPT = [5, 6, 7]
CASES = DATA / "cases"


@pytest.fixture
def model() -> Iterator[Any]:
    with zincmetal.load(PATH, device="cpu", context=64) as m:
        yield m


def test_keywords_are_the_fields_of_sampling() -> None:
    assert set(SamplingOptions.__annotations__) == set(SAMPLING)


def test_no_token_is_made_of_none(model: Any) -> None:
    result = model.generate(PROMPT, max_tokens=0)
    assert (result.tokens, result.text, result.finish_reason, result.prompt_tokens) == ([], "", "length", 3)
    assert list(model.stream_generate(PROMPT, 0)) == []
    assert model._sequence == PROMPT


def test_without_a_limit_the_context_is_filled(model: Any) -> None:
    model.id_tokenizer.eog_ids = frozenset()
    assert len(model.generate(PROMPT, max_tokens=-1).tokens) == 64 - 3 + 1


def test_numpy_integers_and_none_are_taken(model: Any) -> None:
    want = model.generate(PROMPT, max_tokens=3).tokens
    assert model.generate(np.array(PROMPT), np.int64(3), stop=None, progress=None, temperature=None).tokens == want
    assert len(model.generate(PROMPT, None).tokens) <= 62
    with zincmetal.load(PATH, device="cpu", context=np.int64(32), kv=None, threads=None) as other:
        assert other.config.n_ctx == 32
    with pytest.raises(UsageError, match="context must be an integer"):
        zincmetal.load(PATH, device="cpu", context=True)


def test_the_end_token_is_in_the_result(model: Any) -> None:
    tokens = model.generate(PROMPT, max_tokens=10).tokens
    model.id_tokenizer.eog_ids = frozenset([tokens[3]])
    at = tokens.index(tokens[3])
    result = model.generate(PROMPT, max_tokens=10)
    assert (result.finish_reason, result.stop_token, result.stop_string) == ("stop", tokens[at], None)
    last = list(model.stream_generate(PROMPT, max_tokens=10))[-1]
    assert (last.stop_token, last.stop_string) == (tokens[at], None)


def test_the_stop_string_is_in_the_result(smollm2: Path) -> None:
    with zincmetal.load(smollm2, device="cpu", context=64) as m:
        result = m.generate("Water boils at", max_tokens=12, stop=["never", "perfect"])
        assert (result.stop_token, result.stop_string) == (None, "perfect")
        assert m.generate("Water boils at", max_tokens=2).stop_string is None
        ids = m.tokenize("<|im_start|>user\n", parse_special=True)
        assert m.logits("a b").shape[0] == len(m.tokenize("a b"))
        m.generate("<|im_start|>user\n", max_tokens=0, parse_special=True)
        assert m._sequence == ids


def test_a_misspelt_option_is_named(model: Any, smollm2: Path) -> None:
    with pytest.raises(UsageError, match="'temprature' is no option of it; did you mean temperature"):
        model.generate(PROMPT, temprature=0.5)
    with zincmetal.load(smollm2, device="cpu", context=64) as m:
        hello = [{"role": "user", "content": "hi"}]
        for wrong in ("temprature", "enable_thinking"):
            with pytest.raises(UsageError, match=f"'{wrong}' is neither an option nor a variable"):
                m.chat(hello, 1, **{wrong: 1})
        assert m.chat(hello, 1, add_generation_prompt=False, tools=None).prompt_tokens


def test_a_file_that_changes_is_told(tmp_path: Path) -> None:
    path = Path(shutil.copy(PATH, tmp_path / "model.gguf"))
    with zincmetal.load(path, device="cpu", context=64) as m:
        assert m.generate(PROMPT, max_tokens=2).tokens
        os.utime(path, ns=(1, 1))
        with pytest.raises(FileChangedError, match="has been changed since it was loaded"):
            m.generate(PROMPT)


def test_a_file_that_is_replaced_is_not_changed(tmp_path: Path) -> None:
    path = Path(shutil.copy(PATH, tmp_path / "model.gguf"))
    with zincmetal.load(path, device="cpu", context=64) as m:
        os.replace(shutil.copy(PATH, tmp_path / "other"), path)
        assert m.generate(PROMPT, max_tokens=2).tokens


@pytest.mark.parametrize(
    "error", [MemoryError(), SystemError("returned NULL"), OSError(12, "no"), Exception("bad_alloc")]
)
def test_where_memory_ends_the_error_is_typed(error: Exception) -> None:
    with pytest.raises(OutOfMemoryError, match="the host's memory has ended"), typed_errors:
        raise error


@pytest.mark.parametrize(
    "error", [KeyError("k"), ValueError("v"), Exception("e"), OSError(2, "no"), KeyboardInterrupt()]
)
def test_other_errors_pass(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, typed_errors:
        raise error
    assert caught.value is error


def test_a_budget_sees_what_else_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ZINCMETAL_MEMORY_LIMIT", raising=False)
    assert budget({"working_set_bytes": 100, "allocated_bytes": 30}) == 70
    assert budget({"working_set_bytes": 100}) == 100


@pytest.mark.parametrize("module", ["gguf", "plan"])
def test_a_report_without_a_reader_ends_quietly(module: str) -> None:
    command = [sys.executable, "-m", f"zincmetal.{module}", str(PATH)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.close()
        errors = child.stderr.read()
    assert (child.returncode, errors) == (0, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("module", ["gguf", "plan"])
def test_a_full_disk_is_said_in_a_line(module: str) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", f"zincmetal.{module}", str(PATH)]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "No space left" in done.stderr


def test_a_key_beyond_half_names_the_remedy() -> None:
    path = CASES / "key-beyond-f16.gguf"
    with zincmetal.load(path, device="cpu", kv="f32") as m:
        assert np.isfinite(m.logits([1, 2])).all()
    with zincmetal.load(path, device="cpu", kv="f16") as m:
        for call in (
            lambda: m.generate([1, 2], 3),
            lambda: m.generate([1, 2], 3, temperature=1),
            lambda: m.logits([1]),
        ):
            with pytest.raises(
                DeviceError, match="layer 0 are beyond the range of kv='f16': load the model with kv='f32'"
            ):
                call()


def test_chat_has_the_begin_token_that_its_template_leaves_out() -> None:
    seen: list[list[int]] = []
    with zincmetal.load(CASES / "template-without-bos.gguf", device="cpu") as m:
        m.chat(
            [{"role": "user", "content": "hi"}], 1, logits_processors=[lambda ids, x: (seen.append(list(ids)), x)[1]]
        )
        assert seen[0].count(m.tokenizer.bos_id) == 1
        assert seen[0][0] == m.tokenizer.bos_id


def test_a_template_keyword_reaches_the_template() -> None:
    hello = [{"role": "user", "content": "hi"}]
    with zincmetal.load(CASES / "thinking-switch.gguf", device="cpu") as m:
        for on in (True, False):
            m.chat(hello, 0, enable_thinking=on)
            assert m.detokenize(m._sequence).endswith("</think>\n\n") == (not on)
