"""Files as converters write them: with keys missing, spelt otherwise or in excess; against float64 NumPy."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import zincmetal
from support.model_files import with_keys, write
from support.paths import DATA
from support.tiny_dense import Meaning, Tensor, Tiny
from zincmetal import config, gguf, models
from zincmetal.device import backend
from zincmetal.errors import GGUFError, UnsupportedModelError, UsageError
from zincmetal.gguf import quants
from zincmetal.gguf.random_weights import random_weights
from zincmetal.graph.ops import Op, Value, Weight
from zincmetal.plan.arena import lay_out
from zincmetal.plan.chunks import ONE_ROW
from zincmetal.plan.launch import Arg, Launch
from zincmetal.plan.lower import Lowering
from zincmetal.plan.target import Target

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3")
IDS = (np.arange(40) * 7 % 40).tolist()
BIASED = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
LANES = ("msl", "native")

every_arch = pytest.mark.parametrize("arch", ARCHITECTURES)


def meaning(arch: str, **changes: Any) -> Meaning:
    """Returns the default meaning of a file of an architecture."""
    gemma = {"embedding_scale": 24**0.5, "rope_base_local": 10000.0} if arch == "gemma3" else {}
    return Meaning(**(gemma | changes))


def check(tmp_path: Path, tiny: Tiny, means: Meaning, kv: str = "f32") -> None:
    """Fails unless the logits of many rows at once, and of one token after the other, are the reference's."""
    tiny.add_tokenizer()
    want = tiny.logits(IDS, means)
    with zincmetal.load(tiny.save(tmp_path / "m.gguf"), device="cpu", kv=kv, exact=True) as model:
        np.testing.assert_allclose(model.logits(IDS), want, atol=3e-5 * max(1.0, np.abs(want).max()))
        tokens = model.generate(IDS[:5], 20).tokens
    after = tiny.logits([*IDS[:5], *tokens], means)[4:-1]
    chosen = after[np.arange(len(tokens)), tokens]
    assert len(tokens) == 20
    assert (chosen > after.max(axis=-1) - 1e-4).all()


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.fixture(params=LANES)
def lane(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("ZINCMETAL_NATIVE", "0" if request.param == "msl" else "1")
    return str(request.param)


@every_arch
def test_the_reference_agrees_on_a_plain_file(arch, tmp_path, caplog):
    check(tmp_path, Tiny(arch), meaning(arch))
    assert not warnings(caplog)


# ---- sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", [4, 12, 20, 36, 60, 68, 100, 132, 252])
@every_arch
def test_heads_of_any_multiple_of_4(arch, head_dim, lane, tmp_path):
    check(tmp_path, Tiny(arch, head_dim=head_dim), meaning(arch))


def test_heads_of_other_sizes_are_refused(tmp_path):
    for head_dim, kv, error, problem in [
        (18, "f32", UnsupportedModelError, "key_length is 18; multiples of 4 up to 512"),
        (516, "f32", UnsupportedModelError, "key_length is 516; multiples of 4 up to 512"),
        (20, "q8_0", UsageError, "blocks of 32, not 20: use kv='f16'"),
    ]:
        with pytest.raises(error, match=problem):
            zincmetal.load(Tiny("llama", head_dim=head_dim).save(tmp_path / "m.gguf"), device="cpu", kv=kv)


@pytest.mark.parametrize(("kv", "near"), [("f16", 0.02), ("q8_0", 0.4)])
def test_smaller_caches_take_what_they_hold(kv, near, tmp_path):
    tiny = Tiny("llama", head_dim=32 if kv == "q8_0" else 20)
    with zincmetal.load(tiny.save(tmp_path / "m.gguf"), device="cpu", kv=kv) as model:
        np.testing.assert_allclose(model.logits(IDS), tiny.logits(IDS), atol=near)


@every_arch
def test_feed_forwards_of_different_widths(arch, tmp_path):
    check(tmp_path, Tiny(arch, n_ff=(28, 44)), meaning(arch))


def test_numbers_may_be_lists_of_equal_ones(tmp_path):
    lists = {"attention.head_count": [3, 3], "attention.head_count_kv": [1, 1], "feed_forward_length": [28, 28]}
    check(tmp_path, Tiny("qwen3", keys=lists), meaning("qwen3"))


@pytest.mark.parametrize("name", ["attention.head_count", "attention.head_count_kv"])
@pytest.mark.parametrize("entries", [[3], [3, 3, 3], [0, 3], [-1, -1], [1.0, 1.0], ["3", "3"]])
def test_lists_that_do_not_fit_are_refused(name, entries, tmp_path):
    with pytest.raises((GGUFError, UnsupportedModelError), match=f"llama.{name}"):
        zincmetal.load(Tiny("llama", keys={name: entries}).save(tmp_path / "m.gguf"), device="cpu")


@pytest.mark.parametrize("entries", [[28], [28, 28, 28], [0, 28], [28.0, 28.0]])
def test_widths_that_do_not_fit_the_blocks_are_refused(entries, tmp_path):
    with pytest.raises(GGUFError, match=r"llama\.feed_forward_length"):
        zincmetal.load(Tiny("llama", keys={"feed_forward_length": entries}).save(tmp_path / "m.gguf"), device="cpu")


def test_a_width_that_is_missing_comes_from_its_tensor(tmp_path, caplog):
    check(tmp_path, Tiny("llama", keys={"feed_forward_length": None}), Meaning())
    assert [
        "feed_forward_length is missing, 28 is taken from tensor blk.0.ffn_gate.weight" in w for w in warnings(caplog)
    ]


@pytest.mark.parametrize("name", ["expert_feed_forward_length", "expert_shared_feed_forward_length"])
def test_the_width_of_experts_comes_from_their_tensor(name, caplog):
    with gguf.open(DATA / "qwen35moe-q4k-q5k-q8.gguf") as file:
        want = models.configure(file)
        assert models.configure(with_keys(file, {f"qwen35moe.{name}": None})) == want
    (message,) = warnings(caplog)
    assert f"qwen35moe.{name} is missing" in message


def test_missing_dimensions_and_those_of_1(tmp_path):
    tiny = Tiny("qwen2")
    for name, t in tiny.tensors.items():
        dims = t.values.shape[::-1]
        tiny.tensors[name] = replace(t, dims=(*dims, *[1] * (4 - len(dims))))
    check(tmp_path, tiny, meaning("qwen2"))


def test_a_dimension_of_1_is_not_any_other(tmp_path):
    tiny = Tiny("llama")
    w = tiny.tensors["blk.0.attn_k.weight"]
    tiny.tensors["blk.0.attn_k.weight"] = replace(w, dims=(*w.values.shape[::-1][:1], 4, 2))
    with pytest.raises(UnsupportedModelError, match=r"tensor blk.0.attn_k.weight has shape \(2, 4, 24\)"):
        zincmetal.load(tiny.save(tmp_path / "m.gguf"), device="cpu")


# ---- types and biases -----------------------------------------------------------------------------------------------


@every_arch
@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_norms_and_biases_in_half_precision(arch, kind, lane, tmp_path):
    tiny = Tiny(arch)
    tiny.add_biases(*BIASED, kind=kind)
    tiny.convert("norm.weight", kind)
    check(tmp_path, tiny, meaning(arch))


@every_arch
def test_everything_in_half_precision(arch, tmp_path):
    tiny = Tiny(arch)
    tiny.convert("", "bf16")
    check(tmp_path, tiny, meaning(arch))


def test_some_norms_in_half_precision(tmp_path):
    tiny = Tiny("qwen3")
    tiny.convert("blk.0.attn_norm.weight", "f16")
    tiny.convert("attn_k_norm.weight", "bf16")
    tiny.convert("output_norm.weight", "f16")
    check(tmp_path, tiny, Meaning())


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
def test_rope_factors_of_any_float(kind, tmp_path):
    tiny = Tiny("llama")
    tiny.tensors["rope_freqs.weight"] = Tensor(np.full(4, 2.5, np.float32), kind)
    check(tmp_path, tiny, Meaning(rope_factor=2.5))


def test_half_precision_in_recurrent_layers(tmp_path):
    """Values that fit half precision give the same result in either type."""
    logits = []
    for kind in (quants.F32, quants.F16):
        path = tmp_path / f"{kind.name}.gguf"
        with gguf.open(DATA / "qwen35-q4_k_m.gguf") as file:
            rewrite(file, path, kind)
        with zincmetal.load(path, device="cpu", kv="f32") as model:
            logits.append(model.logits(IDS))
    np.testing.assert_array_equal(logits[0], logits[1])


def rewrite(file: gguf.File, path: Path, kind: quants.QuantType) -> None:
    """Writes the file again with vectors and convolutions rounded to half precision and stored in this type."""
    tensors, data, changed = {}, bytearray(), 0
    for t in file.tensors.values():
        raw, qtype = file.data(t.name).tobytes(), t.type
        if t.type is quants.F32 and (len(t.shape) == 1 or "conv1d" in t.name):
            half = np.frombuffer(raw, np.float32).astype(np.float16)
            raw, qtype = half.astype(np.float16 if kind is quants.F16 else np.float32).tobytes(), kind
            changed += 1
        data += raw + bytes(-len(raw) % 32)
        tensors[t.name] = Weight(t.name, qtype, t.shape)
    assert changed > 20
    write(path, {k: file.metadata[k] for k in file.metadata if not k.startswith("tokenizer.")}, tensors)
    with path.open("r+b") as out:
        out.seek(path.stat().st_size - len(data))
        out.write(data)


@every_arch
@pytest.mark.parametrize("names", [BIASED, BIASED[:3], ("attn_output",), ("ffn_gate",), ("ffn_up", "ffn_down")])
def test_biases_where_the_file_has_them(arch, names, lane, tmp_path):
    tiny = Tiny(arch)
    tiny.add_biases(*names)
    check(tmp_path, tiny, meaning(arch))


def test_a_bias_in_one_block(tmp_path):
    tiny = Tiny("llama")
    tiny.add_biases("attn_q", "ffn_down", blocks=("blk.1",))
    check(tmp_path, tiny, Meaning())


def test_qwen2_must_have_its_biases(tmp_path):
    tiny = Tiny("qwen2")
    del tiny.tensors["blk.1.attn_k.bias"]
    with pytest.raises(UnsupportedModelError, match=r"tensor blk.1.attn_k.bias is missing"):
        zincmetal.load(tiny.save(tmp_path / "m.gguf"), device="cpu")


# ---- scales of whole matrices ---------------------------------------------------------------------------------------


class Packed(Tensor):
    """A matrix in NVFP4, whose values are those of its blocks times the scale that the file has beside it."""

    def __init__(self, m: int, k: int, scale: float, rng: np.random.Generator) -> None:
        self.packed = random_weights(quants.NVFP4, (m, k), rng, size=k**-0.5 / scale)
        super().__init__(quants.dequantize(quants.NVFP4, self.packed, (m, k)) * np.float32(scale), "nvfp4")

    def raw(self) -> bytes:
        return self.packed.tobytes()


def test_scales_of_nvfp4(lane, tmp_path):
    """The scale of a matrix multiplies its products. The scale for activations has no use."""
    tiny, rng = Tiny("llama", n_embd=64, n_head=8, n_ff=(64, 128)), np.random.default_rng(0)
    for name, plain in list(tiny.tensors.items()):
        if name.startswith("blk.") and plain.values.ndim == 2 and "attn_k" not in name:
            scale = float(np.float32(rng.uniform(0.02, 0.2)))
            tiny.tensors[name] = Packed(*plain.values.shape, scale, rng)
            tiny.tensors[name.replace("weight", "scale")] = Tensor(np.array([scale], np.float32))
            tiny.tensors[name.replace("weight", "input_scale")] = Tensor(np.array([3], np.float32))
    check(tmp_path, tiny, Meaning())
    tiny.add_biases("attn_q")
    with pytest.raises(UnsupportedModelError, match=r"attn_q.scale: .* no product that has a bias"):
        zincmetal.load(tiny.save(tmp_path / "biased.gguf"), device="cpu")


def test_a_scale_of_another_type_is_refused(tmp_path):
    tiny = Tiny("llama")
    tiny.tensors["blk.1.ffn_up.scale"] = Tensor(np.array([2], np.float32))
    with pytest.raises(UnsupportedModelError, match=r"no use for 1 tensors .*blk.1.ffn_up.scale"):
        zincmetal.load(tiny.save(tmp_path / "m.gguf"), device="cpu")


# ---- rotary scaling and windows -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "factor"),
    [
        ({"rope.scale_linear": 4.0}, 4.0),
        ({"rope.scaling.factor": 4.0}, 4.0),
        ({"rope.scaling.factor": 4.0, "rope.scaling.type": "linear"}, 4.0),
        ({"rope.scaling.type": "linear", "rope.scale_linear": 4.0}, 4.0),
        ({"rope.scaling.factor": 4.0, "rope.scale_linear": 2.0}, 4.0),
        ({"rope.scaling.factor": 4.0, "rope.scaling.type": "none"}, 1.0),
        ({"rope.scaling.type": "default"}, 1.0),
        ({"rope.scaling.factor": 0.0}, 1.0),
        ({"rope.scale_linear": 1.0}, 1.0),
        ({"rope.scaling.type": "linear"}, 1.0),
        ({"rope.scaling.type": "linear", "rope.scaling.original_context_length": 0}, 1.0),
    ],
)
@every_arch
def test_a_rotary_factor_however_it_is_said(arch, said, factor, tmp_path):
    check(tmp_path, Tiny(arch, keys=said), meaning(arch, rope_factor=factor))


