"""Backend in this process: a loaded model."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Any

from ..api.generation import Asked
from ..api.handle import Generation
from ..api.model import Model
from ..api.result import Chunk, Logprob, Result
from ..api.text import ModelText
from .aside import aside
from .backend import ModelCard, Reading, Vectors
from .texts import embedded, reranked


class LocalAnswer:
    """Generation of a model in this process."""

    def __init__(self, generation: Generation) -> None:
        self._generation = generation

    async def events(self) -> AsyncGenerator[Reading | Chunk, None]:
        """Yield what happens. See ``Answering``."""
        async for event in self._generation.events():
            yield event if isinstance(event, Chunk) else Reading(*event)

    async def result(self) -> Result:
        """Return the whole, after the end."""
        return self._generation.result()

    def cancel(self) -> None:
        """End the generation within one step."""
        self._generation.cancel()


class LocalBackend:
    """Model that is loaded in this process. Whoever made the model closes it."""

    def __init__(self, model: Model, card: ModelCard) -> None:
        self._model, self.card = model, card

    @property
    def text(self) -> ModelText:
        """Tokenizer, chat template and advised sampling of the model's file."""
        return self._model.text

    async def start(self, asked: Asked) -> LocalAnswer:
        """Begin a generation. See ``Backend``."""
        asked = replace(asked, progress=_unread)
        if asked.grammar is None:
            return LocalAnswer(self._model.start(asked))
        return LocalAnswer(await aside(self._model.start, asked))  # a large grammar compiles for long

    async def score(self, ids: Sequence[int], n_top: int) -> list[Logprob]:
        """Return the log-probabilities of a prompt. Other requests wait meanwhile."""
        return await aside(self._model.prompt_scores, ids, n_top)

    async def embed(self, texts: Sequence[str | Sequence[int]], normalize: bool, dimensions: int | None) -> Vectors:
        """Return the vectors of texts. See ``Backend``."""
        return await aside(embedded, self._model, texts, normalize, dimensions)

    async def rerank(self, query: str, documents: Sequence[str], instruction: str | None) -> Vectors:
        """Return the scores of documents. See ``Backend``."""
        return await aside(reranked, self._model, query, documents, instruction)

    async def figures(self) -> dict[str, Any]:
        """Return what the engine has at this moment."""
        return self._model.figures()

    async def clear_cache(self) -> None:
        """Forget all prompts that are cached."""
        await aside(self._model.clear_cache)


def _unread(done: int, total: int) -> None:
    """Ask for progress, which ``events`` yields."""
