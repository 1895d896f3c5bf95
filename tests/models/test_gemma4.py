"""Gemma 4 beyond its distributions: the sizes of its layers, sequences side by side, and files that contradict
themselves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.mixtures import Mixture, engine
from support.model_files import with_keys
from support.paths import DATA
from support.reference_models import load, log_softmax
from zincmetal import gguf
from zincmetal.device import backend
from zincmetal.errors import GGUFError, UnsupportedModelError
from zincmetal.gguf.quants import F32
from zincmetal.plan.planner import Planner
from zincmetal.plan.target import Target

DENSE, E2B, MIXTURE = (DATA / "families" / f"gemma4-{name}.gguf" for name in ("dense", "e2b", "moe"))
TARGET = Target.of_kernels(backend.load("cpu"))


def test_layers_have_sizes_of_their_own() -> None:
    """Large heads where all is seen, small ones in a window. The cache of a layer has its width, and none if shared."""
    with gguf.open(E2B) as file:
        planner = Planner(file, TARGET, 256)
        layers, states = planner.config.layers, planner.addresses.states
        assert [layer.window for layer in layers] == [24, 24, 0, 24, 24, 0]
        assert [(layer.head_dim, layer.n_rot) for layer in layers[:3]] == [(32, 32), (32, 32), (64, 64)]
        assert [layer.n_ff for layer in layers] == [128] * 3 + [256] * 3
        assert [layer.kv_layer for layer in layers] == [0, 1, 2, 1, 1, 2]
        caches = {state.name: n for state, n in states.items() if state.kind == "k_cache"}
        rows = planner.addresses.room.pages * TARGET.page
        assert caches == {"k_cache.0": 2 * 32 * rows, "k_cache.1": 2 * 32 * rows, "k_cache.2": 2 * 64 * rows}
        assert planner.page_bytes == TARGET.page * (2 * 2 * (32 + 32 + 64) + 4)
        assert planner.kv_read() == 2 * 2 * (4 * 24 * 32 + 2 * 256 * 64)
        (full, _), (local, _) = planner.config.rope_tables.values()
        assert full is not None
        assert local is not None
        assert (full.base, full.divisors, local.base, local.divisors) == (1e6, "rope_freqs.weight", 1e4, "")


def test_one_row_takes_few_dispatches() -> None:
    """Eight for a block, and four more for its second embedding: all norms join the sums before, or products after."""
    with gguf.open(DENSE) as file:
        kinds = [d.launch.op.kind for d in Planner(file, TARGET, 256).plan().dispatches]
    per_block = ["linear_stack", "rope_kv", "attention", "linear", "rms_norm_add_norm", "linear_geglu", "linear"]
    assert kinds[2:11] == [*per_block, "rms_norm_add_norm", "linear_stack"]
    assert len(kinds) == 2 + 5 * 8 + 4  # begin, embedding; blocks; product, cap and arg max
    with gguf.open(E2B) as file:
        kinds = [d.launch.op.kind for d in Planner(file, TARGET, 256).plan().dispatches]
    # A block that reads another's K/V has one product less to stack; the second embeddings take three in all.
    assert len(kinds) == 2 + 3 + 6 * 12 + 4


def test_a_mixture_stands_beside_the_feed_forward() -> None:
    with gguf.open(MIXTURE) as file:
        planner = Planner(file, TARGET, 256)
        assert [(layer.n_ff, layer.mixture) for layer in planner.config.layers] == [(128, True)] * 4
        kinds = [d.launch.op.kind for d in planner.plan().dispatches]
        uses = {use for use, _ in planner.plan().weight_reads()}
    router = ["rms_norm", "linear"]
    experts = ["route_experts_gated", "experts_mix", "rms_norm_add", "rms_norm_add_norm"]
    assert kinds[7:17] == ["linear_geglu", "linear", "rms_norm", *router, *experts, "linear_stack"]
    assert uses >= {"router", "routed experts", "feed-forward", "attention", "norms", "LM head", "embedding"}


@pytest.mark.parametrize(
    ("path", "kv"), [(DENSE, "q8_0"), (E2B, "f32"), (MIXTURE, "f32")], ids=lambda x: getattr(x, "stem", x)
)
def test_sequences_side_by_side_equal_each_alone(path: Path, kv: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of many sequences, chunks of prompts, forks and kept pages, over windows and shared K/V."""
    monkeypatch.setenv("ZINCMETAL_NATIVE", "1")
    with engine(path, kv, threads=2) as opened:
        mixture = Mixture(opened, 1, (16, 300, 16))
        mixture.run()
    for member in mixture.members:
        assert not isinstance(member.ended, BaseException), member.ended
        assert member.tokens == member.expected
    assert mixture.together > 1


