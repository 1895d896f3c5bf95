"""Rewrites of a graph's operations that save dispatches: each pass takes a list of operations and returns one.

A fused operation keeps those that it stands for, ``parts``, for devices that have no kernel for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import TypeAlias

from .ops import Op, Operand, Value, Weight

UNBATCHED = frozenset({"f32", "bf16"})  # types of experts that no kernel takes many of at once
STACK = 4  # matrices that one stacked product takes


def fuse(ops: list[Op], rows: int) -> list[Op]:
    """All passes for steps of up to ``rows`` rows, in order."""
    ops = fuse_norms(fuse_residual(fuse_glu(ops)))
    return fuse_stack(fuse_shared(fuse_mix(ops))) if rows == 1 else ops


def fuse_glu(ops: list[Op]) -> list[Op]:
    """linear(gate), linear(up), swiglu -> one linear_swiglu, where both weights have one form.

    The same for geglu, and for experts.
    """

    def rewrite(op: Op, producer: Producer) -> tuple[Op, list[Op]] | None:
        if op.kind not in ("swiglu", "geglu"):
            return None
        gate, up = (producer(v) for v in op.reads[1:])
        if gate is None or up is None or not _same_but_weight(gate, up):
            return None
        if gate.kind == "experts" and (op.kind == "geglu" or _unbatched(gate)):
            return None
        *before, w_gate, x = gate.reads
        return Op(f"{gate.kind}_{op.kind}", (*before, w_gate, up.reads[-2], x), op.writes), [gate, up]

    return _rewrite(ops, rewrite)


def fuse_residual(ops: list[Op]) -> list[Op]:
    """add(residual, linear(x)) -> linear_add, and add_shared(…, linear(x)) -> linear_mix."""

    def rewrite(op: Op, producer: Producer) -> tuple[Op, list[Op]] | None:
        if op.kind not in ("add", "add_shared"):
            return None
        if op.kind == "add":
            _, residual, product = op.reads
            kind, extra = "linear_add", [residual]
        else:
            _, weights, product, residual = op.reads
            kind, extra = "linear_mix", [residual, weights]
        linear = producer(product)
        if linear is None or linear.kind != "linear":
            return None
        return Op(kind, (*linear.reads, *extra), op.writes), [linear]

    return _rewrite(ops, rewrite)


def fuse_norms(ops: list[Op]) -> list[Op]:
    """add(residual, rms_norm(x)) -> rms_norm_add, and with rms_norm of the sum right behind it rms_norm_add_norm."""

    def rewrite(op: Op, producer: Producer) -> tuple[Op, list[Op]] | None:
        norm = producer(op.reads[2]) if op.kind == "add" and isinstance(op.reads[1], Value) else None
        if norm is None or norm.kind != "rms_norm":
            return None
        return Op("rms_norm_add", (*norm.reads, op.reads[1]), op.writes, norm.attrs), [norm]

    out: list[Op] = []
    for op in _rewrite(ops, rewrite):
        before = out[-1] if out else op
        if before.kind == "rms_norm_add" and op.kind == "rms_norm" and op.reads[1] == before.out:
            reads, writes = (*before.reads, op.reads[2]), (before.out, op.out)
            out[-1] = Op("rms_norm_add_norm", reads, writes, op.attrs, (before, op))
        else:
            out.append(op)
    return out


def fuse_mix(ops: list[Op]) -> list[Op]:
    """mix(residual, experts(x)) -> experts_mix, which one row's experts compute in one dispatch."""

    def rewrite(op: Op, producer: Producer) -> tuple[Op, list[Op]] | None:
        if op.kind != "mix":
            return None
        _, _, product, residual = op.reads
        experts = producer(product)
        if experts is None or experts.kind != "experts" or _unbatched(experts):
            return None
        return Op("experts_mix", (*experts.reads, residual), op.writes), [experts]

    return _rewrite(ops, rewrite)


