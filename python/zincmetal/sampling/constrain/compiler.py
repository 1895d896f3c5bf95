"""Compiles grammars by llguidance, which is loaded at the first use. Size and time of a grammar are bounded."""

from __future__ import annotations

import re
from functools import lru_cache
from importlib.util import find_spec
from itertools import islice
from typing import Any

import numpy as np

from ...errors import UnsupportedSchemaError, UsageError, quote
from .constraint import Constraint
from .grammar import Grammar
from .schema import parts
from .spent import Spent
from .vocabulary import Vocabulary

MISSING = "grammars, schemas and choices need the package llguidance: pip install 'zincmetal[grammar]'"
ANYTHING = r"start: /(.|\n)*/"
LEAST = 1, 9  # versions before let invalid answers through, and take minutes for some schemas
MOST_TRIED = 200  # schemas in a schema, to find the one that is refused
KEPT = 64  # compiled grammars of a vocabulary: an agent sends the same tools with each turn

#: Bounds of a grammar. Large schemas of APIs stay far below; a hostile one ends in some 100 ms.
LIMITS = {
    "max_items_in_row": 10_000,
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 400_000,
    "step_max_items": 100_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 200_000,
    "precompute_large_lexemes": False,
    "verbose_errors": False,
}


def library() -> Any:
    """Load llguidance. Raises UsageError, with the remedy, if it is not installed."""
    try:
        import llguidance
    except ImportError:
        raise UsageError(MISSING) from None
    version = re.match(r"(\d+)\.(\d+)", llguidance.__version__)
    if version and tuple(map(int, version.groups())) < LEAST:
        raise UsageError(f"llguidance {llguidance.__version__} is too old: pip install -U 'zincmetal[grammar]'")
    return llguidance


def installed() -> bool:
    """Return True if llguidance is installed."""
    return find_spec("llguidance") is not None


class Compiler:
    """Makes matchers of answers over one vocabulary. For any thread."""

    def __init__(self, vocabulary: Vocabulary, spent: Spent | None = None) -> None:
        module = library()
        self._spent = spent or Spent()
        if not vocabulary.ends:
            raise UsageError("the model's file names no end token, so that no answer could end where its grammar does")
        self._module = module
        self._tokenizer = _tokenizer(module, vocabulary)
        self._limits = module.LLParserLimits(**LIMITS)
        # Single calls of a dict are atomic: no lock, which an interrupt could leave held.
        self._kept: dict[str, Any] = {}
        self._n_words = vocabulary.n_words
        bits = self.matcher(Grammar(ANYTHING)).compute_bitmask()
        self._free = np.frombuffer(bits, "<u4", self._n_words)

    def constraint(self, grammar: Grammar, n_prompt: int) -> Constraint:
        """Make the mask of one answer, after a prompt of so many tokens. Raises what :meth:`matcher` does."""
        return Constraint(self.matcher(grammar), self._free, n_prompt, self._spent)

    def matcher(self, grammar: Grammar) -> Any:
        """Return a matcher at its start. Raises UsageError, or UnsupportedSchemaError, for a grammar that is wrong."""
        kept = self._kept.pop(grammar.lark, None)
        if kept is None:
            with self._spent.on("compile"):
                kept = self._compiled(grammar)
        self._kept[grammar.lark] = kept  # as the youngest
        while len(self._kept) > KEPT:
            self._kept.pop(next(iter(self._kept)), None)
        return kept.deep_copy()

    def _compiled(self, grammar: Grammar) -> Any:
        matcher = self._module.LLMatcher(
            self._tokenizer,
            self._module.LLMatcher.grammar_from_lark(grammar.lark),
            log_level=0,
            limits=self._limits,
        )
        if matcher.is_error():
            raise refusal(matcher.get_error())
        bits = matcher.compute_bitmask()
        if matcher.is_error() or not any(bits):  # a schema that refers to nothing but itself, for example
            raise UsageError("no answer can satisfy the grammar")
        return matcher


