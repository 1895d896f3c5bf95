"""Fusion passes on small graphs: which operations are joined, which are not, and that the values stay the same."""

from __future__ import annotations

from typing import Any

import pytest

from zincmetal.gguf.quants import by_name
from zincmetal.graph import fuse as passes
from zincmetal.graph.fuse import Limits
from zincmetal.graph.ops import HIDDEN, LOGITS, Op, Operand, Route, Value, Weight

X = Value("x", 64)
LIMITS = Limits(stack=4, stack_rows=8, expert_types=frozenset({"q4_k", "q8_0"}))


def fuse(ops: list[Op], rows: int) -> list[Op]:
    return passes.fuse(ops, rows, LIMITS)


def fuse_stack(ops: list[Op]) -> list[Op]:
    return passes.fuse_stack(ops, LIMITS)


def weight(name: str, rows: int = 32, qtype: str = "q8_0", *, experts: int = 0) -> Weight:
    shape = (experts, rows, 64) if experts else (rows, 64)
    return Weight(name, by_name(qtype), shape)


def linear(w: Weight, x: Value = X) -> Op:
    return Op("linear", weight=w, x=x, out=Value(f"{w.name}.out", w.shape[0]))


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
    assert [w.name for w in stack.all("matrices")] == ["qkv", "z", "alpha", "b"]
    assert (stack["x"], stack.get("gate"), stack.get("glu")) == (X, None, None)
    assert written([stack]) == written(ops)


def test_another_type_stays_out_of_a_stack():
    ops = [linear(weight("q", 96)), linear(weight("k", 8, "q4_0")), linear(weight("v", 8))]
    assert kinds(fuse_stack(ops)) == ["linear_stack", "linear"]


def test_a_stack_has_four_matrices_at_most():
    ops = fuse_stack([linear(weight(f"w{i}")) for i in range(7)])
    assert [len(op.writes) for op in ops] == [4, 3]
    assert kinds(fuse_stack([linear(weight(f"w{i}")) for i in range(5)])) == ["linear_stack", "linear"]


def test_products_that_add_a_bias_are_stacked_apart_from_the_others():
    products = [linear(weight(name, m)) for name, m in (("q", 96), ("k", 8), ("v", 8), ("z", 4), ("g", 4))]
    biases = [Weight(f"{op.weight('weight').name}.bias", by_name("f32"), (op.value("out").width,)) for op in products]
    sums = [
        Op("add", bias=b, b=op.out, out=Value(f"{b.name}.sum", b.shape[0]))
        for op, b in zip(products[:3], biases[:3], strict=True)
    ]
    plain, biased = fuse([*products, *sums], rows=1)
    assert [w.name for w in biased.weights] == ["q", "k", "v", "q.bias", "k.bias", "v.bias"]
    assert written([biased]) == written(sums)
    assert [w.name for w in plain.weights] == ["z", "g"]
    assert kinds(list(biased.parts)) == ["linear_add"] * 3


def test_a_bias_and_a_residual_are_added_by_the_product_of_one_row():
    product, residual = linear(weight("o")), Value("r", 32)
    biased = Op("add", bias=Weight("o.bias", by_name("f32"), (32,)), b=product.out, out=Value("biased", 32))
    ops = [product, biased, Op("add", a=residual, b=biased.out, out=Value("sum", 32))]
    (fused,) = fuse(ops, rows=1)
    assert (fused.kind, fused["residual"], fused.weight("bias").name) == ("linear_add", residual, "o.bias")
    assert fused.out.name == "sum"
    assert kinds(fuse(ops, rows=2)) == ["linear_add", "add"]


def test_a_product_that_adds_a_value_is_not_stacked():
    products = [linear(weight("a")), linear(weight("b"))]
    ops = [*products, *(Op("add", a=Value("r", 32), b=op.out, out=Value(f"s{i}", 32)) for i, op in enumerate(products))]
    assert kinds(fuse(ops, rows=1)) == ["linear_add"] * 2


