"""Options of sampling: the accepted values, and errors that say why for the others."""

from __future__ import annotations

import math
from dataclasses import fields
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest

from support.naming import case_name
from zincmetal.errors import UsageError
from zincmetal.sampling.params import SamplingParams
from zincmetal.sampling.sampler import Sampler

INF = math.inf
HUGE = 10**5000
NAMES = [f.name for f in fields(SamplingParams)]
INTEGERS = ["top_k", "repeat_last_n", "seed"]
NUMBERS = [name for name in NAMES if name not in (*INTEGERS, "logit_bias", "logits_processors")]


class Index:
    def __init__(self, value=5):
        self.value = value

    def __index__(self):
        if isinstance(self.value, Exception):
            raise self.value
        return self.value


# ---- what is taken --------------------------------------------------------------------------------------------


def test_none_is_the_default():
    assert SamplingParams(**dict.fromkeys(NAMES)) == SamplingParams()


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("five", [5, np.int8(5), np.uint64(5), np.array(5), Index()], ids=case_name)
def test_integers(name, five):
    found = getattr(SamplingParams(**{name: five}), name)
    assert (found, type(found)) == (5, int)


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize(
    "half", [0.5, np.float16(0.5), np.float32(0.5), np.array(0.5), Fraction(1, 2), Decimal("0.5")], ids=case_name
)
def test_numbers(name, half):
    found = getattr(SamplingParams(**{name: half}), name)
    assert (found, type(found)) == (0.5, float)


@pytest.mark.parametrize("one", [1, np.int64(1), np.uint8(1), Index(1), np.array(1)], ids=case_name)
@pytest.mark.parametrize("name", NUMBERS)
def test_integers_are_numbers(name, one):
    found = getattr(SamplingParams(**{name: one}), name)
    assert (found, type(found)) == (1.0, float)


def test_what_special_values_mean():
    logits = np.array([1.0, 3.0, 2.0, 2.9], np.float32)

    def drawn(**options):
        sampler = Sampler(SamplingParams(**options))
        return {sampler.sample(logits, [1, 0, 0]) for _ in range(300)}

    everything = {0, 1, 2, 3}
    assert drawn(temperature=0) == drawn() == {1}
    assert drawn(temperature=1, top_p=0) == drawn(temperature=1, top_p=np.float32(0)) == {1}
    assert drawn(temperature=1, top_k=0) == drawn(temperature=1, top_k=-1) == everything
    assert drawn(temperature=1, min_p=0) == drawn(temperature=1, typical_p=1) == everything
    # Token 1 is the third last: only a window of three or more, or of everything, penalises it.
    assert drawn(presence_penalty=1, repeat_last_n=2) == drawn(presence_penalty=1, repeat_last_n=0) == {1}
    assert drawn(presence_penalty=1, repeat_last_n=3) == drawn(presence_penalty=1, repeat_last_n=-1) == {3}
    history = [1] + [0] * 5000
    assert Sampler(SamplingParams(presence_penalty=1, repeat_last_n=-1)).sample(logits, history) == 3


def test_seeds_that_mean_another_one_each_time():
    logits = np.zeros(1000, np.float32)
    for seed in (None, -1, np.int64(-1)):
        params = SamplingParams(1.0, seed=seed)
        assert params.seed is None
        assert len({Sampler(params).sample(logits, []) for _ in range(20)}) > 5
    for seed in (0, 1, 2**64, 2**128 - 1):
        assert len({Sampler(SamplingParams(1.0, seed=seed)).sample(logits, []) for _ in range(20)}) == 1
    firsts = {Sampler(SamplingParams(1.0, seed=seed)).sample(logits, []) for seed in (0, 1, 2**63, 2**64, 2**127)}
    assert len(firsts) > 1, "every bit of the seed counts"


@pytest.mark.parametrize(
    "bias",
    [
        {7: 1.5, 9: -INF},
        {"7": 1.5, "9": -INF},
        {np.int32(7): np.float32(1.5), Index(9): Decimal("-inf")},
        [(7, 1.5), (9, -INF)],
        [["7", Fraction(3, 2)], [9, -INF]],
        np.array([[7, 1.5], [9, -INF]], object),
        iter({7: 1.5, 9: -INF}.items()),
    ],
    ids=case_name,
)
def test_logit_bias(bias):
    found = SamplingParams(logit_bias=bias).logit_bias
    assert found == {7: 1.5, 9: -INF}
    assert {type(x) for pair in found.items() for x in pair} == {int, float}


def test_the_last_bias_for_a_token_counts():
    assert SamplingParams(logit_bias=[(7, 1.0), ("7", 2.0), ("007", 3.0)]).logit_bias == {7: 3.0}


def test_a_bias_for_no_token_of_the_model():
    params = SamplingParams(logit_bias={99: 1.0, 100: 1.0})
    params.check_vocabulary(101)
    with pytest.raises(UsageError, match="logit_bias: token id 100 is outside the vocabulary of 100"):
        params.check_vocabulary(100)
    with pytest.raises(UsageError, match="logit_bias: token id 9223372036854775807 is outside"):
        SamplingParams(logit_bias={2**63 - 1: 1.0}).check_vocabulary(100)


def test_what_the_caller_changes_later_changes_nothing():
    bias, processors = {1: 1.0}, [lambda ids, x: x]
    params = SamplingParams(logit_bias=bias, logits_processors=processors)
    bias[2] = 1.0
    processors.clear()
    assert params.logit_bias == {1: 1.0}
    assert len(params.logits_processors) == 1


