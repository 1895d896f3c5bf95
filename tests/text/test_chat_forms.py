"""Messages as callers write them: each template gets them in the form that it renders completely."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from zincmetal.errors import ChatTemplateError, UsageError
from zincmetal.text.chat.template import CHATML, ChatTemplate
from zincmetal.text.tokenizer import Tokenizer

Messages = list[dict[str, Any]]
EACH = "{%% for m in messages %%}%s;{%% endfor %%}"

# Our own templates, with the constructs of public ones.
PLUS = EACH % "{{ m.role + ':' + m.content }}"  # takes strings only
PRINTS = EACH % "{{ m.role }}:{{ m.content | trim }}"  # would print a list
ITERATES = EACH % (
    "{{ m.role }}:{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'text' %}[{{ p.text }}]{% endif %}{% endfor %}{% endif %}"
)
PARTS_ONLY = EACH % "{{ m.role }}:{% for p in m.content %}{{ p['text'] }}{% endfor %}"
FIRST_PART = EACH % "{% if m.content is string %}{{ m.content }}{% else %}{{ m.content[0].text }}{% endif %}"
USER_PARTS = EACH % (
    "{% if m.role == 'user' %}{% for p in m.content %}{{ p.text }}|{% endfor %}"
    "{% else %}{{ m.content + '!' }}{% endif %}"
)


def rendered(source: str, messages: Messages, **options: Any) -> str:
    return ChatTemplate(source, "<s>", "</s>").render(messages, **options)


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


def call(arguments: Any) -> dict[str, Any]:
    return {"id": "c1", "type": "function", "function": {"name": "f", "arguments": arguments}}


# --- contents


@pytest.mark.parametrize(
    ("source", "content", "expected"),
    [
        (PLUS, parts("a", "b"), "user:ab;"),
        (PRINTS, parts("a", "b"), "user:ab;"),
        (ITERATES, parts("a", "b"), "user:[a][b];"),
        (ITERATES, "ab", "user:ab;"),
        (PARTS_ONLY, parts("a", "b"), "user:ab;"),
        (PARTS_ONLY, "ab", "user:ab;"),
        (FIRST_PART, parts("a", "b"), "ab;"),
        (USER_PARTS, parts("a", "b"), "a|b|;"),
        (USER_PARTS, "ab", "ab|;"),
        (PLUS, ["a", "b"], "user:ab;"),
        (PLUS, [], "user:;"),
        (PLUS, [{"type": "input_text", "text": "a"}], "user:a;"),
        (PLUS, [{"text": "a", "annotations": None}], "user:a;"),
        (EACH % "{{ m | tojson }}", "a", '{"role": "user", "content": "a"};'),
    ],
)
def test_contents_in_parts(source: str, content: Any, expected: str) -> None:
    assert rendered(source, [{"role": "user", "content": content}]) == expected


def test_each_role_is_tried_by_itself() -> None:
    said = [{"role": role, "content": parts("a", "b")} for role in ("system", "user", "assistant", "user")]
    assert rendered(USER_PARTS, said) == "ab!;a|b|;ab!;a|b|;"
    tool = [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [call({})]}]
    tool.append({"role": "tool", "content": parts("4", "2")})
    assert rendered(PRINTS, tool) == "user:q;assistant:;tool:42;"


def test_chatml_never_shows_a_list() -> None:
    text = rendered(CHATML, [{"role": "user", "content": parts("hi")}])
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("kind", ["image_url", "image", "input_audio", "video", "file", "sketch"])
def test_parts_that_are_no_text_are_refused_by_name(kind: str) -> None:
    messages = [{"role": "user", "content": "x"}, {"role": "user", "content": [*parts("a"), {"type": kind, kind: "z"}]}]
    for source in (PLUS, ITERATES, PARTS_ONLY):
        with pytest.raises(UsageError, match=rf"messages\[1\].content\[1\].*{kind}"):
            rendered(source, messages)


def test_parts_of_other_types_go_to_templates_that_show_them() -> None:
    source = EACH % (
        "{% for p in m.content %}{% if p.type == 'note' %}({{ p.note }}){% else %}{{ p.text }}{% endif %}{% endfor %}"
    )
    note = [{"role": "user", "content": [{"type": "note", "note": "n"}, *parts("a")]}]
    assert rendered(source, note) == "(n)a;"


@pytest.mark.parametrize(
    "content",
    [
        [5],
        [None],
        [[]],
        [{}],
        [{"type": "text"}],
        [{"type": "text", "text": 5}],
        [{"type": 5, "text": "a"}],
        {},
        5,
        b"x",
    ],
)
def test_contents_that_are_none_are_refused(content: Any) -> None:
    with pytest.raises(UsageError, match=r"messages\[0\]"):
        rendered(PLUS, [{"role": "user", "content": content}])


# --- keys that are None, contents that are missing


CALLS = [
    {"role": "user", "content": "w?"},
    {"role": "assistant", "content": None, "tool_calls": [call({})]},
    {"role": "tool", "content": "4"},
]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (EACH % "{{ m.content | trim }}", "w?;;4;"),
        (EACH % "{{ m.content }}", "w?;;4;"),
        (EACH % "{{ m.content + '' }}", "w?;;4;"),  # fails if the key is absent
        (EACH % "{% if m.content is none %}{{ m.tool_calls[0].function.name }}{% else %}{{ m.content }}{% endif %}", "w?;f;4;"),  # noqa: E501
        (EACH % "{% if 'content' in m %}{{ m.content }}{% else %}-{% endif %}", "w?;-;4;"),
        (EACH % "{% if m.content is string %}{{ m.content }}{% else %}{{ raise_exception('no') }}{% endif %}", "w?;;4;"),  # noqa: E501
    ],
)  # fmt: skip
@pytest.mark.parametrize("absent", [{}, {"content": None}])
def test_a_call_without_content(source: str, expected: str, absent: dict[str, None]) -> None:
    messages = [CALLS[0], {"role": "assistant", "tool_calls": CALLS[1]["tool_calls"]} | absent, CALLS[2]]
    assert rendered(source, messages) == expected


DUMPED: dict[str, Any] = dict.fromkeys(("refusal", "annotations", "audio", "function_call", "tool_calls", "name"))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (EACH % "{% if 'tool_calls' in m %}{{ m.tool_calls | length }}{% else %}{{ m.content }}{% endif %}", "x;y;"),
        (EACH % "{% if m.audio is defined %}{{ m.audio | length }}{% else %}{{ m.content }}{% endif %}", "x;y;"),
        (EACH % "{{ m | tojson }}", '{"role": "user", "content": "x"};{"role": "assistant", "content": "y"};'),
        (EACH % "{{ m.keys() | join(' ') }}", "role content;role content;"),
        # These two test whether the content is none, and fail where it is absent: so it stays.
        (EACH % "{% if m.tool_calls is none %}{{ m.content }}{% else %}calls{% endif %}", "calls;y;"),
        (EACH % "{% if m['audio'] is none or m.role == 'user' %}{{ m.content }}{% endif %}", "x;y;"),
    ],
)  # fmt: skip
def test_keys_that_are_none(source: str, expected: str) -> None:
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"} | DUMPED]
    assert rendered(source, messages) == expected


@pytest.mark.parametrize("extra", [{}, {"content": None}, {"reasoning_content": "hm"}])
@pytest.mark.parametrize(
    "source",
    [
        EACH % "{{ m.role }}",
        EACH % "{{ m.role }}{{ m.content[9:] }}",
        EACH % "{{ m.role + m.content[9:] }}",
        EACH % "{% if m.content is undefined %}{{ raise_exception('x') }}{% endif %}{{ m.role }}",
    ],
)
def test_an_answer_without_content(source: str, extra: dict[str, Any]) -> None:
    assert rendered(source, [{"role": "user", "content": "x"}, {"role": "assistant"} | extra]) == "user;assistant;"


def test_only_answers_may_lack_a_content() -> None:
    for role in ("user", "system", "developer", "tool"):
        with pytest.raises(UsageError, match=r"messages\[1\] needs a 'content'"):
            rendered(PLUS, [{"role": "user", "content": "x"}, {"role": role, "content": None}])


class Dumped:
    """A message object of a client, such as OpenAI's."""

    def model_dump(self) -> dict[str, Any]:
        return {"role": "assistant", "content": "y"} | DUMPED