def test_every_type_has_a_stack_of_its_own():
    types = ["q5_0", "q4_0", "q4_0", "q4_0", "f32"]
    ops = [linear(weight(f"w{i}", 96 if i == 0 else 8, t)) for i, t in enumerate(types)]
    stacks = fuse_stack(ops)
    assert [[w.type.name for w in op.weights] for op in stacks] == [["q5_0", "f32"], ["q4_0"] * 3]
    assert written(stacks) == written(ops)


def test_products_of_other_inputs_and_the_logits_are_not_stacked():
    other = Value("y", 64)
    ops = [linear(weight("a")), linear(weight("b"), other), Op("linear", weight=weight("out"), x=X, out=LOGITS)]
    assert kinds(fuse_stack(ops)) == ["linear"] * 3


def test_gate_and_up_are_the_last_two_of_a_stack():
    router = linear(weight("router", 8, "f32"))
    pair = Op("linear_swiglu", gate=weight("gate"), up=weight("up"), x=X, out=Value("h", 32))
    (stack,) = fuse_stack([pair, router])
    assert [w.name for w in stack.weights] == ["router", "gate", "up"]
    assert (stack["gate"].name, stack["up"].name, stack["glu"].name) == ("gate", "up", "h")
    assert [w.name for w in stack.writes] == ["router.out", "h"]


def gated(kind: str, gate: Op, up: Op) -> list[Op]:
    return [gate, up, Op(kind, gate=gate.out, up=up.out, out=Value("h", gate.value("out").width))]


@pytest.mark.parametrize("kind", ["swiglu", "geglu"])
def test_gate_and_up_of_one_form_are_one_product(kind):
    assert kinds(fuse(gated(kind, linear(weight("g")), linear(weight("u"))), rows=8)) == [f"linear_{kind}"]


def test_gate_and_up_of_two_types_stay_apart():
    ops = gated("swiglu", linear(weight("g")), linear(weight("u", 32, "q4_0")))
    assert kinds(fuse(ops, rows=32)) == ["linear", "linear", "swiglu"]


def test_a_product_that_something_else_reads_is_kept():
    ops = gated("swiglu", linear(weight("g")), linear(weight("u")))
    ops.append(Op("add", a=X, b=ops[0].out, out=Value("y", 32)))
    assert "linear" in kinds(fuse(ops, rows=32))


def test_a_bias_is_added_by_the_product():
    product = linear(weight("q"))
    ops = [product, Op("add", bias=Weight("q.bias", by_name("f32"), (32,)), b=product.out, out=Value("sum", 32))]
    (fused,) = fuse(ops, rows=1)
    assert fused.kind == "linear_add"
    assert fused["bias"].name == "q.bias"


ROUTE = Route(*(Value(f"route.{i}", 2) for i in range(5)))


def product_of_experts(name: str, x: Operand, qtype: str = "q4_k", bias: bool = False) -> Op:
    w = weight(name, 64, qtype, experts=4)
    biases = Weight(f"{name}.bias", by_name("f32"), (4, 64)) if bias else None
    return Op("experts", **ROUTE._asdict(), weight=w, bias=biases, x=x, out=Value(f"{name}.out", 128))


def mixture(qtype: str, glu: str = "swiglu", biases: str = "") -> list[Op]:
    """A mixture of two of four experts. ``biases``: the first letters of the matrices that have some."""
    gate, up = (product_of_experts(name, X, qtype, name in biases) for name in "gu")
    act = Op(glu, gate=gate.out, up=up.out, out=Value("act", 128))
    down = product_of_experts("d", act.out, qtype, "d" in biases)
    return [gate, up, act, down, Op("mix", weights=ROUTE.weights, y=down.out, residual=X, out=Value("y", 64))]


def test_one_row_takes_two_dispatches_for_its_experts():
    assert kinds(fuse(mixture("q4_k"), rows=1)) == ["experts_gated", "experts_mix"]


def test_many_rows_mix_after_the_products():
    assert kinds(fuse(mixture("q4_k"), rows=8)) == ["experts_gated", "experts", "mix"]


def test_experts_without_a_batched_kernel_are_not_fused():
    assert kinds(fuse(mixture("f32"), rows=1)) == ["experts", "experts", "swiglu", "experts", "mix"]


