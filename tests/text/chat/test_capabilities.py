"""What a template shows, found by trial: for templates in the style of families, and for single traits."""

from __future__ import annotations

import json
from typing import Any

import pytest

from support.template_styles import STYLES
from zincmetal.errors import ChatTemplateError
from zincmetal.text.chat import capabilities, template
from zincmetal.text.chat.capabilities import Capabilities, thinking_variables
from zincmetal.text.chat.template import CHATML, ChatTemplate

EACH = "{%% for m in messages %%}%s;{%% endfor %%}{{ tools }}"
CALLS = "{% for c in m.tool_calls or [] %}{{ c }}{% endfor %}"


SHAPES = ("system", "system_anywhere", "users", "user_after_result", "tools", "calls", "parallel", "text_beside_calls",
          "text_before_calls")  # fmt: skip


def found(source: str, **named: str) -> Capabilities:
    return Capabilities.of(ChatTemplate(source, "<s>", "</s>", named=named))


def lacking(can: Capabilities) -> set[str]:
    """Returns the shapes of messages that are not shown."""
    return {name for name in SHAPES if not can.data()[name]}


@pytest.mark.parametrize(
    ("style", "lacks", "has", "preserving", "efforts"),
    [
        ("qwen2.5", "", "stable stable_in_loop", {}, {}),
        ("qwen3", "", "reasoning_in_loop stable_in_loop", {}, {}),
        ("qwen3.5", "system_anywhere", "reasoning_in_loop stable_in_loop", {}, {}),
        ("qwen3.6", "system_anywhere", "reasoning_in_loop stable stable_in_loop", {"preserve_thinking": True}, {}),
        ("llama3", "parallel text_beside_calls", "dated stable stable_in_loop", {}, {}),
        ("glm", "", "reasoning_in_loop stable stable_in_loop", {"clear_thinking": False}, {}),
        (
            "gpt-oss",
            "system_anywhere parallel text_beside_calls",
            "reasoning_in_loop dated stable_in_loop",
            {},
            {"reasoning_effort": ("low", "medium", "high")},
        ),
        (
            "mistral",
            "system_anywhere users user_after_result text_before_calls",
            "short_ids stable stable_in_loop",
            {},
            {},
        ),
        ("deepseek", "system_anywhere", "stable stable_in_loop", {}, {}),
        ("kimi", "", "named_ids reasoning_in_loop stable_in_loop", {}, {}),
    ],
)
def test_styles(style: str, lacks: str, has: str, preserving: dict[str, Any], efforts: dict[str, Any]) -> None:
    can = found(STYLES[style].source)
    assert lacking(can) == set(lacks.split())
    had = {name for name, value in can.data().items() if value is True and name not in SHAPES}
    assert had == set(has.split())
    assert (can.preserving, can.efforts) == (preserving, efforts)


def test_a_template_for_two_roles_lacks_most() -> None:
    can = found(STYLES["gemma"].source)
    assert can.system
    assert {"tools", "calls", "users", "system_anywhere"} <= lacking(can)


@pytest.mark.parametrize(
    ("each", "name", "value"),
    [
        ("{{ m.role }}{{ m.content }}", "system", True),
        ("{% if m.role != 'system' %}{{ m.content }}{% endif %}", "system", False),
        ("{{ m.content if m.role != 'system' or loop.last else '' }}", "system", False),
        ("{{ m.content if m.role != 'system' or loop.first else '' }}", "system_anywhere", False),
        ("{{ m.content if loop.last or messages[loop.index].role != m.role else '' }}", "users", False),
        ("{{ m.content }}" + CALLS, "calls", True),
        ("{{ m.content }}", "calls", False),
        ("{{ m.content }}{{ m.tool_calls[0] if m.tool_calls else '' }}", "parallel", False),
        ("{% if m.tool_calls %}" + CALLS + "{% else %}{{ m.content }}{% endif %}", "text_beside_calls", False),
        ("{{ m.content }}" + CALLS + "{{ m.reasoning_content }}", "reasoning_in_loop", False),  # behind the call
        ("{{ m.reasoning_content }}{{ m.content }}" + CALLS, "reasoning_kept", True),
        ("{{ m.content }}{{ strftime_now('%H') }}", "dated", False),  # the hour is the same
        ("{{ m.content }}{{ strftime_now('%j') }}", "dated", True),
    ],
)
def test_single_traits(each: str, name: str, value: bool) -> None:
    assert found(EACH % each).data()[name] is value


def test_rules_that_move_to_the_last_question_are_not_shown_in_their_place() -> None:
    source = (
        "{% for m in messages %}{% if m.role != 'system' %}"
        "{{ messages[0].content if loop.last and messages[0].role == 'system' else '' }}{{ m.content }}"
        "{% endif %}{% endfor %}"
    )
    assert not found(source).system


def test_answers_that_need_reasoning() -> None:
    source = EACH % (
        "{% if m.role == 'assistant' and m.reasoning_content is not defined %}{{ raise_exception('no') }}{% endif %}"
        "{{ m.reasoning_content or '' }}{{ m.content }}" + CALLS
    )
    can = found(source)
    assert can.answers_need_reasoning
    assert lacking(can) == set()