@dataclass
class Said:
    role: str
    content: str
    tool_calls: None = None


def test_objects_of_clients_are_understood() -> None:
    said: list[Any] = [{"role": "user", "content": "x"}, Dumped(), Said("user", "z")]
    assert rendered(PLUS, said) == "user:x;assistant:y;user:z;"


def test_keys_stay_in_their_order() -> None:
    answer = {"content": "y", "tool_calls": [call({})], "role": "assistant", "note": "n"}
    text = rendered(EACH % "{{ m.keys() | join(' ') }}", [{"content": "x", "role": "user"}, answer])
    assert text == "content role;content tool_calls role note;"


# --- reasoning


NAMES = ("reasoning_content", "reasoning", "thinking")


@pytest.mark.parametrize("given", NAMES)
@pytest.mark.parametrize("read", NAMES)
def test_reasoning_has_one_meaning_under_three_names(given: str, read: str) -> None:
    source = EACH % f"{{% if m.{read} %}}<{{{{ m.{read} }}}}>{{% endif %}}{{{{ m.content }}}}"
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", given: "hm"}]
    assert rendered(source, messages) == "x;<hm>y;"
    others: dict[str, Any] = {name: None for name in NAMES if name != given}
    assert rendered(source, [messages[0], messages[1] | others]) == "x;<hm>y;"


