"""Options of sampling, and their checks: ``SamplingParams``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import arguments
from ..errors import UsageError, abbreviate
from .noise import MAX_SEED

LogitsProcessor = Callable[[Sequence[int], NDArray[np.float32]], NDArray[np.float32]]

LARGEST_FLOAT = float(np.finfo(np.float64).max)
LARGEST_COUNT = 2**63 - 1  # tokens

_Checked = Iterator[tuple[str, Any]]  # fields with the values to keep


@dataclass(frozen=True)
class SamplingParams:
    """Options for choosing the next token. An option at its default is off. None stands for the default.

    ``temperature`` 0 takes the most probable token and ignores the filters.

    The filters see probabilities before the temperature:

    - ``top_k`` keeps the k most probable tokens. 0 and -1 keep all.
    - ``typical_p`` keeps the tokens whose surprisal is nearest to the entropy, until their probabilities sum to p
      (arXiv 2202.00666).
    - ``top_p`` keeps the fewest most probable tokens whose probabilities sum to p. 0 keeps the best token alone.
    - ``min_p`` keeps the tokens that have at least p times the probability of the best one.

    The penalties count the last ``repeat_last_n`` tokens, prompt included. -1 counts all.

    - ``repeat_penalty`` divides positive logits of these tokens and multiplies negative ones (arXiv 1909.05858).
    - ``presence_penalty`` is subtracted from the logit of each of these tokens.
    - ``frequency_penalty`` is subtracted once for every time that the token occurs.

    ``logit_bias`` maps token ids to numbers that are added to their logits. -inf forbids a token; +inf is refused.
    The ids may be strings of digits, as in JSON. Pairs may replace the mapping.

    ``logits_processors`` are functions. Each gets the ids so far and the logits, float32 [vocab], and returns logits
    of this shape. They run one after another. -inf forbids a token. An exception of a processor goes to the caller.

    The same ``seed`` gives the same tokens for the same logits; ``docs/sampling.md`` has the conditions. None and -1
    give other tokens each time.

    Raises UsageError, which names the option, for a value that an option does not take.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    logits_processors: Sequence[LogitsProcessor] = ()

    def __post_init__(self) -> None:
        # Each value is replaced by a copy, so that later changes of the caller's own object have no effect.
        for check in (self._check_draw, self._check_filters, self._check_penalties, self._check_changes):
            for name, value in check():
                object.__setattr__(self, name, value)

    # ---- checks, one for each group of fields ---------------------------------------------------------------

    def _check_draw(self) -> _Checked:
        yield self._number("temperature", 0.0, "0: the most probable token", 0)
        seed = arguments.integer("seed", self.seed, -1, MAX_SEED, -1, "-1 or None: another one each time")
        yield "seed", None if seed == -1 else seed

    def _check_filters(self) -> _Checked:
        yield self._count("top_k", 0, "0 or -1: off")
        yield self._number("top_p", 1.0, "1: off", 0, 1)
        yield self._number("min_p", 0.0, "0: off", 0, 1)
        yield self._number("typical_p", 1.0, "1: off", 0, 1, above=True)

    def _check_penalties(self) -> _Checked:
        yield self._number("repeat_penalty", 1.0, "1: off", 0, above=True)
        yield self._count("repeat_last_n", 64, "0: off, -1: all")
        yield self._number("presence_penalty", 0.0, "0: off")
        yield self._number("frequency_penalty", 0.0, "0: off")

    def _check_changes(self) -> _Checked:
        yield "logit_bias", _logit_bias("logit_bias", self.logit_bias)
        yield "logits_processors", _processors("logits_processors", self.logits_processors)

    def _number(
        self, name: str, default: float, note: str, low: float = -np.inf, high: float = np.inf, *, above: bool = False
    ) -> tuple[str, float]:
        return name, arguments.number(name, getattr(self, name), low, high, default, note, above=above)

    def _count(self, name: str, default: int, note: str) -> tuple[str, int]:
        return name, arguments.integer(name, getattr(self, name), -1, LARGEST_COUNT, default, note)

    def check_vocabulary(self, n_vocab: int) -> None:
        """Raise UsageError if ``logit_bias`` names a token that the model does not have."""
        wrong = next((t for t in self.logit_bias if t >= n_vocab), None)
        if wrong is not None:
            raise UsageError(f"logit_bias: token id {wrong} is outside the vocabulary of {n_vocab}")

    # ---- questions ------------------------------------------------------------------------------------------

    @property
    def greedy(self) -> bool:
        """True if the device's argmax is the answer: the temperature is 0 and no logit changes."""
        return self.temperature == 0 and not (self.penalises or self.logit_bias or self.logits_processors)

    @property
    def penalises(self) -> bool:
        """True if a penalty is on."""
        on = self.repeat_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0
        return on and self.repeat_last_n != 0

    @property
    def filters(self) -> bool:
        """True if a filter is on."""
        return self.top_k > 0 or self.typical_p < 1 or self.top_p < 1 or self.min_p > 0


def _logit_bias(name: str, value: Any) -> dict[int, float]:
    """Read biases by token id, from a mapping or from pairs."""
    wanted = "a mapping of token ids to numbers or -inf"
    if value is None:
        return {}
    if isinstance(value, str):
        arguments.refuse(name, wanted, value)
    try:
        pairs = [(k, v) for k, v in (value.items() if isinstance(value, Mapping) else value)]
    except Exception as error:
        arguments.refuse(name, wanted, value, error)
    biases = {}
    for token, bias in pairs:
        try:
            biases[_token_of(token)] = arguments.number("", bias, high=LARGEST_FLOAT, finite=False)
        except UsageError as error:
            shown = f"{abbreviate(token)}: {abbreviate(bias)}"
            raise UsageError(f"{name} must be {wanted}, and holds {{{shown}}}") from error.__cause__
    return biases


def _token_of(key: Any) -> int:
    """Read the token id of a key of ``logit_bias``: an integer, or a string of digits."""
    if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 20:
        key = int(key)
    return arguments.integer("", key, 0, LARGEST_COUNT)


def _processors(name: str, value: Any) -> tuple[LogitsProcessor, ...]:
    """Read a sequence of functions."""
    wanted = "a sequence of functions"
    if value is None:
        return ()
    try:
        found = tuple(value)
    except Exception as error:
        arguments.refuse(name, wanted, value, error)
    if not all(callable(f) for f in found):
        arguments.refuse(name, wanted, value)
    return found
