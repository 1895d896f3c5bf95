"""Options of a generation as OpenAI's APIs and llama-server name them, read from a body."""

from __future__ import annotations

import math
import re
from typing import Any

from starlette.requests import Request

from ..api.drafting import KINDS, MOST_DRAFT_TOKENS
from ..errors import abbreviate
from ..sampling.noise import MAX_SEED
from .ask import AnswerFormat, Thinking
from .errors import BadRequest, Unsupported
from .wire import Fields, Json

MOST_STOPS = 16
MOST_BIASES = 1024
LARGEST = 2**31 - 1

#: Headers with a name of the client's session, the best first.
SESSION_HEADERS = ("x-claude-code-session-id", "x-session-affinity", "x-session-id", "x-conversation-id", "session_id")

_DURATION = re.compile(r"(-?)(?:([0-9]{1,6})h)?(?:([0-9]{1,6})m)?(?:([0-9]{1,9}(?:\.[0-9]{1,3})?)s?)?")

# Fields that change the answer, which this server has not, and the values with which they change nothing.
_OFF: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "web_search_options": (),
    "functions": ([],),
    "function_call": ("none",),
    "samplers": ([],),
    "lora": ([],),
    "mirostat": (0,),
    "xtc_probability": (0,),
    "dry_multiplier": (0,),
    "top_n_sigma": (-1, 0),
    "dynatemp_range": (0,),
    "adaptive_target": (-1,),
    "min_tokens": (0,),
    "use_beam_search": (False,),
    "t_max_predict_ms": (-1, 0),
    "n_indent": (0,),
    "post_sampling_probs": (False,),
    "return_tokens": (False,),
    "response_fields": ([],),
    "grammar_lazy": (False,),
    "reasoning_control": (False,),
    "prompt_embeds": (),
    "documents": ([],),
}
_INSTEAD = {
    "functions": "functions is not supported; use tools",
    "function_call": "function_call is not supported; use tool_choice",
    "documents": "documents is not supported; put their text in a message",
}
# Fields that change nothing here, or that only advise.
_HARMLESS = (
    *("user", "metadata", "store", "service_tier", "safety_identifier", "verbosity", "prediction"),
    *("prompt_cache_key", "prompt_cache_retention", "cache_prompt", "id_slot", "n_cache_reuse", "n_keep", "n_discard"),
    *("sse_ping_interval", "verbose", "backend_sampling", "min_keep", "n_probs"),
    *("preserved_tokens", "grammar_triggers", "xtc_threshold", "dry_base", "dry_allowed_length"),
    *("dry_penalty_last_n", "dry_sequence_breakers", "mirostat_tau", "mirostat_eta", "dynatemp_exponent"),
    *("adaptive_decay", "length_penalty", "moderation"),
)


def refuse_unsupported(fields: Fields) -> None:
    """Raise Unsupported for the first field that would change the answer and that this server has not."""
    for name, off in _OFF.items():
        value = fields.given(name)
        if value is not None and value not in off:
            raise Unsupported(fields.at(name), _INSTEAD.get(name, ""))
    modalities = fields.texts("modalities")
    if any(m != "text" for m in modalities):
        raise Unsupported(fields.at("modalities"), 'modalities: only ["text"] is supported')
    fields.skip(*_HARMLESS)


def sampling(fields: Fields) -> Json:
    """Read the options of sampling, and of drafts. Those that are missing have the model's defaults."""
    found = {
        "temperature": fields.number("temperature", low=0, high=100),
        "top_p": fields.number("top_p", low=0, high=1),
        "top_k": fields.integer("top_k", low=-1, high=LARGEST),
        "min_p": fields.number("min_p", low=0, high=1),
        "typical_p": fields.number("typical_p", "typ_p", low=0, high=1, above=True),
        "presence_penalty": fields.number("presence_penalty", low=-100, high=100),
        "frequency_penalty": fields.number("frequency_penalty", low=-100, high=100),
        "repeat_penalty": fields.number("repeat_penalty", "repetition_penalty", low=0, high=100, above=True),
        "repeat_last_n": fields.integer("repeat_last_n", low=-1, high=LARGEST),
        "seed": _seed(fields.integer("seed")),
        "logit_bias": logit_bias(fields) or None,
        "ignore_end": fields.flag("ignore_eos") or None,
        "draft": fields.choice("draft", of=KINDS) or None,
        "draft_tokens": fields.integer("draft_tokens", low=1, high=MOST_DRAFT_TOKENS),
    }
    return {name: value for name, value in found.items() if value is not None}