@pytest.mark.parametrize("glu", ["swiglu", "geglu", "swiglu_clamped"])
@pytest.mark.parametrize("rows", [1, 8])
def test_biases_and_any_gate_cost_no_dispatch(glu: str, rows: int):
    gated, *down = fuse(mixture("q4_k", glu, "gud"), rows)
    assert kinds([gated, *down]) == ["experts_gated", *(["experts_mix"] if rows == 1 else ["experts", "mix"])]
    assert gated.attrs["glu"] == glu
    assert [gated[name].name for name in ("gate", "gate_bias", "up", "up_bias")] == ["g", "g.bias", "u", "u.bias"]
    assert down[0]["bias"].name == "d.bias"
    assert kinds(list(gated.parts)) == ["experts", "experts", glu]


def test_one_bias_of_two_is_left_to_its_product():
    assert kinds(fuse(mixture("q4_k", biases="u"), rows=1)) == ["experts", "experts", "swiglu", "experts_mix"]


ROUTER = {"score": "sigmoid", "normalised": True, "n_group": 1, "n_group_used": 1, "whole_shared": False, "scale": 1.0}


def choice() -> Op:
    bias = Weight("router.bias", by_name("f32"), (4,))
    return Op("route", router=Value("logits", 4), router_bias=bias, **ROUTE._asdict(), **ROUTER)


def test_the_first_product_of_one_row_chooses_the_experts():
    route = choice()
    first, mix = fuse([route, *mixture("q4_k", biases="gu")], rows=1)
    assert kinds([first, mix]) == ["route_experts_gated", "experts_mix"]
    assert kinds(list(first.parts)) == ["route", "experts_gated"]
    assert [first[name].name for name in ("router", "router_bias", "gate", "gate_bias")] == [
        *("logits", "router.bias", "g", "g.bias")
    ]
    assert set(first.writes) == {*route.writes, first.out}
    assert first.attrs == {**ROUTER, "glu": "swiglu", "eps": 0.0}
    assert kinds(fuse([route, *mixture("q4_k")], rows=8))[:2] == ["route", "experts_gated"]


def test_a_choice_for_experts_without_a_batched_kernel_is_a_dispatch():
    assert kinds(fuse([choice(), *mixture("f32")], rows=1))[:2] == ["route", "experts"]


def test_without_a_pair_the_first_of_two_products_chooses():
    ops = fuse([choice(), *mixture("q4_k", biases="u")], rows=1)
    assert kinds(ops) == ["route_experts", "experts", "swiglu", "experts_mix"]
    squared = product_of_experts("u", X)
    relu2 = Op("relu2", x=squared.out, out=Value("act", 128))
    assert kinds(fuse([choice(), squared, relu2], rows=1)) == ["route_experts_relu2"]


def test_the_product_that_chooses_comes_before_all_that_read_the_choice():
    """As where the shared expert's type has no kernel with that of the others."""
    shared = linear(weight("shared", 64))
    added = Op("add_shared", weights=ROUTE.weights, y=shared.out, residual=X, out=Value("added", 64))
    gate, up, act, down, mix = mixture("q4_k")
    mix = mix.replace(residual=added.value("out"))
    ops = fuse([choice(), shared, added, gate, up, act, down, mix], rows=1)
    assert kinds(ops) == ["route_experts_gated", "experts_mix"]
    ops = passes.fuse_route([choice(), shared, added, gate, up, act, down, mix], LIMITS)
    assert kinds(ops) == ["linear", "route_experts", "add_shared", "experts", "swiglu", "experts", "mix"]


def test_a_product_of_what_reads_the_choice_cannot_choose():
    added = Op("add_shared", weights=ROUTE.weights, y=X, residual=X, out=Value("added", 64))
    ops = [choice(), added, product_of_experts("g", added.value("out"))]
    assert passes.fuse_route(ops, LIMITS) == ops
    down = product_of_experts("d", Value("each", 128))  # a row of x for each expert, which no kernel takes
    assert passes.fuse_route([choice(), down], LIMITS) == [choice(), down]


