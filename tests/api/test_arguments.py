"""Arguments: the accepted values, and that every other value is a UsageError that says why."""

from __future__ import annotations

import math
from collections import deque
from decimal import Decimal
from enum import IntEnum
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

import zincmetal
from support import gguf_builder as b
from support.naming import case_name
from support.paths import DATA
from support.reference_models import reference_models
from support.vocab_builder import byte_level
from zincmetal import arguments, gguf, models
from zincmetal.errors import UnsupportedModelError, UsageError, abbreviate, quote
from zincmetal.plan.estimate import device_budget
from zincmetal.text.chat.template import ChatTemplate
from zincmetal.text.tokenizer import Tokenizer

INF = math.inf
HUGE = 10**5000


class Index:
    def __init__(self, value):
        self.value = value

    def __index__(self):
        if isinstance(self.value, BaseException):
            raise self.value
        return self.value


class Real(float):
    """A number whose conversion fails."""

    def __float__(self):
        raise ArithmeticError("no")


class Silent:
    def __repr__(self):
        raise RuntimeError("no")


class Endless(list):
    def __len__(self):
        raise OverflowError("no")

    def __iter__(self):
        raise LookupError("no")


class Odd(IntEnum):
    FIVE = 5


# ---- integers and numbers -------------------------------------------------------------------------------------

FIVES = [5, np.int8(5), np.uint64(5), np.array(5), np.array(5, np.uint16), Index(5), Odd.FIVE]
NO_NUMBERS = [
    True,
    False,
    np.True_,
    np.array(True),
    "5",
    b"5",
    [5],
    (5,),
    {5},
    {5: 5},
    np.array([5]),
    np.array([5.0, 6.0]),
    np.array([[5]]),
    np.array("5"),
    np.timedelta64(5, "s"),
    np.datetime64("2026-01-01"),
    5j,
    np.complex64(5),
    object(),
    Silent(),
    Index(ZeroDivisionError("no")),
    Index("5"),
    Endless(),
    INF,
    -INF,
    math.nan,
    np.float32("nan"),
]


@pytest.mark.parametrize("value", FIVES, ids=case_name)
def test_what_is_an_integer(value):
    found = arguments.integer("n", value, 0, 9)
    assert (found, type(found)) == (5, int)
    found = arguments.number("x", value, 0, 9)
    assert (found, type(found)) == (5.0, float)


@pytest.mark.parametrize(
    "value", [0.5, np.float16(0.5), np.longdouble(0.5), Fraction(1, 2), Decimal("0.5"), np.array(0.5)], ids=case_name
)
def test_what_is_a_number(value):
    found = arguments.number("x", value, 0, 1)
    assert (found, type(found)) == (0.5, float)
    with pytest.raises(UsageError, match=r"^n must be an integer from 0 to 9, not "):
        arguments.integer("n", value, 0, 9)


@pytest.mark.parametrize("value", [*NO_NUMBERS, HUGE, -HUGE, Index(HUGE), np.array(HUGE), 10, -1, None], ids=case_name)
def test_what_is_neither(value):
    with pytest.raises(UsageError, match=r"^n must be an integer from 0 to 9, not ") as raised:
        arguments.integer("n", value, 0, 9)
    assert len(str(raised.value)) < 160
    with pytest.raises(UsageError, match=r"^x must be a number from 0 to 9, not "):
        arguments.number("x", value, 0, 9)
    for more in (Real(5.0), Decimal("sNaN"), Decimal("1e400"), Fraction(HUGE), np.longdouble("1e4000")):
        with pytest.raises(UsageError, match=r"^x must be a finite number, not "):
            arguments.number("x", more)


def test_the_cause_of_a_failure_is_kept():
    cause = ZeroDivisionError("why")
    with pytest.raises(UsageError) as raised:
        arguments.integer("n", Index(cause), 0, 9)
    assert raised.value.__cause__ is cause
    with pytest.raises(KeyboardInterrupt):
        arguments.integer("n", Index(KeyboardInterrupt()), 0, 9)


def test_none_is_the_default_where_there_is_one():
    assert arguments.integer("n", None, 0, 9, default=3) == 3
    assert arguments.integer("n", None, 0, 9, default=0) == 0
    assert arguments.number("x", None, default=0.5) == 0.5
    assert arguments.flag("f", None, default=False) is False
    assert arguments.choice("c", None, ["a", "b"], default="b") == "b"
    for call in (
        lambda: arguments.integer("n", None, 0, 9),
        lambda: arguments.number("n", None),
        lambda: arguments.flag("n", None),
        lambda: arguments.choice("n", None, ["a"]),
    ):
        with pytest.raises(UsageError, match=r"^n must be .*, not None$"):
            call()