# ---- what is refused ------------------------------------------------------------------------------------------

NEVER = [
    True,
    np.False_,
    "1",
    b"1",
    [1],
    np.array([1]),
    np.array([0.5, 0.5]),
    {},
    1j,
    object(),
    math.nan,
    INF,
    -INF,
    HUGE,
    -HUGE,
    Fraction(HUGE),
    Decimal("1e400"),
    Decimal("nan"),
    Index(HUGE),
    Index(RuntimeError("no")),
]
WRONG = [(name, value) for name in (*INTEGERS, *NUMBERS) for value in NEVER]
WRONG += [(name, -2) for name in (*INTEGERS, "temperature", "top_p", "min_p", "typical_p", "repeat_penalty")]
WRONG += [(name, value) for name in INTEGERS for value in (1.5, np.float32(1), Fraction(1), Decimal(1))]
WRONG += [("temperature", -0.1), ("top_k", 2**63), ("seed", 2**128), ("repeat_last_n", 2**63)]
WRONG += [(name, value) for name in ("top_p", "min_p", "typical_p") for value in (-0.1, 1.1, np.nextafter(1, 2))]
WRONG += [("typical_p", 0), ("repeat_penalty", 0), ("repeat_penalty", -0.5)]


def test_the_list_of_wrong_values_is_about_every_option():
    assert {name for name, _ in WRONG} == {*INTEGERS, *NUMBERS}


@pytest.mark.parametrize(("name", "value"), WRONG, ids=case_name)
def test_an_error_names_the_option_and_is_short(name, value):
    with pytest.raises(UsageError, match=rf"^{name} must be an? (finite |integer|number).*, not ") as raised:
        SamplingParams(**{name: value})
    assert len(str(raised.value)) < 200


@pytest.mark.parametrize(
    "value",
    [
        *(5, True, "7", "ab", b"ab", [7], [(7,)], [(7, 1, 2)], object(), HUGE, [None], np.array([7.0])),
        *({-1: 1.0}, {1.5: 1.0}, {True: 1.0}, {None: 1.0}, {"x": 1.0}, {"-1": 1.0}, {"": 1.0}, {"1.0": 1.0}),
        *({"²": 1.0}, {"9" * 5000: 1.0}, {HUGE: 1.0}, {Index(ZeroDivisionError("no")): 1.0}),
        *({1: INF}, {1: math.nan}, {1: None}, {1: "2"}, {1: True}, {1: HUGE}, {1: [2]}, {1: Fraction(HUGE)}),
        *([([], 1.0)], [({}, 1.0)], [(1, "x" * 10**6)]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_biases_that_are_none(value):
    with pytest.raises(UsageError, match=r"^logit_bias must be a mapping of token ids to numbers or -inf") as raised:
        SamplingParams(logit_bias=value)
    assert len(str(raised.value)) < 250


@pytest.mark.parametrize("value", [5, True, "ab", [1], [None], lambda ids, x: x, HUGE, np.array(1)], ids=case_name)
def test_processors_that_are_none(value):
    with pytest.raises(UsageError, match=r"^logits_processors must be a sequence of functions, not "):
        SamplingParams(logits_processors=value)


# ---- processors -----------------------------------------------------------------------------------------------


def processed(result, n=4):
    """Returns the greedy token after a processor."""
    return Sampler(SamplingParams(logits_processors=[lambda ids, x: result])).sample(np.zeros(n, np.float32), [])


@pytest.mark.parametrize(
    "result",
    [
        [0, 1, 3, 2],
        (0.0, -INF, 3.0, 2.0),
        np.array([0, 1, 3, 2], np.int8),
        np.array([0, 1, 2**63, 2], np.uint64),
        np.array([0, 1, 3, 2], np.float16),
        np.array([-INF, -1e300, -1.0, -INF]),
        np.array([0, 1, 1e300, 3e38]),
        np.array([0.0, 1.0, 3.0, 2.0, 9.0])[:4],
        np.array([0, 9, 1, 9, 3, 9, 2, 9], np.float32)[::2],
    ],
)
def test_what_a_processor_may_return(result):
    assert processed(result) == 2


def test_a_finite_number_forbids_nothing():
    result = np.array([-1e300, -INF, -INF, -INF])
    assert processed(result) == 0


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, "NoneType of object"),
        ("text", "str of <U4"),
        (np.array([True] * 4), "ndarray of bool"),
        ([HUGE] * 4, "list of object"),
        (np.zeros(4, complex), "ndarray of complex128"),
        ([[1], [1, 2]], "list, not logits"),
        (np.zeros(3), r"shape \(3,\), not \(4,\)"),
        (np.zeros((1, 4)), r"shape \(1, 4\), not \(4,\)"),
        (1.5, r"shape \(\), not \(4,\)"),
        ([0, math.nan, 0, 0], r"NaN or \+inf"),
        ([0, INF, 0, 0], r"NaN or \+inf"),
    ],
)
def test_what_a_processor_may_not_return(result, message):
    with pytest.raises(UsageError, match=rf"^logits_processors\[0\] returned {message}"):
        processed(result)


@pytest.mark.parametrize("error", [KeyError("mine"), ValueError("mine"), TypeError("mine"), KeyboardInterrupt()])
def test_what_a_processor_raises_is_not_changed(error):
    def raises(ids, x):
        raise error

    for temperature in (0.0, 1.0):
        with pytest.raises(type(error)) as raised:
            Sampler(SamplingParams(temperature, logits_processors=[raises])).sample(np.zeros(4, np.float32), [])
        assert raised.value is error
