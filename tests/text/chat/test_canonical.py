"""Rules of the canonical form: a table for each, and that a longer conversation begins with the shorter one."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zincmetal.errors import UsageError
from zincmetal.text.chat.canonical import canonical, described, reasoning_of, text_of
from zincmetal.text.chat.capabilities import Capabilities

ALL = Capabilities()
Messages = list[dict[str, Any]]


def say(role: str, content: Any = "", **keys: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **keys}


def parts(*texts: str, kind: str = "text") -> list[dict[str, str]]:
    return [{"type": kind, "text": text} for text in texts]


def call(id: str = "a", name: str = "look", arguments: Any = "{}") -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def calling(*calls: dict[str, Any], content: Any = None, **keys: Any) -> dict[str, Any]:
    return say("assistant", content, tool_calls=list(calls), **keys)


def result(text: str, id: str = "a", name: str = "look") -> dict[str, Any]:
    return say("tool", text, tool_call_id=id, name=name)


S, U, A, V = say("system", "rules"), say("user", "hi"), say("assistant", "yes"), say("user", "more")
LATER = say("system", "also")
BILL = "x-anthropic-billing-header: cc_version=2.1.332.1c9; cc_entrypoint=cli;"


def reminder(text: str) -> str:
    return f"<system-reminder>\n{text}\n</system-reminder>"


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ([say("developer", "rules"), U], [S, U]),
        ([say("system", "a"), say("developer", "b"), U], [say("system", "a\n\nb"), U]),
        ([say("system", ""), U], [U]),
        ([say("system", ""), S, U], [S, U]),
        ([say("system", parts("a", "b")), U], [say("system", "a\nb"), U]),
        ([say("system", parts(BILL, "rules")), U], [S, U]),
        ([say("system", f"{BILL}\n\nrules"), U], [S, U]),
        ([say("system", parts(BILL)), U], [U]),
        ([say("system", BILL), U], [U]),
        ([say("system", f"rules {BILL}"), U], [say("system", f"rules {BILL}"), U]),
        ([S, say("user", BILL)], [S, say("user", BILL)]),
    ],
)
def test_rules_of_the_system(given: Messages, wanted: Messages) -> None:
    assert canonical(given, ALL) == wanted


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("a", "a"),
        (" a\n", " a\n"),
        ([], ""),
        (parts("a", "b"), "ab"),
        (parts("a", "b", kind="input_text"), "ab"),
        (parts("a", kind="output_text"), "a"),
        (["a", {"text": "b"}], "ab"),
        ([{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}], "a"),
        ([{"type": "refusal", "refusal": "no"}], "no"),
        (None, ""),
    ],
)
def test_contents_are_strings(content: Any, text: str) -> None:
    assert canonical([say("user", content)], ALL) == [say("user", text)]


@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool"])
def test_a_list_with_one_part_is_its_text(role: str) -> None:
    assert canonical([U, say(role, parts("x"))], ALL) == canonical([U, say(role, "x")], ALL)


@pytest.mark.parametrize(
    ("message", "named"),
    [
        (say("user", [{"type": "image_url", "image_url": {"url": "x"}}]), r"messages\[1\].content\[0\].*image_url"),
        (say("assistant", [{"type": "input_audio"}]), "input_audio"),
        (say("system", [{"type": "file"}]), "file"),
        (say("critic", "x"), r"messages\[1\].*critic"),
        (say(5, "x"), "5"),
        ({"content": "x"}, r"messages\[1\]"),
        ("x", r"messages\[1\]"),
        (say("user", 5), r"messages\[1\].*int"),
        (say("user", [5]), r"messages\[1\].content\[0\].*int"),
        (say("user", [{"type": "text", "text": 5}]), "'text' that is a string"),
        (say("user", [{}]), r"messages\[1\].content\[0\]"),
        (say("assistant", "x", tool_calls="y"), "tool_calls"),
        (say("assistant", "x", tool_calls=[{"function": {}}]), r"tool_calls\[0\]"),
        (say("assistant", "x", tool_calls=[5]), r"tool_calls\[0\]"),
        (calling(call(arguments=[1])), "arguments"),
    ],
)
def test_what_is_wrong_is_named(message: Any, named: str) -> None:
    with pytest.raises(UsageError, match=named):
        canonical([U, message], ALL)


@pytest.mark.parametrize("messages", [[], "hi", None, [say("system", "")]])
def test_a_chat_needs_a_message(messages: Any) -> None:
    with pytest.raises(UsageError, match="messages"):
        canonical(messages, ALL)


def test_an_image_in_a_result_leaves_its_name() -> None:
    """The client cannot take it back: all later requests would be refused."""
    content = [*parts("read: "), {"type": "image", "source": {}}]
    made = canonical([U, calling(call()), result(content)], ALL)  # type: ignore[arg-type]
    assert made[-1]["content"] == "read: [image: not shown, this model reads text only]"


NO_LATER = replace(ALL, system_anywhere=False)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ([S, U, LATER], [S, say("user", f"hi\n\n{reminder('also')}")]),
        ([S, U, LATER, A, V], [S, say("user", f"hi\n\n{reminder('also')}"), A, V]),
        ([U, A, LATER], [U, A, say("user", reminder("also"))]),
        ([U, A, LATER, V], [U, A, say("user", reminder("also")), V]),
        ([U, calling(call()), result("r"), LATER], [U, calling(call()), result(f"r\n\n{reminder('also')}")]),
        ([U, LATER, LATER], [say("user", f"hi\n\n{reminder('also')}\n\n{reminder('also')}")]),
        ([U, say("system", parts("also")), A], [say("user", f"hi\n\n{reminder('also')}"), A]),
        ([U, say("developer", "also"), A], [say("user", f"hi\n\n{reminder('also')}"), A]),
    ],
)
def test_a_later_system_message_stands_where_it_stood(given: Messages, wanted: Messages) -> None:
    assert canonical(given, NO_LATER) == canonical(wanted, ALL)
    assert canonical(given, ALL)[-1] in (LATER, A, V)


@pytest.mark.parametrize(
    ("lacks", "given", "wanted"),
    [
        ("system", [S, U], [say("user", "rules"), U]),
        ("system users", [S, U], [say("user", "rules\n\nhi")]),
        ("users", [U, V], [say("user", "hi\n\nmore")]),
        ("users", [U, A, U, V], [U, A, say("user", "hi\n\nmore")]),
        ("users", [U, A, A], [U, say("assistant", "yes\n\nyes")]),
        ("", [U, V, A, A], [U, V, A, A]),
        ("users system_anywhere", [U, A, LATER, V], [U, A, say("user", f"{reminder('also')}\n\nmore")]),
        ("user_after_result", [U, calling(call()), result("r"), V], [U, calling(call()), result("r\n\nmore")]),
        ("user_after_result", [U, calling(call()), result(""), V], [U, calling(call()), result("more")]),
    ],
)
def test_messages_that_a_template_refuses_are_joined(lacks: str, given: Messages, wanted: Messages) -> None:
    assert canonical(given, replace(ALL, **dict.fromkeys(lacks.split(), False))) == canonical(wanted, ALL)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("{}", "{}"),
        ('{"b": 1,"a":2}', '{"b": 1,"a":2}'),
        ({"a": 1}, {"a": 1}),
        ("", {}),
        (" ", {}),
        (None, {}),
        ("no json", {"input": "no json"}),
        ('{"a": ', {"input": '{"a": '}),
        ("[1]", {"input": "[1]"}),
        ("[" * 100_000, {"input": "[" * 100_000}),
    ],
)
def test_arguments_stay_as_they_are_if_they_are_an_object(given: Any, wanted: Any) -> None:
    (_, made) = canonical([U, calling(call(arguments=given))], ALL)
    assert made["tool_calls"][0]["function"]["arguments"] == wanted


@pytest.mark.parametrize("content", [None, "", [], ...])
def test_a_call_without_text_has_no_content(content: Any) -> None:
    message = calling(call(), content=content)
    if content is ...:
        del message["content"]
    assert canonical([U, message], ALL)[1] == calling(call(), content=None)


def test_text_stands_before_its_calls() -> None:
    answer = calling(call(), content="so", reasoning_content="hm")
    apart = replace(ALL, text_beside_calls=False)
    assert canonical([U, answer], ALL) == [U, answer]
    made = canonical([U, answer], apart)
    assert made == [U, say("assistant", "so"), calling(call(), reasoning_content="hm")]
    assert canonical([U, answer], replace(apart, text_before_calls=False)) == [U, answer]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ([say("assistant", "so"), calling(call())], [calling(call(), content="so")]),
        ([say("assistant", "", reasoning_content="hm"), A], [say("assistant", "yes", reasoning_content="hm")]),
        ([calling(call("a")), calling(call("b"))], [calling(call("a"), call("b"))]),
        ([calling(call("a")), A], [calling(call("a")), A]),
        ([calling(call("a")), calling(call("b"), reasoning_content="hm")], None),
    ],
)
def test_items_of_one_answer_are_one_message(given: Messages, wanted: Messages | None) -> None:
    assert canonical([U, *given], ALL) == [U, *(wanted or given)]


def test_results_have_the_order_of_their_calls() -> None:
    calls, a, b, c = calling(call("a"), call("b"), call("c")), result("1", "a"), result("2", "b"), result("3", "c")
    other = result("?", "z")
    assert canonical([U, calls, c, other, a, b, A], ALL) == [U, calls, a, b, c, other, A]
    again = calling(call("b"), call("a"))
    assert canonical([U, calls, b, a, again, a, b], ALL) == [U, calls, a, b, again, b, a]


def test_results_find_their_calls_without_ids() -> None:
    calls = calling({"name": "look", "arguments": {}}, {"name": "read", "arguments": {}})
    made = canonical([U, calls, say("tool", "1"), say("function", "2", name="read")], ALL)
    assert made[1]["tool_calls"] == [call("call_0", arguments={}), call("call_1", "read", {})]
    assert made[2:] == [result("1", "call_0"), result("2", "call_1", "read")]


def test_a_result_has_the_name_of_its_call() -> None:
    made = canonical([U, calling(call("a", "read")), say("tool", "1", tool_call_id="a")], ALL)
    assert made[-1] == result("1", "a", "read")


def test_the_older_key_of_a_call() -> None:
    function = {"name": "look", "arguments": '{"a": 1}'}
    made = canonical([U, say("assistant", None, function_call=function), say("function", "1", name="look")], ALL)
    assert made == [U, calling(call("call_0", arguments='{"a": 1}')), result("1", "call_0")]


def test_one_call_at_a_time() -> None:
    one = replace(ALL, parallel=False)
    calls, first, second = calling(call("a"), call("b"), content="so"), result("1", "a"), result("2", "b")
    wanted = [U, calling(call("a"), content="so"), first, calling(call("b")), second, A]
    assert canonical([U, calls, first, second, A], one) == wanted
    assert canonical([U, calls, second, first, A], one) == wanted
    assert canonical([U, calls, second], one) == [U, calling(call("a"), content="so"), calling(call("b")), second]
    assert canonical([U, calls, V], one) == [U, calling(call("a"), content="so"), calling(call("b")), V]


def test_short_ids() -> None:
    short = replace(ALL, short_ids=True)
    long = "call_0123456789abcdefghijklmn"
    _, calls, *results = canonical(
        [U, calling(call(long), call("abcdefgh9")), result("1", long), result("2", "x")], short
    )
    ids = [one["id"] for one in calls["tool_calls"]]
    assert ids[1] == "abcdefgh9"
    assert len(ids[0]) == 9
    assert ids[0].isalnum()
    assert results[0]["tool_call_id"] == ids[0]
    assert len({ids[0], results[1]["tool_call_id"]}) == 2
    assert canonical([U, calling(call(long))], short)[1]["tool_calls"][0]["id"] == ids[0]


def test_ids_that_have_the_names_of_tools() -> None:
    named = replace(ALL, named_ids=True)
    talk = [
        U, calling(call("a"), call("b", "find")), result("1", "a"), result("2", "b", "find"), A,
        V, calling(call("a")), result("3", "a"), result("4", "x"),
    ]  # fmt: skip
    made = canonical(talk, named)
    ids = [one["id"] for message in made for one in message.get("tool_calls", ())]
    assert ids == ["functions.look:0", "functions.find:1", "functions.look:2"]
    results = [message["tool_call_id"] for message in made if message["role"] == "tool"]
    assert results == ["functions.look:0", "functions.find:1", "functions.look:2", "x"]
    assert canonical(made, named) == made


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking", "reasoning_text"])
def test_names_of_reasoning(name: str) -> None:
    assert canonical([U, say("assistant", "yes", **{name: "hm"})], ALL)[1] == say(
        "assistant", "yes", reasoning_content="hm"
    )


def test_reasoning_in_parts() -> None:
    content = [
        {"type": "thinking", "thinking": "h", "signature": ""},
        {"type": "reasoning", "text": "m"},
        *parts("yes"),
    ]
    hidden = [{"type": "redacted_thinking", "data": "x"}]
    assert canonical([U, say("assistant", hidden + content)], ALL)[1] == say("assistant", "yes", reasoning_content="hm")
    with pytest.raises(UsageError, match="thinking"):
        canonical([say("user", content)], ALL)


def test_a_template_that_demands_reasoning_gets_it() -> None:
    needs = replace(ALL, answers_need_reasoning=True)
    assert canonical([U, A], needs)[1] == say("assistant", "yes", reasoning_content="")
    assert canonical([U, A | {"reasoning": "hm"}], needs)[1]["reasoning_content"] == "hm"


def test_calls_as_text() -> None:
    without = replace(ALL, calls=False, users=False)
    talk = [U, calling(call("a", arguments='{"b":1}'), call("b"), content="so"), result("1", "a"), result("2", "b"), V]
    written = (
        'so\n<tool_call>\n{"name": "look", "arguments": {"b":1}}\n</tool_call>\n'
        '<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call>'
    )
    results = "<tool_response>\n1\n</tool_response>\n\n<tool_response>\n2\n</tool_response>\n\nmore"
    assert canonical(talk, without) == [U, say("assistant", written), say("user", results)]


def test_tools_are_described_behind_the_rules() -> None:
    tool = {"type": "function", "function": {"name": "look", "parameters": {}}}
    made = canonical(described([S, U], [tool]), ALL)
    assert [m["role"] for m in made] == ["system", "user"]
    assert made[0]["content"].startswith("rules\n\n")
    assert json.dumps(tool) in made[0]["content"]
    assert canonical(described([U], [tool]), ALL)[0]["role"] == "system"


def test_names_of_people_stay() -> None:
    assert canonical([say("user", "hi", name="Ada", id="x")], ALL) == [say("user", "hi", name="Ada")]


def test_the_text_and_the_reasoning_of_a_message_alone() -> None:
    message = say("assistant", [{"type": "thinking", "thinking": "hm"}, *parts("a", "b")])
    assert (text_of("x", message), reasoning_of(message)) == ("ab", "hm")
    assert reasoning_of(A) == ""


# ---- any conversation ----------------------------------------------------------------------------------------------

FLAGS = ("system", "system_anywhere", "users", "user_after_result", "calls", "parallel", "text_beside_calls",
         "text_before_calls", "short_ids", "named_ids", "answers_need_reasoning")  # fmt: skip
capabilities = st.builds(
    lambda values: replace(ALL, **dict(zip(FLAGS, values, strict=True))), st.tuples(*[st.booleans()] * len(FLAGS))
)
words = st.sampled_from(["", "a", "b c", " d\n", BILL])
contents = st.one_of(words, st.lists(words, max_size=2).map(lambda texts: parts(*texts)))
ids = st.sampled_from(["a", "b", "c", "call_0123456789"])
calls = st.builds(call, ids, st.sampled_from(["f", "g"]), st.sampled_from(["{}", '{"x": 1}', "nonsense"]))
messages = st.one_of(
    st.builds(say, st.sampled_from(["system", "developer", "user", "assistant"]), contents),
    st.builds(lambda some, content, why: calling(*some, content=content, reasoning=why),
              st.lists(calls, min_size=1, max_size=3), st.none() | contents, st.none() | words),
    st.builds(result, words, ids),
)  # fmt: skip
talks = st.lists(messages, min_size=1, max_size=8)


def grown(shorter: dict[str, Any], longer: dict[str, Any]) -> bool:
    """Returns True if a message is another with more at its end."""
    same = {k: v for k, v in shorter.items() if k in ("role", "tool_call_id")}
    texts = (shorter["content"] or "", longer["content"] or "")
    return same.items() <= longer.items() and texts[1].startswith(texts[0].rstrip("\n"))


@given(talk=talks, can=capabilities, cut=st.integers(1, 8))
@settings(max_examples=200, deadline=None)
def test_what_follows_changes_nothing_before(talk: Messages, can: Capabilities, cut: int) -> None:
    """Cut before a message that begins a turn: answers that follow each other are one, and results of tools too."""
    talk = [say("user", "first"), *talk]
    begins = [m["role"] not in ("tool", "assistant") and m["content"] == "a" for m in talk] + [True]
    at = next((i for i in range(min(cut, len(talk)), 0, -1) if begins[i]), len(talk))
    shorter, longer = canonical(talk[:at], can), canonical(talk, can)
    assert len(shorter) <= len(longer)
    assert shorter[:-1] == longer[: len(shorter) - 1]
    assert grown(shorter[-1], longer[len(shorter) - 1])


@given(talk=talks, can=capabilities)
@settings(max_examples=100, deadline=None)
def test_it_is_pure_and_nothing_is_lost(talk: Messages, can: Capabilities) -> None:
    talk = [*talk, say("user", "last")]
    given_ = copy.deepcopy(talk)
    made = canonical(talk, can)
    assert talk == given_
    assert made == canonical(copy.deepcopy(talk), can)
    shown = json.dumps(made)
    for message in talk:
        if message["role"] not in ("system", "developer"):
            assert json.dumps(text_of("x", message))[1:-1] in shown
    if can.calls:
        assert sum(len(m.get("tool_calls", ())) for m in made) == sum(len(m.get("tool_calls", ())) for m in talk)
