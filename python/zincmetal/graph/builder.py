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
from .ops import CANDIDATES, KV_CACHES, LOGITS, PAGES, RECURRENT, STEP, TOKENS, Op, Operand, Route, State, Value, Weight

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
        assert self.cfg.experts, f"config.MIXTURES lacks {self.cfg.arch}"
        return self.cfg.experts

    @property
    def _ssm(self) -> Ssm:
        assert self.cfg.ssm, f"config.HYBRIDS lacks {self.cfg.arch}"
        return self.cfg.ssm

    # ---- operations ---------------------------------------------------------------------------------------

    def embed(self, name: str) -> Value:
        """Rows of the table ``name`` for the step's tokens, times the model's scale of them."""
        table = self.rows(name, self.cfg.n_vocab, self.cfg.n_embd)
        return self._emit("embed", (STEP, TOKENS, table), "embd", self.cfg.n_embd, scale=self.cfg.embedding_scale)

    def rms_norm(self, x: Value, name: str) -> Value:
        """x / sqrt(mean(x²) + eps) · weight, by row."""
        weight = self.vector(f"{name}.weight", x.width)
        return self._emit("rms_norm", (STEP, x, weight), name, x.width, last=x.last, eps=self.cfg.norm_eps)

    def linear(self, x: Value, name: str, n_out: int, bias: bool | None = False) -> Value:
        """x Wᵀ for the weight ``name`` [n_out, width of x], plus its bias [n_out]: None for where the file has one."""
        bias = self.has(f"{name}.bias") if bias is None else bias
        # A weight of one row is stored as a vector.
        shape = (x.width,) if n_out == 1 and self.has(f"{name}.weight", 1) else (n_out, x.width)
        weight = self.weight(f"{name}.weight", *shape)
        out = self._emit("linear", (STEP, weight, x), f"{name}.out", n_out, last=x.last)
        return self.add(self.vector(f"{name}.bias", n_out), out) if bias else out

    def swiglu(self, gate: Value, up: Value) -> Value:
        """silu(gate) · up."""
        return self._emit("swiglu", (STEP, gate, up), f"{gate.name}.swiglu", gate.width, last=gate.last)

    def geglu(self, gate: Value, up: Value) -> Value:
        """gelu(gate) · up, with the tanh form of gelu."""
        return self._emit("geglu", (STEP, gate, up), f"{gate.name}.geglu", gate.width, last=gate.last)

    def add(self, a: Value | Weight, b: Value) -> Value:
        """a + b; a weight [width] is added to every row."""
        return self._emit("add", (STEP, a, b), f"{b.name}.sum", b.width, last=b.last)

    def last_row(self, x: Value) -> Value:
        """The last row of the step."""
        return self._emit("take_last_row", (STEP, x), f"{x.name}.last", x.width, last=True)

    def rope_kv(
        self, layer: int, q: Value, k: Value, v: Value, rope: str, qk_norm: bool = False, freqs: str = "rope_freqs"
    ) -> Value:
        """Rotated q; rotated k and v go to the cache of ``layer``. ``rope`` is "norm" (pairs) or "neox" (halves).

        q may hold [q | gate] for each head: the gates stay where they are.
        """
        cfg, prefix = self.cfg, f"blk.{layer}"
        table = self.vector(freqs, cfg.n_rot // 2)
        norms = (table, table)  # never read without qk_norm
        if qk_norm:
            norms = (
                self.vector(f"{prefix}.attn_q_norm.weight", cfg.head_dim),
                self.vector(f"{prefix}.attn_k_norm.weight", cfg.head_dim),
            )
        k_cache, v_cache = self.kv(layer)
        out = Value(f"{prefix}.q_rope", cfg.n_head * cfg.head_dim)
        reads = (STEP, PAGES, q, k, v, table, *norms)
        self.ops.append(Op("rope_kv", reads, (out, k_cache, v_cache), {"rope": rope, "qk_norm": qk_norm}))
        return out

    def attention(self, layer: int, q: Value, window: int = 0, gate: Value | None = None) -> Value:
        """Causal softmax attention of q over the cache of ``layer``, over the last ``window`` positions if not 0.

        ``gate`` holds [q | gate] for each head: the head's result times sigmoid(gate).
        """
        reads = (STEP, PAGES, q, *self.kv(layer), gate or q)  # a gate that is q is never read
        scale = self.cfg.attention_scale
        return self._emit("attention", reads, f"blk.{layer}.kqv", q.width, scale=scale, window=window)

    def route(self, layer: int, logits: Value, shared: Value | None) -> Route:
        """The experts that each row takes, by softmax over ``logits``, and their weights, which sum to 1.

        ``shared`` is the logit of the shared expert: its weight is its sigmoid.
        """
        experts, prefix = self._experts, f"blk.{layer}"
        chosen = Route(
            Value(f"{prefix}.expert_ids", experts.n_used),
            Value(f"{prefix}.expert_weights", experts.n_used + 1),
            # Where many rows meet many experts: what every row takes, by expert, and in tiles of one expert each.
            Value(f"{prefix}.expert_slots", experts.n_used),
            Value(f"{prefix}.expert_tiles", 4 * experts.n_used),
            Value(f"{prefix}.expert_n_tiles", 1),
        )
        reads = (STEP, logits, shared or logits)
        self.ops.append(Op("route", reads, tuple(chosen), {"has_shared": shared is not None, "scale": experts.scale}))
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
        return self._emit("experts", (*route, weight, x), f"{name}.out", experts.n_used * n_out)

    def mix(self, residual: Value, route: Route, y: Value) -> Value:
        """residual + Σ weight · y over a row's experts; y is [T, n_used · n]."""
        return self._emit("mix", (STEP, route.weights, y, residual), f"{y.name}.mix", residual.width)

    def add_shared(self, residual: Value, route: Route, y: Value) -> Value:
        """residual + y, times the weight of the shared expert."""
        return self._emit("add_shared", (STEP, route.weights, y, residual), f"{y.name}.sum", residual.width)

    def ssm(self, layer: int, qkv: Value, z: Value, alpha: Value, beta: Value) -> Value:
        """Causal convolution, gated delta rule and gated norm of a recurrent layer; advances its state."""
        ssm, prefix = self._ssm, f"blk.{layer}"
        weights = (
            self._f32(f"{prefix}.ssm_conv1d.weight", ssm.channels, ssm.d_conv),
            self.vector(f"{prefix}.ssm_a", ssm.n_v_head),
            self.vector(f"{prefix}.ssm_dt.bias", ssm.n_v_head),
            self.vector(f"{prefix}.ssm_norm.weight", ssm.d_state),
        )
        states = tuple(State(f"{kind}.{layer}") for kind in RECURRENT)
        out = Value(f"{prefix}.ssm", ssm.d_inner)
        self.ops.append(Op("ssm", (STEP, qkv, z, alpha, beta, *weights), (out, *states), {"eps": self.cfg.norm_eps}))
        return out

    def logits(self, x: Value) -> None:
        """The output projection, into the state "logits"; a tied model uses the embedding table."""
        name = "output" if self.has("output.weight") else "token_embd"
        weight = self.rows(f"{name}.weight", self.cfg.n_vocab, x.width)
        self.ops.append(Op("linear", (STEP, weight, x), (LOGITS,)))

    def argmax(self) -> None:
        """The id of the largest logit of the last row, into the step buffer, which then holds the step that follows."""
        self.ops.append(Op("argmax", (LOGITS,), (STEP, TOKENS)))

    def candidates(self) -> None:
        """What sampling needs of the logits of the last row, into the state "candidates"."""
        self.ops.append(Op("candidates", (LOGITS,), (CANDIDATES,)))

    def kv(self, layer: int) -> tuple[State, State]:
        """The key and value cache of a layer: [positions, n_head_kv, head_dim] each, in whole pages."""
        k_cache, v_cache = (State(f"{kind}.{layer}") for kind in KV_CACHES)
        return k_cache, v_cache

    def _emit(
        self, kind: str, reads: tuple[Operand, ...], name: str, width: int, last: bool = False, **attrs: Any
    ) -> Value:
        out = Value(name, width, last)
        self.ops.append(Op(kind, reads, (out,), attrs))
        return out
