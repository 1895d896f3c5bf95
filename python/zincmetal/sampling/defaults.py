"""Default options of sampling for chat: from the file, or else as the authors of the model publish them.

Greedy is no default for models that think: they repeat themselves when the most probable token is always taken.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from ..errors import abbreviate

KEY = "general.sampling."
ALL_TOKENS = -1  # a number of last tokens that stands for all
LARGEST = 1 << 30  # tokens; more than any vocabulary or context has
FILTERS = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}  # filters, with the values that turn them off

Number = float | int


class _Field(NamedTuple):
    """Field of SamplingParams, and the function that converts the file's value. It returns None for a bad value."""

    name: str
    value: Callable[[float], Number | None]


def _share(x: float) -> Number | None:
    return None if x <= 0 else min(x, 1.0)


_FIELDS = {
    "temp": _Field("temperature", lambda x: max(x, 0.0)),  # llama.cpp also takes a negative one as greedy
    "top_k": _Field("top_k", lambda x: min(max(int(x), 0), LARGEST)),
    "top_p": _Field("top_p", _share),
    "min_p": _Field("min_p", lambda x: x if 0 <= x <= 1 else None),
    "penalty_last_n": _Field("repeat_last_n", lambda x: ALL_TOKENS if x < 0 else min(int(x), LARGEST)),
    "penalty_repeat": _Field("repeat_penalty", lambda x: x if x > 0 else None),
}
# Keys of samplers that zincmetal lacks. With each: the key that turns its sampler on, and the value for off.
_MISSING = {
    "xtc_probability": ("xtc_probability", 0.0),
    "xtc_threshold": ("xtc_probability", 0.0),
    "mirostat": ("mirostat", 0),
    "mirostat_tau": ("mirostat", 0),
    "mirostat_eta": ("mirostat", 0),
}

_QWEN_THINKS: dict[str, Number] = {"temperature": 0.6, "top_p": 0.95, "top_k": 20}
_QWEN_ANSWERS: dict[str, Number] = {"temperature": 0.7, "top_p": 0.8, "top_k": 20}

# Patterns of the architecture and of the model's name, and the options that the authors publish. First match counts.
_FAMILIES: list[tuple[str, str, dict[str, Number]]] = [
    ("gemma3", "", {"temperature": 1.0, "top_k": 64, "top_p": 0.95}),
    (r"qwen35(moe)?", r"qwen-?3\.5", {"temperature": 1.0, "top_p": 0.95, "top_k": 20, "presence_penalty": 1.5}),
    (r"qwen35(moe)?", "", {"temperature": 1.0, "top_p": 0.95, "top_k": 20}),
    (r"qwen3(moe)?", "coder", _QWEN_ANSWERS | {"repeat_penalty": 1.05}),
    (r"qwen3(moe)?", "instruct", _QWEN_ANSWERS),
    (r"qwen3(moe)?", "", _QWEN_THINKS),
    ("qwen2|llama", r"deepseek-?r1", {"temperature": 0.6, "top_p": 0.95}),
    ("qwen2", "qwq", _QWEN_THINKS),
    ("qwen2", "instruct", _QWEN_ANSWERS | {"repeat_penalty": 1.05}),
    ("llama", "smollm-?2.*instruct", {"temperature": 0.2, "top_p": 0.9}),
    ("llama", "magistral", {"temperature": 0.7, "top_p": 0.95}),
    ("llama", "mistral-small", {"temperature": 0.15}),
    ("llama", r"llama-?3.*instruct", {"temperature": 0.6, "top_p": 0.9}),
    ("mistral3", "magistral|reasoning", {"temperature": 0.7, "top_p": 0.95}),
    ("mistral3", "", {"temperature": 0.15}),
    ("smollm3", "", {"temperature": 0.6, "top_p": 0.95}),
    ("seed_oss", "", {"temperature": 1.1, "top_p": 0.95}),
    ("lfm2(moe)?", r"lfm-?2(?!\.5)", {"temperature": 0.3, "min_p": 0.15, "repeat_penalty": 1.05}),
]


def chat_defaults(metadata: Mapping[str, Any]) -> dict[str, Number]:
    """Find the fields of ``SamplingParams`` for a chat whose caller sets none.

    They come from ``general.sampling.*`` of the file, or else from the table of families. Empty (greedy) if neither
    has a value. A warning names the options of the file that zincmetal does not have. A file with filters but without
    a temperature gets temperature 1.
    """
    asked = {key.removeprefix(KEY): value for key, value in metadata.items() if key.startswith(KEY)}
    return _of_file(asked) if asked else _of_family(metadata)


def _of_file(asked: Mapping[str, Any]) -> dict[str, Number]:
    found: dict[str, Number] = {}
    ignored = []
    for name, value in asked.items():
        number = _number(value)
        made = None
        if name in _FIELDS and number is not None:
            made = _FIELDS[name].value(number)
        if made is not None:
            found[_FIELDS[name].name] = made
        elif not _is_off(name, asked):
            ignored.append(f"{KEY}{name} = {abbreviate(value)}")
    if ignored:
        message = "chat is sampled without these options of the file, which zincmetal does not have: %s"
        logging.getLogger("zincmetal.sampling").warning(message, ", ".join(sorted(ignored)))
    if "temperature" not in found and any(found.get(name, off) != off for name, off in FILTERS.items()):
        found["temperature"] = 1.0  # the default of the configuration files that converters read
    return found


def _is_off(name: str, asked: Mapping[str, Any]) -> bool:
    """Return True for a key of a sampler that the file does not turn on."""
    switch, off = _MISSING.get(name, (name, None))
    value = _number(asked.get(switch, off))
    return name in _MISSING and value == off


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    if not math.isfinite(number) or type(value).__name__ in ("bool", "bool_", "str"):
        return None
    short = float(f"{number:.7g}")
    with np.errstate(over="ignore"):
        single = float(np.float32(short))
    return short if single == number else number  # a float32 becomes 0.9, not 0.8999999761581421


def _of_family(metadata: Mapping[str, Any]) -> dict[str, Number]:
    architecture = str(metadata.get("general.architecture", ""))
    words = (metadata.get(f"general.{key}") for key in ("name", "basename", "finetune", "version"))
    name = "-".join(re.sub(r"[\s_]+", "-", word) for word in words if isinstance(word, str)).lower()
    for family, said, values in _FAMILIES:
        if re.fullmatch(family, architecture) and re.search(said, name):
            return dict(values)
    return {}
