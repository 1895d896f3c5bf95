"""Chat templates in the styles of well-known families: their marks, their refusals, and what they leave out.

All are written here, in a few lines each. With each comes what a model of that family writes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Style:
    """Template, its control tokens, and the texts of its models.

    ``thought`` and ``called`` write reasoning and a call, with %-signs for their texts. ``opened``: the prompt has the
    beginning of ``thought`` already. ``ends``: the tokens after a call and after an answer.
    """

    source: str
    special: tuple[str, ...]
    ends: tuple[str, str]
    thought: str = "%s"
    opened: str = ""
    said: str = "%s"
    called: str = ""
    arguments: str = "json"

    def call(self, thought: str, name: str, arguments: Mapping[str, Any]) -> str:
        """What a model writes that calls a tool."""
        if self.arguments == "tags":
            written = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in arguments.items())
        elif self.arguments == "keys":
            written = "".join(f"<arg_key>{k}</arg_key>\n<arg_value>{v}</arg_value>\n" for k, v in arguments.items())
        else:
            written = json.dumps(arguments, separators=(",", ":"))  # no template writes it so
        return self._thought(thought) + self.called % (name, written)

    def answer(self, thought: str, text: str) -> str:
        """What a model writes that answers."""
        return self._thought(thought) + self.said % text

    def _thought(self, thought: str) -> str:
        return (self.thought % thought).removeprefix(self.opened) if self.thinks else ""

    @property
    def thinks(self) -> bool:
        return self.thought != "%s"


_TOOLS = "{% if tools %}<tools>{% for t in tools %}{{ t | tojson }}\n{% endfor %}</tools>{% endif %}"
_CHATML_TURNS = ("<|im_start|>", "<|im_end|>")
_ASKED = (  # the place of the last question, which is no result of a tool
    "{% set ns = namespace(asked=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.asked = loop.index0 %}"
    "{% endif %}{% endfor %}"
)
_REASONING = "{% set why = m.reasoning_content | default('', true) %}"
_HERMES_CALLS = (
    "{% for c in m.tool_calls or [] %}\n<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}'
)
_XML_CALLS = (
    "{% for c in m.tool_calls or [] %}{{ '\n\n' if m.content and loop.first else '' }}<tool_call>\n"
    "<function={{ c.function.name }}>\n{% for k, v in c.function.arguments.items() %}<parameter={{ k }}>\n"
    "{{ v if v is string else v | tojson }}\n</parameter>\n{% endfor %}</function>\n</tool_call>{% endfor %}"
)
_RESULT = "<|im_start|>user\n<tool_response>\n{{ m.content }}\n</tool_response><|im_end|>\n"


def _chatml(system: str, reasoning: str, calls: str, opening: str, head: str = "") -> str:
    return (
        head
        + "<|im_start|>system\n{% if messages[0].role == 'system' %}{{ messages[0].content }}\n{% endif %}"
        + _TOOLS + "<|im_end|>\n{% for m in messages %}{% if m.role == 'system' and not loop.first %}" + system
        + "{% elif m.role == 'user' %}<|im_start|>user\n{{ m.content }}<|im_end|>\n{% elif m.role == 'tool' %}"
        + _RESULT + "{% elif m.role == 'assistant' %}<|im_start|>assistant\n" + reasoning
        + "{{ m.content or '' }}" + calls + "<|im_end|>\n{% endif %}{% endfor %}"
        + "{% if add_generation_prompt %}<|im_start|>assistant\n" + opening + "{% endif %}"
    )  # fmt: skip


_SHOWN = "<|im_start|>system\n{{ m.content }}<|im_end|>\n"
_REFUSED = "{{ raise_exception('a system message must be the first') }}"
_IN_LOOP = "{% if why and loop.index0 > ns.asked %}<think>\n{{ why | trim }}\n</think>\n\n{% endif %}"
_ALWAYS_OPEN = "{% if loop.index0 > ns.asked %}<think>\n{{ why | trim }}\n</think>\n\n{% endif %}"
_KEPT_OPEN = "{% if preserve_thinking or loop.index0 > ns.asked %}<think>\n{{ why | trim }}\n</think>\n\n{% endif %}"
_OFF = "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
_OPENED = (
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% else %}<think>\n{% endif %}"
)
_HERMES_CALL = '\n<tool_call>\n{"name": "%s", "arguments": %s}\n</tool_call>'
_XML_CALL = "<tool_call>\n<function=%s>\n%s</function>\n</tool_call>"
_THINK = "<think>\n%s\n</think>\n\n"
_CHATML_ENDS = ("<|im_end|>", "<|im_end|>")

_LLAMA = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday Date: "
    "{{ date_string if date_string is defined else strftime_now('%d %b %Y') }}\n\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}" + _TOOLS + "<|eot_id|>"
    "{% for m in messages %}{% if m.role == 'assistant' and m.tool_calls %}"
    "{% if m.tool_calls | length != 1 %}{{ raise_exception('one call only') }}{% endif %}"
    "{% set f = m.tool_calls[0].function %}<|start_header_id|>assistant<|end_header_id|>\n\n"
    '{"name": "{{ f.name }}", "parameters": {{ f.arguments | tojson }}}<|eot_id|>'
    "{% elif m.role == 'tool' %}<|start_header_id|>ipython<|end_header_id|>\n\n{{ m.content | tojson }}<|eot_id|>"
    "{% elif m.role != 'system' or not loop.first %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
_GEMMA = (
    "<bos>{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}"
    "{% set said = messages[1:] %}{% else %}{% set first = '' %}{% set said = messages %}{% endif %}"
    "{% for m in said %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ first if loop.first else '' }}"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
_GLM = (
    "[gMASK]<sop>{% if tools %}<|system|>\n" + _TOOLS + "{% endif %}" + _ASKED + "{% for m in messages %}"
    "{% if m.role == 'user' %}<|user|>\n{{ m.content }}{% elif m.role == 'system' %}<|system|>\n{{ m.content }}"
    "{% elif m.role == 'tool' %}{% if messages[loop.index0 - 1].role != 'tool' %}<|observation|>{% endif %}\n"
    "<tool_response>\n{{ m.content }}\n</tool_response>{% else %}<|assistant|>" + _REASONING +
    "{% if why and ((clear_thinking is defined and not clear_thinking) or loop.index0 > ns.asked) %}\n"
    "<think>{{ why | trim }}</think>{% else %}\n<think></think>{% endif %}"
    "{% if m.content %}\n{{ m.content | trim }}{% endif %}{% for c in m.tool_calls or [] %}\n"
    "<tool_call>{{ c.function.name }}\n{% for k, v in c.function.arguments.items() %}"
    "<arg_key>{{ k }}</arg_key>\n<arg_value>{{ v if v is string else v | tojson }}</arg_value>\n{% endfor %}"
    "</tool_call>{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)  # fmt: skip
_HARMONY = (
    "<|start|>system<|message|>Today: {{ strftime_now('%Y-%m-%d') }}\nReasoning: "
    "{{ reasoning_effort if reasoning_effort is defined else 'medium' }}<|end|>"
    "{% set rules = messages[0].content if messages[0].role in ('system', 'developer') else '' %}"
    "{% if rules or tools %}<|start|>developer<|message|>{{ rules }}" + _TOOLS + "<|end|>{% endif %}" + _ASKED +
    "{% for m in messages %}{% if m.role == 'user' %}<|start|>user<|message|>{{ m.content }}<|end|>"
    "{% elif m.role == 'tool' %}<|start|>functions.{{ m.name }} to=assistant<|channel|>commentary<|message|>"
    "{{ m.content }}<|end|>{% elif m.role == 'assistant' %}" + _REASONING +
    "{% if m.tool_calls %}{% if why and loop.index0 > ns.asked %}<|start|>assistant<|channel|>analysis<|message|>"
    "{{ why }}<|end|>{% endif %}<|start|>assistant to=functions.{{ m.tool_calls[0].function.name }}"
    "<|channel|>commentary json<|message|>{{ m.tool_calls[0].function.arguments | tojson }}<|call|>"
    "{% else %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|end|>{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)  # fmt: skip
_MISTRAL = (
    "<s>{% set ns = namespace(users=0) %}{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]"
    "{% endif %}{% for m in messages %}{% if m.role in ('user', 'assistant') and not m.tool_calls %}"
    "{% if (m.role == 'user') != (ns.users % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% set ns.users = ns.users + 1 %}{% endif %}{% if m.role == 'system' %}{% if loop.first %}"
    "[SYSTEM_PROMPT]{{ m.content }}[/SYSTEM_PROMPT]{% else %}{{ raise_exception('no') }}{% endif %}"
    "{% elif m.role == 'user' %}[INST]{{ m.content }}[/INST]{% elif m.role == 'tool' %}"
    "{% if m.tool_call_id | length != 9 %}{{ raise_exception('ids have 9 characters') }}{% endif %}"
    "[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]{% elif m.tool_calls %}{{ m.content or '' }}"
    "{% for c in m.tool_calls %}[TOOL_CALLS]{{ c.function.name }}[ARGS]{{ c.function.arguments | tojson }}{% endfor %}"
    "</s>{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
)
_DEEPSEEK = (
    "{% set ns = namespace(rules='') %}{% for m in messages %}{% if m.role == 'system' %}"
    "{% set ns.rules = ns.rules + m.content %}{% endif %}{% endfor %}<｜begin▁of▁sentence｜>{{ ns.rules }}" + _TOOLS
    + "{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}{% elif m.role == 'tool' %}"
    "<｜tool▁outputs▁begin｜>{{ m.content }}<｜tool▁outputs▁end｜>{% elif m.role == 'assistant' %}"
    "{% if messages[loop.index0 - 1].role == 'user' %}<｜Assistant｜></think>{% endif %}{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{{ c.function.name }}<｜tool▁sep｜>"
    "{{ c.function.arguments }}<｜tool▁call▁end｜><｜tool▁calls▁end｜>{% endfor %}<｜end▁of▁sentence｜>{% endif %}"
    "{% endfor %}{% if add_generation_prompt and messages[-1].role != 'tool' %}<｜Assistant｜></think>{% endif %}"
)  # fmt: skip

_KIMI_CALLS = (
    "<|tool_calls_section_begin|>{% for c in m.tool_calls %}<|tool_call_begin|>{{ c.id }}<|tool_call_argument_begin|>"
    "{{ c.function.arguments if c.function.arguments is string else c.function.arguments | tojson }}<|tool_call_end|>"
    "{% endfor %}<|tool_calls_section_end|>"
)
_KIMI = (
    "{% if tools %}<|im_system|>tool_declare<|im_middle|>{{ tools | tojson }}<|im_end|>{% endif %}"
    "{% set ns = namespace(answer=-1) %}{% for m in messages %}{% if m.role == 'assistant' and not m.tool_calls %}"
    "{% set ns.answer = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% set kind = m.role if m.role in ('user', 'assistant') else 'system' %}"
    "<|im_{{ kind }}|>{{ m.name or m.role }}<|im_middle|>"
    "{% if m.role == 'assistant' %}"
    "<think>{{ m.reasoning_content or '' if loop.index0 > ns.answer else '' }}</think>{{ m.content or '' }}"
    "{% if m.tool_calls %}" + _KIMI_CALLS + "{% endif %}"
    "{% elif m.role == 'tool' %}## Return of {{ m.tool_call_id }}\n{{ m.content }}{% else %}{{ m.content }}{% endif %}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_assistant|>assistant<|im_middle|>{% endif %}"
)

STYLES: Mapping[str, Style] = {
    "qwen2.5": Style(_chatml(_SHOWN, "", _HERMES_CALLS, ""), _CHATML_TURNS, _CHATML_ENDS, called=_HERMES_CALL),
    "qwen3": Style(
        _chatml(_SHOWN, _REASONING + _IN_LOOP, _HERMES_CALLS, _OFF, _ASKED),
        (*_CHATML_TURNS, "<think>", "</think>"), _CHATML_ENDS, _THINK, called=_HERMES_CALL,
    ),
    "qwen3.5": Style(
        _chatml(_REFUSED, _REASONING + _ALWAYS_OPEN, _XML_CALLS, _OPENED, _ASKED),
        (*_CHATML_TURNS, "<think>", "</think>"), _CHATML_ENDS, _THINK, "<think>\n", called=_XML_CALL, arguments="tags",
    ),
    "qwen3.6": Style(
        _chatml(_REFUSED, _REASONING + _KEPT_OPEN, _XML_CALLS, _OPENED, _ASKED),
        (*_CHATML_TURNS, "<think>", "</think>"), _CHATML_ENDS, _THINK, "<think>\n", called=_XML_CALL, arguments="tags",
    ),
    "llama3": Style(
        _LLAMA, ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        ("<|eot_id|>", "<|eot_id|>"), called='{"name": "%s", "parameters": %s}',
    ),
    "gemma": Style(
        _GEMMA, ("<bos>", "<start_of_turn>", "<end_of_turn>"), ("<end_of_turn>", "<end_of_turn>"), called=_HERMES_CALL,
    ),
    "glm": Style(
        _GLM, ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<think>", "</think>"),
        ("<|observation|>", "<|user|>"), "\n<think>%s</think>", said="\n%s",
        called="\n<tool_call>%s\n%s</tool_call>", arguments="keys",
    ),
    "gpt-oss": Style(
        _HARMONY, ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|call|>", "<|return|>"),
        ("<|call|>", "<|return|>"), "<|channel|>analysis<|message|>%s<|end|><|start|>assistant",
        said="<|channel|>final<|message|>%s",
        called="<|channel|>commentary to=functions.%s <|constrain|>json<|message|>%s",
    ),
    "mistral": Style(
        _MISTRAL, ("<s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CALLS]", "[ARGS]", "</s>"),
        ("</s>", "</s>"), called="[TOOL_CALLS]%s[ARGS]%s",
    ),
    "deepseek": Style(
        _DEEPSEEK,
        ("<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>", "<｜tool▁calls▁begin｜>"),
        ("<｜end▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
        called="<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>%s<｜tool▁sep｜>%s<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    ),
    "kimi": Style(
        _KIMI,
        ("<|im_system|>", "<|im_user|>", "<|im_assistant|>", "<|im_middle|>", "<|im_end|>", "<|tool_call_begin|>",
         "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_argument_begin|>",
         "<|tool_call_end|>"),
        ("<|im_end|>", "<|im_end|>"), "<think>%s</think>",
        called="<|tool_calls_section_begin|><|tool_call_begin|>functions.%s:0<|tool_call_argument_begin|>%s"
        "<|tool_call_end|><|tool_calls_section_end|>",
    ),
}  # fmt: skip
