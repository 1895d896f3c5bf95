"""Models that count (bench/counting.py): their text, their block that drafts, and what bench/speculate.py reports."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import counting
import speculate
import synthetic
import zincmetal
from zincmetal import gguf
from zincmetal.engine.governor import Always, Governor
from zincmetal.gguf import quants

#: Small files of the shapes that are measured, in the types of their real ones.
MODELS = {
    "35b": ("--tiny",),
    "35b-of-catalogue": ("--tiny", "--model", "qwen3.6-35b-a3b"),
    "27b": ("--tiny", "--model", "qwen3.8-27b", "--quant", "Q4_K_M"),
}
TOKENS = 96


def call(main: Any, *args: str) -> None:
    """Calls a script's main function with arguments."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["script", *args])
        main()


def written(name: str, folder: Path, *more: str) -> Path:
    """Writes a model with a block that drafts, and returns its path."""
    call(synthetic.main, str(folder / f"{name}.gguf"), *MODELS[name], "--draft", *more)
    return folder / f"{name}.gguf"


@pytest.fixture(scope="module", params=MODELS)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(request.param, tmp_path_factory.mktemp("counting"), "--counting")


@pytest.fixture(scope="module")
def model(path: Path) -> Iterator[zincmetal.Model]:
    with zincmetal.load(path, device="cpu", context=512, threads=1) as opened:
        yield opened


def prompt(model: zincmetal.Model, share: float) -> list[int]:
    return speculate.prompt_of(model, 12, share)


def counted(model: zincmetal.Model, share: float, n: int = TOKENS) -> list[int]:
    """Returns the text that follows the prompt."""
    section = counting.section(model.config.n_vocab, share)
    return [section[(1 + i) % len(section)] for i in range(n)]


# ---- the weights ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["q8_0", "q4_k", "q5_k", "q6_k", "q4_0", "q5_0", "q3_k"])
def test_codes_become_weights(name: str) -> None:
    kind, rng = quants.by_name(name), np.random.default_rng(1)
    codes = rng.integers(-1, 2, (3, 512)).astype(np.int8)
    for size in (1.0, 5120**-0.5):
        weights = quants.dequantize(kind, counting.encode(kind, codes, size), codes.shape)
        assert not weights[codes == 0].any()
        assert (np.sign(weights) == codes).all()
        assert np.abs(weights[codes != 0]) == pytest.approx(size, rel=0.16)


@pytest.mark.parametrize("name", ["f32", "q4_1", "iq4_xs", "mxfp4", "iq2_xxs"])
def test_other_types_are_refused(name: str) -> None:
    kind = quants.by_name(name)
    with pytest.raises(ValueError, match=name):
        counting.encode(kind, np.ones((1, 256), np.int8), 1.0)


def test_only_what_must_be_is_not_random(path: Path, tmp_path: Path) -> None:
    """Types and shapes are the same, and so are all bytes but for scales that are 0, and rows of tokens."""
    with gguf.open(path) as counts, gguf.open(written(path.stem, tmp_path)) as random:
        n_vocab = counts.tensors["token_embd.weight"].shape[0]
        changed = {
            name for name, t in counts.tensors.items() if not np.array_equal(counts.data(name), random.data(name))
        }
        tables = {"token_embd.weight", "output.weight"}
        ends = {name for name in counts.tensors if name.split(".")[-2] in counting.ENDS}
        assert changed == tables | ends | {next(name for name in counts.tensors if "eh_proj" in name)}
        for name, t in counts.tensors.items():
            assert (t.type, t.shape) == (random.tensors[name].type, random.tensors[name].shape)
            mine, theirs = counts.data(name), random.data(name)
            if name in tables:
                rows = mine.reshape(n_vocab, -1) != theirs.reshape(n_vocab, -1)
                first = counting.section(n_vocab, counting.SHARES[-1]).stop + 1
                assert rows[: first - 1].any(1).all()
                assert not rows[first:].any()
            if name in ends:
                assert not quants.dequantize(t.type, mine, t.shape).any()
                assert t.type.block is not None
                mine, theirs = mine.view(t.type.block), theirs.view(t.type.block)
                fields = {*(t.type.block.names or ())} - {"d", "dmin"}
                assert all(np.array_equal(mine[field], theirs[field]) for field in fields)


