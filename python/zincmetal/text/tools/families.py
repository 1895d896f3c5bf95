"""Shapes of the families' answers, and how a chat template tells its family. Data alone."""

from __future__ import annotations

from . import call_shapes as calls
from .shape import CallShape, Shape, Tags

_OPEN, _CLOSE = ("<think>",), ("</think>",)
_CHATML = ("<|im_end|>", "<|im_start|>assistant", "<|im_start|>", "<|endoftext|>")


def _suffixed(suffix: str) -> Shape:
    """Hunyuan's tags, which all end alike."""
    key, value = f"arg_key{suffix}", f"arg_value{suffix}"
    tags = Tags(f"<tool_sep{suffix}>", f"<{key}>", f"</{key}>", f"</{value}>", value=f"<{value}>")
    call = CallShape(
        "tagged", f"<tool_calls{suffix}>", f"</tool_calls{suffix}>", f"<tool_call{suffix}>", f"</tool_call{suffix}>",
        tags=tags, many=True,
    )  # fmt: skip
    return Shape("hunyuan", (f"<think{suffix}>",), (f"</think{suffix}>",), (call,))


# --- families

_LLAMA_TURNS = (
    "<|start_header_id|>assistant<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>",
    "<|start_header_id|>", "<|end_header_id|>",
)  # fmt: skip
_DEEPSEEK_TURNS = ("<｜Assistant｜>", "<｜User｜>", "<｜end▁of▁sentence｜>")
_MISTRAL_TURNS = ("[/INST]", "</s>", "[INST]")
_GLM_TURNS = ("<|assistant|>", "<|user|>", "<|observation|>", "<|endoftext|>")
_COHERE_TURNS = (
    "<|CHATBOT_TOKEN|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|START_TEXT|>", "<|END_TEXT|>",
    "<|END_OF_TURN_TOKEN|>", "<|START_OF_TURN_TOKEN|>",
)  # fmt: skip
_GEMMA_TURNS = ("<|turn>model", "<turn|>", "<|tool_response>")
_IFM_TURNS = ("<|ifm|im_end|>", "<|ifm|im_start|>assistant")
_APERTUS_TURNS = ("<|assistant_start|>", "<|assistant_end|>")
_APRIEL_TURNS = ("<|begin_assistant|>", "<|end|>", "[END FINAL RESPONSE]")
_STEPS = "Here are my reasoning steps:"
_GENERIC_CALLS = (
    calls.HERMES,
    calls.XML,
    calls.ARGS,
    calls.TOOL_CALLS,
    calls.XML_ALONE,
    *calls.FENCES,
    calls.WHOLE_JSON,
    calls.WHOLE_LIST,
)