@pytest.mark.parametrize("key", ["rope.scale_linear", "rope.scaling.factor"])
def test_a_factor_of_yarn_in_either_spelling(key, tmp_path):
    said = {"rope.scaling.type": "yarn", "rope.scaling.original_context_length": 32}
    with gguf.open(Tiny("llama", keys={**said, key: 4.0}).save(tmp_path / "m.gguf")) as file:
        assert models.configure(file).layers[0].rope == config.Rope(10000.0, "yarn", 4.0, 32)


def test_yarn_turns_blocks_with_a_window_too(tmp_path):
    yarn = {"type": "yarn", "factor": 4.0, "original_context_length": 32, "yarn_beta_fast": 16.0}
    said = {"attention.sliding_window": 8, "attention.sliding_window_pattern": 2}
    said |= {f"rope.scaling.{name}": value for name, value in yarn.items()}
    with gguf.open(Tiny("llama", keys=said).save(tmp_path / "m.gguf")) as file:
        layers = models.configure(file).layers
    assert [layer.window for layer in layers] == [8, 0]
    assert {layer.rope for layer in layers} == {config.Rope(10000.0, "yarn", 4.0, 32, beta_fast=16.0)}


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_q_k_and_v_in_one_matrix(arch, tmp_path):
    """With one bias too, if there is one."""
    tiny = Tiny(arch)
    want = tiny.logits(IDS, meaning(arch))
    for name in [f"blk.{i}.attn_{{}}.{end}" for i in range(tiny.n_layer) for end in ("weight", "bias")]:
        parts = [tiny.tensors.pop(name.format(of)).values for of in "qkv" if name.format(of) in tiny.tensors]
        if parts:
            tiny.tensors[name.format("qkv")] = Tensor(np.concatenate(parts))
    with zincmetal.load(tiny.save(tmp_path / "m.gguf"), device="cpu", kv="f32") as model:
        np.testing.assert_allclose(model.logits(IDS), want, atol=3e-5 * max(1.0, np.abs(want).max()))


