"""The block that drafts, against exact distributions at every prefix, on every lane."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from support.kernel_lab import SEED
from support.mixtures import engine
from support.paths import DATA
from support.reference_models import GPUS, NOISE, kl
from support.steps_lab import StepsLab
from zincmetal import gguf
from zincmetal.engine.batch import Builder, id_of
from zincmetal.engine.engine import Engine
from zincmetal.engine.session import Session
from zincmetal.gguf.quants import dequantize
from zincmetal.plan.chunks import chunk_shape

FILES = sorted((DATA / "families").glob("*-mtp.gguf"))
F64 = NDArray[np.float64]
LANES = ["msl", "native", *GPUS]
every_file = pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)


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
def test_distribution_at_every_prefix(path: Path, lane: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each prefix is a sequence of its own, and the block drafts for all of them in one step."""
    exact = np.load(path.with_suffix(".npz"))
    with opened(path, lane, monkeypatch, exact=lane != "native") as made:
        made.load_block()
        sessions = [Session(made) for _ in exact["prefix_lengths"]]
        for session, n in zip(sessions, exact["prefix_lengths"].tolist(), strict=True):
            session.prefill(exact["tokens"][:n].tolist())
        logits = draft_logits(made, sessions, exact["mtp_next"].tolist())
        for session in sessions:
            session.close()
    got = kl(exact["mtp_logprobs_zero_pair"], logits)
    assert (got <= (1e-5 if lane in GPUS else NOISE)).all(), f"KL {got}"


@every_file
@pytest.mark.parametrize("lane", ["native", *GPUS])
def test_prompts_in_any_pieces_prepare_the_block(path: Path, lane: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of one token, of a few, and of many, and rewinds of what is drafted in between."""
    exact, rng = np.load(path.with_suffix(".npz")), np.random.default_rng(SEED)
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
    got = kl(exact["mtp_logprobs_zero_pair"], np.array(found))
    assert (got <= (1e-5 if lane in GPUS else NOISE)).all(), f"KL {got}"


class Reference:
    """The block of a dense file, in float64: rows of tokens and of the model's h after the final norm."""

    def __init__(self, path: Path) -> None:
        self.file = gguf.open(path)
        keys = self.file.metadata
        self.i = keys["qwen35.block_count"] - 1
        self.n_head, self.n_kv = keys["qwen35.attention.head_count"], keys["qwen35.attention.head_count_kv"]
        self.eps, self.n_rot = keys["qwen35.attention.layer_norm_rms_epsilon"], keys["qwen35.rope.dimension_count"]
        self.base = keys["qwen35.rope.freq_base"]

    def weight(self, name: str) -> F64:
        info = self.file.tensors[f"{name}.weight"]
        return dequantize(info.type, self.file.data(info.name), info.shape).astype(np.float64)

    def of(self, name: str) -> F64:
        return self.weight(f"blk.{self.i}.{name}")

    def norm(self, x: F64, weight: F64) -> F64:
        return np.asarray(x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + self.eps) * weight)

    def rotated(self, x: F64) -> F64:
        """Rotates [T, heads, head_dim] by their places."""
        half = self.n_rot // 2
        angle = np.arange(len(x))[:, None, None] * self.base ** (-np.arange(half) / half)
        a, b = x[..., :half], x[..., half : self.n_rot]
        turned = [a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)]
        return np.concatenate([*turned, x[..., self.n_rot :]], axis=-1)

    def attention(self, h: F64) -> F64:
        n, dim = len(h), self.of("attn_q_norm").size
        q, gate = np.split((h @ self.of("attn_q").T).reshape(n, self.n_head, 2 * dim), 2, axis=-1)
        k, v = ((h @ self.of(f"attn_{name}").T).reshape(n, self.n_kv, dim) for name in "kv")
        q, k = self.rotated(self.norm(q, self.of("attn_q_norm"))), self.rotated(self.norm(k, self.of("attn_k_norm")))
        k, v = (np.repeat(x, self.n_head // self.n_kv, axis=1) for x in (k, v))
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(dim)
        scores[:, np.triu(np.ones((n, n), bool), 1)] = -np.inf
        shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
        shares /= shares.sum(axis=-1, keepdims=True)
        y = np.einsum("hqk,khd->qhd", shares, v) / (1 + np.exp(-gate))
        return np.asarray(y.reshape(n, -1) @ self.of("attn_output").T)

    def last(self, tokens: list[int], h: F64) -> tuple[F64, F64]:
        """Returns the logits and the own h of the last row. Row t has the token t, and h of the position before."""
        before = np.concatenate([np.zeros((1, h.shape[1])), h[: len(tokens) - 1]])
        pairs = [self.norm(self.weight("token_embd")[tokens], self.of("nextn.enorm"))]
        pairs.append(self.norm(before, self.of("nextn.hnorm")))
        x = np.concatenate(pairs, axis=1) @ self.of("nextn.eh_proj").T
        x = x + self.attention(self.norm(x, self.of("attn_norm")))
        y = self.norm(x, self.of("post_attention_norm"))
        gate = y @ self.of("ffn_gate").T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ self.of("ffn_up").T)) @ self.of("ffn_down").T
        own = self.norm(x[-1:], self.of("nextn.shared_head_norm"))[0]
        return np.asarray(self.weight("output") @ own), own


@pytest.mark.parametrize("lane", LANES)
def test_drafts_of_several_tokens_go_on_from_their_own_rows(lane: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against float64. The model's h come from a plan that ends in hidden rows."""
    path = DATA / "families" / "qwen35-mtp.gguf"
    ids, n = np.load(path.with_suffix(".npz"))["tokens"].tolist()[:70], 61
    reference = Reference(path)
    lab = StepsLab(path, lane if lane in GPUS else "cpu", context=128, kv="f32", exact=True)
    shape = chunk_shape(n, 0, 0, "hidden")
    lab.step([(0, ids[:n])], "none", shape)
    h = lab.buffers.floats("hidden", n * lab.planner.config.n_embd).reshape(n, -1).astype(np.float64)
    lab.close()
    with opened(path, lane, monkeypatch, exact=True) as made, Session(made) as session:
        made.load_block()
        session.prefill(ids[:n])
        for step in range(5):
            tokens = ids[: n + 1 + step]
            builder = Builder(made, made.pages, made.slots)
            assert builder.add_draft(session.sequence, n + step, tokens[-1])
            made.submit(builder.batch())
            made.collect()
            want, own = reference.last(tokens, h)
            h = np.concatenate([h, own[None]])
            assert np.abs(made.logits()[0] - want).max() < 1e-4 * np.abs(want).max(), step
    reference.file.close()
