"""What a server remembers of answers: their reasoning, their tokens, and when a conversation began."""

from __future__ import annotations

import json
from typing import Any

import pytest

from support.vocab_builder import CONTROL, byte_level
from zincmetal.serve.echo import ENTRY, IDLE, Beginnings, Echo, Told
from zincmetal.text.chat.template import CHATML, ChatTemplate
from zincmetal.text.tokenizer import Tokenizer
from zincmetal.text.tools.events import CallArguments, CallBegin, CallEnd, Reasoning, Text

TEMPLATE = CHATML.replace("{{ message.content }}", "{{ message.reasoning_content }}{{ message.content }}")
USER: dict[str, Any] = {"role": "user", "content": "hi"}
MORE: dict[str, Any] = {"role": "user", "content": "and then?"}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    special = {"<|im_start|>": CONTROL, "<|im_end|>": CONTROL}
    keys = byte_level([("h", "e"), ("l", "l"), ("he", "ll")], special, eos_token_id=260)
    return Tokenizer.from_metadata(keys)


def answer(text: str, reasoning: str = "", *calls: dict[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = {"role": "assistant", "content": text}
    return (
        made | ({"reasoning_content": reasoning} if reasoning else {}) | ({"tool_calls": list(calls)} if calls else {})
    )


def call(arguments: Any, id: str = "a", name: str = "look") -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def told(message: dict[str, Any]) -> dict[str, Any]:
    """Returns a message without its reasoning."""
    return {key: value for key, value in message.items() if key != "reasoning_content"}


class Talk:
    """Turns of a conversation, with a model that writes its own tokens."""

    def __init__(self, tokenizer: Tokenizer, echo: Echo, messages: list[dict[str, Any]] | None = None) -> None:
        self.tokenizer, self.echo = tokenizer, echo
        self.messages = messages or [USER]
        self.template = ChatTemplate(TEMPLATE, control_texts=tokenizer.control_texts)

    def ask(self) -> list[int]:
        said = self.echo.restored(self.messages)
        self.shown = self.template.prompt(said)
        self.ids = self.echo.ids(said, self.shown, self.tokenizer)
        return self.ids

    def reply(self, made: list[int], message: dict[str, Any]) -> list[int]:
        self.echo.remember(self.messages, self.shown, self.ids, made, message)
        return [*self.ids, *made]


def bytes_of(tokenizer: Tokenizer, text: str) -> list[int]:
    """Returns ids of a text that encoding it would not give: a token for each byte."""
    return [tokenizer.encode(c, add_bos=False, add_eos=False)[0] for c in text]


END = 260


def test_tokens_come_back_as_they_were_made(tokenizer: Tokenizer) -> None:
    talk = Talk(tokenizer, Echo())
    first = talk.ask()
    made = [*bytes_of(tokenizer, "hello"), END]
    assert made != tokenizer.prompt("hello<|im_end|>", parse_special=True)
    before = talk.reply(made, answer("hello"))
    talk.messages = [USER, answer("hello"), MORE]
    second = talk.ask()
    assert second[: len(before)] == before
    assert tokenizer.decode(second) == talk.shown
    assert Talk(tokenizer, Echo(), talk.messages).ask() != second
    made = [*bytes_of(tokenizer, "hell"), END]
    before = talk.reply(made, answer("hell"))
    talk.messages = [*talk.messages, answer("hell"), MORE]
    assert talk.ask()[: len(before)] == before
    assert first == before[: len(first)]


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "ho"}, answer("hello"), MORE],  # another question
        [{"role": "system", "content": "x"}, USER, answer("hello"), MORE],  # another prompt
        [USER, answer("hello you"), MORE],
        [USER, answer("hello", "", call("{}")), MORE],
        [USER, answer("no"), USER, answer("hello"), MORE],
    ],
)
def test_other_conversations_are_encoded(tokenizer: Tokenizer, messages: list[dict[str, Any]]) -> None:
    talk = Talk(tokenizer, Echo())
    talk.ask()
    talk.reply([*bytes_of(tokenizer, "hello"), END], answer("hello"))
    talk.messages = messages
    assert talk.ask() == tokenizer.prompt(talk.shown, parse_special=True)


def test_an_answer_without_an_end_is_encoded(tokenizer: Tokenizer) -> None:
    talk = Talk(tokenizer, Echo())
    talk.ask()
    talk.reply(bytes_of(tokenizer, "hello"), answer("hello"))
    talk.messages = [USER, answer("hello"), MORE]
    assert talk.ask() == tokenizer.prompt(talk.shown, parse_special=True)