@pytest.mark.parametrize("rows", [1, 8])
def test_experts_without_a_gate_take_their_activation(rows: int):
    up = product_of_experts("u", X, bias=True)
    act = Op("relu2", x=up.out, out=Value("act", 128))
    down = product_of_experts("d", act.out)
    mix = Op("mix", weights=ROUTE.weights, y=down.out, residual=X, out=Value("y", 64))
    squared, *others = fuse([up, act, down, mix], rows)
    assert kinds([squared, *others]) == ["experts_relu2", *(["experts_mix"] if rows == 1 else ["experts", "mix"])]
    assert (squared["bias"], squared["x"], squared.out) == (up["bias"], X, act.out)


def test_a_clamped_gate_of_plain_products_is_a_dispatch():
    ops = gated("swiglu_clamped", linear(weight("g")), linear(weight("u")))
    assert kinds(fuse(ops, rows=32)) == ["linear", "linear", "swiglu_clamped"]


def norm(x: Value, name: str, eps: float = 1e-6) -> Op:
    return Op("rms_norm", x=x, weight=Weight(name, by_name("f32"), (64,)), out=Value(name, 64), eps=eps)


def test_a_norm_before_and_after_a_sum_is_one_dispatch():
    post = norm(Value("h", 64), "post")
    add = Op("add", a=X, b=post.out, out=Value("sum", 64))
    following = norm(add.value("out"), "next", eps=1e-5)
    (both,) = fuse([post, add, following], rows=8)
    assert both.kind == "rms_norm_add_norm"
    assert (both.attrs["eps"], both.attrs["next_eps"]) == (1e-6, 1e-5)
    names = ("x", "weight", "residual", "next_weight", "sum", "out")
    assert [both[name].name for name in names] == ["h", "post", "x", "next", "sum", "next"]
    assert kinds(fuse([post, add], rows=8)) == ["rms_norm_add"]


def test_a_norm_that_something_else_reads_is_kept():
    post = norm(Value("h", 64), "post")
    add = Op("add", a=X, b=post.out, out=Value("sum", 64))
    again = Op("add", a=post.out, b=add.out, out=Value("y", 64))
    assert kinds(fuse([post, add, again], rows=8)) == ["rms_norm", "add", "add"]


def test_only_the_norm_of_the_sum_joins_it():
    post = norm(Value("h", 64), "post")
    add = Op("add", a=X, b=post.out, out=Value("sum", 64))
    other = norm(X, "other")
    assert kinds(fuse([post, add, other], rows=8)) == ["rms_norm_add", "rms_norm"]


def test_a_factor_of_the_sum_goes_with_its_norm():
    """As at the end of a block that has a factor, where the next one begins with a norm."""
    post = norm(Value("h", 64), "post")
    add = Op("add", a=X, b=post.out, out=Value("sum", 64))
    factor = Weight("factor", by_name("f32"), (1,))
    scaled = Op("scale", x=add.out, factor=factor, out=Value("scaled", 64))
    following = norm(scaled.value("out"), "next")
    (both,) = fuse([post, add, scaled, following], rows=8)
    assert (both.kind, both["factor"], both["sum"].name) == ("rms_norm_add_norm", factor, "scaled")
    also = Op("add", a=add.out, b=scaled.out, out=Value("y", 64))  # reads the sum as it was
    assert kinds(fuse([post, add, scaled, also], rows=8)) == ["rms_norm_add", "scale", "add"]


@pytest.mark.parametrize(
    ("changed", "of_next"),
    [({"scale": 2.0}, True), ({"groups": 2.0}, True), ({"groups": 2.0}, False)],
)
def test_a_following_norm_of_another_kind_stays_apart(changed: dict[str, float], of_next: bool):
    post = norm(Value("h", 64), "post")
    add = Op("add", a=X, b=post.out, out=Value("sum", 64))
    following = norm(add.value("out"), "next")
    ops = [post, add, Op("rms_norm", **{**following.but(), **changed})]
    if not of_next:
        ops = [Op("rms_norm", **{**post.but(), **changed}), add, following]
    assert kinds(fuse(ops, rows=8)) == ["rms_norm_add", "rms_norm"]
    plain = Op("rms_norm", **following.but("weight"))
    assert kinds(fuse([post, add, plain], rows=8)) == ["rms_norm_add", "rms_norm"]


