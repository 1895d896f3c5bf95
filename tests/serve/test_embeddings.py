"""/v1/embeddings and /v1/rerank: forms of requests and replies, and a real model behind them."""

from __future__ import annotations

import asyncio
import base64
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from openai import AsyncOpenAI

import zincmetal
from support.paths import DATA
from support.remote_models import remote_model
from support.served import Served
from support.streams import Reply, ask
from zincmetal.errors import UsageError
from zincmetal.serve.app import make_app
from zincmetal.serve.backend import ModelCard
from zincmetal.serve.local import LocalBackend
from zincmetal.serve.serving import Serving

EMBEDDINGS, RERANK = "/v1/embeddings", "/v1/rerank"


def vectors_of(reply: Reply) -> list[Any]:
    assert reply.status == 200, reply.body
    assert [row["index"] for row in reply.json["data"]] == list(range(len(reply.json["data"])))
    return [row["embedding"] for row in reply.json["data"]]


@pytest.mark.parametrize(
    ("given", "lengths"),
    [("abc", [3]), (["a", "abcd"], [1, 4]), ([1, 2, 3], [3]), ([[1], [2, 3]], [1, 2]), (["ab", [5]], [2, 1])],
)
def test_forms_of_the_input(served: Served, given: Any, lengths: list[int]) -> None:
    reply = ask(served.app, EMBEDDINGS, {"model": "scripted", "input": given, "user": "me"})
    assert vectors_of(reply) == [[n, i, 0.5] for i, n in enumerate(lengths)]
    assert reply.json["object"] == "list"
    assert reply.json["model"] == "scripted"
    assert reply.json["usage"] == {"prompt_tokens": sum(lengths), "total_tokens": sum(lengths)}


def test_forms_of_the_vectors(served: Served) -> None:
    (coded,) = vectors_of(ask(served.app, EMBEDDINGS, {"input": "abc", "encoding_format": "base64"}))
    assert np.frombuffer(base64.b64decode(coded), "<f4").tolist() == [3, 0, 0.5]
    assert vectors_of(ask(served.app, EMBEDDINGS, {"input": "abc", "dimensions": 2})) == [[3, 0]]
    assert vectors_of(ask(served.app, EMBEDDINGS, {"input": "abc", "embd_normalize": -1})) == [[1.5, 0, 0.25]]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (EMBEDDINGS, {}, "input"),
        (EMBEDDINGS, {"input": []}, "input"),
        (EMBEDDINGS, {"input": 3}, "input"),
        (EMBEDDINGS, {"input": ["a", 3]}, "input[1]"),
        (EMBEDDINGS, {"input": [[1], []]}, "input[1]"),
        (EMBEDDINGS, {"input": [[1, "a"]]}, "input[0]"),
        (EMBEDDINGS, {"input": ["a"] * 2049}, "input"),
        (EMBEDDINGS, {"input": "a", "encoding_format": "int8"}, "encoding_format"),
        (EMBEDDINGS, {"input": "a", "dimensions": 0}, "dimensions"),
        (EMBEDDINGS, {"input": "a", "embd_normalize": 1}, "embd_normalize"),
        (RERANK, {"documents": ["a"]}, "query"),
        (RERANK, {"query": "a"}, "documents"),
        (RERANK, {"query": "a", "documents": []}, "documents"),
        (RERANK, {"query": "a", "documents": ["a", {"title": "b"}]}, "documents[1]"),
        (RERANK, {"query": "a", "texts": [3]}, "texts[0]"),
        (RERANK, {"query": "a", "documents": ["a"], "top_n": 0}, "top_n"),
    ],
)
def test_a_field_that_is_wrong_is_named(served: Served, path: str, body: Any, param: str) -> None:
    reply = ask(served.app, path, body)
    assert (reply.status, reply.json["error"]["param"]) == (400, param)


DOCUMENTS: list[Any] = ["a", "b a a", {"text": "aaa"}, "none"]


