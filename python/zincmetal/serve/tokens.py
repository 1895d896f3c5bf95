"""Tokens as clients see them: their text and bytes, beside their log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..api.result import Logprob
from .wire import Json

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer

LEAST = -9999.0  # stands for minus infinity, which is no JSON


def chat_logprobs(logprobs: Sequence[Logprob], tokenizer: Tokenizer) -> Json:
    """Return the ``logprobs`` of a choice of the chat API."""
    return {"content": [_entry(logprob, tokenizer) for logprob in logprobs], "refusal": None}


def _entry(logprob: Logprob, tokenizer: Tokenizer) -> Json:
    tops = [_token(token, value, tokenizer) for token, value in logprob.top]
    return {**_token(logprob.token, logprob.logprob, tokenizer), "top_logprobs": tops}


def _token(token: int, value: float, tokenizer: Tokenizer) -> Json:
    data = tokenizer.token_bytes(token)
    return {
        "token": token_text(token, tokenizer),
        "bytes": list(data),
        "logprob": finite(value),
        "id": token,
    }


def token_text(token: int, tokenizer: Tokenizer) -> str:
    """Return a token's text. A fraction of a character shows as replacement characters; ``bytes`` tell the rest."""
    return tokenizer.token_bytes(token).decode("utf-8", "replace")


def finite(value: float) -> float:
    """Return a log-probability that JSON can hold."""
    return max(value, LEAST)


class Offsets:
    """Where tokens begin in the text of a completion, in characters."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._decoder = tokenizer.stream()
        self._at = 0
        self.begun = False

    def begin(self, at: int) -> None:
        """Go on at a position: after the text of the prompt."""
        self._at, self.begun = at, True

    def next(self, token: int) -> int:
        """Return the position of a token, and go on behind it."""
        self.begun = True
        at = self._at
        self._at += len(self._decoder.push(token))
        return at


def legacy_logprobs(logprobs: Sequence[Logprob], tokenizer: Tokenizer, offsets: Offsets, n_top: int | None) -> Json:
    """Return the ``logprobs`` of a choice of the older API. The token itself is always among the top ones."""
    tops = [dict(logprob.top[: n_top or 0]) | {logprob.token: logprob.logprob} for logprob in logprobs]
    return {
        "tokens": [legacy_text(logprob.token, tokenizer) for logprob in logprobs],
        "token_logprobs": [finite(logprob.logprob) for logprob in logprobs],
        "top_logprobs": [{legacy_text(t, tokenizer): finite(v) for t, v in top.items()} for top in tops],
        "text_offset": [offsets.next(logprob.token) for logprob in logprobs],
    }


def legacy_text(token: int, tokenizer: Tokenizer) -> str:
    """Return a token's text. Fractions of characters are told apart, since texts are keys here."""
    data = tokenizer.token_bytes(token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
