"""Three turns of each agent, by templates in the style of each family: the next prompt begins with the last one.

The requests are in the wire's form and go through the whole server. A model's answers are a script. Then the same
tokens run on a hybrid with the real prefix cache: it computes what is new, and nothing else.
"""

from __future__ import annotations

import functools
from bisect import bisect_left
from collections.abc import Callable
from itertools import pairwise, product
from pathlib import Path
from types import SimpleNamespace

import pytest

import zincmetal
from support.agents import AGENTS, NEXT, QUESTION, RULES, Model, Run, claude_code, codex, opencode
from support.paths import DATA
from support.replay import reused
from support.scripted import ScriptedModels
from support.streams import ask
from support.template_styles import STYLES
from zincmetal.engine.sequence import common
from zincmetal.serve.app import make_app
from zincmetal.serve.backend import ModelCard
from zincmetal.serve.echo import Echo
from zincmetal.serve.local import LocalBackend
from zincmetal.serve.serving import Serving

HYBRID = DATA / "qwen35-q4_k_m.gguf"
MOST_EXTRA = 64  # tokens of a turn that are computed although they were before
# Their templates drop the reasoning of a turn when the next question comes, and there is no variable against it.
FORGET = ("qwen3", "qwen3.5", "gpt-oss", "kimi")


@pytest.fixture(params=STYLES)
def style(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(style: str, tmp_path: Path) -> Model:
    return Model.of(STYLES[style], tmp_path)


Recorded = Callable[[str, str], list[Run]]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """Function that returns the requests of an agent, by the template of a style. Each is recorded once."""

    @functools.cache
    def record(style: str, agent: str) -> list[Run]:
        model = Model.of(STYLES[style], tmp_path_factory.mktemp("agent"))
        AGENTS[agent](model)
        return model.runs(sides=True)

    return record


@pytest.mark.parametrize(
    ("style", "agent"),
    [(style, agent) for style, agent in product(STYLES, AGENTS) if STYLES[style].thinks or "without" not in agent],
)
def test_the_next_prompt_begins_with_the_last_one_and_its_answer(recorded: Recorded, style: str, agent: str) -> None:
    first, second, third = (run for run in recorded(style, agent) if not run.side)
    assert second.ids[: len(first.all)] == first.all
    if style in FORGET:
        assert common(third.ids, first.ids) >= len(first.ids) - 10  # all but the opening of the answer
    else:
        assert third.ids[: len(second.all)] == second.all


def test_without_what_was_remembered_it_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts write calls as no template does, so the test above needs the exact tokens."""
    monkeypatch.setattr(Echo, "remember", lambda *_: None)
    for style in ("qwen2.5", "llama3", "mistral", "gpt-oss"):
        model = Model.of(STYLES[style], tmp_path)
        opencode(model)
        first, second, _ = model.runs()
        assert len(first.ids) - 10 <= common(second.ids, first.all) < len(first.all)


def test_a_reasoning_that_the_client_dropped_is_there_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model.of(STYLES["qwen3.6"], tmp_path)
    claude_code(model, thinks=False)
    text = model.backend.text.tokenizer.decode(model.runs()[-1].ids)
    assert text.count("The file comes first.") == 2
    monkeypatch.setattr(Echo, "restored", lambda _, messages: list(messages))
    claude_code(model, session="34c", thinks=False)
    assert "The file comes first." not in model.backend.text.tokenizer.decode(model.runs()[-1].ids)


@pytest.mark.parametrize(
    ("style", "agent"),
    [*(("qwen3.5", agent) for agent in AGENTS), *((other, "opencode") for other in STYLES if other != "qwen3.5")],
)
def test_a_hybrid_computes_only_what_is_new(recorded: Recorded, style: str, agent: str) -> None:
    runs = recorded(style, agent)
    known: list[list[int]] = []
    for run, found in zip(runs, reused(HYBRID, runs), strict=True):
        same = max((common(run.ids, ids) for ids in known), default=0)
        assert len(run.ids) - found <= len(run.ids) - same + MOST_EXTRA
        known.append(run.all)


@pytest.mark.parametrize("style", ["qwen2.5", "qwen3.5", "gemma", "glm"])
def test_a_side_request_takes_nothing_from_the_next_turn(tmp_path: Path, style: str) -> None:
    model = Model.of(STYLES[style], tmp_path)
    opencode(model, side=False)
    alone = reused(HYBRID, model.runs(sides=True))
    opencode(model)
    both = model.runs(sides=True)[len(alone) :]
    assert len(both) == len(alone) + 1
    found = reused(HYBRID, both)
    assert [found[0], *found[2:]] == alone


def test_another_session_of_an_agent_shares_its_rules_and_tools(model: Model, style: str) -> None:
    if style == "gemma":
        pytest.skip("its rules are a part of the first question")
    claude_code(model, session="1c9")
    claude_code(model, session="34c", question="What was in notes.txt, please?")
    first, *_, second, _, _ = model.runs()
    (found,) = reused(HYBRID, [first, second])[1:]
    tokenizer = model.backend.text.tokenizer
    rules = bisect_left(range(len(second.ids)), True, key=lambda n: RULES in tokenizer.decode(second.ids[:n]))
    assert found >= 0.95 * rules


def test_rules_are_shown_once_and_the_bill_is_not(model: Model) -> None:
    claude_code(model)
    codex(model)
    for run in model.runs():
        shown = model.backend.text.tokenizer.decode(run.ids)
        assert shown.count(RULES) == 1
        assert "cc_version" not in shown
        assert "$schema" not in shown
    assert NEXT in shown
    assert QUESTION in shown


def test_midnight_changes_no_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The date in a prompt is that of the conversation's first turn, whatever the day is when it goes on."""
    model = Model.of(STYLES["llama3"], tmp_path)
    hours = iter(range(1_700_000_000, 1_800_000_000, 5 * 3600))
    monkeypatch.setattr("zincmetal.serve.echo.time", SimpleNamespace(time=lambda: float(next(hours))))
    opencode(model, side=False)
    for one, other in pairwise(model.runs()):
        assert other.ids[: len(one.all)] == one.all


def test_a_real_model_reads_its_own_answers_never_again(smollm2: Path) -> None:
    """It may draw single letters only, and the tokenizer would join them."""
    with zincmetal.load(smollm2, device="cpu", context=1024) as model:
        tokenizer = model.text.tokenizer
        letters = [tokenizer.encode(c, add_bos=False, add_eos=False)[0] for c in "helo"]
        biases, form = dict.fromkeys(map(str, letters), 60), {"regex": "[helo]{12}"}
        card = ModelCard("smollm2", n_ctx=1024, n_ctx_train=1024, n_vocab=model.config.n_vocab, sequences=4)
        app = make_app(Serving(ScriptedModels([LocalBackend(model, card)])))  # type: ignore[list-item]
        talk, known, joined = [{"role": "system", "content": "Answer in a few words."}], 0, 0
        for turn in range(4):
            talk.append({"role": "user", "content": f"Say {turn + 1}."})
            body = {"messages": talk, "seed": turn, "logit_bias": biases, "structured_outputs": form}
            reply = ask(app, "/v1/chat/completions", body).json
            (choice,), usage = reply["choices"], reply["usage"]
            assert usage["prompt_tokens_details"]["cached_tokens"] >= known
            assert choice["finish_reason"] == "stop"
            text = choice["message"]["content"]
            talk.append({"role": "assistant", "content": text})
            known = usage["total_tokens"] - 1
            joined += usage["completion_tokens"] - len(tokenizer.encode(text, add_bos=False, add_eos=False))
    assert joined > 4  # so this test would fail if texts were encoded anew
