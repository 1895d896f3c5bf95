"""Chat templates of our own, in the conventions of the families, and the answers that they show."""

from __future__ import annotations

from typing import Any, NamedTuple

from zincmetal.text.chat.template import ChatTemplate

from .answers import TOOLS, Read

USER = {"role": "user", "content": "How is it there?"}


class Form(NamedTuple):
    """Template, the format that it must be known by, and the control tokens of its models."""

    name: str
    source: str
    control: tuple[str, ...] = ()


def _template(turn: str, think: str, calls: str, end: str, opening: str = "") -> str:
    """Writes a template. ``@`` stands for a call's function, ``$`` for the text of reasoning."""
    opens = turn.replace("ROLE", "assistant") + opening
    thought = "{% if m.reasoning_content %}" + think.replace("$", "{{ m.reasoning_content }}") + "{% endif %}"
    if opening:
        thought = think.replace("$", "{{ m.reasoning_content or '' }}")
        thought = "{% if m.role == 'assistant' %}" + opening + thought + "{% endif %}"
    return (
        "{% for m in messages %}"
        + turn.replace("ROLE", "{{ m.role }}")
        + (thought if think else "")
        + "{{ m.content or '' }}{% if m.tool_calls %}"
        + calls.replace("@", "c.function")
        + "{% endif %}"
        + end
        + "{% endfor %}{% if add_generation_prompt %}"
        + opens
        + "{% endif %}"
    )


def _each(call: str) -> str:
    return "{% for c in m.tool_calls %}" + call + "{% endfor %}"


def _listed(call: str) -> str:
    return "[" + _each("{% if not loop.first %}, {% endif %}" + call) + "]"


def _parameters(text: str) -> str:
    value = "{{ (v if v is string else v|tojson) }}"
    return (
        "{% for k, v in @.arguments|items %}" + text.replace("KEY", "{{ k }}").replace("VALUE", value) + "{% endfor %}"
    )


_CHATML = "<|im_start|>ROLE\n"
_THINK = "<think>\n$\n</think>\n\n"
_JSON = '{"name": "{{ @.name }}", "arguments": {{ @.arguments|tojson }}}'
_ARGS = "{{ @.arguments|tojson }}"
_DSML = _parameters(
    '<｜DSML｜parameter name="KEY" string="{{ "true" if v is string else "false" }}">VALUE</｜DSML｜parameter>\n'
)
_GEMMA = (
    '{% macro show(v) %}{% if v is string %}<|"|>{{ v }}<|"|>{% elif v is mapping %}{% raw %}{{% endraw %}'
    "{% for k, x in v|items %}{{ ',' if not loop.first }}{{ k }}:{{ show(x) }}{% endfor %}{% raw %}}{% endraw %}"
    "{% elif v is sequence %}[{% for x in v %}{{ ',' if not loop.first }}{{ show(x) }}{% endfor %}]"
    "{% else %}{{ v|tojson }}{% endif %}{% endmacro %}"
)
_PYTHON = (
    "{{ @.name }}({% for k, v in @.arguments|items %}{{ ', ' if not loop.first }}{{ k }}={{ v|tojson }}{% endfor %})"
)
_HARMONY = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% if m.thinking %}<|start|>assistant<|channel|>analysis"
    "<|message|>{{ m.thinking }}<|end|>{% endif %}{% if m.content %}<|start|>assistant<|channel|>commentary<|message|>"
    "{{ m.content }}<|end|>{% endif %}{% for c in m.tool_calls or [] %}<|start|>assistant<|channel|>commentary "
    "to=functions.{{ c.function.name }} <|constrain|>json<|message|>{{ c.function.arguments|tojson }}<|call|>"
    "{% endfor %}"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)


def _mistral(calls: str) -> str:
    return (
        "{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]{% else %}"
        "{% if m.reasoning_content %}[THINK]{{ m.reasoning_content }}[/THINK]{% endif %}{{ m.content or '' }}"
        "{% if m.tool_calls %}" + calls.replace("@", "c.function") + "{% endif %}</s>{% endif %}{% endfor %}"
    )