def _seed(seed: int | None) -> int | None:
    """Return a seed that the engine takes. -1 is a random one; other negative ones are as good as any."""
    return None if seed is None or seed == -1 else seed % (MAX_SEED + 1)


def logit_bias(fields: Fields) -> dict[int | str, float]:
    """Read biases by token id, or by a text whose tokens are meant. ``false`` forbids a token.

    OpenAI's form is an object of ids; llama-server also takes pairs, ``[[id or text, bias or false], …]``.
    """
    value, path = fields.given("logit_bias"), fields.at("logit_bias")
    if value is None:
        return {}
    if isinstance(value, dict):
        pairs = list(value.items())
    elif isinstance(value, list) and all(isinstance(p, list) and len(p) == 2 for p in value):
        pairs = [(p[0], p[1]) for p in value]
    else:
        raise BadRequest(f"{path} must be an object of biases by token id, or pairs of them", path, "invalid_type")
    if len(pairs) > MOST_BIASES:
        raise BadRequest(f"{path} has more than {MOST_BIASES} biases", path)
    return dict(_bias(key, bias, path) for key, bias in pairs)


def _bias(key: Any, bias: Any, path: str) -> tuple[int | str, float]:
    if isinstance(key, str) and key.isascii() and key.isdigit():
        key = int(key[:20])
    if type(key) not in (int, str) or (type(key) is int and not 0 <= key <= LARGEST):
        raise BadRequest(f"{path}: {abbreviate(key)} is no token id", path)
    if bias is False:
        return key, -math.inf
    if type(bias) not in (int, float):
        raise BadRequest(f"{path}: the bias of {abbreviate(key)} must be a number, not {abbreviate(bias)}", path)
    return key, -math.inf if bias <= -100 else float(bias)


def stop(fields: Fields) -> tuple[str, ...]:
    """Read the texts that end an answer."""
    return tuple(text for text in fields.texts("stop", most=MOST_STOPS) if text)


def max_tokens(fields: Fields, default: int | None = None) -> int | None:
    """Read the most tokens of an answer. -1 is llama-server's "no limit". The context clamps it, never refuses it."""
    found = fields.integer("max_completion_tokens", "max_tokens", "n_predict", low=-2, high=None)
    if found is None:
        return default
    return None if found < 0 else min(found, LARGEST)


def deadline(fields: Fields) -> float | None:
    """Read the seconds to the end of a request. It is our own field."""
    return fields.number("deadline", low=0, above=True)


def keep_alive(fields: Fields) -> float | None:
    """Read the seconds that the model stays loaded after the request. -1: for good. Texts are Ollama's: "10m"."""
    value = fields.given("keep_alive", "ttl")
    if not isinstance(value, str):
        return fields.number("keep_alive", "ttl")
    parts = _DURATION.fullmatch(value)
    if not parts or not value.strip("-"):
        path = fields.at("keep_alive")
        raise BadRequest(f"{path} must be seconds or a text such as 10m, not {abbreviate(value)}", path)
    hours, minutes, seconds = (float(part or 0) for part in parts.groups()[1:])
    return (3600 * hours + 60 * minutes + seconds) * (-1 if parts[1] else 1)


def affinity(request: Request, fields: Fields) -> str:
    """Return the name of the client's session, "" if it gives none."""
    for name in SESSION_HEADERS:
        if found := request.headers.get(name):
            return found[:256]
    key = fields.given("prompt_cache_key")
    return key[:256] if isinstance(key, str) else ""


def answer_format(fields: Fields) -> AnswerFormat:
    """Read the form of the answer's text: OpenAI's ``response_format``, or names of llama-server and vLLM."""
    found = [form for form in (_response_format(fields), _grammar(fields), _guided(fields)) if form.kind != "text"]
    if len(found) > 1:
        raise BadRequest(
            "response_format, grammar and the like: the body asks for more than one form of the answer",
            "response_format",
        )
    return found[0] if found else AnswerFormat()


