"""Constrained answers of whole models: they follow their form, alone and in a batch, by the device and by the host."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace

import jsonschema
import numpy as np
import pytest

import zincmetal
from support import text_model
from support.reference_models import reference_models
from support.running import running_of
from zincmetal.api.generation import Asked, sampling_params
from zincmetal.engine.governor import Always
from zincmetal.errors import GrammarError, UsageError
from zincmetal.sampling.constrain.budget import Budget
from zincmetal.sampling.constrain.grammar import Grammar

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "likes": {"type": "array", "items": {"enum": ["tea", "coffee", "milk"]}, "maxItems": 2},
    },
    "required": ["name", "age", "likes"],
    "additionalProperties": False,
}
FORMS = [
    Grammar.of_schema(PERSON),
    Grammar.of_regex(r"[A-Z][a-z]{2,8}, \d{4}"),
    Grammar.of_choices(["yes", "no", "perhaps not"]),
    None,
]


@dataclass
class Person:
    name: str
    age: int


@pytest.fixture(scope="module")
def demo(smollm2):
    with zincmetal.load(smollm2, device="cpu", context=512) as model:
        yield model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A model of random weights, over single bytes: any constraint is against its will."""
    path = text_model.save(tmp_path_factory.mktemp("tiny") / "tiny.gguf", eos_token_id=text_model.END)
    with zincmetal.load(path, device="cpu", context=256) as model:
        yield model


def asked(model, grammar, seed, n=120, **options) -> Asked:
    return Asked(
        model.tokenize("Someone: "),
        n,
        sampling_params("test", {"temperature": 0.9, "seed": seed}),
        grammar=grammar,
        **options,
    )


# ---- answers follow their form -------------------------------------------------------------------------------------


def test_twenty_answers_by_a_schema_parse(demo):
    handles = [demo.start(asked(demo, Grammar.of_schema(PERSON), seed)) for seed in range(20)]
    texts = [handle.result() for handle in handles]
    assert [result.finish_reason for result in texts] == ["stop"] * 20
    for result in texts:
        jsonschema.validate(json.loads(result.text), PERSON)
    assert len({result.text for result in texts}) > 10


@pytest.mark.parametrize("seed", range(6))
def test_a_model_against_its_will(tiny, seed):
    result = tiny.start(asked(tiny, Grammar.of_schema(PERSON), seed, n=240)).result()
    assert result.finish_reason == "stop"
    jsonschema.validate(json.loads(result.text), PERSON)
    assert re.fullmatch(r"[A-Z][a-z]{2,8}, \d{4}", tiny.start(asked(tiny, FORMS[1], seed)).result().text)
    assert tiny.start(asked(tiny, FORMS[2], seed)).result().text in ("yes", "no", "perhaps not")


@pytest.mark.parametrize("which", ["tiny", "demo"])
def test_alone_or_in_a_batch_the_text_is_the_same(which, request):
    model = request.getfixturevalue(which)
    wanted = [asked(model, FORMS[i % 4], seed=i, n=24) for i in range(6)]
    alone = [model.start(one).result().text for one in wanted]
    handles = [model.start(one) for one in wanted]
    assert [handle.result().text for handle in handles] == alone


def test_greedy_answers_follow_their_form_too(tiny):
    greedy = replace(asked(tiny, FORMS[2], 0), params=sampling_params("test", {"temperature": 0}))
    assert tiny.start(greedy).result().text in ("yes", "no", "perhaps not")


@pytest.mark.parametrize("which", ["tiny", "demo"])
def test_the_host_draws_what_the_device_draws(which, request):
    model = request.getfixturevalue(which)
    for seed, form in enumerate(FORMS):
        one = asked(model, form, seed, n=24)
        by_host = replace(one, params=replace(one.params, logits_processors=(lambda ids, logits: logits,)))
        assert model.start(one).result().tokens == model.start(by_host).result().tokens


