"""The operations of one step over activations of T rows, before anything is known of kernels or memory.

An architecture calls the methods of :class:`Graph` in the order of its equations. Operands are weights (named
as the file names them), values (rows of float32 that live within the step) and state (what outlives it: the KV
cache, the logits).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod
from typing import Any, TypeAlias

from ..config import Experts, ModelConfig, Ssm
from ..errors import UnsupportedModelError
from .ops import KV_CACHES, LOGITS, RECURRENT, Op, Route, State, Value, Weight

MAX_EXPERT_BYTES = 2**32 - 1  # of one expert: kernels step from one to the next by a 32-bit number

LookUp: TypeAlias = Callable[[str], Weight | None]


class Graph:
    """Collects operations. ``weight`` finds a weight by its name in the file, or None."""

    def __init__(self, cfg: ModelConfig, weight: LookUp) -> None:
        self.cfg = cfg
        self.ops: list[Op] = []
        self._weight = weight

    # ---- operands ---------------------------------------------------------------------------------------

    def has(self, name: str, n_dims: int | None = None) -> bool:
        """Whether the file has this tensor (with so many dimensions)."""
        weight = self._weight(name)
        return weight is not None and n_dims in (None, len(weight.shape))

    def weight(self, name: str, *shape: int) -> Weight:
        """The weight ``name``, which must have this shape. Raises UnsupportedModelError."""
        weight = self._weight(name)
        if weight is None:
            raise UnsupportedModelError(f"tensor {name} is missing; a {self.cfg.arch} model needs it")
        if weight.shape != shape:
            raise UnsupportedModelError(f"tensor {name} has shape {weight.shape}; the metadata asks for {shape}")
        if not weight.type.supported:
            raise UnsupportedModelError(f"tensor {name} is {weight.type.name}, a type with no kernel here")
        return weight

    def rows(self, name: str, n: int, k: int) -> Weight:
        """The first ``n`` rows of the matrix ``name``, which may have more."""
        weight = self._weight(name)
        n_rows = max(n, prod(weight.shape[:-1])) if weight else n
        return replace(self.weight(name, n_rows, k), shape=(n, k))

    def vector(self, name: str, n: int) -> Weight:
        """A float32 weight of one dimension: norms and biases."""
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
        """Rows of the table ``name`` for the step's tokens, times the model's scale of them."""
        table = self.rows(name, self.cfg.n_vocab, self.cfg.n_embd)
        return self._emit("embed", "embd", self.cfg.n_embd, table=table, scale=self.cfg.embedding_scale)

    def rms_norm(self, x: Value, name: str) -> Value:
        """x / sqrt(mean(x²) + eps) · weight, by row."""
        weight = self.vector(f"{name}.weight", x.width)
        return self._emit("rms_norm", name, x.width, x.last, x=x, weight=weight, eps=self.cfg.norm_eps)

    def linear(self, x: Value, name: str, n_out: int, bias: bool | None = False) -> Value:
        """x Wᵀ for the weight ``name`` [n_out, width of x], plus its bias [n_out]: None for where the file has one."""
        bias = self.has(f"{name}.bias") if bias is None else bias
        # A weight of one row is stored as a vector.
        shape = (x.width,) if n_out == 1 and self.has(f"{name}.weight", 1) else (n_out, x.width)
        weight = self.weight(f"{name}.weight", *shape)
        out = self._emit("linear", f"{name}.out", n_out, x.last, weight=weight, x=x)
        return self.add(self.vector(f"{name}.bias", n_out), out) if bias else out

    def swiglu(self, gate: Value, up: Value) -> Value:
        """silu(gate) · up."""
        return self._emit("swiglu", f"{gate.name}.swiglu", gate.width, gate.last, gate=gate, up=up)

    def geglu(self, gate: Value, up: Value) -> Value:
        """gelu(gate) · up, with the tanh form of gelu."""
        return self._emit("geglu", f"{gate.name}.geglu", gate.width, gate.last, gate=gate, up=up)

    def add(self, a: Value | Weight, b: Value) -> Value:
        """a + b; a weight [width] is added to every row."""
        summand = {"bias": a} if isinstance(a, Weight) else {"a": a}
        return self._emit("add", f"{b.name}.sum", b.width, b.last, b=b, **summand)

    def last_row(self, x: Value) -> Value:
        """The last row of the step."""
        return self._emit("take_last_row", f"{x.name}.last", x.width, True, x=x)

    def rope_kv(
        self, layer: int, q: Value, k: Value, v: Value, rope: str, qk_norm: bool = False, freqs: str = "rope_freqs"
    ) -> Value:
        """Rotated q; rotated k and v go to the cache of ``layer``. ``rope`` is "norm" (pairs) or "neox" (halves).

        q may hold [q | gate] for each head: the gates stay where they are.
        """
        cfg, prefix = self.cfg, f"blk.{layer}"
        table = self.vector(freqs, cfg.n_rot // 2)
        norms = {}
        if qk_norm:
            norms = {name: self.vector(f"{prefix}.attn_{name}.weight", cfg.head_dim) for name in ("q_norm", "k_norm")}
        operands = {"q": q, "k": k, "v": v, "freqs": table, **norms, **self.kv(layer)}
        return self._emit("rope_kv", f"{prefix}.q_rope", cfg.n_head * cfg.head_dim, rope=rope, **operands)

    def attention(self, layer: int, q: Value, window: int = 0, gate: Value | None = None) -> Value:
        """Causal softmax attention of q over the cache of ``layer``, over the last ``window`` positions if not 0.

        ``gate`` holds [q | gate] for each head: the head's result times sigmoid(gate).
        """
        operands = {"q": q, "gate": gate, **self.kv(layer)}
        scale = self.cfg.attention_scale
        return self._emit("attention", f"blk.{layer}.kqv", q.width, **operands, scale=scale, window=window)

    def route(self, layer: int, logits: Value, shared: Value | None) -> Route:
        """The experts that each row takes, by softmax over ``logits``, and their weights, which sum to 1.

        ``shared`` is the logit of the shared expert: its weight is its sigmoid.
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
        """x Wᵀ for each of a row's experts e, with W = ``name``[e] [n_out, n_in]: [T, n_used · n_out].

        x is [T, n_in], which all experts of a row share, or [T, n_used · n_in].
        """
        experts = self._experts
        weight = self.weight(f"{name}.weight", experts.n, n_out, n_in)
        nbytes = n_out * weight.row_bytes
        if nbytes > MAX_EXPERT_BYTES:
            problem = f"experts of {nbytes} bytes; kernels take up to {MAX_EXPERT_BYTES}"
            raise UnsupportedModelError(f"tensor {name}.weight has {problem}")
        return self._emit("experts", f"{name}.out", experts.n_used * n_out, **route._asdict(), weight=weight, x=x)

    def mix(self, residual: Value, route: Route, y: Value) -> Value:
        """residual + Σ weight · y over a row's experts; y is [T, n_used · n]."""
        operands = {"weights": route.weights, "y": y, "residual": residual}
        return self._emit("mix", f"{y.name}.mix", residual.width, **operands)

    def add_shared(self, residual: Value, route: Route, y: Value) -> Value:
        """residual + y, times the weight of the shared expert."""
        operands = {"weights": route.weights, "y": y, "residual": residual}
        return self._emit("add_shared", f"{y.name}.sum", residual.width, **operands)

    def ssm(self, layer: int, qkv: Value, z: Value, alpha: Value, beta: Value) -> Value:
        """Causal convolution, gated delta rule and gated norm of a recurrent layer; advances its state."""
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
        """The output projection, into the state "logits"; a tied model uses the embedding table."""
        name = "output" if self.has("output.weight") else "token_embd"
        weight = self.rows(f"{name}.weight", self.cfg.n_vocab, x.width)
        self.ops.append(Op("linear", weight=weight, x=x, out=LOGITS))

    def argmax(self) -> None:
        """The id of the largest logit of the last row, into the step buffer, which then holds the step that follows."""
        self.ops.append(Op("argmax"))

    def candidates(self) -> None:
        """What sampling needs of the logits of the last row, into the state "candidates"."""
        self.ops.append(Op("candidates"))

    def kv(self, layer: int) -> dict[str, State]:
        """The key and value cache of a layer, by kind."""
        return {kind: State(kind, layer) for kind in KV_CACHES}

    def _emit(self, kind: str, name: str, width: int, last: bool = False, /, **given: Any) -> Value:
        """Append an operation whose result is a new value."""
        out = Value(name, width, last)
        self.ops.append(Op(kind, out=out, **given))
        return out
