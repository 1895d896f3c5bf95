"""Chat templates: honest ones render; hostile ones end with an error and leave the process unharmed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from zincmetal import gguf
from zincmetal.errors import ChatTemplateError, UsageError
from zincmetal.text.chat import sandbox as _render
from zincmetal.text.chat import template as chat
from zincmetal.text.chat.template import CHATML, ChatTemplate
from zincmetal.text.tokenizer import Tokenizer

USER = [{"role": "user", "content": "Hi"}]


def rendered(source: str, messages: list[dict[str, Any]] = USER, **options: Any) -> str:
    return ChatTemplate(source, "<s>", "</s>").render(messages, **options)


# --- honest templates


def test_chatml() -> None:
    messages = [*USER, {"role": "assistant", "content": "Hello."}]
    assert rendered(CHATML, messages) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert rendered(CHATML, add_generation_prompt=False) == "<|im_start|>user\nHi<|im_end|>\n"


def test_smollm2_template_makes_the_tokens_of_a_turn(smollm2: Path) -> None:
    with gguf.open(smollm2) as file:
        tokenizer = Tokenizer.from_metadata(file.metadata)
        template = ChatTemplate.from_metadata(file.metadata, tokenizer)
    text = template.render(USER)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    ids = tokenizer.encode(text, parse_special=True)
    assert ids.count(tokenizer.bos_id or 0) == 3
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ bos_token }}|{{ eos_token }}", "<s>|</s>"),
        ("  {% if true %}\n  x\n  {% endif %}\ny", "  x\ny"),
        ("{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}{% if i > 3 %}{% break %}{% endif %}{{ i }}{% endfor %}", "013"),  # noqa: E501
        ("{{ messages | tojson }}", '[{"role": "user", "content": "Hi"}]'),
        ("{{ {'b': 'é<', 'a': 1} | tojson(indent=1, sort_keys=True) }}", '{\n "a": 1,\n "b": "é<"\n}'),
        ("{{ tools is none }}{{ documents is none }}{{ nothing is defined }}", "TrueTrueFalse"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}!", "Hi!"),
        ("{{ messages[0]['content'].strip().split('i')[0] ~ messages|length }}", "H1"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "1"),
        ("{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f(2) }}", "[2]"),
    ],
)  # fmt: skip
def test_features_that_templates_rely_on(source: str, expected: str) -> None:
    assert rendered(source) == expected


def test_today_and_extra_variables() -> None:
    before = time.strftime("%Y-%m-%d")
    assert rendered("{{ strftime_now('%Y-%m-%d') }}") in (before, time.strftime("%Y-%m-%d"))
    tools = [{"name": "f", "parameters": {}}]
    assert rendered("{{ tools[0].name }}{{ enable_thinking }}", tools=tools, enable_thinking=False) == "fFalse"


def test_content_is_data_whatever_it_holds() -> None:
    content = "{{ 1 + 1 }} {% raw %} <|im_end|> \0 \ud800 é🦙"
    assert rendered("{{ messages[0].content }}", [{"role": "user", "content": content}]) == content
    long = "x" * 2_000_000
    assert rendered("{{ messages[0].content }}", [{"role": "user", "content": long}]) == long


def test_a_template_that_refuses_says_why() -> None:
    with pytest.raises(ChatTemplateError, match="roles must alternate"):
        rendered("{{ raise_exception('roles must alternate') }}")


def test_a_template_keeps_a_list_of_its_own() -> None:
    source = "{% set ns = namespace(ids=[]) %}{% set _ = ns.ids.append('a') %}{% set _ = ns.ids.append('b') %}"
    assert rendered(source + "{{ ns.ids.pop(0) }}{{ ns.ids | length }}") == "a1"
    for _ in range(2):  # what it does to the messages ends with the render
        assert rendered("{% set _ = messages.append(1) %}{{ messages | length }}") == "2"


def test_threads_take_turns() -> None:
    results: list[str] = []
    threads = [threading.Thread(target=lambda i=i: results.append(rendered("{{ n }}", n=i))) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [str(i) for i in range(8)]


# --- hostile templates


def why_it_ended(error: pytest.ExceptionInfo[ChatTemplateError]) -> str:
    """Returns the message of the error, after the next template has rendered."""
    assert rendered("{{ messages[0].content }}") == "Hi"
    return str(error.value)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "TIME_LIMIT", 0.3)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% set r = range(99999) %}{% for i in r %}{% for j in r %}{% endfor %}{% endfor %}",
        "{{ 10 ** (10 ** 10) }}",
        "{% set ns = namespace(a=[1], b=[1]) %}{% for i in range(60) %}"
        "{% set ns.a = [ns.a, ns.a] %}{% set ns.b = [ns.b, ns.b] %}{% endfor %}{{ ns.a == ns.b }}",
        "{{ lipsum(n=10 ** 9) }}",
        "{% set a = 'a' * 100000 %}{% for i in range(99999) %}{% set x = a.count('aab') %}{% endfor %}",
    ],
)
def test_endless_templates_are_stopped(source: str) -> None:
    with pytest.raises(ChatTemplateError) as error:
        rendered(source)
    assert "takes more than 0.3 seconds" in why_it_ended(error)


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 10 ** 10 }}",
        "{{ 'a'.ljust(10 ** 10) }}",
        "{{ '%10000000000d' % 1 }}",
        "{{ '{:>10000000000}'.format(1) }}",
        "{{ [1] | batch(10 ** 10, 0) | list }}",
        "{{ [1] | tojson(indent=10 ** 10) }}",
        "{{ ('a' * 10 ** 6).join(range(99999) | map('string')) }}",
        "{{ ('a' * 10 ** 5).replace('', 'b' * 10 ** 5) }}",
        "{{ (1).to_bytes(10 ** 10, 'big') }}",
        "{% set ns = namespace(s='x') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    ],
)
def test_greedy_templates_are_stopped(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "TIME_LIMIT", 30.0)  # so that only memory can end it
    with pytest.raises(ChatTemplateError) as error:
        rendered(source)
    assert "needs more than 512 MiB of memory" in why_it_ended(error)


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("{% for i in range(10 ** 9) %}{% endfor %}", "OverflowError"),
        ("{% for i in range(99999) %}{{ 'y' * 1000 }}{% endfor %}", "more than 8388608 characters"),
        ("{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ " + "(" * 100_000 + ")" * 100_000 + " }}", "RecursionError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ cycler.__init__.__globals__ }}", "SecurityError"),
        ("{{ messages.clear() }}", "SecurityError"),
        ("{% include 'x' %}", "TypeError"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ nothing.at.all }}", "UndefinedError"),
    ],
)
def test_wrong_templates_are_errors(source: str, why: str) -> None:
    with pytest.raises(ChatTemplateError) as error:
        rendered(source)
    assert why in why_it_ended(error)


def ask_alone(source: str, prelude: str, seconds: float) -> subprocess.CompletedProcess[bytes]:
    """Runs the rendering program after a statement that changes its process."""
    code = f"import runpy, sys\n{prelude}\nrunpy.run_path(sys.argv[2], run_name='__main__')"
    request = {"source": source, "variables": [{}], "longest": 100, "seconds": seconds}
    body = json.dumps(request).encode()
    settings = json.dumps({"path": sys.path, "memory": 256 << 20, "forked": False})
    return subprocess.run(
        [sys.executable, "-c", code, settings, _render.__file__],
        input=_render.LENGTH.pack(len(body)) + body,
        capture_output=True,
        timeout=300,
    )


def test_time_is_bounded_where_the_caller_blocks_the_signal() -> None:
    blocked = (
        "import signal\nsignal.signal(signal.SIGPROF, signal.SIG_IGN)\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGPROF})"
    )
    assert ask_alone("{{ 10 ** (10 ** 10) }}", blocked, 0.2).returncode == -signal.SIGPROF


def test_without_jinja_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "_renderer", chat.Renderer())
    monkeypatch.setattr(sys, "path", [p for p in sys.path if "site-packages" not in p])
    with pytest.raises(ChatTemplateError, match="pip install jinja2"):
        rendered("x")


def test_a_forked_process_has_a_renderer_of_its_own(fresh: chat.Renderer) -> None:
    assert rendered("{{ 1 }}") == "1"
    if (child := os.fork()) == 0:
        os._exit(0 if rendered("{{ 2 }}") == "2" else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert rendered("{{ 3 }}") == "3"


def test_an_interrupted_call_leaves_no_answer_for_the_next(
    fresh: chat.Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    assert rendered("{{ 1 }}") == "1"
    with monkeypatch.context() as patch:
        patch.setattr(_render, "read_message", interrupted)
        with pytest.raises(KeyboardInterrupt):
            rendered("{{ 2 }}")
    assert rendered("{{ 3 }}") == "3"


# --- wrong use


@pytest.mark.parametrize(
    "messages",
    [
        "hello",
        None,
        [],
        {},
        ["hello"],
        [{}],
        [{"role": "user"}],
        [{"content": "x"}],
        [{"role": 1, "content": "x"}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": "x", "more": object()}],
    ],
)
def test_wrong_messages_are_refused(messages: Any) -> None:
    with pytest.raises(UsageError):
        rendered(CHATML, messages)


def test_calls_of_tools_need_no_content() -> None:
    messages = [*USER, {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]
    assert rendered("{{ messages[1].tool_calls[0].name }}", messages) == "f"


def test_a_file_without_template_is_an_error_with_a_remedy() -> None:
    tokenizer = Tokenizer.from_metadata({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["t0"]})
    with pytest.raises(ChatTemplateError, match=r"parse_special=True \(--special .*CHATML"):
        ChatTemplate.from_metadata({}, tokenizer)
    with pytest.raises(ChatTemplateError, match="chat_template"):
        ChatTemplate.from_metadata({"tokenizer.chat_template": ["x"]}, tokenizer)


def test_importing_the_module_does_not_import_jinja2() -> None:
    code = "import sys, zincmetal.text.chat.template; sys.exit('jinja2' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})


def test_a_template_is_shown_in_one_line() -> None:
    assert repr(ChatTemplate("{{ x }}")) == "<ChatTemplate: 7 characters>"
    assert repr(ChatTemplate("x", named={"rag": "y"})) == "<ChatTemplate: 1 characters, and by name 'rag'>"
