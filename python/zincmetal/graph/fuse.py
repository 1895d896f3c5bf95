"""Rewrites of a step's operations that save dispatches: each pass takes a list of operations and returns one.

A fused operation keeps the operations that it stands for as ``parts``, for devices that have no kernel for it.

A recurrent layer of the 35B-A3B model in decode (one row), 22 operations before and 6 dispatches after:

    before                                             after
    rms_norm, linear qkv, z, alpha, beta               linear_stack of a norm
    ssm                                                ssm
    linear ssm_out, add                                linear_add
    rms_norm, linear router, shared logit, shared gate
      and up, swiglu                                   linear_stack of a norm
    route, experts gate, experts up, swiglu            route_experts_gated of the same norm
    linear shared down, add_shared, experts down, mix  experts_mix
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

from .ops import Op, Operand, Value, Weight

GLUS = ("swiglu", "geglu", "swiglu_clamped")
LINEAR_GLUS = GLUS[:2]  # that a product of two matrices can end with
FIRST_PRODUCTS = ("experts", "experts_gated", "experts_relu2")  # that may choose their experts
#: Kinds that can begin with a norm of their x.
_LINEAR = ("linear", "linear_add", "linear_swiglu", "linear_geglu", "linear_stack")
NORMED = (*_LINEAR, *FIRST_PRODUCTS, *(f"route_{kind}" for kind in FIRST_PRODUCTS))


class Limits(NamedTuple):
    """Sizes and types that fused kernels take."""

    stack: int  # matrices of one linear_stack
    stack_rows: int  # rows of a step whose products of one x are stacked
    expert_types: frozenset[str]  # quant types of many experts at once
    norms: bool = True  # products of one row compute the norm that they read
    choice: bool = True  # the first product of one row with its experts chooses them


class Fused(NamedTuple):
    """Fused operation, and the operations that it makes superfluous."""

    kind: str
    operands: dict[str, Any]
    superfluous: list[Op]


Producer: TypeAlias = Callable[[Operand | None], Op | None]


def fuse(ops: list[Op], rows: int, limits: Limits) -> list[Op]:
    """Run all passes for steps of up to ``rows`` rows, in order."""
    ops = fuse_residual(fuse_relu2(fuse_glu(ops, limits), limits))
    ops = fuse_norms(fuse_bias_and_residual(ops) if rows == 1 else ops)
    if rows == 1:
        ops = fuse_shared(fuse_mix(ops, limits))
        ops = fuse_route(ops, limits) if limits.choice else ops
    ops = fuse_stack(ops, limits) if rows <= limits.stack_rows else ops
    return fuse_inputs(ops) if rows == 1 and limits.norms else ops


def fuse_glu(ops: list[Op], limits: Limits) -> list[Op]:
    """Fuse linear(gate), linear(up), swiglu -> linear_swiglu, if both weights have one type and shape.

    Also fuse geglu in this way. Products of experts and any gate become experts_gated.
    """

    def rewrite(op: Op, producer: Producer) -> Fused | None:
        gate, up = producer(op["gate"]), producer(op["up"])
        if gate is None or up is None or not _same_but_weight(gate, up):
            return None
        operands = {**gate.but("weight", "bias"), "gate": gate["weight"], "up": up["weight"], "out": op.out}
        if gate.kind == "linear":
            return Fused(f"linear_{op.kind}", operands, [gate, up]) if op.kind in LINEAR_GLUS else None
        if not _batched(gate, limits) or (gate.get("bias") is None) != (up.get("bias") is None):
            return None
        operands |= {"gate_bias": gate.get("bias"), "up_bias": up.get("bias"), "glu": op.kind}
        return Fused("experts_gated", operands, [gate, up])

    return _rewrite(ops, GLUS, rewrite)


def fuse_relu2(ops: list[Op], limits: Limits) -> list[Op]:
    """Fuse relu2(experts(x)) -> experts_relu2."""

    def rewrite(op: Op, producer: Producer) -> Fused | None:
        experts = producer(op["x"])
        if experts is None or experts.kind != "experts" or not _batched(experts, limits):
            return None
        return Fused("experts_relu2", {**experts.but(), "out": op.out}, [experts])

    return _rewrite(ops, ("relu2",), rewrite)


def fuse_residual(ops: list[Op]) -> list[Op]:
    """Fuse add(residual or bias, linear(x)) -> linear_add, and add_shared(residual, linear(x)) -> linear_mix."""

    def rewrite(op: Op, producer: Producer) -> Fused | None:
        linear = producer(op["b"] if op.kind == "add" else op["y"])
        if linear is None or linear.kind != "linear":
            return None
        operands = {**linear.but(), "out": op.out}
        if op.kind == "add":
            return Fused("linear_add", {**operands, "residual": op.get("a"), "bias": op.get("bias")}, [linear])
        del operands["eps"]  # it has no norm
        return Fused("linear_mix", {**operands, "residual": op["residual"], "weights": op["weights"]}, [linear])

    return _rewrite(ops, ("add", "add_shared"), rewrite)


def fuse_bias_and_residual(ops: list[Op]) -> list[Op]:
    """Fuse add(residual, linear_add(bias, x)) -> linear_add of both, which one row's products take."""

    def rewrite(op: Op, producer: Producer) -> Fused | None:
        biased = producer(op["b"]) if op.get("a") else None
        if biased is None or biased.kind != "linear_add" or biased.get("residual"):
            return None
        return Fused("linear_add", {**biased.but(), "residual": op["a"], "out": op.out}, [biased])

    return _rewrite(ops, ("add",), rewrite)


