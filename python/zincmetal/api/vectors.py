"""Vectors of texts, and the relevance of documents to a query, of models that were trained for it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .. import arguments
from ..engine.vectors import vectors
from ..errors import UsageError
from ..gguf.quants import dequantize
from ..text.chat.marks import Marker
from .naming import model_name

if TYPE_CHECKING:
    from .model import Model

F32 = NDArray[np.float32]
TEMPLATE = "tokenizer.chat_template.rerank"  # the key of a reranker's prompt, with {query} and {document}
INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
#: Prompt of Qwen3-Reranker, for files without one.
QWEN3 = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n'
    f"<|im_start|>user\n<Instruct>: {INSTRUCTION}\n<Query>: {{query}}\n<Document>: {{document}}<|im_end|>\n"
    "<|im_start|>assistant\n<think>\n\n</think>\n\n"
)


def text_ids(model: Model, texts: Sequence[Any], parse_special: bool = False) -> list[list[int]]:
    """Return the ids of texts, or of lists of ids, which stay. A text begins and ends as the file says."""
    return [
        model.tokenizer.encode(text, parse_special=parse_special)
        if isinstance(text, str)
        else arguments.token_ids(text, "texts", model.config.n_vocab)
        for text in texts
    ]


def embed(model: Model, ids: Sequence[Sequence[int]], normalize: bool, dimensions: int | None) -> F32:
    """Return the vectors of texts, given as ids: float32 [n, dim]. See ``Model.embed``."""
    pooling = model.config.pooling
    if pooling is None:
        why = f"{model_name(model.file, model.config)} makes no vectors: its file has no pooling_type"
        raise UsageError(f"{why}; load an embedding model")
    if pooling.kind == "rank":
        raise UsageError(f"{model_name(model.file, model.config)} is a reranker, it makes scores: use rerank")
    if dimensions is not None:
        dimensions = arguments.integer("dimensions", dimensions, 1, pooling.width)
    found = vectors(model.running, ids, pooling.kind)[:, :dimensions]
    return normalized(found) if normalize else found


def normalized(rows: F32) -> F32:
    """Scale each row to a length of 1. Zeros stay."""
    lengths = np.linalg.norm(rows.astype(np.float64), axis=-1, keepdims=True)
    return (rows / np.where(lengths == 0, 1, lengths)).astype(np.float32)


def rerank(model: Model, prompts: Sequence[Sequence[int]]) -> F32:
    """Return the score of each prompt of :func:`rerank_ids`: float32 [n]. See ``Model.rerank``."""
    rows: F32 = vectors(model.running, prompts, "last")
    if "cls.output.weight" not in model.file.tensors:
        rows = rows @ _yes_and_no(model).T
        return np.ascontiguousarray(softmax(rows)[:, 0])
    if rows.shape[1] == 1:
        return np.ascontiguousarray(rows[:, 0])
    labels = model.config.pooling.labels if model.config.pooling else ()
    return np.ascontiguousarray(softmax(rows)[:, labels.index("yes") if "yes" in labels else 0])


def softmax(rows: F32) -> F32:
    """Return the probabilities of each row's logits."""
    weights = np.exp(rows.astype(np.float64) - rows.max(axis=-1, keepdims=True))
    found: F32 = (weights / weights.sum(axis=-1, keepdims=True)).astype(np.float32)
    return found


def rerank_ids(model: Model, query: str, documents: Sequence[str], instruction: str | None) -> list[list[int]]:
    """Return the prompt that asks for the relevance of each document, as ids.

    Special tokens in the query and the documents are text. Raises UsageError if the model is no reranker.
    """
    template, tokenizer = _template(model), model.tokenizer
    if template is None:
        if instruction is not None:
            raise UsageError(f"instruction: {model_name(model.file, model.config)} takes none")
        ends = [tokenizer.eos_id] if tokenizer.add_eos and tokenizer.eos_id is not None else []
        begin = [*tokenizer.encode(query, add_eos=False), *ends]
        return [[*begin, *tokenizer.encode(text, add_bos=False, add_eos=False), *ends] for text in documents]
    if instruction is not None:
        if INSTRUCTION not in template:
            raise UsageError("instruction: the model's prompt has no place for one")
        template = template.replace(INSTRUCTION, "{instruction}")
    marker = Marker(tokenizer.control_texts, beginnings=True)
    fill = _filling(template, query=marker.mark(query), instruction=marker.mark(instruction or ""))
    return [
        tokenizer.encode(fill(marker.mark(text)), add_bos=False, parse_special=True, add_eos=False)
        for text in documents
    ]


def _filling(template: str, **texts: str) -> Callable[[str], str]:
    """Return the function that puts a document, and these texts, into a template, at once."""

    def fill(document: str) -> str:
        given = {**texts, "document": document}
        return re.sub(r"\{(query|document|instruction)\}", lambda match: given[match[1]], template)

    return fill


def _template(model: Model) -> str | None:
    """Return the prompt of a reranker, or None if it takes a query and a document without one."""
    pooling, metadata = model.config.pooling, model.file.metadata
    template = metadata.get(TEMPLATE)
    if isinstance(template, str) and "{query}" in template and "{document}" in template:
        return template
    if pooling and pooling.kind == "rank" and "cls.output.weight" in model.file.tensors:
        return QWEN3 if pooling.labels else None
    name = f"{metadata.get('general.name', '')} {metadata.get('general.basename', '')}"
    if (pooling and pooling.kind == "rank") or "rerank" in name.lower():
        return QWEN3
    raise UsageError(
        f"{model_name(model.file, model.config)} is no reranker: its file has neither pooling_type 4 nor a prompt "
        f"for it ({TEMPLATE}); load a reranker, or compare the vectors of embed"
    )


def _yes_and_no(model: Model) -> F32:
    """Return the rows of the LM head for "yes" and "no", float32 [2, n_embd]."""
    tensor = model.file.tensors.get("output.weight") or model.file.tensors["token_embd.weight"]
    rows = model.file.data(tensor.name).reshape(tensor.shape[-2], -1)
    found = []
    for word in ("yes", "no"):
        ids = model.tokenizer.encode(word, add_bos=False, add_eos=False)
        if len(ids) != 1:
            raise UsageError(f"{model_name(model.file, model.config)} has no single token for {word!r}: no reranker")
        found.append(dequantize(tensor.type, rows[ids[0]], tensor.shape[-1:]))
    return np.stack(found)