def _tokenizer(module: Any, vocabulary: Vocabulary) -> Any:
    wrapper = module.TokenizerWrapper(_AsWanted(vocabulary))
    return module.LLTokenizer(wrapper, eos_token=sorted(vocabulary.ends))


class _AsWanted:
    """Vocabulary as llguidance takes it: the first byte 0xFF marks a token that no text matches."""

    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._encode = vocabulary.exact
        self.eos_token_id = min(vocabulary.ends)
        self.tokens = vocabulary.named()
        self.special_token_ids: list[int] = []  # they have their mark already

    def __call__(self, text: bytes) -> list[int]:
        return self._encode(text)


@lru_cache(KEPT)
def check(grammar: Grammar) -> None:
    """Check a grammar without a vocabulary, so that what is wrong with it shows before a model is asked.

    Names of control tokens are not checked. Raises UsageError, or UnsupportedSchemaError for a schema in it.
    """
    module = library()
    said = module.LLMatcher.validate_grammar(
        module.LLMatcher.grammar_from_lark(grammar.lark), limits=module.LLParserLimits(**LIMITS)
    )
    if said and not said.startswith("WARNING"):
        raise refusal(said)


def of_schema(schema: Any, lenient: bool = False) -> Grammar:
    """Make the grammar of a JSON schema, and check it: what is wrong with the schema is named with its place."""
    grammar = Grammar.of_schema(schema, lenient)
    try:
        check(grammar)
    except UsageError as error:
        raise _located(error, schema, lenient) from None
    return grammar


def _located(error: UsageError, schema: Any, lenient: bool) -> UsageError:
    """Find the innermost schema that is refused for the same reason, and name its place in the error."""
    found, told = "#", str(error)
    for path, inner in islice(parts(schema), MOST_TRIED):
        if path.startswith(found):
            try:
                check(Grammar.of_schema(inner, lenient))
            except UsageError as same:
                found = path if str(same) == told else found
    if isinstance(error, UnsupportedSchemaError):
        return UnsupportedSchemaError(error.keyword, found, error.why)
    return UsageError(f"{error}; the schema is at {quote(found, 200)}") if found != "#" else error


#: What the compiler says of schemas that it cannot follow, and the keyword that says so.
_BLAMED = {
    "oneOf": r"oneOf",
    "minimum": r"range",
    "pattern": r"regex|look-?around|backreference",
    "minProperties": r"min/maxProperties",
    "patternProperties": r"pattern ?Properties|disjoint",
    "$ref": r"circular|external|retriev|\$ref",
    "format": r"format",
}


def refusal(said: str) -> UsageError:
    """Make the error for what the compiler says about a grammar."""
    lines = [line.strip() for line in said.splitlines() if not re.match(r"\s*(\d+ \||\^+\s*$)", line)]
    text = re.sub(r"^(at )?\d+\(\d+\): ", "", " ".join(filter(None, lines)))
    unknown = re.search(r"unknown special token: (\"[^\"]*\")", text)
    if unknown:
        return UsageError(f"the grammar names {unknown[1]}, which is no control token of this model")
    of_schema = re.match(r"failed to compile JSON schema: (.*)", text, re.DOTALL)
    if not of_schema:
        return UsageError(f"the grammar is wrong, or too large: {quote(text, 300)}")
    reason = of_schema[1].split("Enable 'coerce_one_of'")[0].strip(" .")
    if "nsatisfiable" in reason:
        return UsageError(f"no answer can satisfy the JSON schema: {quote(reason, 300)}")
    if "too large" in reason or "stack level" in reason:
        return UsageError(f"the JSON schema is too large: {quote(reason, 300)}")
    unknown = re.search(r'Unimplemented keys: \["([^"]+)"', reason)
    keyword = unknown[1] if unknown else next((k for k, v in _BLAMED.items() if re.search(v, reason)), "")
    if keyword:
        return UnsupportedSchemaError(keyword, "#", "" if unknown else quote(reason, 300))
    return UsageError(f"the JSON schema is wrong: {quote(reason, 300)}")
