"""Numbers that are not finite end their own request: activations, keys, values, states, and what drafters propose.

Nobody reuses them, now or after a restart.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import zincmetal
from support import model_files
from support.mixtures import Member, Mixture, engine
from support.paths import DATA
from support.running import running_of
from zincmetal import gguf
from zincmetal.engine.cache_folder import CacheFolder
from zincmetal.engine.drafters import Draft, Drafter
from zincmetal.engine.engine import Engine
from zincmetal.engine.governor import Always
from zincmetal.engine.scheduler import Scheduler
from zincmetal.errors import DeviceError
from zincmetal.sampling.params import SamplingParams

A, B = [i % 40 + 5 for i in range(140)], [i % 30 + 3 for i in range(130)]
FILES = ("llama-q4_k_m.gguf", "qwen35-q4_k_m.gguf")
PATHS = [*(DATA / name for name in FILES), DATA / "gemma3-q4_0.gguf", DATA / "qwen35moe-q4k-q5k-q8.gguf"]
FAMILIES = sorted((DATA / "families").glob("*.gguf"))
X = 77  # the token whose embedding is damaged
LONG = 8000  # tokens: a generation that a test ends
GREEDY = SamplingParams()


def load(name: str, folder: Path | None = None) -> Any:
    return zincmetal.load(DATA / name, device="cpu", threads=1, context=8192, cache_dir=folder)


def poison(model: Any, value: float) -> None:
    """Fills the first page of the oldest running request."""
    engine = model.engine

    def fill() -> None:
        page = model.running.scheduler.state().pages[0]
        engine.write_page(page, np.full(engine.page_bytes // 2, value, np.float16).tobytes())

    model.running.loop.call(fill)


def damaged(path: Path, folder: Path) -> Path:
    """Writes the model with NaN as the embedding of token X, and with an LM head of its own."""
    keys, tensors, rows = model_files.read(path)
    name = "token_embd.weight"
    if "output.weight" not in tensors:
        tensors["output.weight"], rows["output.weight"] = (
            replace(tensors[name], name="output.weight"),
            rows[name].copy(),
        )
    rows[name] = rows[name].copy()
    rows[name][X] = 0xFF
    model_files.write_with_weights(folder / path.name, keys, tensors, rows)
    return folder / path.name


def run(opened: Engine, *members: Member, drafters: Sequence[Drafter] = ()) -> None:
    """Runs members together, the first of them with these drafters."""
    pools = {"pages": opened.pages, "slots": opened.slots, "seats": opened.free_seats}
    scheduler = Scheduler(opened, governor=Always(), **pools)
    for i, member in enumerate(members):
        request = member.ask()
        request.drafter = drafters[i] if i < len(drafters) else None
        scheduler.submit(request)
    while scheduler.step():
        pass


def alone(opened: Engine, ids: list[int], n: int) -> list[int]:
    return Mixture(opened, 0, (1, 1, 1)).alone(ids, GREEDY, None, frozenset(), n)


@pytest.mark.parametrize(
    ("path", "lane"),
    [*((path, "native") for path in (*PATHS, *FAMILIES)), *((path, "msl") for path in (*PATHS[:2], *FAMILIES[::5]))],
    ids=lambda x: getattr(x, "stem", x),
)
def test_damaged_activations_end_their_request_alone(
    path: Path, lane: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are rows of the same steps as those of others: of chunks, single ones, and decode rows."""
    monkeypatch.setenv("ZINCMETAL_NATIVE", "0" if lane == "msl" else "1")
    with engine(damaged(path, tmp_path), "f32", threads=1, context=256) as opened:
        good = []
        for ids in (A[:30], B[:21], [9], [4, 5]):
            with suppress(DeviceError):  # the text of some files comes to X by itself
                want = alone(opened, ids, 6)
                good += [Member(ids, GREEDY, want)] if want else []
        bad = [Member(ids, GREEDY, [0] * 6) for ids in ([*A[:20], X, *A[:9]], [*B[:12], X], [X])]
        forced = Member(A[:7], SamplingParams(logit_bias={X: 1e6}), [0] * 6)
        run(opened, *bad[:2], *good[:2], forced, *good[2:], bad[2])
    assert good
    for member in good:
        assert member.tokens == member.want
    for member in (*bad, forced):
        assert isinstance(member.ended, DeviceError)
        assert "not finite" in str(member.ended)
        assert member.tokens == ([X] if member is forced else [])


