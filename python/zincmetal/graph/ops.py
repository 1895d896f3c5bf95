"""Operations of a step. The table of all of them comes first.

All code finds an operand by its name in the table: ``Op("linear", weight=w, x=h, out=y)["weight"]``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .operands import (
    CANDIDATES,
    KV_CACHES,
    LOGITS,
    PAGES,
    RECURRENT,
    STEP,
    TOKENS,
    Operand,
    Route,
    State,
    Value,
    Weight,
)

__all__ = [
    "CANDIDATES",
    "KV_CACHES",
    "LOGITS",
    "OPS",
    "PAGES",
    "RECURRENT",
    "SIGNATURES",
    "STEP",
    "TOKENS",
    "Op",
    "Operand",
    "Route",
    "State",
    "Value",
    "Weight",
]


class Form(NamedTuple):
    """Kind of operation as text: its operands, the beginnings of its kernels' names, and its numbers."""

    reads: str
    writes: str
    kernels: str
    attrs: str = ""


_ROUTE = "ids[T,n_used] weights[T,n_used+1] slots[T,n_used] tiles[T,4*n_used] n_tiles[T,1]"
_CACHES, _HEADS = "k_cache v_cache", "n_head*head_dim"

#: By kind: the operands that an operation reads, the operands that it writes, and its kernels. Numbers have names too.
#:
#: ``name[shape]`` is a value if the shape begins with T (the rows of a step) or 1 (its last row). Otherwise it is a
#: weight. A name without a shape is the state of that kind. A state of the whole step need not be given. ``?`` marks
#: an operand that may be left out, ``*`` any number of operands. An add has one of ``a`` and ``bias``. A state may
#: stand in the place of a written value: the last linear writes LOGITS.
OPS: Mapping[str, Form] = {
    "embed": Form("step tokens table[n_vocab,n_embd]", "out[T,n_embd]", "embed_", attrs="scale"),
    "rms_norm": Form("step x[T,n] weight[n]", "out[T,n]", "rms_norm", attrs="eps"),
    "linear": Form("step weight[m,k] x[T,k]", "out[T,m]", "mul_mv_ mul_mm_"),  # mv: one row; mm: many
    "swiglu": Form("step gate[T,n] up[T,n]", "out[T,n]", "swiglu"),
    "geglu": Form("step gate[T,n] up[T,n]", "out[T,n]", "geglu"),
    "add": Form("step a?[T,n] bias?[n] b[T,n]", "out[T,n]", "add"),
    "take_last_row": Form("step x[T,n]", "out[1,n]", "take_last_row"),
    "rope_kv": Form(
        # q may hold [q | gate] for each head; then it is twice as wide
        f"step pages q[T,{_HEADS}] k[T,n_head_kv*head_dim] v[T,n_head_kv*head_dim] freqs[n_rot/2] "
        "q_norm?[head_dim] k_norm?[head_dim]",
        f"out[T,{_HEADS}] {_CACHES}",
        "rope_kv_",
        attrs="rope",
    ),
    "attention": Form(
        f"step pages q[T,{_HEADS}] {_CACHES} gate?[T,2*{_HEADS}]",
        f"out[T,{_HEADS}]",
        "attention_",
        attrs="scale window",
    ),
    "route": Form("step router[T,n_expert] shared?[T,1]", _ROUTE, "moe_topk_ moe_sort", attrs="scale"),
    "experts": Form(f"{_ROUTE} weight[n_expert,m,k] x[T,k]", "out[T,n_used*m]", "moe_mv_ moe_mm_ mul_mv_"),
    "mix": Form("step weights[T,n_used+1] y[T,n_used*n] residual[T,n]", "out[T,n]", "moe_mix"),
    "add_shared": Form("step weights[T,n_used+1] y[T,n] residual[T,n]", "out[T,n]", "moe_mix"),
    "ssm": Form(
        "step qkv[T,channels] z[T,d_inner] alpha[T,n_v_head] beta[T,n_v_head] "
        "conv_w[channels,d_conv] a[n_v_head] dt_bias[n_v_head] norm_w[d_state]",
        "out[T,d_inner] ssm_conv ssm_state",
        "ssm_",
        attrs="eps",
    ),
    "argmax": Form("logits", "step tokens", "argmax_"),
    "candidates": Form("logits", "candidates", "candidates_"),
    # Fused operations, which graph/fuse.py makes. A stack is of one row, and so is experts_mix.
    "linear_add": Form("step weight[m,k] x[T,k] residual?[T,m] bias?[m]", "out[T,m]", "mul_mv_add_ mul_mm_add_"),
    "linear_mix": Form(
        "step weight[m,k] x[T,k] residual[T,m] weights[T,n_used+1]", "out[T,m]", "mul_mv_mix_ mul_mm_mix_"
    ),
    "linear_swiglu": Form("step gate[m,k] up[m,k] x[T,k]", "out[T,m]", "mul_mv_swiglu_ mul_mm_swiglu_"),
    "linear_geglu": Form("step gate[m,k] up[m,k] x[T,k]", "out[T,m]", "mul_mv_geglu_ mul_mm_geglu_"),
    "linear_stack": Form("step x[1,k] matrices*[m,k] gate?[m,k] up?[m,k]", "outs*[1,m] glu?[1,m]", "mul_mv_stack_"),
    "rms_norm_add": Form("step x[T,n] weight[n] residual[T,n]", "sum[T,n]", "rms_norm_add", attrs="eps"),
    "rms_norm_add_norm": Form(
        "step x[T,n] weight[n] residual[T,n] next_weight[n]", "sum[T,n] out[T,n]", "rms_norm_add_norm", attrs="eps"
    ),
    "experts_swiglu": Form(
        f"{_ROUTE} gate[n_expert,m,k] up[n_expert,m,k] x[T,k]", "out[T,n_used*m]", "moe_mv_swiglu_ moe_mm_swiglu_"
    ),
    "experts_mix": Form(
        f"{_ROUTE} weight[n_expert,m,k] x[1,n_used*k] residual[1,m] shared_weight?[m,k_shared] shared_x?[1,k_shared]",
        "out[1,m]",
        "moe_mv_mix",
    ),
}