GENERIC = Shape("generic", _OPEN, _CLOSE, _GENERIC_CALLS, (*_CHATML, "<end_of_turn>", "<start_of_turn>model"))
HERMES = Shape("hermes", _OPEN, _CLOSE, (calls.HERMES, calls.XML, *calls.FENCES, calls.WHOLE_JSON), _CHATML)
QWEN_XML = Shape("qwen-xml", _OPEN, _CLOSE, (calls.XML, calls.HERMES, calls.XML_ALONE, calls.WHOLE_JSON), _CHATML)
SMOLLM3 = Shape("smollm3", _OPEN, _CLOSE, (calls.HERMES, calls.CODE, *calls.FENCES, calls.WHOLE_JSON), _CHATML)
LFM = Shape("lfm2", _OPEN, _CLOSE, (calls.LFM, calls.LFM_JSON, calls.WHOLE_LIST, calls.WHOLE_JSON), _CHATML)
MINICPM = Shape("minicpm", _OPEN, _CLOSE, (calls.CPM, calls.HERMES), _CHATML)
LLAMA = Shape(
    "llama", _OPEN, _CLOSE, (calls.LLAMA_JSON, calls.WHOLE_LIST, *calls.PYTHON_TAG, calls.HERMES), _LLAMA_TURNS
)
FUNCTIONARY = Shape("functionary", calls=(calls.FUNCTION, *calls.PYTHON_TAG), turns=_LLAMA_TURNS)
MISTRAL_V3 = Shape("mistral-v3", ("[THINK]",), ("[/THINK]",), (calls.MISTRAL_LIST, calls.MISTRAL_NAMED), _MISTRAL_TURNS)
MISTRAL = Shape("mistral", ("[THINK]",), ("[/THINK]",), (calls.MISTRAL_NAMED, calls.MISTRAL_LIST), _MISTRAL_TURNS)
MISTRAL_V11 = Shape("mistral-v11", ("[THINK]",), ("[/THINK]",), (calls.MISTRAL_V11, calls.MISTRAL_LIST), _MISTRAL_TURNS)
DEEPSEEK = Shape("deepseek", _OPEN, _CLOSE, (calls.DEEPSEEK,), _DEEPSEEK_TURNS)
DEEPSEEK_R1 = Shape("deepseek-r1", _OPEN, _CLOSE, (calls.DEEPSEEK_R1,), _DEEPSEEK_TURNS)
DSML = Shape("dsml", _OPEN, _CLOSE, (calls.DSML, calls.DSML_4), _DEEPSEEK_TURNS)
DSML_4 = Shape("dsml-v4", _OPEN, _CLOSE, (calls.DSML_4, calls.DSML), _DEEPSEEK_TURNS)
GLM = Shape("glm", _OPEN, _CLOSE, (calls.ARGS, calls.HERMES, calls.WHOLE_JSON), _GLM_TURNS)
GEMMA = Shape("gemma4", ("<|channel>thought",), ("<channel|>",), (calls.GEMMA,), _GEMMA_TURNS)
FUNCTION_GEMMA = Shape("function-gemma", calls=(calls.FUNCTION_GEMMA,), turns=("<end_of_turn>", "<start_of_turn>model"))
HARMONY = Shape("harmony", turns=("<|start|>", "<|end|>", "<|call|>", "<|return|>"), harmony=True)
KIMI = Shape("kimi", _OPEN, _CLOSE, (calls.KIMI,), ("<|im_assistant|>", "<|im_middle|>", "<|im_end|>"))
SOLAR = Shape("solar", ("<|think|>",), ("<|end|><|begin|>assistant",), (calls.SOLAR,), ("<|content|>", "<|end|>"))
MINIMAX = Shape("minimax", _OPEN, _CLOSE, (calls.MINIMAX,), ("]~b]ai", "[e~["))
IFM = Shape("ifm", ("<ifm|think>", "<ifm|think_fast>"), ("</ifm|think>", "</ifm|think_fast>"), (calls.IFM,), _IFM_TURNS)
SEED = Shape("seed", ("<seed:think>",), ("</seed:think>",), (calls.SEED,), ("<seed:eos>", "<seed:bos>assistant"))
APERTUS = Shape("apertus", ("<|inner_prefix|>",), ("<|inner_suffix|>",), (calls.APERTUS,), _APERTUS_TURNS)
COHERE = Shape("cohere", ("<|START_THINKING|>",), ("<|END_THINKING|>",), (calls.COHERE,), _COHERE_TURNS)
COMMAND_R = Shape("command-r", calls=(calls.COMMAND_R,), turns=_COHERE_TURNS)
NEMOTRON = Shape(
    "nemotron", _OPEN, _CLOSE, (calls.NEMOTRON,), ("<SPECIAL_11>Assistant", "<SPECIAL_11>", "<SPECIAL_12>")
)
APRIEL = Shape("apriel", (_STEPS,), ("[BEGIN FINAL RESPONSE]",), (calls.TOOL_CALLS_LIST,), _APRIEL_TURNS)
TOOL_CALLS = Shape("tool-calls", _OPEN, _CLOSE, (calls.TOOL_CALLS,), ("<beginning_of_sentence>ai", "<end_of_sentence>"))
GRANITE = Shape("granite", _OPEN, _CLOSE, (calls.GRANITE, calls.WHOLE_JSON), ("<|end_of_role|>", "<|end_of_text|>"))
GIGACHAT = Shape("gigachat", calls=(calls.FUNCTION_CALL,), turns=("<|role_sep|>", "<|message_sep|>"))
GIGACHAT_3 = Shape("gigachat3", calls=(calls.FUNCTION_ROLE,), turns=("<|message_sep|>",))

_FAMILIES: tuple[tuple[tuple[str, ...], Shape], ...] = (
    (("<|channel|>", "<|message|>"), HARMONY),
    (("｜DSML｜", "tool_calls>"), DSML_4),
    (("｜DSML｜",), DSML),
    (("<｜tool▁calls▁begin｜>", "```json"), DEEPSEEK_R1),
    (("<｜tool▁calls▁begin｜>",), DEEPSEEK),
    (("<|tool_call>", "<tool_call|>"), GEMMA),
    (("<start_function_call>",), FUNCTION_GEMMA),
    (("[TOOL_CALLS]", "[CALL_ID]"), MISTRAL_V11),
    (("[TOOL_CALLS]", "[ARGS]"), MISTRAL),
    (("[TOOL_CALLS]",), MISTRAL_V3),
    (("<|tool_calls_section_begin|>",), KIMI),
    (("<|tool_call:begin|>",), SOLAR),
    (("<minimax:tool_call>",), MINIMAX),
    (("<ifm|tool_calls>",), IFM),
    (("<seed:tool_call>",), SEED),
    (("<tool_calls{}>", "opensource"), _suffixed(":opensource")),
    (("<arg_key>",), GLM),
    (("<function=", "<parameter="), QWEN_XML),
    (('<function name="', '<param name="'), MINICPM),
    (("xml_tools", "python_tools"), SMOLLM3),
    (("<|tool_call_start|>",), LFM),
    (("<|tool_list_start|>",), LFM),
    (("<|tools_prefix|>",), APERTUS),
    (("<|START_ACTION|>",), COHERE),
    (("Action: ```json", "tool_name"), COMMAND_R),
    (("<TOOLCALL>",), NEMOTRON),
    (("[BEGIN FINAL RESPONSE]",), APRIEL),
    (("<tool_calls>",), TOOL_CALLS),
    (("<|tool_call|>",), GRANITE),
    (("<|function_call|>",), GIGACHAT),
    (("function call", "<|role_sep|>"), GIGACHAT_3),
    (("<tool_call>",), HERMES),
    (("<function=",), FUNCTIONARY),
    (("<|start_header_id|>", '"parameters"'), LLAMA),
    (("<|python_tag|>",), LLAMA),
)
"""What the source of a template has, all of it, and the shape of answers. The first that fits counts."""


def shape_of(source: str) -> Shape:
    """Return the shape of answers to prompts of a chat template, by what its source has."""
    for signs, shape in _FAMILIES:
        if all(sign in source for sign in signs):
            return shape
    return GENERIC