def test_reasoning_in_parts_goes_where_the_template_reads_it() -> None:
    said = [{"type": "thinking", "thinking": "hm"}, *parts("y")]
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": said}]
    assert rendered(EACH % "<{{ m.reasoning_content }}>{{ m.content }}", messages) == "<>x;<hm>y;"
    by_type = "{{ m.content if m.content is string }}{% if m.content is not string %}{% for p in m.content %}" + (
        "{% if p.type == 'thinking' %}({{ p.thinking }}){% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}"
    )
    assert rendered(EACH % by_type, messages) == "x;(hm)y;"


def test_reasoning_that_is_no_text_is_refused() -> None:
    with pytest.raises(UsageError, match=r"messages\[1\]: its reasoning"):
        rendered(PLUS, [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "thinking": ["hm"]}])


# --- arguments of tool calls


ARGUMENTS = {"city": "Zürich", "n": 2}
LISTS = EACH % (
    "{% for c in m.tool_calls or [] %}{% for k, v in c.function.arguments.items() %}"
    "{{ k }}={{ v }} {% endfor %}{% endfor %}"
)
DUMPS = EACH % "{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{% endfor %}"
INSERTS = EACH % "{% for c in m.tool_calls or [] %}{{ '(' + c.function.arguments + ')' }}{% endfor %}"
SHOWS = EACH % "{% for c in m.tool_calls or [] %}{{ c.function.arguments }}{% endfor %}"
EITHER = EACH % (
    "{% for c in m.tool_calls or [] %}{% set a = c.function.arguments %}"
    "{{ a if a is string else a | tojson }}{% endfor %}"
)


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (LISTS, ";city=Zürich n=2 ;"),
        (DUMPS, ';{"city": "Zürich", "n": 2};'),
        (INSERTS, ';({"city": "Zürich", "n": 2});'),
        (SHOWS, ';{"city": "Zürich", "n": 2};'),
        (EITHER, ';{"city": "Zürich", "n": 2};'),
    ],
)
def test_arguments_of_a_call(source: str, expected: str, as_text: bool) -> None:
    arguments = json.dumps(ARGUMENTS) if as_text else ARGUMENTS
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call(arguments)]}]
    if as_text and source not in (LISTS, DUMPS):
        expected = expected.replace("ü", "\\u00fc")  # as it was given
    assert rendered(source, messages) == expected


@pytest.mark.parametrize("arguments", ["{", "[1]", "5"])
def test_arguments_that_are_no_object_are_refused_where_one_is_needed(arguments: str) -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call(arguments)]}]
    with pytest.raises(UsageError, match=r"messages\[1\].tool_calls\[0\].function.arguments is not a JSON object"):
        rendered(LISTS, messages)
    assert arguments in rendered(EITHER, messages)


@pytest.mark.parametrize("arguments", ["", None, {}])
def test_a_call_without_arguments(arguments: Any) -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call(arguments)]}]
    assert rendered(DUMPS, messages) == ";{};"
    assert rendered(INSERTS, messages) == ";({});"