# ---- norms that products compute -----------------------------------------------------------------------------------


def of(norm: Op, *names: str) -> list[Op]:
    return [linear(weight(name), norm.value("out")) for name in names]


def test_products_of_one_row_compute_the_norm_that_they_read():
    first = norm(X, "norm", eps=1e-5)
    shared, (router,) = of(first, "g", "u"), of(first, "r")
    experts = [product_of_experts(name, first.value("out")) for name in ("eg", "eu")]
    act = Op("swiglu", gate=experts[0].out, up=experts[1].out, out=Value("eh", 64))
    ops = [first, router, *gated("swiglu", *shared), *experts, act]
    stack, mixture = fuse(ops, rows=1)
    assert kinds([stack, mixture]) == ["linear_stack", "experts_gated"]
    for op in (stack, mixture):
        assert (op["x"], op["norm"], op.attrs["eps"]) == (X, first["weight"], 1e-5)
    assert kinds(fuse(ops, rows=2)) == ["rms_norm", "linear_stack", "experts_gated"]


def test_parts_of_a_product_of_a_norm_compute_it_too():
    first = norm(X, "norm")
    stack, *_ = fuse([first, *of(first, "r"), *gated("swiglu", *of(first, "g", "u"))], rows=1)
    assert kinds(list(stack.parts)) == ["linear", "linear_swiglu"]
    gate, up, act = stack.parts[1].parts
    for part in (*stack.parts, gate, up):
        assert (part["x"], part["norm"], part.attrs["eps"]) == (X, first["weight"], 1e-6)
    assert act == Op("swiglu", gate=gate.out, up=up.out, out=stack["glu"])


def test_the_last_product_and_one_with_a_bias_compute_a_norm():
    first = norm(X, "norm")
    logits = Op("linear", weight=weight("out"), x=first.out, out=LOGITS)
    (product,) = of(first, "q")
    biased = Op("add", bias=Weight("q.bias", by_name("f32"), (32,)), b=product.out, out=Value("sum", 32))
    ops = fuse([first, logits, product, biased], rows=1)
    assert kinds(ops) == ["linear", "linear_add"]
    assert all((op["x"], op["norm"]) == (X, first["weight"]) for op in ops)


def test_a_product_that_adds_what_it_multiplies_reads_a_norm():
    """Its second use of the normed vector is not a product."""
    first = norm(X, "norm")
    product = linear(weight("w", 64), first.value("out"))
    total = Op("add", a=first.out, b=product.out, out=Value("sum", 64))
    assert kinds(fuse([first, product, total], rows=1)) == ["rms_norm", "linear_add"]


def test_a_norm_that_is_not_only_an_input_of_products_is_kept():
    first = norm(X, "norm")
    also = Op("add", a=first.out, b=X, out=Value("sum", 64))
    assert kinds(fuse([first, *of(first, "a", "b"), also], rows=1)) == ["rms_norm", "linear_stack", "add"]
    hidden = first.replace(out=HIDDEN)
    assert kinds(fuse([hidden], rows=1)) == ["rms_norm"]


@pytest.mark.parametrize("changed", [{"scale": 2.0}, {"groups": 2.0}, {"weight": None}])
def test_a_norm_of_another_kind_is_no_input(changed: dict[str, Any]):
    plain = norm(X, "norm")
    first = Op("rms_norm", **{**plain.but(), **changed})
    assert kinds(fuse([first, *of(plain, "a")], rows=1)) == ["rms_norm", "linear"]
    assert kinds(fuse([plain, *of(plain, "a")], rows=1)) == ["linear"]


def test_a_norm_after_the_norm_of_a_sum_stays_there():
    post = norm(Value("h", 64), "post")
    add = Op("add", a=X, b=post.out, out=Value("sum", 64))
    following = norm(add.value("out"), "next")
    assert kinds(fuse([post, add, following, *of(following, "a")], rows=1)) == ["rms_norm_add_norm", "linear"]