def test_documents_are_ranked(served: Served) -> None:
    body = {"model": "scripted", "query": "a", "documents": DOCUMENTS}
    for path in (RERANK, "/rerank", "/v1/reranking", "/reranking"):
        reply = ask(served.app, path, body)
        assert [(r["index"], r["relevance_score"]) for r in reply.json["results"]] == [(2, 3), (1, 2), (0, 1), (3, 0)]
    assert reply.json["usage"]["prompt_tokens"] == 13
    reply = ask(served.app, RERANK, {**body, "top_n": 1, "return_documents": True})
    assert reply.json["results"] == [{"index": 2, "relevance_score": 3.0, "document": {"text": "aaa"}}]


def test_texts_in_the_form_of_tei(served: Served) -> None:
    reply = ask(served.app, "/rerank", {"query": "a", "texts": ["", "a"], "return_text": True})
    assert reply.json == [{"index": 1, "score": 1.0, "text": "a"}, {"index": 0, "score": 0.0, "text": ""}]


def test_they_are_counted(served: Served) -> None:
    ask(served.app, EMBEDDINGS, {"input": ["a", "b"]})
    ask(served.app, RERANK, {"query": "a", "documents": ["a"]})
    metrics = ask(served.app, "/metrics", None).body.decode()
    assert 'zincmetal_texts_total{kind="embedding",model="scripted"} 2.0' in metrics
    assert 'zincmetal_texts_total{kind="document",model="scripted"} 1.0' in metrics
    assert 'endpoint="/v1/rerank"' in metrics


# ---- a real model ------------------------------------------------------------------------------------------------


class One:
    """The one model of a server, in this process."""

    def __init__(self, path: Path) -> None:
        self.model = zincmetal.load(path, device="cpu", kv="f32", context=128)
        self.backend = LocalBackend(self.model, ModelCard("one", sequences=4))

    def lease(self, name: str, keep: float | None = None) -> Any:
        backend = self.backend

        class Lease:
            async def __aenter__(self) -> LocalBackend:
                return backend

            async def __aexit__(self, *args: object) -> None:
                return None

        return Lease()


def test_openais_client_gets_the_vectors_of_the_model() -> None:
    """The client asks for base64 unasked, and gives numbers."""
    exact = np.load(DATA / "qwen3-embedding.npz")
    texts = [exact["tokens"][:n].tolist() for n in exact["prefix_lengths"]]
    one = One(DATA / "qwen3-embedding.gguf")
    app = make_app(Serving(one))  # type: ignore[arg-type]

    async def main() -> Any:
        http = httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app))
        async with AsyncOpenAI(base_url="http://localhost/v1", api_key="none", http_client=http) as client:
            return (
                await client.embeddings.create(model="one", input=texts),
                await client.embeddings.create(model="one", input=texts, encoding_format="float", dimensions=8),
            )

    with one.model:
        whole, short = asyncio.run(main())
        wrong = ask(app, RERANK, {"query": "a", "documents": ["b"]})
    assert np.abs(np.array([row.embedding for row in whole.data]) - exact["embeddings"]).max() < 1e-5
    first = exact["embeddings_raw"][:, :8]
    want = first / np.linalg.norm(first, axis=1, keepdims=True)
    assert np.abs(np.array([row.embedding for row in short.data]) - want).max() < 1e-5
    assert whole.usage.prompt_tokens == sum(map(len, texts))
    assert (wrong.status, "is no reranker" in wrong.json["error"]["message"]) == (400, True)


def test_a_model_in_a_process_of_its_own_gives_the_same() -> None:
    path, texts = DATA / "qwen3-embedding.gguf", [[1, 2, 3], [4]]
    with zincmetal.load(path, device="cpu", context=128) as model:
        local = LocalBackend(model, ModelCard("one"))

        async def both() -> None:
            async with remote_model(path) as remote:
                assert await remote.embed(texts, False, 9) == await local.embed(texts, False, 9)
                for backend in (remote, local):
                    with pytest.raises(UsageError, match="is no reranker"):
                        await backend.rerank("a", ["b"], None)

        asyncio.run(both())
