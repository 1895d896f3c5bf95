"""Makes of a request what a backend takes: token ids, options of sampling, a grammar, and a parser of the answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..api.drafting import drafting_of
from ..api.generation import Asked, sampling_params
from ..api.schema import grammar_of
from ..api.text import ModelText
from ..api.tools import budget_of
from ..errors import UnsupportedSchemaError, UsageError
from ..sampling.constrain.grammar import Grammar
from ..sampling.params import SamplingParams
from ..text.tools.format import AnswerParser, Format, Wanted, format_of
from .aside import aside
from .ask import AnswerFormat, Ask
from .backend import Backend, ModelCard
from .errors import BadRequest, HttpError, PromptTooLong, Unsupported
from .prompt import Prompt, prompt_of

TAIL = 256  # characters of the prompt's end that tell how the answer begins


@dataclass(frozen=True)
class Prepared:
    """Arguments for the backend, and what is needed to read the answer and to remember it."""

    asked: Asked
    parser: Callable[[], AnswerParser]
    format: Format
    prompt: Prompt


async def prepared(ask: Ask, backend: Backend) -> Prepared:
    """Prepare a request. Templates and tokenizers run on another thread. Raises the typed errors of both."""
    return await aside(_prepared, ask, backend.text, backend.card)


async def tokens_of(ask: Ask, text: ModelText) -> list[int]:
    """Return the token ids of a prompt. It needs no loaded model."""
    return (await shown_of(ask, text)).ids


async def shown_of(ask: Ask, text: ModelText) -> Prompt:
    """Return the prompt of a request. It needs no loaded model."""
    return await aside(lambda: prompt_of(_with_tools_that_hold(ask, format_for(ask, text)), text))


def format_for(ask: Ask, text: ModelText) -> Format:
    """Return the format of the answer."""
    if ask.prompt is not None:
        return Format()
    if not text.chats:
        raise HttpError("template", "this model's file has no chat template: send a prompt to /v1/completions instead")
    return format_of(text.chat_template.source, text.tokenizer.control_texts)


def _prepared(ask: Ask, text: ModelText, card: ModelCard) -> Prepared:
    form = format_for(ask, text)
    ask = _with_tools_that_hold(ask, form)
    prompt = prompt_of(ask, text)
    if len(prompt.ids) >= card.n_ctx:
        raise PromptTooLong(len(prompt.ids), card.n_ctx)
    callable_ = () if ask.choice.mode == "none" else ask.tools
    tools, tail = {tool.seen: dict(tool.schema) for tool in callable_}, prompt.shown[-TAIL:]
    drafting, sampling = drafting_of(ask.sampling)
    asked = Asked(
        prompt.ids,
        -1 if ask.max_tokens is None else ask.max_tokens,
        _sampling(sampling, text),
        ask.stop,
        hide_special=ask.prompt is None and not form.needs_special,
        n_logprobs=ask.logprobs,
        deadline=ask.deadline,
        marks=None if ask.continue_final else prompt.marks(text),
        grammar=_grammar(ask, form, tail),
        reasoning=budget_of(form, tail, ask.thinking.budget),
        drafting=drafting,
    )
    return Prepared(asked, lambda: form.parser(tools, tail, ask.thinking.split), form, prompt)


# ---- the form of the answer -------------------------------------------------------------------------------------


def _with_tools_that_hold(ask: Ask, form: Format) -> Ask:
    """Return the request without tools that may not be called, if the format cannot forbid the calls.

    If it can, they stay: the prompt is then the same, and so is its prefix in the cache.
    """
    if ask.choice.mode == "required" and not form.calls:
        raise Unsupported(
            "tool_choice", "tool_choice: this model's chat template knows no tool calls; use auto or none"
        )
    if ask.tools and ask.choice.mode == "none":
        calls = replace(_wanted(ask), body=None)
        return ask if form.grammar(calls, "") else replace(ask, tools=())
    return ask


def _grammar(ask: Ask, form: Format, tail: str) -> Grammar | None:
    try:
        return form.grammar(_wanted(ask), tail)
    except UnsupportedSchemaError as error:
        raise BadRequest(str(error), "tools", "unsupported_schema") from None


def _wanted(ask: Ask) -> Wanted:
    """Return what the answer must be. Names of a tool choice are those that the model sees."""
    names = set(ask.choice.names)
    tools = [tool for tool in ask.tools if not names or tool.seen in names]
    return Wanted(
        {tool.seen: dict(tool.schema) for tool in tools},
        ask.choice.mode,
        ask.choice.parallel,
        frozenset(tool.seen for tool in tools if tool.strict),
        _body(ask.format),
    )


def _body(form: AnswerFormat) -> Grammar | None:
    """Return the grammar of an answer's text."""
    try:
        return grammar_of(form.kind, form.value)
    except UsageError as error:
        code = "unsupported_schema" if form.kind.startswith("json") else "invalid_grammar"
        raise BadRequest(str(error), "response_format", code) from None


# ---- sampling ---------------------------------------------------------------------------------------------------


def _sampling(given: dict[str, Any], text: ModelText) -> SamplingParams:
    """Return the options: the request's own, and for the others what the model's makers advise."""
    biases = _biases(given.pop("logit_bias", None) or {}, text)
    if given.pop("ignore_end", False):
        biases.update(dict.fromkeys(text.tokenizer.eog_ids, -math.inf))
    try:
        params = sampling_params("a request", {**text.chat_sampling, **given, "logit_bias": biases})
        params.check_vocabulary(text.id_tokenizer.vocab_size)
    except UsageError as error:
        raise BadRequest(str(error), str(error).partition(":")[0].partition(" ")[0]) from None
    return params


def _biases(given: Mapping[int | str, float], text: ModelText) -> dict[int, float]:
    """Return biases by token id. A text stands for each of its tokens."""
    biases: dict[int, float] = {}
    for key, bias in given.items():
        ids = [key] if isinstance(key, int) else text.tokenizer.encode(key, False, False, add_eos=False)
        biases.update(dict.fromkeys(ids, bias))
    return biases
