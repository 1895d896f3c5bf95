"""The calls that generate: their arguments, and the reasons why a text ended."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import zincmetal
from support.paths import DATA
from support.reference_models import reference_models
from support.text_model import END, HELLO, START, save
from zincmetal.api import model as api
from zincmetal.api.drafting import OPTIONS
from zincmetal.api.generation import SAMPLING, Asked, GenerateOptions, SamplingOptions, request_of
from zincmetal.api.text import CHAT_OPTIONS
from zincmetal.cli import inspect as printer
from zincmetal.device import backend
from zincmetal.errors import DeviceError, FileChangedError, OutOfMemoryError, UsageError, typed_errors
from zincmetal.plan.estimate import device_budget
from zincmetal.plan.target import Target
from zincmetal.sampling.params import SamplingParams
from zincmetal.text.chat.template import CHATML
from zincmetal.text.tokenizer import Tokenizer

PATH = reference_models("llama")[0]
PROMPT = [5, 6, 7]
CASES = DATA / "cases"


@pytest.fixture
def model() -> Iterator[Any]:
    with zincmetal.load(PATH, device="cpu", context=64) as m:
        yield m


def test_keywords_are_the_fields_of_sampling() -> None:
    assert set(SamplingOptions.__annotations__) == set(SAMPLING)


def test_keywords_that_are_passed_on_are_those_of_submit() -> None:
    named = {
        name for name, p in inspect.signature(zincmetal.Model.submit).parameters.items() if p.kind == p.KEYWORD_ONLY
    }
    assert set(GenerateOptions.__annotations__) == named | set(SAMPLING) | set(OPTIONS)
    of_chat = {
        name
        for name, p in inspect.signature(zincmetal.Model.submit_chat).parameters.items()
        if p.kind not in (p.VAR_KEYWORD, p.POSITIONAL_ONLY)
    }
    assert {"self", "messages", *CHAT_OPTIONS} == of_chat


def test_no_token_is_made_of_none(model: Any) -> None:
    result = model.generate(PROMPT, max_tokens=0)
    assert (result.tokens, result.text, result.finish_reason, result.prompt_tokens) == ([], "", "length", 3)
    assert list(model.stream_generate(PROMPT, 0)) == []
    assert model.last == PROMPT


def test_without_a_limit_the_context_is_filled(model: Any) -> None:
    model.text.id_tokenizer.eog_ids = frozenset()
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
    model.text.id_tokenizer.eog_ids = frozenset([tokens[3]])
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
        assert m.last == ids


def test_a_misspelt_option_is_named(model: Any, smollm2: Path) -> None:
    for call in (model.generate, model.stream_generate, model.submit):
        with pytest.raises(UsageError, match="'temprature' is no option of it; did you mean temperature"):
            call(PROMPT, temprature=0.5)
        with pytest.raises(UsageError, match="'dedline' is no option of it; did you mean deadline"):
            call(PROMPT, dedline=5)
    with zincmetal.load(smollm2, device="cpu", context=64) as m:
        hello = [{"role": "user", "content": "hi"}]
        for wrong in ("temprature", "enable_thinking"):
            with pytest.raises(UsageError, match=f"'{wrong}' is neither an option nor a variable"):
                m.chat(hello, 1, **{wrong: 1})
        assert m.chat(hello, 1, add_generation_prompt=False, tools=None).prompt_tokens


@pytest.mark.parametrize("name", ["add_generation_prompt", "continue_final_message"])
def test_a_wrong_flag_of_a_chat_is_told_before_a_missing_template(model: Any, name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} must be True or False, not 1"):
        model.chat(HELLO, 1, **{name: 1})


def test_two_models_build_their_tokenizers_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    second_is_built = threading.Event()

    def build(cls: type, metadata: Any) -> Tokenizer:
        if threading.current_thread() is first:
            assert second_is_built.wait(30), "the second model waits for the first"
        return Tokenizer.for_ids(metadata)

    monkeypatch.setattr(Tokenizer, "from_metadata", classmethod(build))
    with zincmetal.load(PATH, device="cpu", context=64) as a, zincmetal.load(PATH, device="cpu", context=64) as b:
        built: list[Tokenizer] = []
        first = threading.Thread(target=lambda: built.append(a.tokenizer))
        first.start()
        other = threading.Thread(target=lambda: (built.append(b.tokenizer), second_is_built.set()))
        other.start()
        first.join()
        other.join()
        assert built == [b.tokenizer, a.tokenizer]


def test_no_memory_for_the_modules_that_are_imported_at_first_use(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*names: str) -> None:
        raise MemoryError

    monkeypatch.setattr(zincmetal, "import_module", fails)
    with pytest.raises(OutOfMemoryError, match="no memory to import"):
        zincmetal.__getattr__("load")


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
    with pytest.raises(OutOfMemoryError, match="the host is out of memory"), typed_errors:
        raise error


def test_a_memoryview_without_memory_is_told() -> None:
    with pytest.raises(OutOfMemoryError, match="the host is out of memory"), typed_errors:
        raise BufferError("Error getting buffer") from OutOfMemoryError("the process has no memory left")


@pytest.mark.parametrize(
    "error",
    [KeyError("k"), ValueError("v"), Exception("e"), OSError(2, "no"), BufferError("b"), KeyboardInterrupt()],
)
def test_other_errors_pass(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, typed_errors:
        raise error
    assert caught.value is error


def test_a_budget_sees_what_else_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ZINCMETAL_MEMORY_LIMIT", raising=False)
    core = backend.load("cpu")
    info = core.Device(threads=1).info
    info["working_set_bytes"] = 100
    for allocated, free in ((0, 100), (30, 70), (200, 0)):
        info["allocated_bytes"] = allocated
        assert device_budget(Target.of(core, info).free_bytes) == free


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
    with zincmetal.load(CASES / "thinking-switch.gguf", device="cpu") as m:
        for on in (True, False):
            m.chat(HELLO, 0, enable_thinking=on)
            assert m.detokenize(m.last).endswith("</think>\n\n") == (not on)


SHOWS_ALL = "{{ tools | tojson }}{{ documents | tojson }}{{ messages[-1].content }}{{ '|' if add_generation_prompt }}"


@contextmanager
def text_model(path: Path, **keys: Any) -> Iterator[Any]:
    """Loads a model with a chat template."""
    with zincmetal.load(save(path / "m.gguf", **keys), device="cpu") as m:
        yield m


def asked(m: Any, messages: list[dict[str, str]] = HELLO, **options: Any) -> str:
    """Returns the prompt that a chat runs, by chat and by stream_chat."""
    m.chat(messages, 0, **options)
    text: str = m.detokenize(m.last)
    list(m.stream_chat(messages, 0, **options))
    assert m.detokenize(m.last) == text
    return text


def test_what_a_chat_is_asked_for_reaches_the_template(tmp_path: Path) -> None:
    tool, document = {"type": "function", "function": {"name": "f"}}, {"title": "a"}
    with text_model(tmp_path, template=SHOWS_ALL) as m:
        assert asked(m) == "nullnullhi|"
        assert asked(m, tools=[tool], documents=[document]) == f"{json.dumps([tool])}{json.dumps([document])}hi|"
        assert asked(m, tools=None, add_generation_prompt=False) == "nullnullhi"
        assert asked(m, add_generation_prompt=None, continue_final_message=None) == "nullnullhi|"


def test_a_named_template_has_the_tools(tmp_path: Path) -> None:
    named = {"general": {"tokenizer.chat_template.tool_use": "with {{ tools | length }}"}}
    with text_model(tmp_path, template="without", **named) as m:
        assert (asked(m), asked(m, tools=[{"a": 1}])) == ("without", "with 1")


def test_tools_that_no_template_reads_are_refused(tmp_path: Path) -> None:
    with text_model(tmp_path, template=CHATML) as m:
        assert asked(m, tools=[], documents=None) == asked(m)
        for name in ("tools", "documents"):
            with pytest.raises(UsageError, match=f"does not read {name}"):
                m.chat(HELLO, **{name: [{"a": 1}]})
        with pytest.raises(UsageError, match="did you mean documents"):
            m.chat(HELLO, document=[{"a": 1}])


def test_the_last_answer_is_continued(tmp_path: Path) -> None:
    with text_model(tmp_path, template=CHATML) as m:
        begun = [*HELLO, {"role": "assistant", "content": "So"}]
        assert asked(m, begun, continue_final_message=True) == asked(m) + "So"
        with pytest.raises(UsageError, match="continue_final_message: the last message has the role 'user'"):
            m.chat(HELLO, continue_final_message=True)


SAMPLED = {"general": {"general.sampling.temp": 0.75, "general.sampling.top_k": 5}}


def test_a_chat_is_sampled_as_the_file_says_unless_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[SamplingParams] = []

    def noted(asked: Asked, *rest: Any) -> Any:
        used.append(asked.params)
        return request_of(asked, *rest)

    monkeypatch.setattr(api, "request_of", noted)
    with text_model(tmp_path, template=CHATML, **SAMPLED) as m:
        assert m.chat_sampling == {"temperature": 0.75, "top_k": 5}
        for options in ({}, {"seed": 1}, {"logit_bias": {1: 1.0}}, {"temperature": None}):
            m.chat(HELLO, 1, **options)
            assert (used[-1].temperature, used[-1].top_k) == (0.75, 5)
        for options in ({"temperature": 0}, {"top_p": 1.0}, {"min_p": 0.1}, {"repeat_penalty": 1.1}):
            m.chat(HELLO, 1, **options)
            assert (used[-1].temperature, used[-1].top_k) == (0, 0)
        m.generate("hi", 1)
        assert used[-1].greedy


def test_a_chat_is_sampled_as_the_family_is(tmp_path: Path) -> None:
    with text_model(tmp_path, template=CHATML, general={"general.name": "Llama 3.2 1B Instruct"}) as m:
        assert m.chat_sampling == {"temperature": 0.6, "top_p": 0.9}
    with text_model(tmp_path, template=CHATML) as m:
        assert m.chat_sampling == {}


def test_what_a_file_asks_for_in_vain_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with text_model(tmp_path, template=CHATML, general={"general.sampling.mirostat": 2}) as m:
        for _ in range(3):
            m.chat(HELLO, 1)
    assert sum("general.sampling.mirostat" in r.getMessage() for r in caplog.records) == 1


def test_suppressed_tokens_are_never_drawn(tmp_path: Path) -> None:
    options = ({}, {"temperature": 1.0, "seed": 1}, {"logit_bias": {9: 1e4, 10: 1e3}}, {"repeat_penalty": 1.1})
    with text_model(tmp_path) as m:
        best = m.generate(PROMPT, 1).tokens[0]
        assert m.generate(PROMPT, 1, logit_bias={9: 1e4, 10: 1e3}).tokens == [9]
        allowed = {
            n: m.generate(PROMPT, 1, logit_bias={best: -np.inf, 9: -np.inf}, **o).tokens
            for n, o in enumerate(options[:2])
        }
    with text_model(tmp_path, suppress_tokens=[best, 9]) as m:
        made = [m.generate(PROMPT, 1, **o).tokens for o in options]
        assert made[:3] == [allowed[0], allowed[1], [10]]
        for o in options:
            assert not {best, 9} & set(m.generate(PROMPT, 40, **o).tokens)


@pytest.mark.parametrize(
    ("keys", "begin", "end"),
    [
        ({"bos_token_id": START, "eos_token_id": END, "add_bos_token": True}, "257 '<|im_start|>'", "258 '<|im_end|>'"),
        ({"bos_token_id": START}, "257 '<|im_start|>', not added to a prompt", "258 '<|im_end|>'"),
        ({"special": {}}, "none", "none"),
    ],
)
def test_the_printer_says_what_stands_around_a_text(
    keys: Any, begin: str, end: str, tmp_path: Path, capsys: Any
) -> None:
    assert printer.main([str(save(tmp_path / "m.gguf", **keys))]) == 0
    assert capsys.readouterr().out.split("\ntext\n")[1].splitlines() == [
        f"  begin token: {begin}",
        f"  end tokens: {end}",
    ]


def test_the_printer_says_how_a_chat_is_sampled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for general, said in ((SAMPLED["general"], "temperature 0.75, top_k 5"), ({}, "greedy")):
        assert printer.main([str(save(tmp_path / "m.gguf", template=CHATML, general=general))]) == 0
        assert capsys.readouterr().out.endswith(f"\n  sampling of chat without options: {said}\n")
    assert printer.main([str(save(tmp_path / "m.gguf", pre="unheard-of"))]) == 0
    assert "\ntext\n  only token ids: tokenizer.ggml.pre" in capsys.readouterr().out
