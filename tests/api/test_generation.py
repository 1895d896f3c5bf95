"""The Python interface: generation, streaming, misuse."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

import zincmetal
from support.reference_models import reference_models
from zincmetal.errors import ContextFullError, DeviceError, UnsupportedModelError, UsageError
from zincmetal.models import llama
from zincmetal.text.stream import TextStream

PATH = reference_models("llama")[0]


@pytest.fixture
def model():
    with zincmetal.load(PATH, device="cpu", context=64) as m:
        yield m


class Bytes:
    """A tokenizer whose ids are characters."""

    class _Stream:
        def push(self, token):
            return chr(token)

        def finish(self):
            return ""

    def stream(self, continues):
        return self._Stream()


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("hello world", ("wor",), "hello "),
        ("hello world", ("xyz",), "hello world"),
        ("aab", ("ab",), "a"),
        ("ends with wo", ("wor",), "ends with wo"),
        ("one two", ("two", "ne"), "o"),
        ("plain", (), "plain"),
    ],
)
def test_stop_strings(text, stop, expected):
    stream = TextStream(Bytes(), stop)
    out = ""
    for c in text:
        out += stream.push(ord(c))
        if stream.stopped:
            break
    assert out + ("" if stream.stopped else stream.finish()) == expected


def test_generate_is_deterministic_and_stops_at_length(model):
    a = model.generate([5, 6, 7], max_tokens=10)
    b = model.generate([5, 6, 7], max_tokens=10)
    assert a.tokens == b.tokens
    assert len(a.tokens) <= 10
    assert a.finish_reason in ("length", "stop")
    assert a.prompt_tokens == 3


def test_stream_equals_generate(model):
    whole = model.generate([9, 8, 7], max_tokens=12)
    chunks = list(model.stream_generate([9, 8, 7], max_tokens=12))
    assert [c.token for c in chunks] == whole.tokens
    assert "".join(c.text for c in chunks) == whole.text
    assert [c.finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 1)


def test_same_seed_same_text(model):
    options = {"temperature": 1.5, "top_k": 50, "top_p": 0.95, "min_p": 0.001, "repeat_penalty": 1.1}
    runs = [model.generate([1, 2], max_tokens=20, seed=s, **options).tokens for s in (3, 3, 4)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_prompt_reuse_changes_nothing(model):
    """A prompt that extends the last one runs only its new tokens, with the same result."""
    prompt = list(range(20, 50))
    model.generate(prompt[:20], max_tokens=1)
    before = model.engine.steps.counters["tokens"]
    reused = model.generate(prompt, max_tokens=8).tokens
    assert model.engine.steps.counters["tokens"] - before == 10 + len(reused) - 1
    model.reset()
    assert model.generate(prompt, max_tokens=8).tokens == reused


def test_context_fills_up(model):
    result = model.generate(list(range(10, 60)), max_tokens=100)
    assert result.finish_reason in ("length", "stop")
    assert 50 + len(result.tokens) <= 64 + 1
    with pytest.raises(ContextFullError, match="65 tokens and the context 64"):
        model.generate([3] * 65)


def test_logits_need_no_earlier_state(model):
    ids = [4, 5, 6, 7, 8]
    first = model.logits(ids)
    model.generate([100, 200], max_tokens=5)
    assert first.shape == (5, model.config.n_vocab)
    assert first.dtype == np.float32
    assert (model.logits(ids) == first).all()


@pytest.mark.parametrize("bad", [-1, 512, 2**31, 2**40])
def test_a_wrong_id_is_refused(model, bad):
    with pytest.raises(UsageError, match="vocabulary"):
        model.generate([1, bad], max_tokens=1)
    with pytest.raises(UsageError, match="vocabulary"):
        model.engine.core.decode_step(model.engine.steps, model.engine.program(1).compiled, bad)
    assert model.generate([1, 2], max_tokens=2).tokens


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_p": 1.5},
        {"min_p": 2},
        {"top_k": -2},
        {"repeat_penalty": 0},
        {"no_such_option": 1},
        {"seed": -2},
        {"max_tokens": -2},
        {"max_tokens": True},
        {"hide_special": 1},
        {"parse_special": "yes"},
        {"progress": 5},
        {"temprature": 0.5},
        {"max_tokens": 2.5},
        {"stop": [3]},
        {"stop": 5},
    ],
)
def test_bad_sampling_options(model, options):
    with pytest.raises(UsageError, match=next(iter(options))):
        model.generate([1], **options)


@pytest.mark.parametrize("prompt", [[1.5, 2], b"bytes", None, ["a"]])
def test_a_prompt_is_text_or_ids(model, prompt):
    with pytest.raises(UsageError, match="a prompt is text or a sequence of token ids"):
        model.generate(prompt)


def test_one_stop_string_need_not_be_a_list(smollm2):
    with zincmetal.load(smollm2, device="cpu", context=64) as m:
        one, listed = (m.generate("Water boils at", max_tokens=12, stop=stop) for stop in ("perfect", ["perfect"]))
    assert one.text == listed.text
    assert one.finish_reason == "stop"
    assert "perfect" not in one.text


def test_closing_ends_a_stream_and_hides_no_error():
    def fail_while_streaming():
        with zincmetal.load(PATH, device="cpu", context=64) as m:
            streams.append(m.stream_generate([1, 2], max_tokens=9))
            next(streams[0])
            raise KeyError("the caller's")

    streams = []
    with pytest.raises(KeyError, match="the caller's"):
        fail_while_streaming()
    assert list(streams[0]) == []


def test_a_failed_allocation_leaves_a_model_that_works(model):
    with pytest.raises(DeviceError):
        model.plan(10**8)
    assert model.generate(list(range(1, 50)), max_tokens=2).tokens


def test_empty_prompt(model):
    with pytest.raises(UsageError, match="no tokens"):
        model.generate([])


def test_core_refuses_a_full_context(model):
    compiled = model.engine.program(32).compiled
    for _ in range(2):
        model.engine.core.prefill_step(model.engine.steps, compiled, np.ones(32, np.int32))
    with pytest.raises(ContextFullError, match="64 used"):
        model.engine.core.decode_step(model.engine.steps, model.engine.program(1).compiled, 1)
    model.engine.steps.rewind(10)
    model.engine.core.decode_step(model.engine.steps, model.engine.program(1).compiled, 1)
    assert model.engine.steps.length == 11
    with pytest.raises(UsageError, match="rewind"):
        model.engine.steps.rewind(12)


def test_core_refuses_bad_arrays(model):
    compiled = model.engine.program(32).compiled
    for bad in (np.ones(33, np.int32), np.ones((2, 2), np.int32), np.ones(0, np.int32)):
        with pytest.raises(UsageError):
            model.engine.core.prefill_step(model.engine.steps, compiled, bad)
    with pytest.raises(TypeError):
        model.engine.core.prefill_step(model.engine.steps, compiled, np.ones(3, np.float64))


def test_closed_model():
    model = zincmetal.load(PATH, device="cpu", context=64)
    session, plan = model.engine.steps, model.engine.program(1).compiled
    model.close()
    model.close()
    for call in (lambda: model.generate([1]), lambda: model.logits([1]), model.reset, lambda: model.plan(1)):
        with pytest.raises(UsageError, match="closed"):
            call()
    with pytest.raises(UsageError, match="closed"):
        model.engine.core.decode_step(session, plan, 1)


def test_two_threads_at_once(model):
    """The second thread is refused; the first is not disturbed."""
    expected = model.generate([1, 2, 3], max_tokens=40).tokens
    stream = model.stream_generate([1, 2, 3], max_tokens=40)
    got = [next(stream).token]
    errors: list[BaseException] = []

    def intrude():
        try:
            model.generate([7], max_tokens=1)
        except UsageError as error:
            errors.append(error)

    thread = threading.Thread(target=intrude)
    thread.start()
    thread.join()
    assert "in use" in str(errors[0])
    assert got + [c.token for c in stream] == expected


def test_two_threads_in_the_core(model):
    """decode_step itself refuses a second thread."""
    compiled, plan = model.engine.program(32).compiled, model.engine.program(1).compiled
    refused, deadline = [], time.monotonic() + 30

    def work():
        while not refused and time.monotonic() < deadline:
            try:
                model.engine.core.prefill_step(model.engine.steps, compiled, np.ones(30, np.int32))
                model.engine.steps.rewind(0)
            except UsageError as error:
                refused.append(str(error))
            except ContextFullError:
                pass

    threads = [threading.Thread(target=work) for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert refused
    assert all("another thread" in r or "rewind" in r for r in refused)
    model.engine.steps.rewind(0)
    assert model.engine.core.decode_step(model.engine.steps, plan, 1) >= 0


def test_abandoned_stream_frees_the_model(model):
    stream = model.stream_generate([1, 2, 3], max_tokens=20)
    next(stream)
    stream.close()
    assert model.generate([1, 2, 3], max_tokens=2).tokens


@pytest.mark.parametrize(
    "options",
    [{"kv": "f8"}, {"context": 0}, {"context": 2.5}, {"device": "abacus"}, {"threads": -1}, {"threads": 10**6}],
)
def test_bad_load_options(options):
    with pytest.raises(UsageError):
        zincmetal.load(PATH, **{"device": "cpu", **options})


def test_a_device_of_the_environment_is_named_with_its_variable(monkeypatch):
    monkeypatch.setenv("ZINCMETAL_DEVICE", "abacus")
    with pytest.raises(UsageError, match=r"^ZINCMETAL_DEVICE=abacus: no device is called 'abacus'"):
        zincmetal.load(PATH)
    with pytest.raises(UsageError, match=r"^no device is called 'quipu'"):
        zincmetal.load(PATH, device="quipu")


def test_opening_a_device_logs_what_it_is(caplog):
    with caplog.at_level("INFO", logger="zincmetal"):
        zincmetal.load(PATH, device="cpu", threads=2).close()
    (line,) = [r.getMessage() for r in caplog.records if r.name == "zincmetal.device"]
    assert line.startswith("cpu: CPU (")
    assert "2 threads" in line
    assert "GB" in line


def test_unknown_architecture(monkeypatch):
    from zincmetal import models as arch

    monkeypatch.delitem(arch.FAMILIES, "llama")
    with pytest.raises(UnsupportedModelError, match=r"'llama' is not supported; supported: .*qwen3"):
        zincmetal.load(PATH, device="cpu")


def test_tensors_without_a_use_are_refused(monkeypatch):
    """A model with a tensor that its architecture does not compute, such as a bias, must not run."""
    from zincmetal import models as arch

    without_norms = replace(arch.get("qwen3"), build=lambda g: llama.build(g, rope="neox"))
    monkeypatch.setitem(arch.FAMILIES, "qwen3", without_norms)
    with pytest.raises(UnsupportedModelError, match=r"no use for 4 tensors .*blk.0.attn_k_norm.weight"):
        zincmetal.load(reference_models("qwen3")[0], device="cpu")


def test_import_is_light():
    """NumPy, the compiled core and the tokenizer are imported on first use."""
    code = "import sys, zincmetal; print([m for m in ('numpy', 'tokenizers', 'jinja2') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
