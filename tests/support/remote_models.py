"""Starts models in processes of their own, for tests of the server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from zincmetal import gguf
from zincmetal.api.generation import Asked
from zincmetal.api.result import Chunk
from zincmetal.api.text import ModelText
from zincmetal.errors import DeviceError
from zincmetal.sampling.params import SamplingParams
from zincmetal.serve.channel import Load, LoadOptions
from zincmetal.serve.remote import RemoteAnswer, RemoteModel


def asked(ids: Sequence[int] = (104, 105), max_tokens: int = 8, **options: Any) -> Asked:
    """Arguments of a generation."""
    fields = {name: options.pop(name) for name in list(options) if name in Asked.__dataclass_fields__}
    return Asked(list(ids), max_tokens, SamplingParams(**options), **fields)


@asynccontextmanager
async def remote_model(
    path: Path, at_end: Callable[[DeviceError], None] = lambda error: None, parallel: int = 8, **options: Any
) -> AsyncIterator[RemoteModel]:
    """Loads a model in a process of its own, on the CPU."""
    with gguf.open(path) as file:
        model = RemoteModel("tiny", ModelText(file), at_end)
        try:
            planned = await model.open(LoadOptions(str(path), device="cpu", **options))
            order = Load(planned.estimate.n_ctx, parallel, planned.budget)
            await model.load(order, planned.facts, lambda done, total: None)
            yield model
        finally:
            await model.close()


async def text_of(answer: RemoteAnswer) -> str:
    """Text of an answer, read to its end."""
    return "".join([event.text async for event in answer.events() if isinstance(event, Chunk)])


async def soon(future: Any, seconds: float = 60.0) -> Any:
    """Waits, but not forever: a test that hangs says nothing."""
    return await asyncio.wait_for(future, seconds)