WINDOWS = [
    ({}, (6, 6)),
    ({"attention.sliding_window_pattern": 2}, (6, 0)),
    ({"attention.sliding_window_pattern": 1}, (0, 0)),
    ({"attention.sliding_window_pattern": [False, True]}, (0, 6)),
    ({"use_sliding_window": False}, (0, 0)),
    ({"use_sliding_window": True, "max_window_layers": 1}, (0, 6)),
    ({"max_window_layers": 2}, (0, 0)),
    ({"max_window_layers": 0}, (6, 6)),
]


@pytest.mark.parametrize(("said", "windows"), WINDOWS)
@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_windows_are_computed(arch, said, windows, tmp_path):
    check(tmp_path, Tiny(arch, keys={"attention.sliding_window": 6} | said), Meaning(windows=windows))


@pytest.mark.parametrize("spelled", ["rope.freq_base_swa", "rope.local.freq_base", "rope.local_freq_base"])
@every_arch
def test_layers_with_a_window_have_their_base(arch, spelled, tmp_path):
    said = {"attention.sliding_window": 6, "attention.sliding_window_pattern": [True, False], spelled: 500.0}
    means = meaning(arch, windows=(6, 0), rope_base=1e6, rope_base_local=500.0)
    check(tmp_path, Tiny(arch, keys=said | {"rope.global.freq_base": 1e6}), means)