def test_limits():
    assert arguments.integer("n", 0, 0) == 0
    assert arguments.integer("n", HUGE) == HUGE
    for low, high, words in (
        (1, None, "an integer of at least 1"),
        (None, -1, "an integer of at most -1"),
        (1, 2**31 - 1, "an integer from 1 to 2147483647"),
    ):
        with pytest.raises(UsageError, match=f"^n must be {words}, not 0$"):
            arguments.integer("n", 0, low, high)
    with pytest.raises(UsageError, match=r"^n must be an integer of at least 1 \(what it means\), not 0$"):
        arguments.integer("n", 0, 1, note="what it means")
    with pytest.raises(UsageError, match=r"^x must be a number above 0, not 0$"):
        arguments.number("x", 0, 0, above=True)
    with pytest.raises(UsageError, match=r"^x must be a number above 0 and at most 1 \(1: off\), not 2$"):
        arguments.number("x", 2, 0, 1, note="1: off", above=True)
    assert arguments.number("x", -INF, finite=False) == -INF
    for value in (math.nan, INF):
        with pytest.raises(UsageError, match=r"^x must be a number of at most 1, not "):
            arguments.number("x", value, high=1, finite=False)


# ---- the others -----------------------------------------------------------------------------------------------


def test_flags():
    assert arguments.flag("f", True) is arguments.flag("f", np.True_) is arguments.flag("f", np.array(True)) is True
    for value in (0, 1, "true", None, np.int8(1), np.array([True]), Silent()):
        with pytest.raises(UsageError, match=r"^f must be True or False, not "):
            arguments.flag("f", value)


def test_choices():
    assert arguments.choice("kv", np.str_("f16"), ["f16", "f32"]) == "f16"
    for value in ("f8", ["f16"], b"f16", 16, {}, HUGE, Silent(), np.array(["f16"])):
        with pytest.raises(UsageError, match=r"^kv must be one of f16, f32, not "):
            arguments.choice("kv", value, ["f16", "f32"])


def test_texts():
    assert arguments.text("t", "a") == "a"
    assert arguments.texts("stop", None) == arguments.texts("stop", []) == ()
    assert arguments.texts("stop", "ab") == ("ab",)
    assert arguments.texts("stop", np.array(["a", "b"])) == arguments.texts("stop", iter("ab")) == ("a", "b")
    for value in (5, True, b"ab", {"a": 1}, {"a"}, HUGE, Silent(), Endless(), np.array("a")):
        with pytest.raises(UsageError, match=r"^stop must be a string or a sequence of strings, not "):
            arguments.texts("stop", value)
    for value in ([None], ["a", b"b"], [HUGE], np.array([1])):
        with pytest.raises(UsageError, match=r"^stop\[\d\] must be a string, not "):
            arguments.texts("stop", value)
    for value in (None, b"a", 5, ["a"], HUGE, Silent()):
        with pytest.raises(UsageError, match=r"^t must be a string, not "):
            arguments.text("t", value)


def test_token_ids():
    for value in ([1, 2], (1, np.int8(2)), np.array([1, 2], np.uint8), iter([1, Index(2)]), range(1, 3), deque([1, 2])):
        found = arguments.token_ids(value, n_vocab=3)
        assert (found, {type(t) for t in found}) == ([1, 2], {int})
    assert arguments.token_ids([]) == arguments.token_ids(np.array([], np.int64)) == []
    for value in (None, 5, b"ab", bytearray(b"ab"), {1: 2}, {1, 2}, HUGE, Silent(), Endless(), np.array(5), "ab"):
        with pytest.raises(UsageError, match=r"^prompt must be text or a sequence of token ids, not "):
            arguments.token_ids(value)
        with pytest.raises(UsageError, match=r"^tokens must be a sequence of token ids, not "):
            arguments.token_ids(value, "tokens")
    for value in ([1, 2.0], [0, True], np.array([1.0, 2.0]), [1, None], [1, [2]], np.ones((2, 2), int), ["a"]):
        with pytest.raises(UsageError, match=r"^prompt\[[01]\] must be an integer, not "):
            arguments.token_ids(value)
    for wrong in (3, -1, HUGE, -HUGE, 2**64):
        with pytest.raises(UsageError, match=r"^prompt\[1\]: token id .* is outside the vocabulary of 3$"):
            arguments.token_ids([0, wrong], n_vocab=3)


def test_paths():
    assert arguments.path("a/b") == arguments.path(Path("a/b")) == Path("a/b")
    assert arguments.path("a\udcff") == Path("a\udcff"), "a name that is not UTF-8"

    class Bytes:
        def __fspath__(self):
            return b"a"

    class Raises:
        def __fspath__(self):
            raise LookupError("no")

    for value in (None, b"a", 3, ["a"], "a\0b", "a\ud800", Bytes(), Raises(), HUGE, Silent()):
        with pytest.raises(UsageError, match=r"^path must be a path \(a string or os.PathLike\), not "):
            arguments.path(value)


