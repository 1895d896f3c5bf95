"""Stored responses: within a bound of bytes, and each of them whole."""

from __future__ import annotations

import pytest

from zincmetal.serve.errors import HttpError
from zincmetal.serve.store import ResponseStore


def response(number, text="yes"):
    return {"id": f"resp_{number}", "output": [{"id": f"msg_{number}", "type": "message", "text": text}]}


def item(text="hi"):
    return {"type": "message", "role": "user", "content": text}


def filled(n, most=1 << 20, text="yes"):
    store = ResponseStore(most)
    for number in range(n):
        store.put(response(number, text), [item()], 1)
    return store


def test_response_comes_back_as_it_was():
    store, given = ResponseStore(), response(0)
    store.put(given, [item()], 1)
    given["output"].clear()  # the store has its own
    assert store.response("resp_0") == response(0)
    assert store.item("msg_0") == response(0)["output"][0]


def test_conversation_is_the_items_and_the_answer():
    store = ResponseStore()
    store.put(response(0), [item("a"), item("b"), item("c")], 1)
    assert store.conversation("resp_0") == [item("a"), item("b"), item("c"), *response(0)["output"]]
    assert store.inputs("resp_0") == [item("c")]


def test_response_without_an_input_of_its_own():
    store = ResponseStore()
    store.put(response(0), [item("a")], 0)
    assert store.inputs("resp_0") == []


@pytest.mark.parametrize("call", ["response", "inputs", "delete", "conversation"])
def test_unknown_response_is_a_404_by_name(call):
    with pytest.raises(HttpError) as refusal:
        getattr(filled(1), call)("resp_9")
    code = "previous_response_not_found" if call == "conversation" else "response_not_found"
    assert (refusal.value.kind, refusal.value.code) == ("not_found", code)


def test_deleted_response_leaves_nothing():
    store = filled(1)
    store.delete("resp_0")
    assert (len(store), store.nbytes, store.item("msg_0")) == (0, 0, None)


def test_bytes_stay_within_the_bound():
    store = filled(100, most=10_000, text="x" * 900)
    assert 0 < store.nbytes <= 10_000
    assert 1 <= len(store) < 11
    store.response("resp_99")
    with pytest.raises(HttpError):
        store.response("resp_0")
    assert store.item("msg_0") is None


def test_what_was_used_last_is_kept():
    one = filled(1, text="x" * 900).nbytes
    store = filled(3, most=3 * one + 100, text="x" * 900)
    store.conversation("resp_0")
    store.put(response(3, "x" * 900), [item()], 1)
    assert store.response("resp_0")
    with pytest.raises(HttpError):
        store.response("resp_1")


def test_response_beyond_the_bound_is_not_stored():
    store = filled(1, most=1000)
    store.put(response(1, "x" * 2000), [item()], 1)
    assert len(store) == 1


def test_later_turn_outlives_the_first():
    store = ResponseStore()
    store.put(response(0), [item("a")], 1)
    store.put(response(1), [*store.conversation("resp_0"), item("b")], 1)
    store.delete("resp_0")
    assert store.conversation("resp_1") == [item("a"), *response(0)["output"], item("b"), *response(1)["output"]]