@pytest.mark.parametrize("options", [{"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.2}, {"repeat_penalty": 1.5}])
def test_filters_see_only_what_the_form_allows(tiny, options):
    one = replace(
        asked(tiny, FORMS[0], 3, n=240), params=sampling_params("test", {"temperature": 1.0, "seed": 3, **options})
    )
    jsonschema.validate(json.loads(tiny.start(one).result().text), PERSON)


def test_where_nothing_is_constrained_the_text_is_that_without_a_grammar(demo):
    free = demo.start(asked(demo, None, 5, n=24)).result()
    lazy = Grammar("start: (call | /(.|\\n)*/)\ncall: head /[0-9]/\nhead[lazy]: /(.|\\n)*<call>/")
    assert demo.start(asked(demo, lazy, 5, n=24)).result().tokens == free.tokens


def test_log_probabilities_come_with_a_form(tiny):
    result = tiny.start(asked(tiny, FORMS[2], 1, n_logprobs=2)).result()
    assert len(result.logprobs) == len(result.tokens)


# ---- reasoning -----------------------------------------------------------------------------------------------------


def test_a_budget_ends_reasoning(demo):
    result = demo.start(asked(demo, None, 2, n=30, reasoning=Budget(7, "</think>"))).result()
    assert 1 <= len(demo.tokenize(result.text.split("</think>")[0])) <= 9
    assert result.text.count("</think>") == 1


def test_a_budget_and_a_grammar_work_together(demo):
    body = Grammar.of_schema(PERSON).rule("body")
    grammar = Grammar(f"start: thought body\nthought[lazy]: /(.|\\n)*<\\/think>/\n{body}")
    result = demo.start(asked(demo, grammar, 2, reasoning=Budget(9, "</think>"))).result()
    _, answer = result.text.split("</think>")
    jsonschema.validate(json.loads(answer), PERSON)
    assert result.finish_reason == "stop"


# ---- errors --------------------------------------------------------------------------------------------------------


def test_a_dead_end_ends_its_request_and_no_other(tiny, monkeypatch):
    mask = tiny.text.mask

    def failing(grammar, budget, n_prompt, n_vocab):
        made = mask(grammar, budget, n_prompt, n_vocab)

        def failed(ids):
            if len(ids) > n_prompt + 4:
                raise GrammarError("the answer cannot go on")
            return made(ids)

        return failed if grammar == FORMS[1] else made

    monkeypatch.setattr(tiny.text, "mask", failing)
    handles = [tiny.start(asked(tiny, FORMS[i % 2], i, n=200)) for i in range(6)]
    for i, handle in enumerate(handles):
        if i % 2:
            with pytest.raises(GrammarError):
                handle.result()
        else:
            jsonschema.validate(json.loads(handle.result().text), PERSON)
    assert tiny.figures()["running"] == []


def test_a_wrong_grammar_is_refused_before_anything_runs(tiny):
    with pytest.raises(UsageError):
        tiny.start(asked(tiny, Grammar("start: nothing"), 0))
    assert tiny.figures()["running"] == []


def test_a_form_that_the_biases_forbid_is_an_error_of_this_request(tiny):
    one = asked(tiny, Grammar.of_choices(["a"]), 0)
    params = replace(one.params, logit_bias={ord("a"): -np.inf})
    with pytest.raises(UsageError, match="no token is left"):
        tiny.start(replace(one, params=params)).result()


# ---- the calls -----------------------------------------------------------------------------------------------------


def test_generate_with_a_form(demo):
    person = demo.generate("A person: ", 120, schema=Person, seed=1, temperature=0.8).parsed
    assert isinstance(person, Person)
    assert isinstance(person.age, int)
    assert set(demo.generate("A person: ", 120, schema=PERSON, seed=1, temperature=0.8).parsed) == {
        "name",
        "age",
        "likes",
    }
    assert demo.generate("Yes or no? ", choices=["yes", "no"]).parsed in ("yes", "no")
    assert re.fullmatch(r"\d{3}", demo.generate("A number: ", regex=r"\d{3}").parsed)
    assert demo.generate("x", grammar='start: "a" | "b"').parsed in ("a", "b")
    assert demo.generate("x", 4).parsed is None


def test_several_prompts_with_one_form(demo):
    results = demo.generate(["One: ", "Two: ", "Three: "], 20, schema=list[int], seed=4, temperature=1.0)
    assert all(isinstance(number, int) for result in results if result.parsed is not None for number in result.parsed)
    assert any(result.parsed is not None for result in results)


def test_a_chat_with_a_form(demo):
    messages = [{"role": "user", "content": "Describe a person."}]
    assert isinstance(demo.chat(messages, 120, schema=Person, seed=2).parsed, Person)
    with demo.submit_chat(messages, 60, choices=["yes", "no"]) as handle:
        text = "".join(chunk.text for chunk in handle)
        assert handle.result().parsed == text
        assert text in ("yes", "no")


def test_an_answer_that_ends_too_early_has_no_value(demo):
    result = demo.generate("A person: ", 3, schema=PERSON)
    assert (result.parsed, result.finish_reason) == (None, "length")


@pytest.mark.parametrize("options", [{"schema": {}, "regex": "a"}, {"choices": ["a"], "grammar": "start: /a/"}])
def test_an_answer_has_one_form(demo, options):
    with pytest.raises(UsageError, match="one form"):
        demo.generate("x", **options)


def test_a_vocabulary_that_cannot_write_a_form_is_an_error():
    with (
        zincmetal.load(reference_models("llama")[0], device="cpu", context=64) as model,
        pytest.raises(UsageError, match="no answer can satisfy"),  # no token of it has the letter
    ):
        model.generate([1, 2], choices=["a"])


def test_drafts_do_not_change_an_answer_with_a_form(tiny):
    running = running_of(tiny)
    governor, running.scheduler.speculation.governor = running.scheduler.speculation.governor, Always()
    drinks = "((tea|coffee|milk), ){6,9}water"
    try:
        drafted = accepted = 0
        for seed in range(6):
            options = {"regex": drinks, "temperature": 1.0 if seed else 0.0, "seed": seed}
            plain, found = (tiny.generate("a", 120, draft=draft, **options) for draft in ("off", "lookup"))
            assert found.tokens == plain.tokens
            assert re.fullmatch(drinks, found.text)
            drafted, accepted = drafted + found.drafted, accepted + found.accepted
        assert drafted > accepted > 20
    finally:
        running.scheduler.speculation.governor = governor
