"""The Python interface: generation, streaming, misuse."""

from __future__ import annotations

import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest

import zincmetal
from support.paths import DATA
from support.reference_models import reference_models
from support.running import running_of, until
from zincmetal.device.buffers import Buffers
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
    """A prompt that extends an earlier one runs only its new tokens, with the same result as without a cache."""
    prompt = list(range(20, 50))
    model.generate(prompt[:20], max_tokens=1)
    before = model.engine.steps.counters["tokens"]
    result = model.generate(prompt, max_tokens=8)
    assert model.engine.steps.counters["tokens"] - before == 10 + len(result.tokens) - 1
    assert (result.cache.reused, result.cache.source, result.cache.why) == (20, "memory", "")
    with zincmetal.load(PATH, device="cpu", context=64, cache=False) as other:
        plain = [other.generate(prompt, max_tokens=8) for _ in range(2)]
    assert [r.tokens for r in plain] == [result.tokens] * 2
    assert [(r.cache.reused, r.cache.why) for r in plain] == [(0, "there is no prefix cache")] * 2


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
    with model.session() as session, pytest.raises(UsageError, match="vocabulary"):
        session.decode(bad)
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


@pytest.mark.parametrize("prompt", [[1.5, 2], b"bytes", None, [1, "a"], {1: 2}, {"a"}, 5, [[1], 2]])
def test_a_prompt_is_text_or_ids(model, prompt):
    with pytest.raises(UsageError, match="a prompt is text or a sequence of token ids"):
        model.generate(prompt)


def test_one_stop_string_need_not_be_a_list(smollm2):
    with zincmetal.load(smollm2, device="cpu", context=64) as m:
        one, listed = (m.generate("Water boils at", max_tokens=12, stop=stop) for stop in ("perfect", ["perfect"]))
    assert one.text == listed.text
    assert one.finish_reason == "stop"
    assert "perfect" not in one.text


def test_closing_ends_a_stream_whose_reader_learns_of_it_and_hides_no_error():
    def fail_while_streaming():
        with zincmetal.load(PATH, device="cpu", context=64) as m:
            m.text.id_tokenizer.eog_ids = frozenset()

            def wait(ids, logits):
                until(lambda: len(ids) == 2 or running_of(m).loop.closed)
                return logits

            streams.append(m.stream_generate([1, 2], max_tokens=60, logits_processors=[wait]))
            next(streams[0])
            raise KeyError("the caller's")

    streams = []
    with pytest.raises(KeyError, match="the caller's"):
        fail_while_streaming()
    with pytest.raises(UsageError, match=r"ended by close\(\)"):
        list(streams[0])
    assert list(streams[0]) == []


def test_a_failed_allocation_leaves_a_model_that_works(model, monkeypatch):
    def fails(buffers, name, nbytes):
        raise DeviceError(f"no memory for {name}")

    with monkeypatch.context() as patched:
        patched.setattr(Buffers, "alloc", fails)
        for call in (lambda: model.plan(512), lambda: model.generate(list(range(1, 50)), max_tokens=2)):
            with pytest.raises(DeviceError, match="no memory for"):
                call()
    assert model.generate(list(range(1, 50)), max_tokens=2).tokens


def test_empty_prompt(model):
    with pytest.raises(UsageError, match="no tokens"):
        model.generate([])


def test_a_session_refuses_what_does_not_fit(model):
    with model.session() as session:
        session.prefill([1] * 64, "none")
        with pytest.raises(ContextFullError, match="64 used"):
            session.decode(1)
        session.rewind(10)
        session.decode(1)
        assert session.length == 11
        with pytest.raises(UsageError, match="rewind"):
            session.rewind(12)
        with pytest.raises(UsageError, match="at least one"):
            session.step([])


def test_closed_model():
    model = zincmetal.load(PATH, device="cpu", context=64)
    model.generate([1], 2)
    model.close()
    model.close()
    calls = (lambda: model.generate([1]), lambda: model.submit([1]), lambda: model.logits([1]), lambda: model.plan(1))
    for call in (*calls, model.reset, model.fork, model.save, lambda: model.prompt_logprobs([1, 2])):
        with pytest.raises(UsageError, match="closed"):
            call()
    with pytest.raises(UsageError, match="closed"), model.session():
        pass


def test_two_threads_at_once(model):
    """A call of a second thread runs beside a stream of the first. Neither changes the other."""
    alone = [model.generate([1, 2, 3], max_tokens=40).tokens, model.generate([7], max_tokens=9).tokens]
    stream = model.stream_generate([1, 2, 3], max_tokens=40)
    got, other = [next(stream).token], []
    thread = threading.Thread(target=lambda: other.extend(model.generate([7], max_tokens=9).tokens))
    thread.start()
    thread.join()
    assert [got + [c.token for c in stream], other] == alone


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
        zincmetal.load(DATA / "qwen3-q4_0.gguf", device="cpu")


def test_import_is_light():
    """NumPy, the compiled core and the tokenizer are imported on first use. So is what extras bring."""
    heavy = [
        "numpy",
        "tokenizers",
        "jinja2",
        "starlette",
        "uvicorn",
        "msgspec",
        "llguidance",
        "huggingface_hub",
        "asyncio",
    ]
    code = f"import sys, zincmetal; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
