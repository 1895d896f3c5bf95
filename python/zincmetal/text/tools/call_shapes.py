"""Ways to write calls, of all families. Data alone."""

from __future__ import annotations

from .shape import CallShape, Tags

_QWEN_TAGS = Tags(">", "<parameter=", ">", "</parameter>", lines=True)
_SEED_TAGS = Tags(">", "<parameter=", ">", "</parameter>")
_INVOKE_TAGS = Tags('">', '<parameter name="', '">', "</parameter>")
_CPM_TAGS = Tags('">', '<param name="', '">', "</param>", text_value="<![CDATA[", text_end="]]>")
_ARG_TAGS = Tags("", "<arg_key>", "</arg_key>", "</arg_value>", value="<arg_value>")


_IFM_TAGS = Tags("", "<ifm|arg_key>", "</ifm|arg_key>", "</ifm|arg_value>", value="<ifm|arg_value>")
_DSML_TAGS = Tags(
    '">', '<｜DSML｜parameter name="', '"', "</｜DSML｜parameter>",
    text_value=' string="true">', json_value=' string="false">',
)  # fmt: skip


WHOLE_JSON = CallShape("json", bare=True)
WHOLE_LIST = CallShape("pythonic", bare=True)
HERMES = CallShape("json", "<tool_call>", "</tool_call>")
XML = CallShape("tagged", "<tool_call>", "</tool_call>", "<function=", "</function>", tags=_QWEN_TAGS)
XML_ALONE = CallShape("tagged", "<function=", "</tool_call>", "", "</function>", bare=True, tags=_QWEN_TAGS)
FUNCTION = CallShape(
    "named", "<function=", "", "", "</function>", head=r"(?P<name>[^\s<>{}]+)>\s*", head_form="{name}>"
)
ARGS = CallShape("tagged", "<tool_call>", "</tool_call>", tags=_ARG_TAGS)
IFM = CallShape(
    "tagged", "<ifm|tool_calls>", "</ifm|tool_calls>", "<ifm|tool_call>", "</ifm|tool_call>", tags=_IFM_TAGS, many=True
)
SEED = CallShape("tagged", "<seed:tool_call>", "</seed:tool_call>", "<function=", "</function>", tags=_SEED_TAGS)
CPM = CallShape("tagged", '<function name="', "", "", "</function>", tags=_CPM_TAGS)
MINIMAX = CallShape(
    "tagged", "<minimax:tool_call>", "</minimax:tool_call>", '<invoke name="', "</invoke>", tags=_INVOKE_TAGS, many=True
)


def _dsml(section: str) -> CallShape:
    return CallShape(
        "tagged", f"<｜DSML｜{section}>", f"</｜DSML｜{section}>", '<｜DSML｜invoke name="', "</｜DSML｜invoke>",
        tags=_DSML_TAGS, many=True,
    )  # fmt: skip


DSML, DSML_4 = _dsml("function_calls"), _dsml("tool_calls")
PYTHON_TAG = (
    CallShape("json", "<|python_tag|>", keys=("name", "parameters")),
    CallShape("pythonic", "<|python_tag|>"),
)
LLAMA_JSON = CallShape("json", bare=True, keys=("name", "parameters"))
MISTRAL_LIST = CallShape("json", "[TOOL_CALLS]", id_key="id", listed=True)


def _mistral(form: str) -> CallShape:
    head = r"\s*(?P<name>[^\s\[\]{}]+)\s*(?:\[CALL_ID\]\s*\w*\s*)?(?:\[ARGS\])?\s*"
    return CallShape("named", "[TOOL_CALLS]", head=head, head_form=form)


MISTRAL_NAMED, MISTRAL_V11 = _mistral("{name}[ARGS]"), _mistral("{name}[CALL_ID]{id}[ARGS]")
_DEEPSEEK_HEAD = r"\s*(?:function<｜tool▁sep｜>)?(?P<name>[^\s<]+)(?:<｜tool▁sep｜>)?\s*(?:```(?:json)?)?\s*"


def _deepseek(form: str, tail: str) -> CallShape:
    return CallShape(
        "named", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>",
        head=_DEEPSEEK_HEAD, head_form=form, tail=tail, many=True,
    )  # fmt: skip


DEEPSEEK = _deepseek("{name}<｜tool▁sep｜>", "")
DEEPSEEK_R1 = _deepseek("function<｜tool▁sep｜>{name}\n```json\n", "\n```")


KIMI = CallShape(
    "named", "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>", "<|tool_call_end|>",
    head=r"\s*(?:functions\.)?(?P<name>[^\s:<]+)(?::\d*)?\s*(?:<\|tool_call_argument_begin\|>)?\s*",
    head_form="functions.{name}:{index}<|tool_call_argument_begin|>", many=True,
)  # fmt: skip
SOLAR = CallShape(
    "named", "<|tool_calls|>", "<|calls|>", "<|tool_call:begin|>", "<|tool_call:end|>",
    head=r"[^<]*<\|tool_call:name\|>\s*(?P<name>[^\s<]+)\s*<\|tool_call:args\|>\s*",
    head_form="{id}<|tool_call:name|>{name}<|tool_call:args|>", many=True,
)  # fmt: skip
_GEMMA_NAME = r"\s*(?P<name>[^\s{}<>]+)\s*"
GEMMA = CallShape("named", "<|tool_call>", "<tool_call|>", "call:", head=_GEMMA_NAME, head_form="{name}", quote='<|"|>')
FUNCTION_GEMMA = CallShape(
    "named", "<start_function_call>", "<end_function_call>", "call:",
    head=_GEMMA_NAME, head_form="{name}", quote="<escape>",
)  # fmt: skip
LFM = CallShape("pythonic", "<|tool_call_start|>", "<|tool_call_end|>", listed=True)
LFM_JSON = CallShape("json", "<|tool_call_start|>", "<|tool_call_end|>", listed=True)
CODE = CallShape("pythonic", "<code>", "</code>", bare=True)
FENCES = (
    CallShape("pythonic", "```tool_code", "```", bare=True),
    CallShape("json", "```tool_code", "```", bare=True),
    CallShape("json", "```tool_call", "```", bare=True),
    CallShape("json", "```json", "```", bare=True),
)
APERTUS = CallShape(
    "named", "<|tools_prefix|>", "<|tools_suffix|>", "{", "}", listed=True,
    head=r'\s*"(?P<name>[^"{}]+)"\s*:\s*', head_form='"{name}": ',
)  # fmt: skip
GRANITE = CallShape("json", "<|tool_call|>", listed=True)
NEMOTRON = CallShape("json", "<TOOLCALL>", "</TOOLCALL>", listed=True)
TOOL_CALLS = CallShape("json", "<tool_calls>", "</tool_calls>", many=True)
TOOL_CALLS_LIST = CallShape("json", "<tool_calls>", "</tool_calls>", listed=True)
COHERE = CallShape(
    "json", "<|START_ACTION|>", "<|END_ACTION|>", listed=True, keys=("tool_name", "parameters"), id_key="tool_call_id"
)
COMMAND_R = CallShape("json", "Action: ```json", "```", listed=True, keys=("tool_name", "parameters"))
FUNCTION_CALL = CallShape("json", "<|function_call|>")
FUNCTION_ROLE = CallShape("json", "function call<|role_sep|>")