@pytest.mark.parametrize("path", PATHS[:1] + PATHS[2:3], ids=lambda path: path.stem)
@pytest.mark.parametrize("to_disk", [False, True])
def test_a_prompt_is_computed_anew_if_what_it_reused_is_damaged(path: Path, to_disk: bool, tmp_path: Path) -> None:
    """A prompt that ended before its first token left pages behind, and nobody had seen what they hold."""
    begin, own = A[:70], B[:40]
    path = damaged(path, tmp_path)
    with load(path) as model:
        wanted = model.generate([*begin, *own], 6).tokens
    model = load(path, tmp_path / "cache" if to_disk else None)
    model.generate([*begin, 7, 7, 7, X, *own], 0)
    if to_disk:
        model.close()
        model = load(path, tmp_path / "cache")
    with model:
        found = model.generate([*begin, *own], 6)
        assert (found.tokens, found.cache.reused) == (wanted, 0)
        assert "damaged" in found.cache.why
        again = model.generate([*begin, *own], 6)
        assert again.tokens == wanted
        assert again.cache.reused > 100


@pytest.mark.parametrize("tokens", [[-1], [-2, 3], [3, 10**6], [2**40], [float("nan")], [3, float("inf")], [1.5], None])
def test_wild_drafts_touch_nobody(tokens: Any) -> None:
    """The drafter is not asked again."""

    class Wild(Drafter):
        def propose(self, ids: Sequence[int], n: int) -> Draft:
            return Draft(tokens)

    with engine(DATA / FILES[0], "f32", threads=1) as opened:
        want = alone(opened, [3, 4, 5], 12)
        members = [Member([3, 4, 5], GREEDY, want) for _ in range(3)]
        run(opened, *members, drafters=[Wild(), Wild()])
    for member in members:
        assert member.tokens == want
        assert member.stats
        assert not member.stats.drafts


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("tensor", ["output.weight", "token_embd.weight"])
@pytest.mark.parametrize("n", [1, 4])
def test_a_draft_model_that_is_damaged_drafts_nothing(tensor: str, value: float, n: int, tmp_path: Path) -> None:
    with gguf.open(DATA / FILES[0]) as file:
        found = file.tensors[tensor]
    held = bytearray((DATA / FILES[0]).read_bytes())
    blocks = np.frombuffer(held, np.float16, found.nbytes // 2, found.offset).reshape(-1, found.type.block_bytes // 2)
    blocks[:, [0, -1]] = value  # a block's scale is its first number or its last
    (tmp_path / "draft.gguf").write_bytes(held)
    with load(FILES[0]) as model:
        running_of(model).scheduler.speculation.governor = Always()
        wanted = model.generate([5, 6, 7], 20).tokens
        other = model.submit(B, max_tokens=12)
        drafted = model.generate([5, 6, 7], 20, draft=tmp_path / "draft.gguf", draft_tokens=n)
        assert (drafted.tokens, drafted.drafted) == (wanted, 0)
        assert len(other.result().tokens) == 12


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", FILES)
def test_a_poisoned_page_ends_one_request_and_is_forgotten(name: str, value: float, tmp_path: Path) -> None:
    with load(name) as model:
        wanted = [model.generate(ids, 12).tokens for ids in (A, B)]
    with load(name, tmp_path) as model:
        first, second = model.submit(A, max_tokens=LONG), model.submit(B, max_tokens=12)
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
        damaged = model.submit(A, max_tokens=LONG)
        next(iter(damaged))
        poison(model, np.nan)
        with pytest.raises(DeviceError, match="not finite"):
            damaged.result()
        result = model.generate(A, 12)
        assert (result.tokens, result.cache.reused) == (wanted, 0)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_poisoned_state_ends_one_request(value: float) -> None:
    with load(FILES[1]) as model:
        wanted = [model.generate(ids, 12).tokens for ids in (A, B)]
        first, second = model.submit(A, max_tokens=LONG), model.submit(B, max_tokens=12)
        next(iter(first))
        engine = model.engine

        def fill() -> None:
            slot = model.running.scheduler.state().slots[0]
            engine.write_slot(slot, np.full(engine.slot_bytes // 4, value, np.float32).tobytes())

        model.running.loop.call(fill)
        with pytest.raises(DeviceError, match="not finite"):
            first.result()
        assert second.result().tokens == wanted[1]
        assert [model.generate(ids, 12).tokens for ids in (A, B)] == wanted
