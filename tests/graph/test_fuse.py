"""Fusion passes on small graphs: which operations are joined, which are not, and that the values stay the same."""

from __future__ import annotations

import pytest

from zincmetal.gguf.quants import by_name
from zincmetal.graph.fuse import fuse, fuse_stack
from zincmetal.graph.ops import LOGITS, STEP, Op, Value, Weight

X = Value("x", 64)


def weight(name: str, rows: int = 32, qtype: str = "q8_0", *, experts: int = 0) -> Weight:
    shape = (experts, rows, 64) if experts else (rows, 64)
    return Weight(name, by_name(qtype), shape)


def linear(w: Weight, x: Value = X) -> Op:
    return Op("linear", (STEP, w, x), (Value(f"{w.name}.out", w.shape[0]),))


def kinds(ops: list[Op]) -> list[str]:
    return [op.kind for op in ops]


def written(ops: list[Op]) -> set[object]:
    return {w for op in ops for w in op.writes}


def test_products_of_one_input_are_stacked_with_f32_among_them():
    ops = [
        linear(weight("qkv", 96)),
        linear(weight("z")),
        linear(weight("alpha", 4, "f32")),
        linear(weight("b", 4, "f32")),
    ]
    (stack,) = fuse_stack(ops)
    assert stack.kind == "linear_stack"
    assert [r.name for r in stack.reads] == ["step", "x", "qkv", "z", "alpha", "b"]
    assert written([stack]) == written(ops)


def test_another_type_stays_out_of_a_stack():
    ops = [linear(weight("q", 96)), linear(weight("k", 8, "q4_0")), linear(weight("v", 8))]
    assert kinds(fuse_stack(ops)) == ["linear_stack", "linear"]


def test_a_stack_has_four_matrices_at_most():
    ops = fuse_stack([linear(weight(f"w{i}")) for i in range(6)])
    assert len(ops[0].writes) == 4
    assert kinds(ops) == ["linear_stack", "linear", "linear"]


def test_products_of_other_inputs_and_the_logits_are_not_stacked():
    other = Value("y", 64)
    ops = [linear(weight("a")), linear(weight("b"), other), Op("linear", (STEP, weight("out"), X), (LOGITS,))]
    assert kinds(fuse_stack(ops)) == ["linear"] * 3


def test_gate_and_up_are_the_last_two_of_a_stack():
    router = linear(weight("router", 8, "f32"))
    pair = Op("linear_swiglu", (STEP, weight("gate"), weight("up"), X), (Value("h", 32),))
    (stack,) = fuse_stack([pair, router])
    assert [r.name for r in stack.reads[2:]] == ["router", "gate", "up"]
    assert [w.name for w in stack.writes] == ["router.out", "h"]


def gated(kind: str, gate: Op, up: Op) -> list[Op]:
    return [gate, up, Op(kind, (STEP, gate.out, up.out), (Value("h", gate.out.width),))]  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["swiglu", "geglu"])
def test_gate_and_up_of_one_form_are_one_product(kind):
    assert kinds(fuse(gated(kind, linear(weight("g")), linear(weight("u"))), rows=8)) == [f"linear_{kind}"]


def test_gate_and_up_of_two_types_stay_apart():
    ops = gated("swiglu", linear(weight("g")), linear(weight("u", 32, "q4_0")))
    assert kinds(fuse(ops, rows=8)) == ["linear", "linear", "swiglu"]


def test_a_product_that_something_else_reads_is_kept():
    ops = gated("swiglu", linear(weight("g")), linear(weight("u")))
    ops.append(Op("add", (STEP, X, ops[0].out), (Value("y", 32),)))
    assert "linear" in kinds(fuse(ops, rows=8))


def test_a_bias_is_added_by_the_product():
    product = linear(weight("q"))
    ops = [product, Op("add", (STEP, Weight("q.bias", by_name("f32"), (32,)), product.out), (Value("sum", 32),))]
    (fused,) = fuse(ops, rows=1)
    assert fused.kind == "linear_add"
    assert fused.reads[-1].name == "q.bias"


ROUTE = tuple(Value(f"route.{i}", 2) for i in range(5))


def mixture(qtype: str) -> list[Op]:
    h = [Op("experts", (*ROUTE, weight(n, 64, qtype, experts=4), X), (Value(f"{n}.out", 128),)) for n in ("g", "u")]
    act = Op("swiglu", (STEP, h[0].out, h[1].out), (Value("act", 128),))
    down = Op("experts", (*ROUTE, weight("d", 64, qtype, experts=4), act.out), (Value("down", 128),))
    return [*h, act, down, Op("mix", (STEP, ROUTE[1], down.out, X), (Value("y", 64),))]


def test_one_row_takes_two_dispatches_for_its_experts():
    assert kinds(fuse(mixture("q4_k"), rows=1)) == ["experts_swiglu", "experts_mix"]


def test_many_rows_mix_after_the_products():
    assert kinds(fuse(mixture("q4_k"), rows=8)) == ["experts_swiglu", "experts", "mix"]


def test_experts_without_a_batched_kernel_are_not_fused():
    assert kinds(fuse(mixture("f32"), rows=1)) == ["experts", "experts", "swiglu", "experts", "mix"]


def norm(x: Value, name: str) -> Op:
    return Op("rms_norm", (STEP, x, Weight(name, by_name("f32"), (64,))), (Value(name, 64),), {"eps": 1e-6})


def test_a_norm_before_and_after_a_sum_is_one_dispatch():
    post = norm(Value("h", 64), "post")
    add = Op("add", (STEP, X, post.out), (Value("sum", 64),))
    following = norm(add.out, "next")
    (both,) = fuse([post, add, following], rows=8)
    assert both.kind == "rms_norm_add_norm"
    assert [r.name for r in both.reads] == ["step", "h", "post", "x", "next"]
    assert [w.name for w in both.writes] == ["sum", "next"]
    assert kinds(fuse([post, add], rows=8)) == ["rms_norm_add"]


def test_a_norm_that_something_else_reads_is_kept():
    post = norm(Value("h", 64), "post")
    add = Op("add", (STEP, X, post.out), (Value("sum", 64),))
    again = Op("add", (STEP, post.out, add.out), (Value("y", 64),))
    assert kinds(fuse([post, add, again], rows=8)) == ["rms_norm", "add", "add"]


def test_only_the_norm_of_the_sum_joins_it():
    post = norm(Value("h", 64), "post")
    add = Op("add", (STEP, X, post.out), (Value("sum", 64),))
    other = norm(X, "other")
    assert kinds(fuse([post, add, other], rows=8)) == ["rms_norm_add", "rms_norm"]