def fuse_shared(ops: list[Op]) -> list[Op]:
    """experts_mix(linear_mix(residual, shared expert), …) -> one experts_mix of all, where a kernel has both types."""

    def rewrite(op: Op, producer: Producer) -> tuple[Op, list[Op]] | None:
        if op.kind != "experts_mix":
            return None
        *before, residual = op.reads
        shared = producer(residual)
        if shared is None or shared.kind != "linear_mix":
            return None
        _, w_shared, x_shared, residual, _ = shared.reads
        types = {w.type.name for w in (*_weights(op), *_weights(shared))}
        if len(types) > 1 and (_weights(shared)[0].type.name != "q8_0" or "f16" in types):
            return None
        return Op("experts_mix", (*before, residual, w_shared, x_shared), op.writes), [shared]

    return _rewrite(ops, rewrite)


def fuse_stack(ops: list[Op]) -> list[Op]:
    """Products with the same activations -> one linear_stack of up to STACK matrices, of one type and of f32.

    A linear_swiglu counts as two of them. The stack stands where the first stood: all need the same x alone.
    """
    stacks: dict[int, Op] = {}
    gone: set[int] = set()
    for group in _by_input(ops):
        members = _stackable(group)
        if len(members) > 1:
            stacks[id(members[0])] = _stack(members)
            gone |= {id(op) for op in members[1:]}
    return [stacks.get(id(op), op) for op in ops if id(op) not in gone]


def _by_input(ops: list[Op]) -> Iterator[list[Op]]:
    groups: dict[Operand, list[Op]] = {}
    for op in ops:
        if op.kind in ("linear", "linear_swiglu") and isinstance(op.out, Value):
            groups.setdefault(op.reads[-1], []).append(op)
    yield from groups.values()


def _stackable(group: list[Op]) -> list[Op]:
    """The members that fit one stack: the type with the most bytes beside f32, at most one pair, STACK matrices."""
    nbytes: Counter[str] = Counter()
    for w in (w for op in group for w in _weights(op) if w.type.name != "f32"):
        nbytes[w.type.name] += w.type.nbytes(w.shape)
    types = {"f32", *(name for name, _ in nbytes.most_common(1))}
    fitting = [op for op in group if all(w.type.name in types for w in _weights(op))]
    pairs = [op for op in fitting if op.kind == "linear_swiglu"][:1]
    plain = [op for op in fitting if op.kind == "linear"][: STACK - 2 * len(pairs)]
    return [op for op in group if any(op is member for member in plain + pairs)]


def _stack(members: list[Op]) -> Op:
    ordered = sorted(members, key=lambda op: op.kind == "linear_swiglu")  # the pair comes last
    step, x = members[0].reads[0], members[0].reads[-1]
    weights = tuple(w for op in ordered for w in _weights(op))
    return Op("linear_stack", (step, x, *weights), tuple(op.out for op in ordered), parts=tuple(members))


def _unbatched(op: Op) -> bool:
    return any(w.type.name in UNBATCHED for w in _weights(op))


def _weights(op: Op) -> list[Weight]:
    return [v for v in op.reads if isinstance(v, Weight)]


def _same_but_weight(a: Op, b: Op) -> bool:
    """Whether two products differ in nothing but the values of their weights."""
    w_a, w_b = a.reads[-2], b.reads[-2]
    if not (isinstance(w_a, Weight) and isinstance(w_b, Weight) and a.kind == b.kind in ("linear", "experts")):
        return False
    return (w_a.type, w_a.shape, a.reads[-1]) == (w_b.type, w_b.shape, b.reads[-1])


Producer: TypeAlias = Callable[[Operand], Op | None]


def _rewrite(ops: list[Op], rewrite: Callable[[Op, Producer], tuple[Op, list[Op]] | None]) -> list[Op]:
    """Replace operations by what ``rewrite(op, producer)`` gives: the new one, and those that it makes superfluous.

    ``producer(value)`` is the operation that wrote a value which nothing else reads, or None.
    """
    uses = Counter(v for op in ops for v in op.reads if isinstance(v, Value))
    wrote = {v: op for op in ops for v in op.writes if isinstance(v, Value)}

    def producer(v: Operand) -> Op | None:
        return wrote.get(v) if isinstance(v, Value) and uses[v] == 1 else None

    out, gone = [], set[int]()
    for op in ops:
        result = rewrite(op, producer)
        if result is not None:
            fused, superfluous = result
            gone |= {id(s) for s in superfluous}
            op = Op(fused.kind, fused.reads, fused.writes, fused.attrs, (*superfluous, op))
        out.append(op)
    return [op for op in out if id(op) not in gone]
