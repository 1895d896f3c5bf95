"""The table of operations: operands are found by name, and wrong ones are refused."""

from __future__ import annotations

from typing import Any

import pytest

from zincmetal.gguf.quants import F32
from zincmetal.graph.ops import CHOSEN, LOGITS, PAGES, RESULTS, SIGNATURES, STEP, Op, State, Value, Weight

X, Y, W = Value("x", 8), Value("y", 4), Weight("w", F32, (4, 8))


def test_operands_are_found_by_name():
    op = Op("linear", weight=W, x=X, out=Y)
    assert (op["step"], op["weight"], op["x"], op["out"]) == (STEP, W, X, Y)
    assert (op.reads, op.writes) == ((STEP, W, X), (Y,))
    assert op.replace(x=Value("other", 8)).value("x").name == "other"
    assert Op("argmax").writes == (CHOSEN, RESULTS)


def test_an_operand_that_was_left_out():
    op = Op("add", a=X, b=X, out=X)
    assert op.get("bias") is None
    with pytest.raises(KeyError, match="bias"):
        op["bias"]
    stack = Op("linear_stack", x=X, matrices=[W, W], outs=[Y, Y])
    assert (stack.all("matrices"), stack.all("glu")) == ((W, W), ())


def test_the_logits_stand_where_a_value_is_written():
    assert Op("linear", weight=W, x=X, out=LOGITS).out == LOGITS
    with pytest.raises(TypeError, match="linear takes x, a value"):
        Op("linear", weight=W, x=LOGITS, out=Y)


@pytest.mark.parametrize(
    ("kind", "given", "wrong"),
    [
        ("linaer", {}, "no operation is called 'linaer'"),
        ("linear", {"weight": W, "x": X}, r"linear takes out, a value or state \[T,m\], not None"),
        ("linear", {"weight": X, "x": X, "out": Y}, "linear takes weight, a weight .*not Value"),
        ("linear", {"weight": W, "x": W, "out": Y}, "linear takes x, a value .*not Weight"),
        ("linear", {"weight": W, "x": X, "out": Y, "residual": X}, "linear takes no residual"),
        ("linear", {"weight": W, "x": X, "out": Y, "step": PAGES}, "linear takes step, a state, not"),
        ("rms_norm", {"weight": W, "x": X, "out": Y}, "rms_norm needs eps"),
        ("linear_stack", {"x": X, "matrices": [W, X], "outs": [Y, Y]}, "linear_stack takes matrices, a weight"),
        ("attention", {"q": X, "k_cache": State("v_cache", 0)}, "attention takes k_cache, a state, not"),
    ],
)
def test_wrong_operands_are_refused(kind: str, given: dict[str, Any], wrong: str):
    with pytest.raises(TypeError, match=wrong):
        Op(kind, **given)


def test_states_have_the_names_of_their_buffers():
    assert (State("k_cache", 12).name, State("logits").name) == ("k_cache.12", "logits")


def test_names_are_those_of_one_operand():
    for kind, signature in SIGNATURES.items():
        names = [slot.name for slot in signature.slots]
        assert len(set(names)) == len(names), kind
        assert not set(names) & signature.attrs.keys(), kind