def test_the_template_for_tools_is_asked_about_tools() -> None:
    assert not found(CHATML).tools
    assert found(CHATML, tool_use=EACH % ("{{ m.content }}" + CALLS)).tools


def test_another_name_for_tools() -> None:
    source = "{% for t in xml_tools or [] %}{{ t }}{% endfor %}" + CHATML
    assert found(source).tools
    tool = {"type": "function", "function": {"name": "look"}}
    made = ChatTemplate(source)
    assert "look" in made.render([{"role": "user", "content": "hi"}], tools=[tool])
    assert "tools" in made.variables


def test_a_template_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    source = CHATML + "{# once #}"
    can = found(source)
    monkeypatch.setattr(template, "_ask", None)
    assert found(source) is can


def test_few_templates_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    known: dict[Any, Capabilities] = {}
    monkeypatch.setattr(capabilities, "_known", known)
    monkeypatch.setattr(capabilities, "MOST_KNOWN", 2)
    for source in ("a", "b", "c"):
        found(source)
    assert [key[0] for key in known] == ["b", "c"]


def test_a_wrong_template_is_an_error() -> None:
    with pytest.raises(ChatTemplateError):
        found("{% for %}")


def test_a_template_that_refuses_all_shows_nothing() -> None:
    can = found("{{ raise_exception('no') }}")
    assert not any((can.system, can.users, can.calls, can.tools))


def test_the_trials_warn_of_nothing(caplog: pytest.LogCaptureFixture) -> None:
    found(CHATML + "{# quiet #}")
    assert not caplog.records


def test_capabilities_are_data() -> None:
    for style in STYLES.values():
        data = found(style.source).data()
        assert json.loads(json.dumps(data)) == {k: json.loads(json.dumps(v)) for k, v in data.items()}


# ---- reasoning -----------------------------------------------------------------------------------------------------

SWITCH = "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
OTHERS = {
    "switch": CHATML + SWITCH,
    "modes": CHATML + "{% if thinking_mode == 'disabled' %}no{% elif thinking_mode == 'enabled' %}yes{% endif %}",
    "options": CHATML + "{{ 'detailed thinking ' + thinking_option }}",
    "budget": CHATML + "{% if thinking_budget == 0 %}none{% endif %}",
    "any effort": CHATML + "Reasoning: {{ reasoning_effort }}",
    "named efforts": CHATML
    + "{% if reasoning_effort not in ['no_think', 'low', 'high'] %}{{ raise_exception('no') }}{% endif %}"
    "{{ reasoning_effort }}",
    "both": CHATML + SWITCH + "{% if thinking_effort == 'max' %}hard{% elif thinking_effort == 'high' %}so{% endif %}",
    "read, but of no use": CHATML + "{% set x = enable_thinking %}",
    "none": CHATML,
}


@pytest.mark.parametrize(
    ("source", "effort", "enabled", "wanted"),
    [
        ("switch", "", None, {}),
        ("switch", "none", None, {"enable_thinking": False}),
        ("switch", "low", None, {"enable_thinking": True}),
        ("switch", "high", False, {"enable_thinking": False}),
        ("switch", "", True, {"enable_thinking": True}),
        ("modes", "none", None, {"thinking_mode": "disabled"}),
        ("modes", "medium", None, {"thinking_mode": "enabled"}),
        ("options", "", False, {"thinking_option": "off"}),
        ("budget", "none", None, {"thinking_budget": 0}),
        ("any effort", "high", None, {"reasoning_effort": "high"}),
        ("any effort", "minimal", None, {"reasoning_effort": "low"}),
        ("any effort", "max", None, {"reasoning_effort": "high"}),
        ("any effort", "none", None, {"reasoning_effort": "low"}),  # the least there is
        ("any effort", "", True, {}),
        ("any effort", "odd", None, {}),
        ("named efforts", "none", None, {"reasoning_effort": "no_think"}),
        ("named efforts", "medium", None, {"reasoning_effort": "high"}),
        ("named efforts", "minimal", None, {"reasoning_effort": "low"}),
        ("named efforts", "high", False, {"reasoning_effort": "no_think"}),
        ("both", "low", None, {"enable_thinking": True, "thinking_effort": "high"}),
        ("both", "none", None, {"enable_thinking": False}),
        ("read, but of no use", "none", None, {}),
        ("none", "high", None, {}),
    ],
)
def test_what_clients_say_of_reasoning(source: str, effort: str, enabled: bool | None, wanted: dict[str, Any]) -> None:
    assert thinking_variables(found(OTHERS[source]), effort, enabled) == wanted


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("preserve_thinking", True),
        ("preserved_thinking", True),
        ("keep_past_thinking", True),
        ("clear_thinking", False),
        ("truncate_history_thinking", False),
        ("drop_thinking", False),
    ],
)
def test_variables_that_keep_reasoning(variable: str, value: bool) -> None:
    shown = variable if value else f"{variable} is defined and not {variable}"
    source = EACH % (f"{{% if {shown} %}}{{{{ m.reasoning_content }}}}{{% endif %}}{{{{ m.content }}}}" + CALLS)
    assert found(source).preserving == {variable: value}
    kept = EACH % ("{{ m.reasoning_content }}{{ m.content }}" + CALLS + f"{{% set x = {variable} %}}")
    assert found(kept).preserving == {}
