"""Operations of one step over activations of T rows. No kernel and no memory is known yet.

A family's ``build`` calls the methods of :class:`Graph` in the order of its equations. Operands are weights
(with their names in the file), values and states. Values are rows of float32 that live within the step. States are
memory that outlives the step, such as the K/V cache and the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod
from typing import Any, TypeAlias

from ..config import Experts, ModelConfig, Ssm
from ..errors import UnsupportedModelError
from .ops import KV_CACHES, LOGITS, RECURRENT, Op, Route, State, Value, Weight

LookUp: TypeAlias = Callable[[str], Weight | None]


class Graph:
    """Collects operations in ``ops``. ``weight`` finds a weight by its name in the file, or gives None."""

    def __init__(self, cfg: ModelConfig, weight: LookUp) -> None:
        self.cfg = cfg
        self.ops: list[Op] = []
        self._weight = weight

    # ---- operands ---------------------------------------------------------------------------------------

    def has(self, name: str, n_dims: int | None = None) -> bool:
        """Return True if the file has this tensor (with ``n_dims`` dimensions)."""
        weight = self._weight(name)
        return weight is not None and n_dims in (None, len(weight.shape))

    def weight(self, name: str, *shape: int) -> Weight:
        """Return the weight ``name``. Raises UnsupportedModelError if it is missing or has another shape."""
        weight = self._weight(name)
        if weight is None:
            raise UnsupportedModelError(f"tensor {name} is missing; a {self.cfg.arch} model needs it")
        if weight.shape != shape:
            raise UnsupportedModelError(f"tensor {name} has shape {weight.shape}; the metadata asks for {shape}")
        if not weight.type.supported:
            raise UnsupportedModelError(f"tensor {name} is {weight.type.name}, a type with no kernel here")
        return weight

    def rows(self, name: str, n: int, k: int) -> Weight:
        """Return the first ``n`` rows of the matrix ``name``, which may have more."""
        weight = self._weight(name)
        n_rows = max(n, prod(weight.shape[:-1])) if weight else n
        return replace(self.weight(name, n_rows, k), shape=(n, k))

    def vector(self, name: str, n: int) -> Weight:
        """Return a float32 weight of one dimension: norms and biases."""
        return self._f32(name, n)

    def _f32(self, name: str, *shape: int) -> Weight:
        weight = self.weight(name, *shape)
        if weight.type.name != "f32":
            raise UnsupportedModelError(
                f"tensor {name} is {weight.type.name}; zincmetal needs it to be f32, f16 or bf16"
            )
        return weight

    @property
    def _experts(self) -> Experts:
        assert self.cfg.experts, f"the traits of {self.cfg.arch} do not say that it is a mixture"
        return self.cfg.experts

    @property
    def _ssm(self) -> Ssm:
        assert self.cfg.ssm, f"the traits of {self.cfg.arch} do not say that it is a hybrid"
        return self.cfg.ssm

    # ---- operations ---------------------------------------------------------------------------------------

    def embed(self, name: str) -> Value:
        """Look up the rows of table ``name`` for the step's tokens, times the model's embedding scale: [T, n_embd]."""
        table = self.rows(name, self.cfg.n_vocab, self.cfg.n_embd)
        return self._emit("embed", "embd", self.cfg.n_embd, table=table, scale=self.cfg.embedding_scale)

    def rms_norm(self, x: Value, name: str) -> Value:
        """Compute x / sqrt(mean(x²) + eps) · weight, for each row: [T, width of x]."""
        weight = self.vector(f"{name}.weight", x.width)
        return self._emit("rms_norm", name, x.width, x.last, x=x, weight=weight, eps=self.cfg.norm_eps)

    def linear(self, x: Value, name: str, n_out: int, bias: bool | None = False) -> Value:
        """Compute x Wᵀ with W = ``name`` [n_out, width of x]: [T, n_out].

        ``bias``: add the bias [n_out] of that name. True: always. False: never. None: if the file has one.
        """
        bias = self.has(f"{name}.bias") if bias is None else bias
        # A weight of one row is stored as a vector.
        shape = (x.width,) if n_out == 1 and self.has(f"{name}.weight", 1) else (n_out, x.width)
        weight = self.weight(f"{name}.weight", *shape)
        out = self._emit("linear", f"{name}.out", n_out, x.last, weight=weight, x=x)
        return self.add(self.vector(f"{name}.bias", n_out), out) if bias else out

    def swiglu(self, gate: Value, up: Value) -> Value:
        """Compute silu(gate) · up: [T, width]."""
        return self._emit("swiglu", f"{gate.name}.swiglu", gate.width, gate.last, gate=gate, up=up)

    def geglu(self, gate: Value, up: Value) -> Value:
        """Compute gelu(gate) · up: [T, width]. This gelu is the tanh form."""
        return self._emit("geglu", f"{gate.name}.geglu", gate.width, gate.last, gate=gate, up=up)

    def add(self, a: Value | Weight, b: Value) -> Value:
        """Compute a + b: [T, width]. A weight a, [width], is added to every row."""
        summand = {"bias": a} if isinstance(a, Weight) else {"a": a}
        return self._emit("add", f"{b.name}.sum", b.width, b.last, b=b, **summand)

    def last_row(self, x: Value) -> Value:
        """Take the last row of the step: [1, width]."""
        return self._emit("take_last_row", f"{x.name}.last", x.width, True, x=x)

    def rope_kv(
        self, layer: int, q: Value, k: Value, v: Value, rope: str, qk_norm: bool = False, freqs: str = "rope_freqs"
    ) -> Value:
        """Rotate q: [T, n_head · head_dim]. Write rotated k, and v, to the caches of ``layer``.

        ``rope`` is "norm" (it turns pairs) or "neox" (halves). A head of q may hold [q | gate]: the gate is left out.
        """
        cfg, prefix = self.cfg, f"blk.{layer}"
        table = self.vector(freqs, cfg.n_rot // 2)
        norms = {}
        if qk_norm:
            norms = {name: self.vector(f"{prefix}.attn_{name}.weight", cfg.head_dim) for name in ("q_norm", "k_norm")}
        operands = {"q": q, "k": k, "v": v, "freqs": table, **norms, **self.kv(layer)}
        return self._emit("rope_kv", f"{prefix}.q_rope", cfg.n_head * cfg.head_dim, rope=rope, **operands)

    def attention(self, layer: int, q: Value, window: int = 0, gate: Value | None = None) -> Value:
        """Compute causal softmax attention of q over the cache of ``layer``: [T, n_head · head_dim].

        A ``window`` that is not 0 limits it to the last positions. ``gate`` holds [q | gate] for each head. The result
        of the head is multiplied by sigmoid(gate).
        """
        operands = {"q": q, "gate": gate, **self.kv(layer)}
        scale = self.cfg.attention_scale
        return self._emit("attention", f"blk.{layer}.kqv", q.width, **operands, scale=scale, window=window)

    def route(self, layer: int, logits: Value, shared: Value | None) -> Route:
        """Choose the experts of each row by softmax over ``logits`` [T, n_expert]. Their weights sum to the scale.

        ``shared`` [T, 1] is the logit of the shared expert, whose weight is its sigmoid.
        """
        experts, prefix = self._experts, f"blk.{layer}"
        chosen = Route(
            Value(f"{prefix}.expert_ids", experts.n_used),
            Value(f"{prefix}.expert_weights", experts.n_used + 1),
            Value(f"{prefix}.expert_slots", experts.n_used),
            Value(f"{prefix}.expert_tiles", 4 * experts.n_used),
            Value(f"{prefix}.expert_n_tiles", 1),
        )
        self.ops.append(Op("route", router=logits, shared=shared, **chosen._asdict(), scale=experts.scale))
        return chosen

    def experts(self, route: Route, x: Value, name: str, n_in: int, n_out: int) -> Value:
        """Compute x Wᵀ for each expert e of a row: [T, n_used · n_out]. W is ``name``[e], [n_out, n_in].

        x is [T, n_in], one row for all experts, or [T, n_used · n_in], one row for each.
        """
        experts = self._experts
        weight = self.weight(f"{name}.weight", experts.n, n_out, n_in)
        return self._emit("experts", f"{name}.out", experts.n_used * n_out, **route._asdict(), weight=weight, x=x)

    def mix(self, residual: Value, route: Route, y: Value) -> Value:
        """Compute residual + Σ weight · y over a row's experts: [T, n]. y is [T, n_used · n]."""
        operands = {"weights": route.weights, "y": y, "residual": residual}
        return self._emit("mix", f"{y.name}.mix", residual.width, **operands)

    def add_shared(self, residual: Value, route: Route, y: Value) -> Value:
        """Compute residual + weight of the shared expert · y: [T, n]."""
        operands = {"weights": route.weights, "y": y, "residual": residual}
        return self._emit("add_shared", f"{y.name}.sum", residual.width, **operands)

    def ssm(self, layer: int, qkv: Value, z: Value, alpha: Value, beta: Value) -> Value:
        """Compute a recurrent layer's convolution, delta rule and gated norm: [T, d_inner]. Advances its states."""
        ssm, prefix = self._ssm, f"blk.{layer}"
        weights = {
            "conv_w": self._f32(f"{prefix}.ssm_conv1d.weight", ssm.channels, ssm.d_conv),
            "a": self.vector(f"{prefix}.ssm_a", ssm.n_v_head),
            "dt_bias": self.vector(f"{prefix}.ssm_dt.bias", ssm.n_v_head),
            "norm_w": self.vector(f"{prefix}.ssm_norm.weight", ssm.d_state),
        }
        states = {kind: State(kind, layer) for kind in RECURRENT}
        values = {"qkv": qkv, "z": z, "alpha": alpha, "beta": beta}
        eps = self.cfg.norm_eps
        return self._emit("ssm", f"{prefix}.ssm", ssm.d_inner, **values, **weights, **states, eps=eps)

    def logits(self, x: Value) -> None:
        """Project x to the logits, into LOGITS. A tied model uses the embedding table."""
        name = "output" if self.has("output.weight") else "token_embd"
        weight = self.rows(f"{name}.weight", self.cfg.n_vocab, x.width)
        self.ops.append(Op("linear", weight=weight, x=x, out=LOGITS))

    def argmax(self) -> None:
        """Write the id of the last row's largest logit to STEP and TOKENS, which then hold the next step."""
        self.ops.append(Op("argmax"))

    def candidates(self) -> None:
        """Write the last row's largest logits, and sums over all, to CANDIDATES: enough for sampling."""
        self.ops.append(Op("candidates"))

    def kv(self, layer: int) -> dict[str, State]:
        """Return the key and value cache of a layer, by kind."""
        return {kind: State(kind, layer) for kind in KV_CACHES}

    def _emit(self, kind: str, name: str, width: int, last: bool = False, /, **given: Any) -> Value:
        """Append an operation whose result is a new value."""
        out = Value(name, width, last)
        self.ops.append(Op(kind, out=out, **given))
        return out
