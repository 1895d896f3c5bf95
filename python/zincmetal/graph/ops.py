"""Operations of a step. The table of all of them comes first.

All code finds an operand by its name in the table: ``Op("linear", weight=w, x=h, out=y)["weight"]``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .operands import (
    ACCEPTED,
    BIASES,
    CHOSEN,
    DRAWS,
    HIDDEN,
    HISTORY,
    KEPT,
    KV_CACHES,
    LOGITS,
    LOGPROBS,
    MASKS,
    NEXT,
    NEXT_DRAWS,
    NEXT_OUTS,
    NEXT_PAGES,
    NEXT_ROWS,
    NEXT_STEP,
    OUT_ROWS,
    PAGED,
    PAGES,
    RECURRENT,
    RESULTS,
    ROWS,
    STEP,
    TOKENS,
    Operand,
    Route,
    State,
    Value,
    Weight,
    caches_of,
)

__all__ = [
    "ACCEPTED",
    "BIASES",
    "CHOSEN",
    "DRAWS",
    "HIDDEN",
    "HISTORY",
    "KEPT",
    "KV_CACHES",
    "LOGITS",
    "LOGPROBS",
    "MASKS",
    "NEXT",
    "NEXT_DRAWS",
    "NEXT_OUTS",
    "NEXT_PAGES",
    "NEXT_ROWS",
    "NEXT_STEP",
    "OPS",
    "OUT_ROWS",
    "PAGED",
    "PAGES",
    "RECURRENT",
    "RESULTS",
    "ROWS",
    "SIGNATURES",
    "STEP",
    "TOKENS",
    "Op",
    "Operand",
    "Route",
    "State",
    "Value",
    "Weight",
    "caches_of",
]


class Form(NamedTuple):
    """Kind of operation as text: its operands, the beginnings of its kernels' names, and its numbers.

    A number that is usually left out has its usual value behind it: ``scale=1``.
    """

    reads: str
    writes: str
    kernels: str
    attrs: str = ""


_ROUTE = "ids[T,n_used] weights[T,n_used+1] slots[T,n_used] tiles[T,4*n_used] n_tiles[T,1]"
_ROUTER = "router[T,n_expert] shared?[T,1] router_bias?[n_expert] router_scales?[n_expert]"
_ROUTER_ATTRS = "score normalised n_group n_group_used whole_shared scale"
_EXPERTS = "weight[n_expert,m,k] x[T,k] bias?[n_expert,m] norm?[k]"
_GATED_EXPERTS = "gate[n_expert,m,k] up[n_expert,m,k] x[T,k] gate_bias?[n_expert,m] up_bias?[n_expert,m] norm?[k]"
_CACHES, _HEADS = "k_cache v_cache", "n_head*head_dim"

#: By kind: the operands that an operation reads, the operands that it writes, and its kernels. Numbers have names too.
#:
#: ``name[shape]`` is a value if the shape begins with T (the rows of a step, or of a value of outputs its outputs), O
#: (its outputs) or 1 (a step of one row). Otherwise it is a weight, of one number if the shape is ``unit``. A name
#: without a shape is the state of that kind. A state of the whole step need not be given. ``?`` marks an operand that
#: may be left out, ``*`` any number of operands.
#: An add has one of ``a`` and ``bias``. A state may stand in the place of a written value: the last linear writes
#: LOGITS.
OPS: Mapping[str, Form] = {
    "begin": Form(
        "next_step next_rows next_outs next_pages next_draws chosen accepted",
        "step rows tokens out_rows pages draws history",
        "begin_step",
    ),
    "embed": Form("step tokens table[n_vocab,n_embd]", "out[T,n_embd]", "embed_", attrs="scale"),
    # Norms of a row, or of ``groups`` vectors of a row. The normalised vector is multiplied by ``scale``.
    "rms_norm": Form("step x[T,n] weight?[n]", "out[T,n]", "rms_norm", attrs="eps scale=1 groups=1"),
    # Products that take a ``norm`` apply it to x, which is one row then: W rms_norm(x), with ``eps``.
    "linear": Form(
        "step weight[m,k] x[T,k] norm?[k]", "out[T,m]", "mul_mv_ mul_few_ mul_mm_", attrs="eps=0"
    ),  # one row, few, many
    "linear_heads": Form("step weight[n_head,m,k] x[T,n_head*k]", "out[T,n_head*m]", "mul_heads_mv_ mul_heads_mm_"),
    "swiglu": Form("step gate[T,n] up[T,n]", "out[T,n]", "swiglu"),
    "geglu": Form("step gate[T,n] up[T,n]", "out[T,n]", "geglu"),
    "swiglu_clamped": Form("step gate[T,n] up[T,n]", "out[T,n]", "swiglu_clamped"),
    "relu2": Form("step x[T,n]", "out[T,n]", "relu2"),
    "geglu_slice": Form(
        "step gate[T,n] up[T,m]", "out[T,n]", "geglu_slice", attrs="first"
    ),  # up from column `first` on
    "scale": Form("step x[T,n] factor[unit]", "out[T,n]", "scale"),
    "add": Form("step a?[T,n] bias?[n] b[T,n]", "out[T,n]", "add"),
    "take_rows": Form("step out_rows x[T,n]", "out[O,n]", "take_rows"),
    "rope_kv": Form(
        # q may hold [q | gate] for each head; then it is twice as wide
        f"step rows pages q[T,{_HEADS}] k[T,n_head_kv*head_dim] v[T,n_head_kv*head_dim] freqs[n_rot/2] "
        "q_norm?[head_dim] k_norm?[head_dim]",
        f"out[T,{_HEADS}] {_CACHES}",
        "rope_kv_",
        attrs="rope layer v_norm=0",
    ),
    "rope": Form(
        f"step rows q[T,{_HEADS}] freqs[n_rot/2] q_norm?[head_dim]", f"out[T,{_HEADS}]", "rope_kv_", attrs="rope layer"
    ),
    "store_kv": Form(  # the part of rope_kv that writes the caches
        "step rows pages k[T,n_head_kv*head_dim] v[T,n_head_kv*head_dim] freqs[n_rot/2] k_norm?[head_dim]",
        _CACHES,
        "rope_kv_",
        attrs="rope layer v_norm=0",
    ),
    "attention": Form(
        # the last head_dim of a stride gate
        f"step rows pages q[T,{_HEADS}] {_CACHES} gate?[T,n_head*gate_stride] sinks?[n_head]",
        f"out[T,{_HEADS}]",
        "attention_",
        attrs="scale window layer",
    ),
    "rope_latent": Form(
        "step rows pages q[T,n_head*n_key] kv[T,n_latent+n_rot] norm[n_latent] freqs[n_rot/2]",
        "still[T,n_head*n_still] rot[T,n_head*n_rot] k_cache",
        "rope_latent_",
        attrs="layer",
    ),
    "attention_latent": Form(
        "step rows pages q[T,n_head*n_latent] q_rot[T,n_head*n_rot] k_cache",
        "out[T,n_head*n_latent]",
        "attention_latent_ attention_merge",
        attrs="scale layer",
    ),
    "route": Form(
        f"step {_ROUTER}",
        _ROUTE,
        "moe_topk moe_sort moe_route",
        attrs=_ROUTER_ATTRS,
    ),
    "experts": Form(f"{_ROUTE} {_EXPERTS}", "out[T,n_used*m]", "moe_mv_ moe_few_ moe_mm_ mul_mv_", attrs="eps=0"),
    "mix": Form("step weights[T,n_used+1] y[T,n_used*n] residual?[T,n]", "out[T,n]", "moe_mix"),
    "add_shared": Form("step weights[T,n_used+1] y[T,n] residual[T,n]", "out[T,n]", "moe_mix"),
    "ssm": Form(
        "step rows qkv[T,channels] z[T,d_inner] alpha[T,n_v_head] beta[T,n_v_head] "
        "conv_w[channels,d_conv] a[n_v_head] dt_bias[n_v_head] norm_w[d_state]",
        "out[T,d_inner] ssm_conv ssm_state",
        "ssm_",
        attrs="repeat eps",
    ),
    # x: for each k head its q and k, and v and z of its v heads
    "ssm_ungroup": Form("step x[T,n]", "qkv[T,channels] z[T,d_inner]", "ssm_ungroup"),
    "mamba2": Form(
        # inputs: [z | x | B | C | dt]; x, B and C are the channels
        "step rows inputs[T,d_in] conv_w[channels,d_conv] conv_b[channels] a[n_head,1] d[n_head,1] dt_bias[n_head] "
        "norm_w[n_group,d_inner/n_group]",
        "out[T,d_inner] ssm_conv ssm_state",
        "mamba2_",
        attrs="eps",
    ),
    "short_conv": Form("step rows bcx[T,3*n] conv_w[n,taps]", "out[T,n] short_conv", "short_conv"),
    "keep_rows": Form("step rows pages x[T,n]", "kept", "keep_rows_"),
    "pair_rows": Form("step rows pages kept x[T,n]", "out[T,2*n]", "pair_rows_"),
    "cap_logits": Form("step", "logits", "cap_logits", attrs="scale cap"),  # in place
    "argmax": Form("step logits", "chosen results", "argmax_"),
    "draw": Form("step logits draws pages history biases masks", "chosen results logprobs", "draw_"),
    "accept": Form("step rows tokens out_rows chosen", "accepted results", "accept_drafts"),
    # Fused operations, which graph/fuse.py makes. A stack is of one row, and so is experts_mix. Of a stack's matrices
    # all have a bias, or none has.
    "linear_add": Form(
        "step weight[m,k] x[T,k] residual?[T,m] bias?[m] norm?[k]",
        "out[T,m]",
        "mul_mv_add_ mul_few_ mul_mm_add_",
        attrs="eps=0",
    ),
    "linear_mix": Form(
        "step weight[m,k] x[T,k] residual[T,m] weights[T,n_used+1]", "out[T,m]", "mul_mv_mix_ mul_few_ mul_mm_mix_"
    ),
    "linear_swiglu": Form(
        "step gate[m,k] up[m,k] x[T,k] norm?[k]",
        "out[T,m]",
        "mul_mv_swiglu_ mul_few_gated_ mul_mm_swiglu_",
        attrs="eps=0",
    ),
    "linear_geglu": Form(
        "step gate[m,k] up[m,k] x[T,k] norm?[k]",
        "out[T,m]",
        "mul_mv_geglu_ mul_few_gated_ mul_mm_geglu_",
        attrs="eps=0",
    ),
    "linear_stack": Form(
        "step x[T,k] matrices*[m,k] gate?[m,k] up?[m,k] biases*[m] norm?[k]",
        "outs*[T,m] glu?[T,m]",
        "mul_mv_stack_ mul_few_stack_",
        attrs="eps=0",
    ),
    "rms_norm_add": Form(
        "step x[T,n] weight?[n] residual[T,n] factor?[unit]", "sum[T,n]", "rms_norm_add", attrs="eps scale=1 groups=1"
    ),
    "rms_norm_add_norm": Form(
        "step x[T,n] weight?[n] residual[T,n] next_weight[n] factor?[unit]",
        "sum[T,n] out[T,n]",
        "rms_norm_add_norm",
        attrs="eps next_eps scale=1 groups=1",
    ),
    "experts_gated": Form(  # glu: the kind of the gate, such as swiglu
        f"{_ROUTE} {_GATED_EXPERTS}",
        "out[T,n_used*m]",
        "moe_mv_gated_ moe_few_gated_ moe_mm_gated_",
        attrs="glu eps=0",
    ),
    "experts_relu2": Form(f"{_ROUTE} {_EXPERTS}", "out[T,n_used*m]", "moe_mv_ moe_few_ moe_mm_", attrs="eps=0"),
    # The choice of experts, and the first product with them, of one row.
    "route_experts": Form(
        f"{_ROUTER} {_EXPERTS}", f"out[T,n_used*m] {_ROUTE}", "moe_mv_", attrs=f"{_ROUTER_ATTRS} eps=0"
    ),
    "route_experts_relu2": Form(
        f"{_ROUTER} {_EXPERTS}", f"out[T,n_used*m] {_ROUTE}", "moe_mv_", attrs=f"{_ROUTER_ATTRS} eps=0"
    ),
    "route_experts_gated": Form(
        f"{_ROUTER} {_GATED_EXPERTS}", f"out[T,n_used*m] {_ROUTE}", "moe_mv_gated_", attrs=f"{_ROUTER_ATTRS} glu eps=0"
    ),
    "experts_mix": Form(
        f"{_ROUTE} weight[n_expert,m,k] x[1,n_used*k] residual?[1,m] bias?[n_expert,m] "
        "shared_weight?[m,k_shared] shared_x?[1,k_shared]",
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


_OF_A_STEP = {
    state.kind: state
    for state in (
        *(STEP, ROWS, TOKENS, OUT_ROWS, PAGES, HISTORY, *NEXT),
        *(LOGITS, HIDDEN, KEPT, CHOSEN, ACCEPTED, RESULTS, DRAWS, LOGPROBS, BIASES, MASKS),
    )
}


def _slots(text: str, written: bool) -> tuple[Slot, ...]:
    found = []
    for word in text.split():
        match = re.fullmatch(r"(\w+)([?*]?)(\[\S+\])?", word)
        assert match, word
        name, mark, shape = match[1], match[2], match[3] or ""
        of_rows = shape.startswith(("[T", "[O", "[1"))
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
        numbers = (text.partition("=") for text in form.attrs.split())
        self.attrs = {name: float(usual) if usual else None for name, _, usual in numbers}
        self.usual = {name: usual for name, usual in self.attrs.items() if usual is not None}
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
        given = {**signature.usual, **given}
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
    def layer(self) -> int:
        """Number of the layer whose sizes an operation has."""
        return int(self.attrs["layer"])

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