def test_a_window_of_a_hybrid_is_refused():
    with gguf.open(DATA / "qwen35-q4_k_m.gguf") as file:
        windowed = with_keys(file, {"qwen35.attention.sliding_window": 16})
        with pytest.raises(UnsupportedModelError, match=r"qwen35.attention.sliding_window is 16"):
            models.configure(windowed)


@every_arch
def test_scales_of_attention_and_of_embeddings(arch, tmp_path):
    said = {"attention.scale": 0.3125, "embedding_scale": 2.5}
    check(tmp_path, Tiny(arch, keys=said), meaning(arch, attention_scale=0.3125, embedding_scale=2.5))


# ---- rows and tokens ------------------------------------------------------------------------------------------------


@every_arch
def test_rows_beyond_the_tokens_are_never_drawn(arch, lane, tmp_path, caplog):
    tiny = Tiny(arch)
    tiny.add_tokenizer(33)
    for name in ("token_embd.weight", "output.weight"):  # the tokens that must not be drawn have the largest logits
        tiny.tensors[name].values[33:] *= 50
    ids = [i % 33 for i in IDS]
    want = tiny.logits(ids, meaning(arch))[:, :33]
    with zincmetal.load(tiny.save(tmp_path / "m.gguf"), device="cpu", kv="f32") as model:
        assert model.config.n_vocab == 33
        np.testing.assert_allclose(model.logits(ids), want, atol=1e-4)
        for seed in range(10):
            assert max(model.generate(ids[:3], 10, temperature=3.0, seed=seed).tokens) < 33
        assert max(model.generate(ids[:3], 10).tokens) < 33
        with pytest.raises(UsageError):
            model.logits([33])
    assert sum("has 40 rows: the 33 of tokenizer.ggml.tokens count" in w for w in warnings(caplog)) == 1