# ---- reading the table --------------------------------------------------------------------------------------------


class Slot(NamedTuple):
    """Place of an operand in an operation. A name without a shape is the kind of the state that stands there."""

    name: str
    shape: str
    types: tuple[type, ...]
    optional: bool
    many: bool
    default: State | None

    def __str__(self) -> str:
        kinds = " or ".join(t.__name__.lower() for t in self.types)
        return f"{self.name}, a {kinds}" + (f" {self.shape}" if self.shape else "")


_OF_A_STEP = {state.kind: state for state in (STEP, TOKENS, PAGES, LOGITS, CANDIDATES)}


def _slots(text: str, written: bool) -> tuple[Slot, ...]:
    found = []
    for part in text.split():
        match = re.fullmatch(r"(\w+)([?*]?)(\[\S+\])?", part)
        assert match, part
        name, mark, shape = match[1], match[2], match[3] or ""
        of_rows = shape.startswith(("[T", "[1"))
        types: tuple[type, ...] = (Value,) if of_rows else (Weight,) if shape else (State,)
        if written and of_rows:
            types = (Value, State)
        found.append(Slot(name, shape, types, mark != "", mark == "*", None if mark else _OF_A_STEP.get(name)))
    return tuple(found)


class Signature:
    """Form, parsed: its slots, kernels and numbers."""

    def __init__(self, form: Form) -> None:
        self.reads, self.writes = _slots(form.reads, written=False), _slots(form.writes, written=True)
        self.slots = (*self.reads, *self.writes)
        self.many = frozenset(slot.name for slot in self.slots if slot.many)
        self.attrs = dict.fromkeys(form.attrs.split())
        self.kernels = tuple(form.kernels.split())