@pytest.mark.parametrize("name", ["35b", "35b-of-catalogue"])
def test_experts_are_spread_as_with_random_weights(name: str, tmp_path: Path) -> None:
    """Each expert is chosen about as often as others, and tokens in a row choose others."""
    with gguf.open(written(name, tmp_path, "--counting")) as file:
        routers = [name for name in file.tensors if name.endswith("ffn_gate_inp.weight")]
        arch = file.metadata["general.architecture"]
        used, n = (int(file.metadata[f"{arch}.expert_{key}"]) for key in ("used_count", "count"))

        def read(name: str) -> NDArray[np.float32]:
            t = file.tensors[name]
            return quants.dequantize(t.type, file.data(name), t.shape)

        table = read("token_embd.weight")
        rows = table[: counting.section(len(table), counting.SHARES[-1]).stop]
        assert routers
        for router in routers:
            norm = read(router.replace("ffn_gate_inp", "post_attention_norm"))
            chosen = np.argsort(-(rows * norm) @ read(router).T, axis=1)[:, :used]
            share = np.bincount(chosen.ravel(), minlength=n) / chosen.size
            assert share.min() > 0.6 / n, router
            both = (chosen[1:, :, None] == chosen[:-1, None, :]).sum((1, 2)).mean()
            assert both == pytest.approx(used * used / n, rel=0.25), router


# ---- the text -------------------------------------------------------------------------------------------------------


def test_the_text_counts_whatever_is_rounded(model: zincmetal.Model) -> None:
    """The best logit is so far above the others that no rounding can change the text."""
    for share in counting.SHARES:
        text = counted(model, share)
        assert model.generate(prompt(model, share), TOKENS).tokens == text
        logits = model.logits([*prompt(model, share), *text])[-TOKENS:]
        best = np.sort(logits, axis=1)[:, -2:]
        assert (best[:, 0] < 0.6 * best[:, 1]).all()


def test_the_block_is_right_as_often_as_its_section_says(model: zincmetal.Model) -> None:
    """The text is that without drafts. Each token is right with the section's share, at any place of a draft."""
    speculation = model.running.scheduler.speculation
    speculation.governor = Always()
    found = {}
    for n in (1, 3):
        for share in counting.SHARES:
            result = model.generate(prompt(model, share), TOKENS, draft="mtp", draft_tokens=n)
            assert result.tokens == counted(model, share)
            assert len(result.drafts) == n
            rights = [right for _, right in result.drafts]
            tried = [result.drafts[0][0], *rights[:-1]]  # those whose drafts were right up to them
            found[n, share] = sum(rights) / sum(tried)
            assert result.drafts[0][1] / result.drafts[0][0] == pytest.approx(share, abs=0.15)
        assert found[n, 0.0] == 0.0
        assert found[n, 1.0] > 0.97  # the last draft may be cut
        rising = [found[n, share] for share in counting.SHARES]
        assert rising == sorted(rising)
        assert rising == pytest.approx(counting.SHARES, abs=0.12)


# ---- what is printed ------------------------------------------------------------------------------------------------


def test_the_script_reports_what_was_accepted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It forces rates, measures the block, and says that all texts are the same."""
    path = written("27b", tmp_path, "--counting")
    run = speculate.Side.run

    def noted(side: speculate.Side, ids: list[int], n: int, counts: bool) -> None:
        run(side, ids, n, counts)  # leaves the model its own governor, which has a turn again
        assert type(side.model.running.scheduler.speculation.governor) is Governor

    monkeypatch.setattr(speculate.Side, "run", noted)
    forced = "--rates", "0,0.5,0.9", "--lengths", "1,3", "--mtp", "--shares", "0,0.9"
    sizes = "--rounds", "1", "--tokens", str(TOKENS), "--prompt", "12", "--device", "cpu", "--threads", "1"
    capsys.readouterr()
    call(speculate.main, str(path), *forced, *sizes)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    heads = [i for i, row in enumerate(rows) if not row[0][0].isdigit()]
    assert heads == [0, 7]
    for n, rate, _, same, *accepted in rows[1:7]:
        assert same == "same"
        assert len(accepted) == int(n)
        assert float(accepted[0]) == pytest.approx(float(rate), abs=0.15 if float(rate) else 0)
    blocks = {(float(share), draft): (same, accepted) for share, draft, _, _, same, _, _, *accepted in rows[8:]}
    assert [draft for _, draft in blocks] == 2 * ["none", "off", "1", "3", "governor"]
    assert all(same == "same" for same, _ in blocks.values())
    for (share, draft), (_, accepted) in blocks.items():
        if draft.isdigit():
            assert len(accepted) == int(draft)
            assert float(accepted[0]) == pytest.approx(share, abs=0.15 if share else 0)
        assert draft not in ("none", "off") or not accepted