@pytest.mark.parametrize("calls", ["f", {}, ["f"], [{"function": "f"}], [call([1])], [call(5)]])
def test_calls_that_are_none_are_refused(calls: Any) -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": calls}]
    with pytest.raises(UsageError, match=r"messages\[1\].tool_calls"):
        rendered(PLUS, messages)


def test_a_template_that_cannot_list_tools_is_still_found_out() -> None:
    source = "{{ tools | map(attribute='function') | tojson if tools }}" + DUMPS
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [call('{"a": 1}')]}]
    assert rendered(source, messages) == ';{"a": 1};'


# --- templates with names, variables


def tokenizer(**keys: Any) -> tuple[dict[str, Any], Tokenizer]:
    tokens = ["<pad>", "<unk>", "<s>", "</s>", "<sep>", "<extra>", "word"]
    meta: dict[str, Any] = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": tokens}
    meta["tokenizer.ggml.token_type"] = [3, 2, 3, 3, 3, 3, 1]
    meta |= {f"tokenizer.ggml.{key}_token_id": value for key, value in keys.items()}
    return meta, Tokenizer.from_metadata(meta)


def test_named_templates() -> None:
    meta, made = tokenizer()
    key = "tokenizer.chat_template"
    named = {key: "plain", f"{key}.tool_use": "tools", f"{key}.rag": "documents", "tokenizer.chat_templates": ["rag"]}
    template = ChatTemplate.from_metadata(meta | named, made)
    user = [{"role": "user", "content": "x"}]
    tool, document = {"name": "f"}, {"title": "t", "text": "x"}
    assert template.render(user) == template.render(user, tools=[]) == "plain"
    assert template.render(user, tools=[tool]) == template.prompt(user, tools=[tool]) == "tools"
    assert template.render(user, documents=[document]) == "documents"
    assert template.render(user, tools=[tool], documents=[document]) == "tools"
    assert template.named.keys() == {"tool_use", "rag"}
    assert template.choose("rag").render(user, tools=[tool]) == "documents"
    with pytest.raises(UsageError, match="'other'; templates with a name: rag, tool_use"):
        template.choose("other")
    only = ChatTemplate.from_metadata(meta | {f"{key}.default": "d", f"{key}.tool_use": "t"}, made)
    assert (only.render(user), only.render(user, tools=[tool])) == ("d", "t")
    with pytest.raises(ChatTemplateError, match=r"chat_template.tool_use is of type list"):
        ChatTemplate.from_metadata(meta | {key: "x", f"{key}.tool_use": []}, made)


def test_special_tokens_by_name() -> None:
    names = ("bos", "eos", "pad", "unk", "sep", "cls", "mask")
    source = " ".join(f"{{{{ {name}_token is defined }}}}" for name in names)
    user = [{"role": "user", "content": "x"}]
    key = {"tokenizer.chat_template": source}
    meta, made = tokenizer(eos=3, padding=0, unknown=1, seperator=4)
    assert ChatTemplate.from_metadata(meta | key, made).render(user) == "False True True True True False False"
    meta, made = tokenizer(bos=2, mask=5)
    assert ChatTemplate.from_metadata(meta | key, made).render(user) == "True" + " False" * 5 + " True"
    source = "{{ bos_token }}{{ pad_token }}{{ additional_special_tokens | join }}"
    meta, made = tokenizer(bos=2, eos=3, padding=0)
    template = ChatTemplate.from_metadata(meta | {"tokenizer.chat_template": source}, made)
    assert template.render(user) == "<s><pad><sep><extra>"


def test_a_template_that_cannot_do_without_a_begin_token() -> None:
    assert ChatTemplate("{{ bos_token + 'x' }}").render([{"role": "user", "content": ""}]) == "x"


def test_variables() -> None:
    source = "{% set a = 1 %}{{ a }}{{ messages }}{% if enable_thinking is defined %}{{ b.c }}{% endif %}{{ range(3) }}"
    template = ChatTemplate(source, named={"tool_use": "{{ tools }}"})
    assert template.variables == {"messages", "enable_thinking", "b", "tools"}
    with pytest.raises(ChatTemplateError, match="TemplateSyntaxError"):
        _ = ChatTemplate("{% if %}").variables


