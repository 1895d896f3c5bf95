"""Rewrites of a graph's operations that save dispatches: each pass takes a list of operations and returns one."""

from __future__ import annotations

from collections import Counter

from .graph import Op, Value, Weight


def fuse(ops: list[Op]) -> list[Op]:
    """All passes, in order."""
    return fuse_residual(fuse_swiglu(ops))


def fuse_swiglu(ops: list[Op]) -> list[Op]:
    """linear(gate), linear(up), swiglu -> one linear_swiglu, where both weights have one type and one input."""
    uses, producer = _uses(ops), _producers(ops)
    out, gone = [], set()
    for op in ops:
        if op.kind == "swiglu":
            gate, up = (producer.get(v) for v in op.reads[1:])
            if gate and up and _same_input(gate, up) and all(uses[p.out] == 1 for p in (gate, up)):
                gone |= {id(gate), id(up)}
                step, w_gate, x = gate.reads
                op = Op("linear_swiglu", (step, w_gate, up.reads[1], x), op.writes)
        out.append(op)
    return [op for op in out if id(op) not in gone]


def fuse_residual(ops: list[Op]) -> list[Op]:
    """add(residual, linear(x)) -> linear_add, where nothing else reads the product."""
    uses, producer = _uses(ops), _producers(ops)
    out, gone = [], set()
    for op in ops:
        if op.kind == "add":
            _, residual, product = op.reads
            linear = producer.get(product)
            if linear and linear.kind == "linear" and uses[product] == 1:
                gone.add(id(linear))
                op = Op("linear_add", (*linear.reads, residual), op.writes)
        out.append(op)
    return [op for op in out if id(op) not in gone]


def _same_input(a: Op, b: Op) -> bool:
    return a.kind == b.kind == "linear" and a.reads[2] == b.reads[2] and _form(a) == _form(b)


def _form(op: Op) -> object:
    weight = op.reads[1]
    return (weight.type, weight.shape) if isinstance(weight, Weight) else None


def _uses(ops: list[Op]) -> Counter[object]:
    return Counter(v for op in ops for v in op.reads if isinstance(v, Value))


def _producers(ops: list[Op]) -> dict[object, Op]:
    return {v: op for op in ops for v in op.writes if isinstance(v, Value)}
