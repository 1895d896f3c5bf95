"""Default sampling of a chat: the file's parameters, else the family's."""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np
import pytest

from zincmetal.sampling.defaults import ALL_TOKENS, LARGEST, chat_defaults
from zincmetal.sampling.params import SamplingParams

S = "general.sampling."


def of_file(**values: Any) -> dict[str, Any]:
    return {"general.architecture": "gemma3"} | {S + key: value for key, value in values.items()}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"temp": 0.7}, {"temperature": 0.7}),
        ({"temp": -1.0}, {"temperature": 0.0}),
        ({"top_k": 40, "top_p": 0.9, "min_p": 0.05}, {"top_k": 40, "top_p": 0.9, "min_p": 0.05, "temperature": 1.0}),
        ({"top_k": -1, "top_p": 1.5}, {"top_k": 0, "top_p": 1.0}),
        ({"penalty_last_n": 32, "penalty_repeat": 1.1}, {"repeat_last_n": 32, "repeat_penalty": 1.1}),
        ({"penalty_last_n": -1}, {"repeat_last_n": ALL_TOKENS}),
        ({"top_k": 2**64 - 1, "temp": 0.0}, {"top_k": LARGEST, "temperature": 0.0}),
        ({"penalty_last_n": 1e30}, {"repeat_last_n": LARGEST}),
        ({"temp": float(np.float32(0.9)), "top_p": 0.123456789}, {"temperature": 0.9, "top_p": 0.123456789}),
        ({"temp": np.float32(0.5), "top_k": np.int32(7)}, {"temperature": 0.5, "top_k": 7}),
        ({"temp": 1, "mirostat": 0, "mirostat_tau": 5.0, "xtc_probability": 0.0, "xtc_threshold": 0.1}, {"temperature": 1}),  # noqa: E501
    ],
)  # fmt: skip
def test_a_file_that_says_how_is_followed(
    values: dict[str, Any], expected: dict[str, float], caplog: pytest.LogCaptureFixture
) -> None:
    found = chat_defaults(of_file(**values))
    assert found == expected
    assert not caplog.records
    SamplingParams(**found)


@pytest.mark.parametrize(
    "values",
    [
        {"mirostat": 2},
        {"mirostat": 1, "mirostat_tau": 4.0},
        {"xtc_probability": 0.5},
        {"sequence": "top_k;temperature"},
        {"dry_multiplier": 0.8},
        {"temp": math.nan},
        {"temp": "hot"},
        {"temp": True},
        {"top_p": 0.0},
        {"min_p": 2.0},
        {"penalty_repeat": 0.0},
    ],
)
def test_what_cannot_be_followed_is_named(values: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "zincmetal"):
        assert chat_defaults(of_file(**values)) == {}
    (record,) = caplog.records
    assert all(S + name in record.getMessage() for name in values)


@pytest.mark.parametrize(
    ("architecture", "name", "expected"),
    [
        ("qwen3", "Qwen3 0.6B", (0.6, 0.95, 20)),
        ("qwen3moe", "Qwen3-30B-A3B-Thinking-2507", (0.6, 0.95, 20)),
        ("qwen3moe", "Qwen3 30B A3B Instruct 2507", (0.7, 0.8, 20)),
        ("qwen3moe", "Qwen3-Coder-30B-A3B-Instruct", (0.7, 0.8, 20)),
        ("qwen35moe", "Qwen3.6 35B A3B", (1.0, 0.95, 20)),
        ("qwen35", "Qwen3.5-4B", (1.0, 0.95, 20)),
        ("gemma3", "Gemma 3 270m It", (1.0, 0.95, 64)),
        ("qwen2", "Qwen2.5 7B Instruct", (0.7, 0.8, 20)),
        ("qwen2", "QwQ 32B", (0.6, 0.95, 20)),
        ("qwen2", "DeepSeek R1 Distill Qwen 7B", (0.6, 0.95, 0)),
        ("llama", "Llama 3.2 1B Instruct", (0.6, 0.9, 0)),
        ("llama", "Meta-Llama-3.1-8B-Instruct", (0.6, 0.9, 0)),
        ("llama", "my own model", (0.0, 1.0, 0)),
        ("qwen2", "Qwen2.5 7B", (0.0, 1.0, 0)),
        ("unheard-of", "x", (0.0, 1.0, 0)),
    ],
)
def test_families(architecture: str, name: str, expected: tuple[float, float, int]) -> None:
    found = SamplingParams(**chat_defaults({"general.architecture": architecture, "general.name": name}))
    assert (found.temperature, found.top_p, found.top_k) == expected


def test_a_name_may_stand_in_several_keys() -> None:
    meta = {"general.architecture": "qwen3", "general.basename": "Qwen3", "general.finetune": "Instruct"}
    assert chat_defaults(meta)["temperature"] == 0.7
    assert chat_defaults({"general.architecture": 5, "general.name": None}) == {}


def test_what_is_returned_is_the_callers_own() -> None:
    meta = {"general.architecture": "gemma3"}
    chat_defaults(meta).clear()
    assert chat_defaults(meta)["top_k"] == 64