def fuse_norms(ops: list[Op]) -> list[Op]:
    """Fuse add(residual, rms_norm(x)) -> rms_norm_add, or rms_norm_add_norm if rms_norm of the sum follows.

    A factor of the sum goes with it.
    """

    def add(op: Op, producer: Producer) -> Fused | None:
        residual = op.get("a")
        norm = producer(op["b"]) if residual else None
        if norm is None or norm.kind != "rms_norm":
            return None
        return Fused("rms_norm_add", {**norm.but("out"), "residual": residual, "sum": op.out}, [norm])

    def scale(op: Op, producer: Producer) -> Fused | None:
        added = producer(op["x"])
        if added is None or added.kind != "rms_norm_add":
            return None
        return Fused("rms_norm_add", {**added.but("sum"), "factor": op["factor"], "sum": op.out}, [added])

    out: list[Op] = []
    for op in _rewrite(_rewrite(ops, ("add",), add), ("scale",), scale):
        before = out[-1] if out else op
        if before.kind == "rms_norm_add" and op.kind == "rms_norm" and _is_plain_norm_of(op, before):
            operands = {**before.but(), "next_weight": op["weight"], "next_eps": op.attrs["eps"], "out": op.out}
            out[-1] = Op("rms_norm_add_norm", (before, op), **operands)
        else:
            out.append(op)
    return out


def _is_plain_norm_of(norm: Op, before: Op) -> bool:
    """Return True if a norm is of the sum of ``before``, with a weight and without a factor."""
    plain = norm.get("weight") is not None and norm.attrs["scale"] == 1
    return plain and norm["x"] == before["sum"] and norm.attrs["groups"] == before.attrs["groups"] == 1


def fuse_mix(ops: list[Op], limits: Limits) -> list[Op]:
    """Fuse mix(residual, experts(x)) -> experts_mix, which one row's experts compute in one dispatch."""

    def rewrite(op: Op, producer: Producer) -> Fused | None:
        experts = producer(op["y"])
        if experts is None or experts.kind != "experts" or not _batched(experts, limits):
            return None
        return Fused("experts_mix", {**experts.but("eps"), "residual": op.get("residual"), "out": op.out}, [experts])

    return _rewrite(ops, ("mix",), rewrite)


