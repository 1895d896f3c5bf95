"""Tools of a chat: functions as schemas, calls in answers, and the loop that carries them out."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import pytest

import zincmetal
from support import text_model
from zincmetal.api.result import Call, Result
from zincmetal.api.tools import Function, Reading, Tools, as_text, budget_of, carried_out, converse, described
from zincmetal.errors import UsageError
from zincmetal.sampling.constrain import compiler
from zincmetal.sampling.constrain.budget import Budget
from zincmetal.text.tools.format import format_of

HERMES = "{%- if tools %}<tool_call>{% endif %}"  # what the source of such a template has


@dataclass
class Place:
    city: str
    country: str = "FR"


def weather(city: str, unit: Literal["c", "f"] = "c", days: Annotated[int, "1 to 7"] = 1) -> str:
    """Tell the weather.

    It is always sunny.

    Args:
        city: Name of the city,
            in English.
        unit (str): Celsius or Fahrenheit.

    Returns:
        A sentence.
    """
    return f"{days} sunny days in {city}, {unit}"


def distance(a: Place, b: Place) -> dict[str, Any]:
    """Compute a distance.

    :param a: Where it begins.
    :param b: Where
        it ends.
    """
    return {"from": a.city, "to": b, "km": 450}


def broken(x: int) -> None:
    raise RuntimeError(f"no {x}")


def untyped(x, y=2):
    return x


# ---- functions as schemas ------------------------------------------------------------------------------------------


def test_a_function_is_described_by_its_annotations_and_its_docstring():
    tool = Function.of(weather).tool
    assert tool["function"]["name"] == "weather"
    assert tool["function"]["description"] == "Tell the weather.\n\nIt is always sunny."
    assert tool["function"]["parameters"] == {
        "type": "object",
        "properties": {
            "city": {"description": "Name of the city, in English.", "type": "string"},
            "unit": {"description": "Celsius or Fahrenheit.", "enum": ["c", "f"]},
            "days": {"type": "integer", "description": "1 to 7"},
        },
        "required": ["city"],
        "additionalProperties": False,
    }


def test_arguments_may_be_classes():
    function = Function.of(distance)
    assert function.description == "Compute a distance."
    assert function.schema["properties"]["b"] == {"description": "Where it ends.", "$ref": "#/$defs/Place"}
    assert function.call({"a": {"city": "Paris"}, "b": {"city": "Lyon"}})["to"] == Place("Lyon")
    compiler.of_schema(function.schema)


@pytest.mark.parametrize("function", [weather, distance, broken, untyped])
def test_the_schema_of_a_function_is_a_grammar(function):
    compiler.of_schema(Function.of(function).schema)


def test_docstrings():
    assert described("") == ("", {})
    assert described("One line.") == ("One line.", {})
    assert described("About.\n\nArgs:\n    a: first\n    b: second\n\nMore.") == (
        "About.\n\nMore.",
        {"a": "first", "b": "second"},
    )


def starred(*args: int) -> None: ...


def named(**options: int) -> None: ...


def first_only(x: int, /) -> None: ...


async def later() -> None: ...


def odd(x: complex) -> None: ...


def missing(x: Nowhere) -> None: ...  # noqa: F821


@pytest.mark.parametrize("function", [starred, named, first_only, later, odd, missing, lambda x: x])
def test_a_function_that_cannot_be_a_tool_is_refused(function):
    with pytest.raises(UsageError):
        Function.of(function)


def test_tools_are_functions_or_schemas():
    schema = {"type": "function", "function": {"name": "other", "parameters": {"type": "object"}}}
    tools = Tools([weather, schema])
    assert [tool["function"]["name"] for tool in tools.shown] == ["weather", "other"]
    assert list(tools.functions) == ["weather"]
    assert list(tools.schemas) == ["weather", "other"]
    assert Tools([{"name": "plain"}]).schemas == {"plain": {}}
    assert Tools(None).shown is None
    assert Tools("odd").shown == "odd"  # the chat template says what is wrong with it
    with pytest.raises(UsageError, match="one name"):
        Tools([weather, weather])


def test_the_choice_of_a_tool():
    tools = Tools([weather, broken])
    assert tools.mode(None) == ("auto", tools.schemas)
    assert tools.mode("none")[0] == "none"
    assert tools.mode("broken") == ("required", {"broken": tools.schemas["broken"]})
    with pytest.raises(UsageError, match="tool_choice"):
        tools.mode("other")


def pairs():
    return {(1, 2): 3}


def endless():
    made = []
    made.append(made)
    return made


# ---- calls are carried out -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "arguments", "result", "error"),
    [
        (weather, {"city": "Paris", "days": 2}, "2 sunny days in Paris, c", ""),
        (weather, {}, None, "city is missing"),
        (weather, {"city": "P", "town": "x"}, None, "'town' is unknown"),
        (weather, {"city": 5}, None, "city: '5' is no string"),
        (weather, {"city": "P", "unit": "k"}, None, "unit"),
        (broken, {"x": 3}, None, "RuntimeError: no 3"),
        (untyped, {"x": [1]}, [1], ""),
        (pairs, {}, None, "keys must be str"),
        (endless, {}, None, "Circular reference"),
    ],
)
def test_a_call_has_a_result_or_an_error(function, arguments, result, error):
    made = carried_out(Function.of(function), Call(function.__name__, arguments))
    assert made.result == result
    assert error in made.error
    assert bool(error) == bool(made.error)


def test_results_are_told_as_text():
    assert as_text("ünï") == "ünï"
    assert json.loads(as_text({"a": Place("Paris"), "b": {1}, "c": (2,)})) == {
        "a": {"city": "Paris", "country": "FR"},
        "b": [1],
        "c": [2],
    }
    assert as_text(None) == "null"
    assert "object" in as_text(object())


class Scripted:
    """Model whose answers are given: one for each prompt."""

    def __init__(self, *answers: str, source: str = HERMES) -> None:
        self.answers, self.prompts, self.options = list(answers), list[list[dict[str, Any]]](), list[dict[str, Any]]()
        self.format = format_of(source)

    @contextmanager
    def submit_chat(self, messages: Sequence[dict[str, Any]], **options: Any):
        self.prompts.append([dict(message) for message in messages])
        self.options.append(options)
        text = self.answers.pop(0)
        result = Result(text, [], "stop", 1, 1.0, 1.0, 1)
        reading = Reading(self.format, Tools(options["tools"]), "")
        yield SimpleNamespace(result=lambda: reading(result), complete=reading)


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def talk(model: Scripted, *tools: Any, rounds: int = 4, **options: Any) -> Result:
    return converse(model, [{"role": "user", "content": "hi"}], Tools(tools), rounds, options)  # type: ignore[arg-type]


def test_the_model_goes_on_with_the_results_of_its_calls():
    model = Scripted(f"Let me see.\n{call('weather', city='Paris')}", "It is sunny in Paris.")
    result = talk(model, weather, max_tokens=9)
    assert result.text == "It is sunny in Paris."
    assert result.finish_reason == "stop"
    assert result.calls == (Call("weather", {"city": "Paris"}, "1 sunny days in Paris, c"),)
    roles = [message["role"] for message in result.messages]
    assert roles == ["user", "assistant", "tool", "assistant"]
    made = result.messages[1]["tool_calls"][0]
    assert json.loads(made["function"]["arguments"]) == {"city": "Paris"}
    assert result.messages[2]["tool_call_id"] == made["id"]
    assert result.messages[2]["content"] == "1 sunny days in Paris, c"
    assert model.prompts[1] == list(result.messages[:3])
    assert [options["max_tokens"] for options in model.options] == [9, 9]


def test_several_calls_of_one_answer_are_carried_out_in_their_order():
    both = call("weather", city="Rome") + "\n" + call("distance", a={"city": "A"}, b={"city": "B"})
    result = talk(Scripted(both, "done"), weather, distance)
    assert [made.name for made in result.calls] == ["weather", "distance"]
    ids = [made["id"] for made in result.messages[1]["tool_calls"]]
    assert len(set(ids)) == 2
    assert [message["tool_call_id"] for message in result.messages[2:4]] == ids
    assert json.loads(result.messages[3]["content"])["to"] == {"city": "B", "country": "FR"}


def test_an_error_of_a_function_is_told_to_the_model():
    model = Scripted(call("broken", x=1), call("broken", x="y"), "I give up.")
    result = talk(model, broken)
    assert [made.error for made in result.calls] == ["RuntimeError: no 1", "ValueError: x: \"'y'\" is no integer"]
    assert model.prompts[1][-1]["content"] == "error: RuntimeError: no 1"
    assert result.text == "I give up."


def test_an_interrupt_in_a_function_ends_the_chat():
    def stopping() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        talk(Scripted(call("stopping")), stopping)


def test_the_rounds_are_bounded():
    model = Scripted(*[call("weather", city=f"{i}") for i in range(9)])
    result = talk(model, weather, rounds=2)
    assert result.finish_reason == "max_rounds"
    assert len(model.prompts) == 3
    assert [made.result is None for made in result.calls] == [False, False, True]
    assert result.messages[-1]["tool_calls"]


def test_a_call_of_a_tool_that_is_no_function_is_left_to_the_caller():
    schema = {"type": "function", "function": {"name": "other", "parameters": {"type": "object"}}}
    result = talk(Scripted(call("other", a=1)), weather, schema)
    assert result.calls == (Call("other", {"a": 1}),)
    assert result.finish_reason == "stop"


def test_a_call_that_was_required_is_required_once():
    model = Scripted(call("weather", city="x"), "done")
    talk(model, weather, tool_choice="required")
    assert [options["tool_choice"] for options in model.options] == ["required", "auto"]


def test_reasoning_is_kept_in_the_messages():
    result = talk(Scripted("<think>hmm</think>\n" + call("weather", city="x"), "<think>so</think>\nSunny."), weather)
    assert result.text.strip() == "Sunny."
    assert [message.get("reasoning_content") for message in result.messages] == [None, "hmm", None, "so"]


def test_an_answer_without_calls_ends_at_once():
    result = talk(Scripted("Hello."), weather)
    assert (result.text, result.calls, len(result.messages)) == ("Hello.", (), 2)


# ---- calls of a model ----------------------------------------------------------------------------------------------

TEMPLATE = (
    "{%- if tools %}<tool_call>{{ tools | tojson }}</tool_call>{% endif %}"
    "{%- for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    text_model.save(path, template=TEMPLATE, eos_token_id=text_model.END, general={"llama.context_length": 4096})
    with zincmetal.load(path, device="cpu", context=4096) as model:
        yield model


def test_schemas_of_tools_keep_what_they_did_and_the_result_has_calls(tiny):
    schema = {"type": "function", "function": {"name": "other", "parameters": {"type": "object"}}}
    options = {"tools": [schema], "seed": 1, "temperature": 1.0}
    with tiny.submit_chat(text_model.HELLO, 12, **options) as handle:
        free = handle.result()
    asked = tiny.text.chat_ids(text_model.HELLO, [schema], None, True, False, {})
    assert free.text == tiny.generate(asked, 12, seed=1, temperature=1.0).text
    assert free.calls == ()
    assert tiny.chat(text_model.HELLO, 12, **options).text == free.text


def test_functions_are_shown_to_the_model_as_schemas(tiny):
    shown = Tools([weather]).shown
    expected = tiny.text.chat_ids(text_model.HELLO, shown, None, True, False, {})
    with tiny.submit_chat(text_model.HELLO, 1, tools=[weather]) as handle:
        assert handle.result().prompt_tokens == len(expected)


@pytest.mark.parametrize("tools", ["weather", {"name": "x"}, [5], 5])
def test_tools_of_another_kind_are_refused(tiny, tools):
    with pytest.raises(UsageError, match="tools"):
        tiny.chat(text_model.HELLO, 4, tools=tools)


def test_a_budget_of_reasoning_in_a_chat(tiny):
    with tiny.submit_chat(text_model.HELLO, 40, reasoning_budget=3, continue_final_message=False) as handle:
        handle.result()
    form = format_of(HERMES)
    assert budget_of(form, "", -1) is None
    assert budget_of(form, "", 5) == Budget(5, "</think>", begin="<think>")
    assert budget_of(form, "<|im_start|>assistant\n<think>\n", 5) == Budget(5, "</think>")
    with pytest.raises(UsageError, match="reasoning_budget"):
        tiny.chat(text_model.HELLO, 4, reasoning_budget=-2)


def test_functions_run_in_asyncio_too(tiny):
    async def talk_to() -> Result:
        return await asyncio.to_thread(lambda: tiny.chat(text_model.HELLO, 4, tools=[weather], max_rounds=0))

    assert asyncio.run(talk_to()).messages


# ---- calls by the grammar of a format ------------------------------------------------------------------------------


def lights(room: Literal["kitchen", "hall"], on: bool) -> str:
    """Switch the lights of a room."""
    return f"{room}: {on}"


def heating(level: Literal[1, 2, 3]) -> str:
    return f"level {level}"


@pytest.mark.parametrize("seed", range(4))
def test_a_model_of_random_weights_makes_the_call_that_is_required(tiny, seed):
    options = {"temperature": 1.0, "seed": seed, "tools": [lights, heating], "reasoning_budget": 3}
    result = tiny.chat(text_model.HELLO, 400, tool_choice="required", max_rounds=0, **options)
    assert result.finish_reason == "max_rounds"
    assert [made.name in ("lights", "heating") for made in result.calls] == [True] * len(result.calls)
    for made in result.calls:
        assert not carried_out(Tools([lights, heating]).functions[made.name], made).error
    named = tiny.chat(text_model.HELLO, 400, tool_choice="heating", max_rounds=0, **options)
    assert {made.name for made in named.calls} == {"heating"}


def test_the_calls_of_a_model_are_carried_out(tiny):
    options = {"temperature": 1.0, "seed": 3, "tools": [lights], "reasoning_budget": 3}
    result = tiny.chat(text_model.HELLO, 400, tool_choice="required", max_rounds=1, **options)
    assert result.calls
    assert all(made.result == f"{made.arguments['room']}: {made.arguments['on']}" for made in result.calls)
    told = [message["content"] for message in result.messages if message["role"] == "tool"]
    assert told == [made.result for made in result.calls]


def test_without_calls_a_choice_of_none_is_kept(tiny):
    result = tiny.chat(text_model.HELLO, 30, tool_choice="none", tools=[lights], seed=1, temperature=1.0)
    assert result.calls == ()