def test_a_tied_table_with_more_rows(tmp_path):
    tiny = Tiny("llama")
    tiny.add_tokenizer(33)
    want = tiny.tensors["output.weight"] = tiny.tensors["token_embd.weight"]
    logits = tiny.logits(IDS[:4])[:, :33]
    del tiny.tensors["output.weight"]
    assert len(want.values) == 40
    with zincmetal.load(tiny.save(tmp_path / "m.gguf"), device="cpu", kv="f32") as model:
        np.testing.assert_allclose(model.logits(IDS[:4]), logits, atol=1e-4)


def test_more_tokens_than_rows(tmp_path, caplog):
    tiny = Tiny("llama")
    tiny.add_tokenizer(44)
    with zincmetal.load(tiny.save(tmp_path / "m.gguf"), device="cpu") as model:
        assert model.config.n_vocab == 40
    assert any("later tokens cannot be used" in w for w in warnings(caplog))


def test_ids_run_without_a_tokenizer(tmp_path, caplog):
    tiny = Tiny("llama")
    with zincmetal.load(tiny.save(tmp_path / "m.gguf"), device="cpu", kv="f32") as model:
        np.testing.assert_allclose(model.logits(IDS), tiny.logits(IDS), atol=1e-4)
    assert not warnings(caplog)


def test_the_output_must_have_the_tables_rows(tmp_path):
    tiny = Tiny("llama")
    tiny.matrix("output", 48, 24)
    with pytest.raises(GGUFError, match=r"token_embd.weight has 40 rows, tensor output.weight 48"):
        zincmetal.load(tiny.save(tmp_path / "m.gguf"), device="cpu")


# ---- names and numbers ----------------------------------------------------------------------------------------------

ENGINES = [
    "step",
    "tokens",
    "pages",
    "logits",
    "next_rows",
    "history",
    "results",
    "arena",
    "converted",
    "weights.0",
    "k_cache.0",
    "v_cache.1",
    "ssm_state.0",
    "rope_freqs.0",
    "rope_freqs.1",
    "argmax.id",
    "embd",
    "blk.0.attn_norm",
    "blk.0.q_rope",
    "blk.1.ffn_gate.swiglu",
    "blk.0.kqv",
    "output.weight.out",
    "draw.parts",
    "attn_q.weight",
]