SIGNATURES = {kind: Signature(form) for kind, form in OPS.items()}


# ---- operations -----------------------------------------------------------------------------------------------------


class Op:
    """One operation: its kind, its operands and numbers by the names of the table, and ``parts``.

    ``parts`` are the operations that a fused operation replaces, in order. Together they have its result. Raises
    TypeError if an operand is missing or wrong by the table.
    """

    __slots__ = ("_named", "attrs", "kind", "parts", "reads", "writes")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, kind: str, parts: Sequence[Op] = (), /, **given: Any) -> None:
        signature = SIGNATURES.get(kind)
        if signature is None:
            raise TypeError(f"no operation is called {kind!r}")
        self.kind, self.parts = kind, tuple(parts)
        self._named: dict[str, tuple[Operand, ...]] = {}
        self.reads, self.writes = self._take(signature.reads, given), self._take(signature.writes, given)
        if given.keys() != signature.attrs.keys():
            missing, unknown = signature.attrs.keys() - given, given.keys() - signature.attrs
            raise TypeError(f"{kind} " + (f"needs {min(missing)}" if missing else f"takes no {min(unknown)}"))
        self.attrs: Mapping[str, Any] = given

    def _take(self, slots: tuple[Slot, ...], given: dict[str, Any]) -> tuple[Operand, ...]:
        """Move the operands of these slots out of ``given``."""
        taken: list[Operand] = []
        for slot in slots:
            name, shape, types, optional, many, default = slot
            operand = given.pop(name, default)
            if operand is None and optional:
                continue
            operands = tuple(operand) if many else (operand,)
            for each in operands:
                if type(each) not in types or not (shape or each.kind == name):
                    raise TypeError(f"{self.kind} takes {slot}, not {each!r}")
            self._named[name] = operands
            taken += operands
        return tuple(taken)

    def __getitem__(self, name: str) -> Operand:
        """Return the operand of this name. Raises KeyError if it was left out."""
        return self._named[name][0]

    def get(self, name: str) -> Operand | None:
        """Return the operand of this name, or None if it was left out."""
        return self._named[name][0] if name in self._named else None

    def all(self, name: str) -> tuple[Operand, ...]:
        """Return all operands of this name: several for a ``*``, none if it was left out."""
        return self._named.get(name, ())

    def value(self, name: str) -> Value:
        """Return the operand of this name, a value."""
        found = self._named[name][0]
        assert isinstance(found, Value), found
        return found

    def weight(self, name: str) -> Weight:
        """Return the operand of this name, a weight."""
        found = self._named[name][0]
        assert isinstance(found, Weight), found
        return found

    @property
    def weights(self) -> tuple[Weight, ...]:
        """Weights among ``reads``, in order."""
        return tuple(o for o in self.reads if isinstance(o, Weight))

    @property
    def out(self) -> Operand:
        """First result, often the only one."""
        return self.writes[0]

    def but(self, *names: str) -> dict[str, Any]:
        """Return the operands and numbers, except these names, as arguments of another operation."""
        many = SIGNATURES[self.kind].many
        operands = {name: found if name in many else found[0] for name, found in self._named.items()}
        return {name: given for name, given in {**operands, **self.attrs}.items() if name not in names}

    def replace(self, **operands: Operand) -> Op:
        """Return the same operation with other operands of these names."""
        return Op(self.kind, self.parts, **{**self.but(), **operands})

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Op):
            return NotImplemented
        return (self.kind, self._named, self.attrs) == (other.kind, other._named, other.attrs)

    def __repr__(self) -> str:
        named = (f"{name}={', '.join(o.name for o in found)}" for name, found in self._named.items())
        return f"Op({self.kind}: {'; '.join([*named, *(f'{n}={v}' for n, v in self.attrs.items())])})"