def _response_format(fields: Fields) -> AnswerFormat:
    form = fields.inner("response_format")
    if form is None:
        return AnswerFormat()
    kind = form.choice("type", of=("text", "json_object", "json_schema", "grammar", "regex"), default="text")
    if kind == "text":
        return AnswerFormat()
    if kind == "json_object":
        schema = form.object("schema")  # llama-server's form
        return AnswerFormat("json_object") if schema is None else AnswerFormat("json_schema", schema)
    if kind == "json_schema":
        named = form.inner("json_schema") or form
        return AnswerFormat("json_schema", _schema(named, "schema"), named.flag("strict", default=True))
    if kind == "grammar":
        return AnswerFormat("grammar", _required_text(form, "grammar"))
    return AnswerFormat("regex", _required_text(form, "pattern", "regex"))


def _schema(fields: Fields, name: str) -> Any:
    schema = fields.given(name)
    if not isinstance(schema, (dict, bool)):
        path = fields.at(name)
        raise BadRequest(f"{path} must be a JSON schema, an object", path, "invalid_type")
    return schema


def _required_text(fields: Fields, *names: str) -> str:
    found = fields.text(*names)
    if not found:
        path = fields.at(names[0])
        raise BadRequest(f"{path} is missing", path, "missing_required_parameter")
    return found


def _grammar(fields: Fields) -> AnswerFormat:
    """Read llama-server's ``json_schema`` and ``grammar``, which may also be an object with a type, or be in Lark."""
    if (schema := fields.given("json_schema")) is not None:
        return (
            AnswerFormat("json_schema", _schema(fields, "json_schema")) if schema != {} else AnswerFormat("json_object")
        )
    value, path = fields.given("grammar"), fields.at("grammar")
    if value is None or value == "":
        return AnswerFormat()
    if isinstance(value, str):
        return AnswerFormat("grammar", value)
    form = Fields.of(value, path)
    kind = form.choice("type", "syntax", of=("lark", "regex", "gbnf"), default="grammar")
    return AnswerFormat(
        kind,  # type: ignore[arg-type]  # one of these
        _required_text(form, "value", "definition", "grammar", "pattern", "regex", "lark", "gbnf"),
    )


def _guided(fields: Fields) -> AnswerFormat:
    """Read vLLM's ``structured_outputs``, and its older names that begin with "guided_"."""
    inner = fields.inner("structured_outputs")
    form, before = (inner, "") if inner else (fields, "guided_")
    if form.given(before + "json") is not None:
        return AnswerFormat("json_schema", _schema(form, before + "json"))
    if pattern := form.text(before + "regex"):
        return AnswerFormat("regex", pattern)
    if grammar := form.text(before + "grammar"):
        return AnswerFormat("grammar", grammar)
    if choices := form.texts(before + "choice", most=MOST_BIASES):
        return AnswerFormat("choice", list(choices))
    return AnswerFormat()


def thinking(fields: Fields) -> tuple[Thinking, Json]:
    """Read how the model thinks, and more variables of the chat template."""
    variables = dict(fields.object("chat_template_kwargs") or {})
    effort, budget = (
        fields.text("reasoning_effort"),
        fields.integer(
            "reasoning_budget",
            "thinking_budget_tokens",
            "reasoning_budget_tokens",
            "thinking_budget",
            low=-1,
            high=LARGEST,
        ),
    )
    if reasoning := fields.inner("reasoning"):
        effort = effort or reasoning.text("effort")
        budget = reasoning.integer("max_tokens", low=0, high=LARGEST) if budget is None else budget
        if reasoning.given("enabled") is not None and not reasoning.flag("enabled"):
            effort = "none"
    if told := fields.inner("thinking"):  # Anthropic's form, which some servers of this API take
        if told.choice("type", of=("enabled", "disabled", "adaptive"), default="enabled") == "disabled":
            effort = "none"
        budget = told.integer("budget_tokens", low=0, high=LARGEST) if budget is None else budget
    on = fields.given("enable_thinking")
    if on is not None:
        effort = (effort or "on") if fields.flag("enable_thinking") else "none"
    if budget == 0:
        effort = effort or "none"
    split = fields.choice(
        "reasoning_format", of=("auto", "none", "deepseek", "deepseek-legacy", "deepseek_legacy"), default="auto"
    )
    return Thinking(effort, -1 if budget is None else budget, split != "none"), variables