def test_the_end_of_the_template_counts(tokenizer: Tokenizer) -> None:
    """Models have several end tokens, and a template writes one of them."""
    special = {"<|im_start|>": CONTROL, "<|im_end|>": CONTROL, "<|endoftext|>": CONTROL}
    other = Tokenizer.from_metadata(byte_level([("h", "e"), ("l", "l"), ("he", "ll")], special, eos_token_id=260))
    talk = Talk(other, Echo())
    talk.ask()
    before = talk.reply([*bytes_of(other, "hello"), 261], answer("hello"))
    talk.messages = [USER, answer("hello"), MORE]
    ids = talk.ask()
    assert ids[: len(before)] == [*before[:-1], 260]
    assert other.decode(ids) == talk.shown


def test_reasoning_that_a_template_drops_stays_away(tokenizer: Tokenizer) -> None:
    """The tokens have it, and the template wants it gone."""
    talk = Talk(tokenizer, Echo())
    talk.template = ChatTemplate(CHATML, control_texts=tokenizer.control_texts)
    talk.ask()
    talk.reply([*bytes_of(tokenizer, "hmhello"), END], answer("hello", "hm"))
    for echoed in (answer("hello", "hm"), answer("hello")):
        talk.messages = [USER, echoed, MORE]
        assert talk.ask() == tokenizer.prompt(talk.shown, parse_special=True)


def test_the_text_of_an_end_in_an_answer_does_not_end_it(tokenizer: Tokenizer) -> None:
    text = "a <|im_end|> b"
    talk = Talk(tokenizer, Echo())
    talk.ask()
    made = [*bytes_of(tokenizer, text), END]
    before = talk.reply(made, answer(text))
    talk.messages = [USER, answer(text), MORE]
    ids = talk.ask()
    assert ids[: len(before)] == before
    assert ids.count(END) == 3


@pytest.mark.parametrize("changed", ['{"a":2,"b":[2]}', '{"b":[2]}', "[1]", "no json", '"a"'])
def test_arguments_that_a_person_changed_stay_changed(tokenizer: Tokenizer, changed: str) -> None:
    talk = Talk(tokenizer, Echo())
    talk.ask()
    talk.reply([*bytes_of(tokenizer, "hello"), END], answer("hello", "hm", call('{"a":1,"b":[2]}')))
    echoed = answer("hello", "", call(changed))
    assert talk.echo.restored([USER, echoed])[1] == echoed
    talk.messages = [USER, echoed, MORE]
    assert talk.ask() == tokenizer.prompt(talk.shown, parse_special=True)


@pytest.mark.parametrize(
    "echoed",
    [
        answer("so", "", call('{"a": 1, "b": [2]}')),
        answer("so\n", "", call('{"b":[2],"a":1}')),
        answer("so", "", call({"b": [2], "a": 1}, id="toolu_other")),
        answer("so", "", call('{"replace_all": false, "b": [2], "a": 1}')),  # Claude Code adds defaults
        {"role": "assistant", "content": [{"type": "text", "text": "so"}], "tool_calls": [call('{"a":1,"b":[2]}')]},
    ],
)
def test_a_dropped_reasoning_comes_back(echoed: dict[str, Any]) -> None:
    echo = Echo()
    echo.remember([USER], "x", [1], [2], answer("so", "hm", call('{"a":1,"b":[2]}')))
    id = echoed["tool_calls"][0]["id"]
    as_written = {"tool_calls": [call('{"a":1,"b":[2]}', id)], "reasoning_content": "hm"}
    assert echo.restored([USER, echoed])[1] == {**echoed, **as_written}
    assert echo.restored([{"role": "system", "content": "new rules"}, USER, echoed])[2]["reasoning_content"] == "hm"


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_a_reasoning_that_the_client_sends_stays(name: str) -> None:
    echo = Echo()
    echo.remember([USER], "x", [1], [2], answer("so", "hm"))
    messages = [USER, {"role": "assistant", "content": "so", name: "other"}]
    assert echo.restored(messages) == messages


@pytest.mark.parametrize(
    "messages",
    [
        [USER, answer("no")],
        [MORE, answer("so")],
        [USER, answer("so", "", call("{}"))],
        [USER, answer("so"), USER, answer("so")],
    ],
)
def test_only_its_own_answer_gets_a_reasoning(messages: list[dict[str, Any]]) -> None:
    echo = Echo()
    echo.remember([USER], "x", [1], [2], answer("so", "hm"))
    with_it = [m.get("reasoning_content") for m in echo.restored(messages)]
    assert with_it in ([None, None], [None, "hm", None, None])


