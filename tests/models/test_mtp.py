"""The block that drafts, against exact distributions at every prefix, on every lane."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from support.added_blocks import ADDED
from support.block_files import FIXTURES, with_block
from support.float64_models import Float64Model
from support.kernel_lab import SEED
from support.mixtures import engine
from support.paths import DATA
from support.reference_models import GPUS, NOISE, kl
from support.steps_lab import StepsLab
from zincmetal.engine.batch import Builder, id_of
from zincmetal.engine.engine import Engine
from zincmetal.engine.session import Session
from zincmetal.graph.ops import KEPT
from zincmetal.plan.chunks import chunk_shape

F64 = NDArray[np.float64]
LANES = ["msl", "native", *GPUS]
every_file = pytest.mark.parametrize("name", [*FIXTURES, *ADDED])
#: The largest KL, in nats, where the model's own rows are rounded more: see ROUNDED in test_reference_families.py.
ROUNDED = {"qwen3next-mtp": 1e-9, "qwen3next-mtp-bare": 1e-9}
#: The same at any position: the states of hybrids carry what float32 rounds on.
AT_ANY_POSITION = {name: 1e-8 for name in (*FIXTURES, *ADDED) if name.startswith("qwen")}
LEAST_MARGIN = 1e-5  # of an expert that is taken, to one that is not: float32 takes the same


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the files of ADDED are."""
    return tmp_path_factory.mktemp("blocks")


@cache
def figures(name: str, folder: Path) -> tuple[Path, dict[str, NDArray[Any]]]:
    """Returns the file, and its exact figures: those beside it, or those of float64."""
    path = with_block(name, folder)
    if name in FIXTURES:
        return path, dict(np.load(path.with_suffix(".npz")))
    base = np.load(ADDED[name].path.with_suffix(".npz"))
    ids, ends = base["tokens"].tolist(), base["prefix_lengths"]
    ids.append(7)  # the token after the longest prefix
    logits = drafts_in_float64(path, ids)[1][ends]
    following = np.array(ids)[ends]
    return path, {"tokens": base["tokens"], "prefix_lengths": ends, "mtp_next": following, ZERO_PAIR: logits}


ZERO_PAIR = "mtp_logprobs_zero_pair"


def drafts_in_float64(path: Path, ids: list[int], h: F64 | None = None) -> tuple[F64, F64]:
    """Returns the h that the block reads, its own by default, and its logits for each row of ids."""
    model = Float64Model(path)
    h = model.h(ids) if h is None else h
    logits, _ = model.drafted(ids, h)
    assert model.margin > LEAST_MARGIN, "the file has a near tie of experts"
    model.close()
    return h, logits


def bound(name: str, lane: str) -> float:
    return 1e-5 if lane in GPUS else ROUNDED.get(name, NOISE)


@pytest.mark.parametrize("name", [*FIXTURES, "glm4moe", "qwen3next"])
def test_float64_gives_the_figures_of_other_programs(name: str) -> None:
    """So it can stand in where there are none: its blocks are those of the model, and one formula drafts."""
    path = DATA / "families" / f"{name}.gguf"
    exact, model = np.load(path.with_suffix(".npz")), Float64Model(path)
    ids, ends = exact["tokens"].tolist(), exact["prefix_lengths"]
    h = model.h(ids)
    assert (kl(exact["logprobs"], model.logits(h)[ends - 1]) <= NOISE).all()
    if name in FIXTURES:
        following = zip(ends.tolist(), exact["mtp_next"].tolist(), strict=True)
        found = [model.drafted([*ids[:n], token], h)[0][-1] for n, token in following]
        assert (kl(exact[ZERO_PAIR], np.array(found)) <= NOISE).all()
    model.close()


