"""Keys, values and states that are not finite end their own request. Nobody reuses them, now or after a restart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import zincmetal
from support.paths import DATA
from zincmetal.engine.cache_folder import CacheFolder
from zincmetal.errors import DeviceError

A, B = [i % 40 + 5 for i in range(140)], [i % 30 + 3 for i in range(130)]
FILES = ("llama-q4_k_m.gguf", "qwen35-q4_k_m.gguf")


def load(name: str, folder: Path | None = None) -> Any:
    return zincmetal.load(DATA / name, device="cpu", threads=1, context=512, cache_dir=folder)


def poison(model: Any, value: float) -> None:
    """Fills the first page of the oldest running request."""
    engine = model.engine

    def fill() -> None:
        page = model.running.scheduler.state().pages[0]
        engine.write_page(page, np.full(engine.page_bytes // 2, value, np.float16).tobytes())

    model.running.loop.call(fill)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", FILES)
def test_a_poisoned_page_ends_one_request_and_is_forgotten(name: str, value: float, tmp_path: Path) -> None:
    with load(name) as model:
        wanted = [model.generate(ids, 12).tokens for ids in (A, B)]
    with load(name, tmp_path) as model:
        first, second = model.submit(A, max_tokens=300), model.submit(B, max_tokens=12)
        tokens = iter(first)
        next(tokens)
        poison(model, value)
        with pytest.raises(DeviceError, match="not finite"):
            first.result()
        assert second.result().tokens == wanted[1]
        assert model.generate(A, 12).tokens == wanted[0]
        assert model.generate(B, 12).tokens == wanted[1]
    with load(name, tmp_path) as model:
        assert model.generate(A, 12).tokens == wanted[0]


def test_files_of_what_is_forgotten_go(tmp_path: Path) -> None:
    """Those that are written, and those that wait to be."""
    model = bytes(16)
    folder = CacheFolder(tmp_path, model, 1 << 20)
    folder.write("a.page", b"1")
    folder.write("b.page", b"2")
    folder.delete("a.page")
    folder.close()
    again = CacheFolder(tmp_path, model, 1 << 20)
    assert again.read("a.page") is None
    assert again.read("b.page") == b"2"
    again.delete("b.page")
    assert not again.has("b.page")
    again.close()
    assert list((tmp_path / model.hex()).iterdir()) == []


@pytest.mark.parametrize("name", FILES)
def test_what_was_moved_to_the_lower_tier_is_forgotten_too(name: str, tmp_path: Path) -> None:
    with load(name, tmp_path) as model:
        wanted = model.generate(A, 12).tokens
        model.generate(B, 2)  # the turn before is copied now
    files = sorted(path for path in tmp_path.rglob("*") if path.suffix in (".page", ".state"))
    assert files
    with load(name, tmp_path) as model:
        damaged = model.submit(A, max_tokens=300)
        next(iter(damaged))
        poison(model, np.nan)
        with pytest.raises(DeviceError, match="not finite"):
            damaged.result()
        result = model.generate(A, 12)
        assert (result.tokens, result.cache.reused) == (wanted, 0)