_LLAMA = _template(
    "<|start_header_id|>ROLE<|end_header_id|>\n\n",
    "",
    _each('{"name": "{{ @.name }}", "parameters": {{ @.arguments|tojson }}}'),
    "<|eot_id|>",
)
_XML = (
    "<tool_call>\n<function={{ @.name }}>\n"
    + _parameters("<parameter=KEY>\nVALUE\n</parameter>\n")
    + "</function>\n</tool_call>"
)
_GLM = (
    "\n<tool_call>{{ @.name }}\n"
    + _parameters("<arg_key>KEY</arg_key>\n<arg_value>VALUE</arg_value>\n")
    + "</tool_call>"
)
_INVOKE = '<invoke name="{{ @.name }}">\n' + _parameters('<parameter name="KEY">VALUE</parameter>\n') + "</invoke>\n"
_SECTION = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")

FORMS = [
    Form("hermes", _template(_CHATML, _THINK, _each(f"\n<tool_call>\n{_JSON}\n</tool_call>"), "<|im_end|>\n")),
    Form(
        "hermes",
        _template(
            _CHATML, "$\n</think>\n\n", _each(f"\n<tool_call>\n{_JSON}\n</tool_call>"), "<|im_end|>\n", "<think>\n"
        ),
        ("<tool_call>", "</tool_call>", "<think>", "</think>", "<|im_start|>", "<|im_end|>"),
    ),
    Form("qwen-xml", _template(_CHATML, _THINK, _each("\n" + _XML), "<|im_end|>\n"), ("<tool_call>", "</tool_call>")),
    Form("qwen-xml", _template(_CHATML, "$\n</think>\n\n", _each("\n" + _XML), "<|im_end|>\n", "<think>\n")),
    Form(
        "smollm3",
        "{# xml_tools python_tools #}"
        + _template(_CHATML, _THINK, _each(f"<tool_call>{_JSON}</tool_call>"), "<|im_end|>\n"),
    ),
    Form("llama", _LLAMA),
    Form(
        "gemma4",
        _GEMMA
        + _template(
            "<|turn>ROLE\n",
            "<|channel>thought\n$<channel|>",
            _each("<|tool_call>call:{{ @.name }}{{ show(@.arguments) }}<tool_call|>"),
            "<turn|>\n",
        ),
        ("<|tool_call>", "<tool_call|>", '<|"|>', "<|channel>", "<channel|>", "<|turn>", "<turn|>"),
    ),
    Form(
        "harmony",
        _HARMONY,
        ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>", "<|constrain|>", "<|return|>"),
    ),
    Form(
        "mistral",
        _mistral(_each(f"[TOOL_CALLS]{{{{ @.name }}}}[ARGS]{_ARGS}")),
        ("[TOOL_CALLS]", "[ARGS]", "[THINK]", "[/THINK]"),
    ),
    Form("mistral-v3", _mistral("[TOOL_CALLS]" + _listed(_JSON)), ("[TOOL_CALLS]",)),
    Form(
        "deepseek",
        _template(
            "<｜ROLE｜>",
            _THINK,
            _SECTION[0]
            + _each("<｜tool▁call▁begin｜>{{ @.name }}<｜tool▁sep｜>" + _ARGS + "<｜tool▁call▁end｜>")
            + _SECTION[1],
            "<｜end▁of▁sentence｜>",
        ),
        (*_SECTION, "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"),
    ),
    Form(
        "deepseek-r1",
        _template(
            "<｜ROLE｜>",
            _THINK,
            _SECTION[0]
            + _each(
                "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{{ @.name }}\n```json\n"
                + _ARGS
                + "\n```<｜tool▁call▁end｜>"
            )
            + _SECTION[1],
            "<｜end▁of▁sentence｜>",
        ),
    ),
    Form(
        "dsml",
        _template(
            "<｜ROLE｜>",
            _THINK,
            "\n\n<｜DSML｜function_calls>\n"
            + _each('<｜DSML｜invoke name="{{ @.name }}">\n' + _DSML + "</｜DSML｜invoke>\n")
            + "</｜DSML｜function_calls>",
            "<｜end▁of▁sentence｜>",
        ),
        ("｜DSML｜",),
    ),
    Form(
        "dsml-v4",
        _template(
            "<｜ROLE｜>",
            _THINK,
            "\n\n<｜DSML｜tool_calls>\n"
            + _each('<｜DSML｜invoke name="{{ @.name }}">\n' + _DSML + "</｜DSML｜invoke>\n")
            + "</｜DSML｜tool_calls>",
            "<｜end▁of▁sentence｜>",
        ),
    ),
    Form("glm", _template("<|ROLE|>\n", _THINK, _each(_GLM), "")),
    Form(
        "glm",
        _template("<|ROLE|>", "$</think>", _each(_GLM.replace("\n", "")), "", "<think>"),
        (
            "<think>",
            "</think>",
            "<tool_call>",
            "</tool_call>",
            "<arg_key>",
            "</arg_key>",
            "<arg_value>",
            "</arg_value>",
        ),
    ),
    Form(
        "lfm2",
        _template(_CHATML, _THINK, "<|tool_call_start|>" + _listed(_PYTHON) + "<|tool_call_end|>", "<|im_end|>\n"),
        ("<|tool_call_start|>", "<|tool_call_end|>"),
    ),
    Form(
        "granite",
        _template(
            "<|start_of_role|>ROLE<|end_of_role|>", _THINK, "<|tool_call|>" + _listed(_JSON), "<|end_of_text|>\n"
        ),
        ("<|tool_call|>",),
    ),
    Form(
        "nemotron",
        _template("<SPECIAL_11>ROLE\n", _THINK, "<TOOLCALL>" + _listed(_JSON) + "</TOOLCALL>", "<SPECIAL_12>\n"),
    ),
    Form(
        "minimax",
        _template("]~b]ROLE\n", _THINK, "\n<minimax:tool_call>\n" + _each(_INVOKE) + "</minimax:tool_call>", "[e~[\n"),
    ),
    Form(
        "kimi",
        _template(
            "<|im_ROLE|>ROLE<|im_middle|>",
            "<think>$</think>",
            "<|tool_calls_section_begin|>"
            + _each(
                "<|tool_call_begin|>functions.{{ @.name }}:{{ loop.index0 }}<|tool_call_argument_begin|>"
                + _ARGS
                + "<|tool_call_end|>"
            )
            + "<|tool_calls_section_end|>",
            "<|im_end|>",
        ),
        ("<|tool_calls_section_begin|>", "<|tool_call_begin|>"),
    ),
    Form(
        "cohere",
        _template(
            "<|START_OF_TURN_TOKEN|>ROLE",
            "<|START_THINKING|>$<|END_THINKING|>",
            "<|START_ACTION|>"
            + _listed(
                '{"tool_call_id": "{{ loop.index0 }}", "tool_name": "{{ @.name }}", '
                '"parameters": {{ @.arguments|tojson }}}'
            )
            + "<|END_ACTION|>",
            "<|END_OF_TURN_TOKEN|>",
        ),
    ),
    Form(
        "apertus",
        _template(
            "<|ROLE_start|>",
            "<|inner_prefix|>$<|inner_suffix|>",
            "<|tools_prefix|>" + _listed('{"{{ @.name }}": ' + _ARGS + "}") + "<|tools_suffix|>",
            "<|ROLE_end|>",
        ),
    ),
]

ENDS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<turn|>",
    "</s>",
    "<｜end▁of▁sentence｜>",
    "<|end_of_text|>",
    "<SPECIAL_12>",
    "[e~[",
    "<|END_OF_TURN_TOKEN|>",
    "<|ROLE_end|>",
    "<|call|>",
)


def rendered(form: Form, answer: Read) -> tuple[str, str]:
    """Renders a prompt, and the answer to it as the model would have to write it, without its end."""
    template = ChatTemplate(form.source)
    calls = [
        {"id": f"call0000{i}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for i, (name, arguments) in enumerate(answer.calls)
    ]
    message: dict[str, Any] = {"role": "assistant", "content": answer.text or None}
    message |= {"tool_calls": calls} if calls else {}
    message |= {"reasoning_content": answer.reasoning} if answer.reasoning else {}
    functions = [{"type": "function", "function": {"name": n, "parameters": s}} for n, s in TOOLS.items()]
    before = template.render([USER], tools=functions)
    after = template.render([USER, message], False, tools=functions)
    assert after.startswith(before)
    text = after[len(before) :]
    for end in ENDS:
        text = text.removesuffix("\n").removesuffix(end)
    return before, text