def opened(path: Path, lane: str, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Any:
    monkeypatch.setenv("ZINCMETAL_NATIVE", "0" if lane == "msl" else "1")
    return engine(path, options.pop("kv", "f32"), device=lane if lane in GPUS else "cpu", **options)


def draft_logits(made: Engine, sessions: list[Session], tokens: list[int]) -> NDArray[np.float32]:
    """Runs a step of the block, with a row for each session. Returns the logits, [sessions, n_vocab]."""
    builder = Builder(made, made.pages, made.slots)
    for session, token in zip(sessions, tokens, strict=True):
        assert builder.add_draft(session.sequence, session.length, token)
    made.submit(builder.batch())
    best = [id_of(choice) for choice in made.collect()]
    logits = made.logits(len(sessions)).copy()
    assert best == logits.argmax(axis=-1).tolist()
    return logits


@every_file
@pytest.mark.parametrize("lane", LANES)
def test_distribution_at_every_prefix(name: str, lane: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each prefix is a sequence of its own, and the block drafts for all of them in one step."""
    path, exact = figures(name, folder)
    with opened(path, lane, monkeypatch, exact=lane != "native") as made:
        made.load_block()
        sessions = [Session(made) for _ in exact["prefix_lengths"]]
        for session, n in zip(sessions, exact["prefix_lengths"].tolist(), strict=True):
            session.prefill(exact["tokens"][:n].tolist())
        logits = draft_logits(made, sessions, exact["mtp_next"].tolist())
        for session in sessions:
            session.close()
    got = kl(exact[ZERO_PAIR], logits)
    assert (got <= bound(name, lane)).all(), f"KL {got}"


@every_file
@pytest.mark.parametrize("lane", ["native", *GPUS])
def test_prompts_in_any_pieces_prepare_the_block(
    name: str, lane: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces of one token, of a few, and of many, and rewinds of what is drafted in between."""
    (path, exact), rng = figures(name, folder), np.random.default_rng(SEED)
    print(f"ZINCMETAL_TEST_SEED={SEED}")
    ids, ends = exact["tokens"].tolist(), exact["prefix_lengths"].tolist()
    found = []
    with opened(path, lane, monkeypatch, exact=lane != "native") as made:
        made.load_block()
        with Session(made) as session:
            for end, token in zip(ends, exact["mtp_next"].tolist(), strict=True):
                while session.length < end:
                    n = min(int(rng.choice([1, 1, 3, 40])), end - session.length)
                    session.prefill(ids[session.length : session.length + n])
                found.append(draft_logits(made, [session], [token])[0])
                draft_logits(made, [session], [int(rng.integers(512))])  # a draft of another token leaves nothing
    got = kl(exact[ZERO_PAIR], np.array(found))
    assert (got <= bound(name, lane)).all(), f"KL {got}"


def kept(made: Engine, session: Session) -> F64:
    """Returns the rows that the block reads, without the weight of their norm: h but for a factor, which it takes away.

    They are the model's after its final norm, of all positions.
    """
    n_embd, pages = made.config.n_embd, session.sequence.pages
    rows = made.buffers.floats(KEPT.name, made.pages.size * made.page * n_embd).reshape(-1, made.page, n_embd)
    h = rows[pages].reshape(-1, n_embd)[: session.length].astype(np.float64)
    info = made.file.tensors[f"blk.{made.config.n_layer}.nextn.hnorm.weight"]
    return h / made.file.data(info.name).view(np.float32)


def hidden(path: Path, lane: str, ids: list[int]) -> F64:
    """Returns the model's rows after its final norm, as the lane computes them."""
    lab = StepsLab(path, lane if lane in GPUS else "cpu", context=128, kv="f32", exact=True)
    lab.step([(0, ids)], "none", chunk_shape(len(ids), 0, 0, "hidden"))
    h = lab.buffers.floats("hidden", len(ids) * lab.planner.config.n_embd).reshape(len(ids), -1).astype(np.float64)
    lab.close()
    return h


@every_file
@pytest.mark.parametrize("lane", LANES)
def test_distribution_at_every_position(name: str, lane: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Token by token: against float64, and more closely against the block in float64 on the rows that the lane kept."""
    path, exact = figures(name, folder)
    ids = exact["tokens"].tolist()[: 24 if lane == "msl" else None]
    with opened(path, lane, monkeypatch, exact=True) as made, Session(made) as session:
        made.load_block()
        session.prefill(ids[:1])
        found = []
        for token in ids[1:]:
            found.append(draft_logits(made, [session], [token])[0])
            session.prefill([token])
        h = kept(made, session)
    at_any = 1e-5 if lane in GPUS else AT_ANY_POSITION.get(name, NOISE)
    for h_of, most in ((None, at_any), (h, 1e-5 if lane in GPUS else NOISE)):
        want = drafts_in_float64(path, ids, h_of)[1][1:]
        got = kl(want, np.array(found))
        assert (got <= most).all(), f"KL {got.max()} at {got.argmax() + 1}"
        assert np.array(found).argmax(axis=-1).tolist() == want.argmax(axis=-1).tolist()


@every_file
@pytest.mark.parametrize("lane", LANES)
def test_drafts_of_several_tokens_go_on_from_their_own_rows(
    name: str, lane: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against float64. The model's h come from a plan that ends in hidden rows."""
    path, exact = figures(name, folder)
    ids, n = exact["tokens"].tolist()[:70], 61
    h, reference = hidden(path, lane, ids[:n]), Float64Model(path)
    with opened(path, lane, monkeypatch, exact=True) as made, Session(made) as session:
        made.load_block()
        session.prefill(ids[:n])
        for step in range(5):
            tokens = ids[: n + 1 + step]
            builder = Builder(made, made.pages, made.slots)
            assert builder.add_draft(session.sequence, n + step, tokens[-1])
            made.submit(builder.batch())
            made.collect()
            want, own = reference.drafted(tokens, h)
            h = np.concatenate([h, own[-1:]])
            assert np.abs(made.logits()[0] - want[-1]).max() < 1e-4 * np.abs(want).max(), step
    assert reference.margin > LEAST_MARGIN
    reference.close()