def test_keywords() -> None:
    user = [{"role": "user", "content": "x"}]
    source = "{{ enable_thinking }} {{ tools | length }} {{ documents[0].text }}"
    said = rendered(source, user, enable_thinking=False, tools=({"name": "f"},), documents=[{"text": "t"}])
    assert said == "False 1 t"
    assert rendered("a", user, misspelt=1) == "a"
    for wrong in ({"tools": "f"}, {"tools": ["f"]}, {"tools": [print]}, {"documents": {}}, {"enable_thinking": {1}}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            rendered("a", user, **wrong)


# --- going on with the last message


THINKS = (
    "{% for m in messages %}<{{ m.role }}>\n{% if m.reasoning_content %}({{ m.reasoning_content }})\n{% endif %}"
    "{{ m.content }}</{{ m.role }}>\n{% endfor %}{% if add_generation_prompt %}<assistant>\n{% endif %}"
)
TRIMS = THINKS.replace("m.content", "m.content | trim")


@pytest.mark.parametrize(
    ("source", "last", "expected"),
    [
        (THINKS, {"content": "Once upon "}, "Once upon "),
        (TRIMS, {"content": " Once upon "}, "Once upon"),
        (THINKS, {"content": ""}, ""),
        (TRIMS, {"content": ""}, ""),
        (TRIMS, {"content": "  "}, ""),
        (THINKS, {}, ""),
        (THINKS, {"content": None, "reasoning": "Let me"}, "(Let me"),
        (THINKS, {"content": "So", "reasoning": "Let me"}, "(Let me)\nSo"),
        (THINKS, {"content": parts("Once ", "upon")}, "Once upon"),
        (PARTS_ONLY, {"content": "Once"}, None),
    ],
)
def test_the_last_answer_is_continued(source: str, last: dict[str, Any], expected: str | None) -> None:
    messages = [{"role": "user", "content": "x"}, {"role": "assistant"} | last]
    whole = "user:x;assistant:Once" if expected is None else f"<user>\nx</user>\n<assistant>\n{expected}"
    assert rendered(source, messages, continue_final_message=True) == whole
    assert ChatTemplate(source).prompt(messages, continue_final_message=True) == whole


def test_what_cannot_be_continued() -> None:
    with pytest.raises(UsageError, match="must be 'assistant'"):
        rendered(THINKS, [{"role": "user", "content": "x"}], continue_final_message=True)
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    with pytest.raises(ChatTemplateError, match="cannot be continued"):
        rendered("{{ messages[0].content }}", messages, continue_final_message=True)


def test_numpys_scalars_and_arrays_are_json() -> None:
    template = ChatTemplate(
        "{{ messages[0].n }} {{ messages[0].list[1] }} {{ budget + 1 }} {{ 'yes' if off is false }}"
    )
    message = {"role": "user", "content": np.str_("x"), "n": np.int64(3), "list": np.array([1.0, 2.5])}
    assert template.render([message], budget=np.int32(4), off=np.bool_(False)) == "3 2.5 5 yes"


@pytest.mark.parametrize("arguments", ['{"a": 1}', {"a": 1}])
@pytest.mark.parametrize("key", ["function", "", "function_call"], ids=["usual", "bare", "older"])
@pytest.mark.parametrize("reads", ["c.function", "(c.function or c)", "c"])
def test_calls_in_other_shapes(arguments: object, key: str, reads: str) -> None:
    """Name and arguments stand under "function", or directly in the call, or in the one call of older clients."""
    call = {"name": "f", "arguments": arguments}
    shown = "{% for c in m.tool_calls or [] %}<{{ READS.name }} {{ READS.arguments | tojson }}>{% endfor %}"
    source = "{% for m in messages %}[{{ m.role }}]{{ m.content or '' }}SHOWN{% endfor %}"
    template = ChatTemplate(source.replace("SHOWN", shown.replace("READS", reads)))
    calls = {"function_call": call} if key == "function_call" else {"tool_calls": [{"function": call} if key else call]}
    text = template.render([{"role": "user", "content": "q"}, {"role": "assistant", "content": None, **calls}])
    assert text == '[user]q[assistant]<f {"a": 1}>'


def test_what_no_template_shows_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    template = ChatTemplate(CHATML)
    user = [{"role": "user", "content": "x"}]
    for _ in "ab":
        assert template.render(user, tools=[{"name": "f"}]) == template.render(user, tools=[])
    (record,) = caplog.records
    assert "no place for tools" in record.getMessage()
