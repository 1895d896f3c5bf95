"""Model as the server sees it, in this process or in one of its own.

A *backend* answers token ids with text, piece by piece. Whatever is text before that (canonical messages, the chat
template, the tokenizer) and after it (reasoning, tool calls) happens in the server's process.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from ..api.generation import Asked
from ..api.result import Chunk, Logprob, Result
from ..api.text import ModelText


@dataclass(frozen=True)
class ModelCard:
    """Facts of a model that clients ask for. ``n_ctx`` is the context that is served, ``n_ctx_train`` the trained one.

    ``state``: "unloaded", "loading", "loaded" or "failed". ``why`` is the reason of a failure. ``facts`` are free.
    """

    id: str
    aliases: tuple[str, ...] = ()
    state: str = "loaded"
    why: str = ""
    created: int = 0  # seconds since 1970
    arch: str = ""
    quantization: str = ""
    n_ctx: int = 0
    n_ctx_train: int = 0
    n_vocab: int = 0
    n_params: int = 0
    nbytes: int = 0  # of the file
    sequences: int = 1  # that run at once
    facts: dict[str, Any] = field(default_factory=dict)


class Reading(NamedTuple):
    """Progress of a prompt: tokens ``done`` of ``total`` to be computed. The first, with ``done`` 0, comes at once.

    The tokens of the prompt that are not in ``total`` were reused.
    """

    done: int
    total: int


class Vectors(NamedTuple):
    """Vectors of texts, or scores of documents: float32 [n, dim] in little-endian bytes, and the tokens of all."""

    data: bytes
    dim: int
    tokens: int


class Answering(Protocol):
    """Generation that runs."""

    def events(self) -> AsyncGenerator[Reading | Chunk, None]:
        """Yield what happens, once. Raises what ended the generation, if it was an error."""

    async def result(self) -> Result:
        """Return the whole, after the end. Raises what ended the generation, if it was an error."""

    def cancel(self) -> None:
        """End the generation within one step. It may be called at any time, and more than once."""


class Backend(Protocol):
    """Loaded model."""

    @property
    def card(self) -> ModelCard:
        """Facts of the model."""

    @property
    def text(self) -> ModelText:
        """Tokenizer, chat template and advised sampling of the model's file."""

    async def start(self, asked: Asked) -> Answering:
        """Begin a generation. Raises QueueFullError, ContextFullError, UsageError, or DeviceError of a lost device."""

    async def score(self, ids: Sequence[int], n_top: int) -> list[Logprob]:
        """Return the log-probability of each id but the first, given those before it, and of the ``n_top`` best ids."""

    async def embed(self, texts: Sequence[str | Sequence[int]], normalize: bool, dimensions: int | None) -> Vectors:
        """Return the vectors of texts, or of token ids. Raises UsageError for a model that makes none."""

    async def rerank(self, query: str, documents: Sequence[str], instruction: str | None) -> Vectors:
        """Return how relevant each document is to a query. Raises UsageError for a model that is no reranker."""

    async def figures(self) -> dict[str, Any]:
        """Return what ``Model.figures`` does: requests, pools, and the cache of the engine at this moment."""

    async def clear_cache(self) -> None:
        """Forget all prompts that are cached."""


class Models(Protocol):
    """Models of a server: which there are, and which are loaded."""

    def cards(self) -> list[ModelCard]:
        """Return the models that can be asked for, the default one first."""

    def resolve(self, name: str) -> str:
        """Return the id of a model by its id, an alias, or "" for the default. Raises ModelNotFoundError."""

    def lease(self, name: str, keep: float | None = None) -> AbstractAsyncContextManager[Backend]:
        """Give a loaded model for the time of a request, and load it first if need be. It stays loaded meanwhile.

        A load takes from a second to minutes: whoever streams sends headers first if the card's state is not "loaded".
        ``keep``: seconds that the model stays loaded after the request, below 0: for good; None: as it is.
        Raises ModelNotFoundError, OutOfMemoryError, QueueFullError, or what made the load fail.
        """

    async def text_of(self, name: str) -> ModelText:
        """Return the text side of a model, loaded or not: for counting tokens, which never waits for generations.

        Raises ModelNotFoundError, or what is wrong with the file.
        """

    async def close(self) -> None:
        """Close all models. Requests that run end with an error."""
