"""A model and a result at a prompt and in a notebook, and the manners of load."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import synthetic
import zincmetal
from support.reference_models import reference_models
from zincmetal import gguf, models
from zincmetal.api.naming import model_name, rounded
from zincmetal.api.result import Result

PATH = reference_models("llama")[0]
RESULT = Result("a <b>\nc & d", [1, 2, 3], "stop", 4, 10.0, 12.34, 1 << 20, stop_string="</x>")


def test_a_model_says_what_it_is_on_which_device() -> None:
    with zincmetal.load(PATH, device="cpu", context=64) as model:
        assert (
            repr(model) == f"<Model {model_name(model.file, model.config)} on {model.device.info['name']}, context 64>"
        )
        assert repr(model).startswith("<Model llama ")
    assert repr(model).endswith(", context 64, closed>")


def test_a_mixture_is_named_as_its_makers_name_it(tmp_path: Path) -> None:
    """With the parameters that a token computes with: Qwen3.6-35B-A3B, a file of the full size without weights."""
    synthetic.write(tmp_path / "whole.gguf", synthetic.Sizes(), empty=True)
    with gguf.open(tmp_path / "whole.gguf") as file:
        assert model_name(file, models.configure(file)) == "qwen35moe 35B-A3B Q4_K"


@pytest.mark.parametrize(
    ("n", "shown"),
    [
        (34.66e9, "35B"),
        (3.02e9, "3B"),
        (1.54e9, "1.5B"),
        (134.5e6, "134M"),
        (9.97e6, "10M"),
        (512, "512"),
        (999e3, "999K"),
    ],
)
def test_parameters_are_rounded(n: float, shown: str) -> None:
    assert rounded(n, digits=1) == shown
    assert rounded(2.95e9) == rounded(3.46e9) == "3B"


def test_a_result_is_shown_in_a_line() -> None:
    assert repr(RESULT) == "<Result 'a <b>\\nc & d': 3 tokens, 12.3 tokens/s, stop at '</x>'>"
    assert len(repr(replace(RESULT, text="x" * 10_000))) < 140
    assert replace(RESULT) == RESULT != replace(RESULT, text="")


def test_a_result_in_a_notebook_is_text_and_no_markup() -> None:
    shown = RESULT._repr_html_()
    assert "a &lt;b&gt;\nc &amp; d" in shown
    assert "12.3 tokens/s" in shown
    assert "&lt;/x&gt;" in shown
    assert "<b>" not in shown


def test_load_takes_keywords_after_the_path() -> None:
    with pytest.raises(TypeError, match="positional argument"):
        zincmetal.load(PATH, 64)  # type: ignore[misc]
    kinds = {p.kind for name, p in inspect.signature(zincmetal.load).parameters.items() if name != "path"}
    assert kinds == {inspect.Parameter.KEYWORD_ONLY}


def test_a_fork_has_the_same_text_and_shares_the_engine() -> None:
    with zincmetal.load(PATH, device="cpu", context=64) as model, model.fork() as twin:
        assert isinstance(twin, zincmetal.Model)
        assert twin.text is model.text
        pairs: list[tuple[Any, Any]] = [(twin.file, model.file), (twin.device, model.device)]
        pairs.append((twin.engine, model.engine))
        assert all(mine is its for mine, its in pairs)