def fuse_shared(ops: list[Op]) -> list[Op]:
    """Fuse experts_mix(linear_mix(residual, shared expert), …) -> experts_mix of all, if a kernel has both types."""

    def rewrite(op: Op, producer: Producer) -> Fused | None:
        shared = producer(op.get("residual"))
        if shared is None or shared.kind != "linear_mix":
            return None
        routed, own = op.weight("weight").type, shared.weight("weight").type
        if routed != own and (own.name != "q8_0" or routed.block_size == 1):
            return None
        of_shared = {"shared_weight": shared["weight"], "shared_x": shared["x"], "residual": shared["residual"]}
        return Fused("experts_mix", {**op.but(), **of_shared}, [shared])

    return _rewrite(ops, ("experts_mix",), rewrite)


def fuse_route(ops: list[Op], limits: Limits) -> list[Op]:
    """Fuse route, experts(x) -> route_experts, which chooses one row's experts for its first product with them.

    Experts with a gate or an activation do so too. The fused operation takes the place of the first one that reads the
    choice, such as the sum with a shared expert.
    """
    for route in [op for op in ops if op.kind == "route"]:
        chosen = set(route.writes)
        readers = [i for i, op in enumerate(ops) if not chosen.isdisjoint(op.reads)]
        first = next((i for i in readers if ops[i].kind in FIRST_PRODUCTS), None)
        if first is None or not _chooses(ops[first], ops[readers[0] : first], limits):
            continue
        product = ops[first]
        fused = Op(f"route_{product.kind}", (route, product), **{**route.but("step"), **product.but()})
        rest = [op for op in ops[readers[0] :] if op is not product]
        ops = [*(op for op in ops[: readers[0]] if op is not route), fused, *rest]
    return ops


def _chooses(product: Op, before: list[Op], limits: Limits) -> bool:
    """Return True if a product can come before these operations, and its kernel can choose the experts."""
    weight = product.weight("gate" if product.get("gate") else "weight")
    early = all(product["x"] not in op.writes for op in before)
    return early and product.value("x").width == weight.shape[-1] and weight.type.name in limits.expert_types


def fuse_stack(ops: list[Op], limits: Limits) -> list[Op]:
    """Fuse products of one x -> linear_stack, for matrices of one type and of f32; another type makes another stack.

    A linear_swiglu counts as two matrices. The stack takes the place of the first product: all read only this x.
    """
    stacks: dict[int, Op] = {}
    gone: set[int] = set()
    for group in _by_input(ops):
        while len(group) > 1:
            members = _stackable(group, limits.stack)
            group = [op for op in group if not any(op is member for member in members)]
            if len(members) > 1:
                stacks[id(members[0])] = _stack(members)
                gone |= {id(op) for op in members[1:]}
    return [stacks.get(id(op), op) for op in ops if id(op) not in gone]


def _by_input(ops: list[Op]) -> Iterator[list[Op]]:
    """Yield the products of each x that a stack could take: those without a bias, and those that add only a bias."""
    groups: dict[tuple[Operand, bool], list[Op]] = {}
    for op in ops:
        biased = op.kind == "linear_add" and op.get("residual") is None
        if (biased or op.kind in ("linear", "linear_swiglu")) and isinstance(op.out, Value):
            groups.setdefault((op["x"], biased), []).append(op)
    yield from groups.values()


def _matrices(op: Op) -> list[Weight]:
    """Return the matrices of a product: one, or gate and up."""
    return [op.weight(name) for name in ("weight", "gate", "up") if op.get(name)]


def _stackable(group: list[Op], most: int) -> list[Op]:
    """Choose the members that fit one stack: the type with the most bytes beside f32, and at most one pair."""
    nbytes: Counter[str] = Counter()
    for w in (w for op in group for w in _matrices(op) if w.type.name != "f32"):
        nbytes[w.type.name] += w.type.nbytes(w.shape)
    types = {"f32", *(name for name, _ in nbytes.most_common(1))}
    fitting = [op for op in group if all(w.type.name in types for w in _matrices(op))]
    pairs = [op for op in fitting if op.kind == "linear_swiglu"][:1]
    plain = [op for op in fitting if op.kind != "linear_swiglu"][: most - 2 * len(pairs)]
    return [op for op in group if any(op is member for member in plain + pairs)]