def test_equal_answers_keep_their_own_reasoning() -> None:
    """An agent that polls makes the same call after the same result, again and again."""
    echo = Echo()
    polling, result = answer("", "", call("{}")), {"role": "tool", "content": "wait", "tool_call_id": "a"}
    talk = [USER]
    for turn in range(4):
        echo.remember(talk, f"x{turn}", [1], [2], answer("", f"thought {turn}", call("{}")))
        talk = [*talk, polling, result]
    thoughts = [m["reasoning_content"] for m in echo.restored(talk) if m["role"] == "assistant"]
    assert thoughts == [f"thought {turn}" for turn in range(4)]


def test_messages_are_not_changed() -> None:
    echo = Echo()
    echo.remember([USER], "x", [1], [2], answer("so", "hm"))
    messages = [dict(USER), answer("so")]
    before = json.dumps(messages)
    echo.restored(messages)
    assert json.dumps(messages) == before


def test_contents_that_are_refused_later_are_passed() -> None:
    image = [{"role": "user", "content": [{"type": "image"}]}, answer("so")]
    assert Echo().restored(image) == image


def test_memory_is_bounded() -> None:
    echo = Echo(100_000)
    for i in range(300):
        talk = [{"role": "user", "content": f"question {i}"}]
        echo.remember(talk, "x", [1] * 100, [2] * 10, answer("so", "h" * 500))
        assert echo.nbytes <= 100_000
    assert echo.restored([talk[0], answer("so")])[1].get("reasoning_content")
    first = [{"role": "user", "content": "question 0"}, answer("so")]
    assert echo.restored(first) == first
    echo.remember(talk, "x", [1] * 100_000, [2], answer("so", "h"))
    assert echo.nbytes < 100_000


def test_what_is_used_stays() -> None:
    echo = Echo(40 * ENTRY)
    echo.remember([USER], "x", [1], [2], answer("so", "hm"))
    for i in range(100):
        assert echo.restored([USER, answer("so")])[1]["reasoning_content"] == "hm"
        echo.remember([{"role": "user", "content": str(i)}], "x", [1], [2], answer("so", "hm"))


def test_what_events_tell() -> None:
    made = Told()
    made.add(5, [Reasoning("h"), Reasoning("m")])
    made.add(6, [Text("so"), CallBegin(0, "look"), CallArguments(0, '{"a"')])
    made.add(7, [CallArguments(0, ":1}"), CallEnd(0, '{"a":1}'), CallBegin(1, "read"), CallEnd(1, "{}")])
    made.add(8, [])
    assert made.ids == [5, 6, 7, 8]
    calls = [(c["function"]["name"], c["function"]["arguments"]) for c in made.message()["tool_calls"]]
    assert calls == [("look", '{"a":1}'), ("read", "{}")]
    assert {k: v for k, v in made.message().items() if k != "tool_calls"} == answer("so", "hm")
    assert Told().message() == answer("")


# ---- the day -------------------------------------------------------------------------------------------------------


def test_a_conversation_keeps_the_time_of_its_begin() -> None:
    beginnings = Beginnings()
    assert beginnings.of([USER], now=1000.0) == 1000.0
    assert beginnings.of([USER, answer("so"), MORE], now=1000.0 + IDLE) == 1000.0
    assert beginnings.of([{"role": "system", "content": "x"}, USER], now=2000.0 + IDLE) == 1000.0
    assert beginnings.of([MORE], now=3000.0) == 3000.0
    assert beginnings.of([USER], "session", now=4000.0) == 4000.0
    assert beginnings.of([MORE], "session", now=5000.0) == 4000.0


def test_after_a_long_pause_it_begins_anew() -> None:
    beginnings = Beginnings()
    beginnings.of([USER], now=1000.0)
    assert beginnings.of([USER], now=1001.0 + IDLE) == 1001.0 + IDLE


def test_few_beginnings_are_kept() -> None:
    beginnings = Beginnings(most=2)
    for i, name in enumerate(("a", "b", "a", "c")):
        beginnings.of([USER], name, now=float(i))
    assert [beginnings.of([USER], name, now=9.0) for name in ("a", "c", "b")] == [0.0, 3.0, 9.0]