def test_callbacks():
    assert arguments.callback("progress", None) is None
    assert arguments.callback("progress", print) is print
    for value in (5, "print", [print], HUGE, Silent()):
        with pytest.raises(UsageError, match=r"^progress must be a function or None, not "):
            arguments.callback("progress", value)


# ---- values in messages ---------------------------------------------------------------------------------------


def test_values_are_shown_short_whatever_they_are():
    itself: list[object] = [1]
    itself.append(itself)
    for value, shown in (
        (5, "5"),
        (-(2**63), "-9223372036854775808"),
        (HUGE, "an integer of about 5001 digits"),
        (True, "True"),
        (None, "None"),
        (0.5, "0.5"),
        (np.float32(0.5), "0.5"),
        ("a\nb", r"'a\nb'"),
        ("x" * 99, repr("x" * 60 + "…")),
        (b"ab\0", r"b'ab\x00'"),
        (b"x" * 99, repr(b"x" * 60) + "…"),
        ([1, "a", HUGE], "[1, 'a', an integer of about 5001 digits]"),
        (np.arange(9), "[0, 1, 2, 3, 4, …]"),
        ({1: "a"}, "{1: 'a'}"),
        ({i: i for i in range(9)}, "{0: 0, 1: 1, 2: 2, 3: 3, 4: 4, …}"),
        (itself, "[1, [1, [1, …]]]"),
        (Silent(), "an object of type Silent"),
        ([Silent()], "[an object of type Silent]"),
        (Endless(), "an object of type Endless"),
    ):
        assert abbreviate(value) == shown
    assert len(abbreviate([["x" * 99] * 9] * 9)) < 1000


def test_quotes_are_of_plain_strings():
    class Loud(str):
        def __repr__(self):
            raise RuntimeError("no")

        __str__ = __len__ = __getitem__ = __repr__

    assert quote(Loud("a")) == abbreviate(Loud("a")) == "'a'"


# ---- digits that Python does not convert ----------------------------------------------------------------------


@pytest.mark.parametrize("limit", ["9" * 5000, "9" * 20, "-1", "1e9", "²"], ids=case_name)
def test_a_memory_limit_that_is_no_number_of_bytes(monkeypatch, limit):
    monkeypatch.setenv("ZINCMETAL_MEMORY_LIMIT", limit)
    with pytest.raises(UsageError, match=r"^ZINCMETAL_MEMORY_LIMIT must be a number of bytes") as raised:
        device_budget(1 << 30)
    assert len(str(raised.value)) < 200


def test_a_tensor_of_a_block_with_thousands_of_digits(tmp_path):
    """The tensor belongs to no block, so no dispatch reads it."""
    source = reference_models("qwen2")[0]
    image = source.read_bytes()
    with gguf.open(source) as file:
        data = min(t.offset for t in file.tensors.values())
        table = image.index(b.string(next(iter(file.tensors))))  # where the table's rows begin
        n = len(file.tensors)
    used = len(image) - data
    padding = bytes(-used % 32)
    row = b.tensor("blk." + "9" * 5000 + ".x", [1], 0, used + len(padding))
    head = image[:8] + b.u64(n + 1) + image[16:table] + row + image[table:data]
    path = tmp_path / "name.gguf"
    path.write_bytes(head + bytes(-len(head) % 32) + image[data:] + padding + bytes(32))
    with pytest.raises(UnsupportedModelError, match="no use for 1 tensors") as raised:
        zincmetal.load(path, device="cpu")
    assert len(str(raised.value)) < 400


NO_TEXT = [None, 3, 0.5, True, b"x", [], Decimal("sNaN"), np.array(["x"]), np.timedelta64(1), object()]


@pytest.mark.parametrize("wrong", NO_TEXT, ids=case_name)
def test_what_is_no_path_and_no_template(wrong):
    with pytest.raises(UsageError, match="path must be a path"):
        gguf.open(wrong)
    with pytest.raises(UsageError, match="source must be a string"):
        ChatTemplate(wrong)
    with pytest.raises(UsageError, match="name must be a string"):
        ChatTemplate("x").choose(wrong)


def test_a_context_of_more_digits_than_python_prints():
    with gguf.open(DATA / "llama-q4_k_m.gguf") as file, pytest.raises(UsageError, match="context must be"):
        models.configure(file, 10**5000)


def test_decoding_an_array_without_dimensions():
    tokenizer = Tokenizer.from_metadata(byte_level())
    with pytest.raises(UsageError, match="token ids are needed"):
        tokenizer.decode(np.array(3))
    assert tokenizer.decode(np.array([65, 66])) == tokenizer.decode([65, 66])