def _stack(members: list[Op]) -> Op:
    plain = [op for op in members if op.kind != "linear_swiglu"]
    operands: dict[str, Any] = {"matrices": [op["weight"] for op in plain], "outs": [op.out for op in plain]}
    operands["biases"] = [op["bias"] for op in plain if op.get("bias")]
    for pair in (op for op in members if op.kind == "linear_swiglu"):
        operands |= {"gate": pair["gate"], "up": pair["up"], "glu": pair.out}
    return Op("linear_stack", members, x=members[0]["x"], **operands)


def fuse_inputs(ops: list[Op]) -> list[Op]:
    """Fold each rms_norm into the products of one row that read it, if nothing else does."""
    readers: dict[Operand, list[Op]] = {}
    for op in ops:
        for operand in op.reads:
            readers.setdefault(operand, []).append(op)
    norms = {op.out: op for op in ops if op.kind == "rms_norm" and _is_input(op, readers.get(op.out, []))}
    gone = {id(norm) for norm in norms.values()}
    return [of_norm(op, norms[op["x"]]) if op.get("x") in norms else op for op in ops if id(op) not in gone]


def _is_input(norm: Op, readers: list[Op]) -> bool:
    """Return True if the readers of a norm can compute it: products, which read it once, as their x."""
    plain = norm.get("weight") is not None and norm.attrs["scale"] == norm.attrs["groups"] == 1
    products = all(op.kind in NORMED and op["x"] == norm.out and op.reads.count(norm.out) == 1 for op in readers)
    return plain and bool(readers) and products and isinstance(norm.out, Value)


def of_norm(op: Op, norm: Op) -> Op:
    """Return the product of a norm as one operation on the norm's x. So are its parts."""
    parts = [of_norm(part, norm) if part.get("x") == norm.out else part for part in op.parts]
    return Op(op.kind, parts, **{**op.but(), "x": norm["x"], "norm": norm["weight"], "eps": norm.attrs["eps"]})


def _batched(op: Op, limits: Limits) -> bool:
    """Return True if kernels take this type of experts."""
    return op.weight("weight").type.name in limits.expert_types


def _same_but_weight(a: Op, b: Op) -> bool:
    """Return True if two products have the same x and weights of one type and shape."""
    if not (a.kind == b.kind in ("linear", "experts")):
        return False
    w_a, w_b = a.weight("weight"), b.weight("weight")
    return (w_a.type, w_a.shape, a["x"]) == (w_b.type, w_b.shape, b["x"])


def _rewrite(ops: list[Op], kinds: tuple[str, ...], rewrite: Callable[[Op, Producer], Fused | None]) -> list[Op]:
    """Replace each operation of these kinds for which ``rewrite(op, producer)`` gives a fused one.

    ``producer(value)`` is the operation that wrote a value which nothing else reads, or None. Superfluous operations
    are dropped.
    """
    if not any(op.kind in kinds for op in ops):
        return ops
    uses = Counter(v for op in ops for v in op.reads if isinstance(v, Value))
    wrote = {v: op for op in ops for v in op.writes if isinstance(v, Value)}

    def producer(v: Operand | None) -> Op | None:
        return wrote.get(v) if isinstance(v, Value) and uses[v] == 1 else None

    out, gone = [], set[int]()
    for op in ops:
        fused = rewrite(op, producer) if op.kind in kinds else None
        if fused is None:
            out.append(op)
            continue
        gone |= {id(s) for s in fused.superfluous}
        out.append(Op(fused.kind, (*fused.superfluous, op), **fused.operands))
    return [op for op in out if id(op) not in gone]