@pytest.mark.parametrize("name", ENGINES)
@every_arch
def test_a_tensor_called_like_the_engines_own_is_refused(name, arch, tmp_path):
    tiny = Tiny(arch)
    tiny.tensors[name] = Tensor(np.ones(4, np.float32))
    with pytest.raises(UnsupportedModelError, match=f"no use for 1 tensors of this file \\({name}\\)"):
        zincmetal.load(tiny.save(tmp_path / "m.gguf"), device="cpu")


@pytest.mark.parametrize(
    "name",
    [
        f"blk.{'9' * 5000}.x",
        f"blk.{'9' * 60000}.attn_q.weight",
        "blk.².x",
        "blk.٣.x",
        "blk.02.attn_q.weight",
        "blk.-1.x",
        "blk.2.x",
        "x\n\x1b[31m",
    ],
    ids=range(8),
)
def test_a_tensor_with_a_strange_name_is_refused_in_few_words(name, tmp_path):
    tiny = Tiny("llama")
    tiny.tensors[name] = Tensor(np.ones(4, np.float32))
    with pytest.raises(UnsupportedModelError, match="no use for 1 tensors") as caught:
        zincmetal.load(tiny.save(tmp_path / "m.gguf"), device="cpu")
    assert len(str(caught.value)) < 400
    assert str(caught.value).isprintable()


def test_an_expert_of_more_than_32_bits(tmp_path):
    """The tensors are a hole in the file."""
    with gguf.open(DATA / "qwen3moe-q4_k_m.gguf") as file:
        n, n_ff = 2, 2**25
        keys = {key: file.metadata[key] for key in file.metadata if not key.startswith("tokenizer.")}
        weights = {t.name: Weight(t.name, t.type, t.shape) for t in file.tensors.values()}
    keys |= {"qwen3moe.expert_count": n, "qwen3moe.expert_used_count": 1, "qwen3moe.expert_feed_forward_length": n_ff}
    for name, w in weights.items():
        n_embd = w.shape[-1] if "gate_exps" in name or "up_exps" in name else w.shape[-2] if len(w.shape) == 3 else 0
        if name.endswith(("gate_exps.weight", "up_exps.weight")):
            weights[name] = replace(w, shape=(n, n_ff, n_embd))
        elif name.endswith("down_exps.weight"):
            weights[name] = replace(w, shape=(n, n_embd, n_ff))
        elif name.endswith("ffn_gate_inp.weight"):
            weights[name] = replace(w, shape=(n, w.shape[-1]))
    write(tmp_path / "m.gguf", keys, weights)
    with pytest.raises(UnsupportedModelError, match=r"blk.0.ffn_\w+_exps.weight has experts of \d+ bytes"):
        zincmetal.load(tmp_path / "m.gguf", device="cpu", context=16)


def test_a_row_of_more_than_32_bits(tmp_path):
    k = 2**30
    weight, x = Weight("w", quants.F32, (4, k)), Value("x", k)
    with gguf.open(Tiny("llama").save(tmp_path / "m.gguf")) as file:
        lowering = Lowering(Target.of_kernels(backend.load("cpu")), models.configure(file), "f16")
    with pytest.raises(UnsupportedModelError, match=r"too large for MatMulParams: row_bytes 4294967296"):
        lowering.launches(Op("linear", weight=weight, x=x, out=Value("y", 4)))


def test_the_work_of_laying_out_grows_with_the_layers():
    """Counts lines run, not seconds: twice the layers run about twice the lines."""
    lines = [lines_run(lay_out, launches(n), ONE_ROW) for n in (40, 80)]
    assert lines[0] < lines[1] < 2.5 * lines[0]


def launches(n_layer: int) -> list[Launch]:
    """Makes a chain of as many values as a model of so many layers has, each read by the next two launches."""
    values = [Value(f"v{i}", 8 + i % 5) for i in range(12 * n_layer)]
    op = Op("argmax")
    return [
        Launch("add", b"", (*(Arg(v, "r") for v in values[max(i - 2, 0) : i]), Arg(values[i], "w")), (1, 1, 1), 32, op)
        for i in range(len(values))
    ]


def lines_run(function: Callable[..., object], *args: object) -> int:
    """Counts the lines of this function that a call runs, each line as often as it runs."""
    count, file = 0, function.__code__.co_filename

    def trace(frame: Any, event: str, _: object) -> Any:
        nonlocal count
        count += event == "line"
        return trace if frame.f_code.co_filename == file else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function(*args)
    finally:
        sys.settrace(before)
    return count
