"""The graph of a mixture: its variations come from the configuration and from the file's tensors."""

from __future__ import annotations

from dataclasses import replace

import pytest

from support.paths import DATA
from zincmetal import gguf, models
from zincmetal.config import Experts, ModelConfig
from zincmetal.errors import UnsupportedModelError
from zincmetal.gguf.quants import F32, Q4_0, QuantType
from zincmetal.graph.builder import Graph
from zincmetal.graph.ops import Op, Value, Weight
from zincmetal.models import qwen3moe

N, WIDTH, N_FF = 4, 64, 32


@pytest.fixture(scope="module")
def cfg() -> ModelConfig:
    with gguf.open(DATA / "qwen3moe-q4_k_m.gguf") as file:
        return replace(models.configure(file), n_embd=WIDTH)


def graph(cfg: ModelConfig, tensors: dict[str, tuple[int, ...]], qtype: QuantType = Q4_0, **experts: object) -> Graph:
    """Makes a graph over tensors of block 0. Vectors, and what ends with a bias, are f32."""
    of = Experts(n=N, n_used=2, n_ff=N_FF, n_ff_shared=0)
    weights = {
        f"blk.0.{name}": Weight(f"blk.0.{name}", F32 if len(shape) == 1 or "bias" in name else qtype, shape)
        for name, shape in tensors.items()
    }
    return Graph(replace(cfg, experts=replace(of, **experts)), weights.get)


ROUTER: dict[str, tuple[int, ...]] = {"ffn_gate_inp.weight": (N, WIDTH)}
DOWN: dict[str, tuple[int, ...]] = {"ffn_down_exps.weight": (N, WIDTH, N_FF)}
UP: dict[str, tuple[int, ...]] = {"ffn_up_exps.weight": (N, N_FF, WIDTH)}
GATED = ROUTER | DOWN | UP | {"ffn_gate_exps.weight": (N, N_FF, WIDTH)}


def mixture(g: Graph) -> list[Op]:
    x = Value("x", WIDTH)
    qwen3moe.mixture(g, 0, x, Value("h", WIDTH))
    return g.ops


def kinds(ops: list[Op]) -> list[str]:
    return [op.kind for op in ops]


def test_the_choice_has_what_the_file_has(cfg):
    plain = next(op for op in mixture(graph(cfg, GATED)) if op.kind == "route")
    assert (plain.get("router_bias"), plain.get("router_scales"), plain.get("shared")) == (None, None, None)
    assert plain.attrs["whole_shared"] is False
    tensors = GATED | {"exp_probs_b.bias": (N,), "ffn_down_exps.scale": (N,)}
    route = next(op for op in mixture(graph(cfg, tensors)) if op.kind == "route")
    assert (route["router_bias"].name, route["router_scales"].name) == (
        "blk.0.exp_probs_b.bias",
        "blk.0.ffn_down_exps.scale",
    )
    for name in ("exp_probs_b.bias", "ffn_down_exps.scale"):
        with pytest.raises(UnsupportedModelError, match=rf"{name} has shape \(5,\); the metadata asks for \(4,\)"):
            mixture(graph(cfg, tensors | {name: (5,)}))


def test_experts_have_the_biases_of_the_file(cfg):
    biases = {f"ffn_{name}_exps.bias": (N, n) for name, n in (("gate", N_FF), ("up", N_FF), ("down", WIDTH))}
    products = [op for op in mixture(graph(cfg, GATED | biases)) if op.kind == "experts"]
    assert [op["bias"].name for op in products] == [f"blk.0.ffn_{name}_exps.bias" for name in ("gate", "up", "down")]
    with pytest.raises(UnsupportedModelError, match=r"ffn_up_exps.bias has shape"):
        mixture(graph(cfg, GATED | biases | {"ffn_up_exps.bias": (N, N_FF + 1)}))


def test_experts_without_a_gate(cfg):
    ops = mixture(graph(cfg, ROUTER | UP | DOWN, activation="relu2"))
    assert kinds(ops) == ["linear", "route", "experts", "relu2", "experts", "mix"]


@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
def test_a_shared_expert_of_weight_1(cfg, activation: str):
    shared = {f"ffn_{name}_shexp.weight": (16, WIDTH) for name in ("gate", "up")}
    shared["ffn_down_shexp.weight"] = (WIDTH, 16)
    g = graph(cfg, GATED | shared, n_ff_shared=16, shared_gated=False, activation=activation)
    ops = mixture(g)
    route = next(op for op in ops if op.kind == "route")
    assert route.get("shared") is None
    assert route.attrs["whole_shared"] is True
    assert "add_shared" in kinds(ops)
    assert ("blk.0.ffn_gate_shexp.weight" in {w.name for op in ops for w in op.weights}) is (activation == "swiglu")


def test_gate_and_up_may_be_one_tensor(cfg):
    g = graph(cfg, ROUTER | DOWN | {"ffn_gate_up_exps.weight": (N, 2 * N_FF, WIDTH)})
    gate, up, _ = (op.weight("weight") for op in mixture(g) if op.kind == "experts")
    row = Q4_0.row_bytes(WIDTH)
    assert gate.shape == up.shape == (N, N_FF, WIDTH)
    assert (gate.first, up.first) == (0, N_FF)
    assert gate.matrix_bytes == up.matrix_bytes == 2 * N_FF * row
    assert g.ops[2].out != g.ops[3].out
    with pytest.raises(UnsupportedModelError, match=r"ffn_gate_up_exps.weight has shape"):
        mixture(graph(cfg, ROUTER | DOWN | {"ffn_gate_up_exps.weight": (N, N_FF, WIDTH)}))
