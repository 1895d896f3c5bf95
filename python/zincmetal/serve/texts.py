"""Vectors and scores of a loaded model, as bytes that travel between processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..api import vectors
from .backend import Vectors

if TYPE_CHECKING:
    from ..api.model import Model


def embedded(model: Model, texts: Sequence[str | Sequence[int]], normalize: bool, dimensions: int | None) -> Vectors:
    """Return the vectors of texts. See ``Backend``."""
    ids = vectors.text_ids(model, texts)
    return _bytes(vectors.embed(model, ids, normalize, dimensions), ids)


def reranked(model: Model, query: str, documents: Sequence[str], instruction: str | None) -> Vectors:
    """Return the scores of documents. See ``Backend``."""
    ids = vectors.rerank_ids(model, query, documents, instruction)
    return _bytes(vectors.rerank(model, ids).reshape(-1, 1), ids)


def _bytes(rows: vectors.F32, ids: Sequence[Sequence[int]]) -> Vectors:
    return Vectors(np.ascontiguousarray(rows, "<f4").tobytes(), rows.shape[1], sum(map(len, ids)))