@pytest.mark.parametrize("path", [DENSE, E2B, MIXTURE], ids=lambda p: p.stem)
def test_chunks_and_saved_pages_change_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = np.load(path.with_suffix(".npz"))["tokens"].tolist()
    with load(path, "native", monkeypatch, kv="f32", context=128) as model:
        whole = log_softmax(model.logits(ids))
        for chunk in (1, 7, 64):
            with model.session() as session:
                for at in range(0, 80, chunk):
                    session.prefill(ids[at : min(at + chunk, 80)])
                snapshot = session.save()
                session.prefill(ids[80:])
                assert np.abs(log_softmax(session.last_logits()) - whole[-1]).max() < 1e-4
                session.restore(snapshot)
                session.prefill(ids[80:90])
                assert np.abs(log_softmax(session.last_logits()) - whole[89]).max() < 1e-4


def test_smaller_caches_stay_close(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = np.load(DENSE.with_suffix(".npz"))
    for kv, bound in (("f16", 1e-4), ("q8_0", 1e-3)):
        with load(DENSE, "native", monkeypatch, kv=kv, context=128) as model:
            logits = model.logits(exact["tokens"])
        p = log_softmax(exact["logprobs"])
        got = (np.exp(p) * (p - log_softmax(logits[exact["prefix_lengths"] - 1]))).sum(axis=-1)
        assert (got <= bound).all(), f"KL {got}"


# ---- files that contradict themselves -------------------------------------------------------------------------------


def plan(path: Path, keys: dict[str, Any], tensors: dict[str, tuple[int, ...] | None] | None = None) -> Planner:
    """Plans a file with other values of these keys, and with other shapes of these tensors (None: without them)."""
    with gguf.open(path) as file:
        changed = with_keys(file, {f"gemma4.{name}": value for name, value in keys.items()})
        for name, shape in (tensors or {}).items():
            found = changed.tensors.pop(name, changed.tensors["output_norm.weight"])
            if shape is not None:
                nbytes = F32.nbytes(shape)
                changed.tensors[name] = replace(found, name=name, shape=shape, type=F32, nbytes=nbytes)
        return Planner(changed, TARGET, 256)


WRONG_KEYS = [
    ("attention.value_length", 32, "attention.value_length differs from the key length 64"),
    ("attention.value_length_swa", 64, "attention.value_length_swa differs from the key length 32"),
    ("attention.key_length_swa", 0, "attention.key_length_swa"),
    ("attention.key_length", 128, "attention.value_length differs from the key length 128"),
    ("rope.dimension_count_swa", 33, "rope.dimension_count_swa.*33 must be even"),
    ("rope.dimension_count_swa", 34, "rope.dimension_count_swa.*at most the head's 32"),
    ("rope.dimension_count", 32, "rope_freqs.weight has 32 values, not 16"),
    ("attention.shared_kv_layers", 6, "shared_kv_layers.*leaves no block whose K/V block 0 can read"),
    ("attention.shared_kv_layers", 5, "shared_kv_layers.*block 2 can read"),
    ("attention.shared_kv_layers", -1, "shared_kv_layers"),
    ("attention.shared_kv_layers", 4, "shared_kv_layers.*leaves no block whose K/V block 2 can read"),
    ("attention.shared_kv_layers", 2, "tensor blk.3.attn_k.weight is missing"),
    ("attention.head_count_kv", np.array([1, 1, 1, 1, 2, 1]), "head_count_kv.*block 4 has 2, and block 1"),
    ("attention.sliding_window_pattern", np.array([True, False]), "sliding_window_pattern"),
    ("embedding_length_per_layer_input", 16, "tensor per_layer_token_embd.weight has shape|per_layer_model_proj"),
    ("embedding_length_per_layer_input", 0, "no use for .* tensors"),
    ("embedding_length_per_layer_input", -1, "embedding_length_per_layer_input"),
    ("feed_forward_length", 128, r"blk.3.ffn_gate.weight has shape \(256, 128\)"),
    ("final_logit_softcapping", -30.0, "final_logit_softcapping"),
    ("final_logit_softcapping", float("nan"), "final_logit_softcapping"),
]


WRONG_KEYS_OF_MIXTURES = [
    ("expert_used_count", 7, "expert_used_count.*7 of 6 experts"),
    ("expert_count", 0, "no use for .* tensors"),
    ("expert_count", 5, r"ffn_gate_inp.weight has shape \(6, 128\)"),
    ("expert_feed_forward_length", 32, "ffn_gate_up_exps.weight"),
]


@pytest.mark.parametrize(("key", "value", "error"), WRONG_KEYS_OF_MIXTURES, ids=lambda x: str(x)[:40])
def test_keys_that_contradict_a_mixture_are_refused(key: str, value: Any, error: str) -> None:
    with pytest.raises((GGUFError, UnsupportedModelError), match=error):
        plan(MIXTURE, {key: value})


@pytest.mark.parametrize(("key", "value", "error"), WRONG_KEYS, ids=lambda x: str(x)[:40])
def test_keys_that_contradict_the_file_are_refused(key: str, value: Any, error: str) -> None:
    with pytest.raises((GGUFError, UnsupportedModelError), match=error):
        plan(E2B, {key: value})


WRONG_TENSORS: list[tuple[Path, str, tuple[int, ...] | None]] = [
    (DENSE, "blk.1.attn_v.weight", None),  # only where all is seen may keys be values
    (DENSE, "blk.2.attn_v.weight", (64, 64)),
    (DENSE, "blk.2.layer_output_scale.weight", (2,)),
    (DENSE, "blk.2.post_ffw_norm.weight", None),
    (DENSE, "blk.2.attn_q_norm.weight", (32,)),
    (DENSE, "blk.2.ffn_gate_inp.weight", (6, 128)),
    (E2B, "blk.2.inp_gate.weight", (64, 128)),
    (E2B, "blk.2.proj.weight", None),
    (E2B, "blk.2.post_norm.weight", (32,)),
    (E2B, "per_layer_proj_norm.weight", (192,)),
    (E2B, "per_layer_token_embd.weight", (512, 160)),
    (MIXTURE, "blk.1.ffn_gate_inp.scale", None),
    (MIXTURE, "blk.1.ffn_gate_inp.scale", (6,)),
    (MIXTURE, "blk.1.ffn_down_exps.scale", (5,)),
    (MIXTURE, "blk.1.ffn_up_exps.scale", (6,)),
    (MIXTURE, "blk.1.ffn_gate_up_exps.weight", (6, 64, 128)),
    (MIXTURE, "blk.1.pre_ffw_norm_2.weight", None),
    (MIXTURE, "blk.1.post_ffw_norm_1.weight", (64,)),
    (DENSE, "blk.1.post_ffw_norm_1.weight", (128,)),
]


@pytest.mark.parametrize(("path", "tensor", "shape"), WRONG_TENSORS, ids=lambda x: getattr(x, "stem", str(x)))
def test_tensors_that_lack_or_do_not_fit_are_named(path: Path, tensor: str, shape: tuple[int, ...] | None) -> None:
    with pytest.raises(UnsupportedModelError, match=tensor):
        plan(path, {}, {tensor: shape})


def test_a_block_that_reads_the_keys_of_another_may_have_its_own() -> None:
    """As the original checkpoints: nothing reads them. A bias would be unknown there too."""
    own = {
        f"blk.4.attn_{name}.weight": shape for name, shape in (("k", (32, 128)), ("v", (32, 128)), ("k_norm", (32,)))
    }
    assert plan(E2B, {}, own).plan().dispatches
    with pytest.raises(UnsupportedModelError, match=r"blk.4.attn_k.bias"):
        plan(E2B, {}, {"blk.4.attn_k.bias": (32,)})


def test_a_model_without_a_cap_has_its_logits_as_they_are() -> None:
    for value in (None, 0.0):
        capped = plan(DENSE, {"final_logit_softcapping": value})
        assert capped.config.logit_cap == 0
        assert "cap_logits" not in {d.launch.kernel for d in capped.plan().dispatches}
