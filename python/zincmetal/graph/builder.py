"""Operations of one step over activations of T rows. No kernel and no memory is known yet.

A family's ``build`` calls the methods of :class:`Graph` in the order of its equations. Operands are weights
(with their names in the file), values and states. Values are rows of float32 that live within the step. States are
memory that outlives the step, such as the K/V cache and the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from math import prod
from typing import Any, NamedTuple, TypeAlias

from ..config import Experts, Mamba2, ModelConfig, ShortConv, Ssm
from ..errors import UnsupportedModelError
from .ops import HIDDEN, LOGITS, Op, Route, State, Value, Weight, caches_of

LookUp: TypeAlias = Callable[[str], Weight | None]


class Rows(NamedTuple):
    """Rows from ``first`` on of a matrix that has ``n``."""

    first: int
    n: int


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
            raise self._lacks(name)
        if weight.shape != shape:
            raise UnsupportedModelError(f"tensor {name} has shape {weight.shape}; the metadata asks for {shape}")
        if not weight.type.supported:
            raise UnsupportedModelError(f"tensor {name} is {weight.type.name}, a type with no kernel here")
        return weight

    def require(self, *names: str) -> None:
        """Raise UnsupportedModelError for a tensor that is missing, of those that other families may lack."""
        for name in names:
            if not self.has(name):
                raise self._lacks(name)

    def _lacks(self, name: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"tensor {name} is missing; a {self.cfg.arch} model needs it")

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
        assert isinstance(self.cfg.recurrence, Ssm), f"{self.cfg.arch} has no gated-DeltaNet layers"
        return self.cfg.recurrence

    # ---- operations ---------------------------------------------------------------------------------------

    def embed(self, name: str, into: str = "") -> Value:
        """Look up the rows of table ``name`` for the step's tokens, times the model's embedding scale: [T, n_embd]."""
        return self.table_rows(name, self.cfg.n_embd, self.cfg.embedding_scale / self.cfg.residual_scale, into)

    def table_rows(self, name: str, width: int, scale: float, into: str = "") -> Value:
        """Look up the rows of table ``name`` for the step's tokens, times ``scale``: [T, width]. ``into``: its name."""
        table = self.rows(name, self.cfg.n_vocab, width)
        into = into or name.replace("token_", "").removesuffix(".weight")
        return self._emit("embed", into, width, table=table, scale=scale)

    def rms_norm(
        self, x: Value, name: str | None, *, eps: float | None = None, scale: float = 1.0, groups: int = 1
    ) -> Value:
        """Compute x / sqrt(mean(x²) + eps) · scale · weight, for each row: [T, width of x].

        ``name`` is the weight's, without ".weight" if it ends so; None: there is no weight. Each of ``groups`` equal
        parts of a row has a norm of its own, with one weight for all. ``eps`` is the residual stream's unless given.
        """
        given = {"x": x, "eps": self.cfg.residual_eps if eps is None else eps, "scale": scale, "groups": groups}
        if name is None:
            return self._emit("rms_norm", f"{x.name}.norm", x.width, x.outs, **given)
        weight = self.vector(name if name.endswith(".scale") else f"{name}.weight", x.width // groups)
        return self._emit("rms_norm", f"{name}.norm" if groups > 1 else name, x.width, x.outs, weight=weight, **given)

    def linear(self, x: Value, name: str, n_out: int, bias: bool | None = False, part: Rows | None = None) -> Value:
        """Compute x Wᵀ with W = ``name`` [n_out, width of x]: [T, n_out].

        ``bias``: add the bias [n_out] of that name. True: always. False: never. None: if the file has one. ``part``: W
        and its bias are these rows of ``name``, which has more.
        """
        bias = self.has(f"{name}.bias") if bias is None else bias
        if part:
            weight = replace(self.weight(f"{name}.weight", part.n, x.width), shape=(n_out, x.width), first=part.first)
            out = self._emit("linear", f"{name}.{part.first}.out", n_out, x.outs, weight=weight, x=x)
            if not bias:
                return out
            return self.add(replace(self.vector(f"{name}.bias", part.n), shape=(n_out,), first=part.first), out)
        # A weight of one row is stored as a vector.
        shape = (x.width,) if n_out == 1 and self.has(f"{name}.weight", 1) else (n_out, x.width)
        weight = self.weight(f"{name}.weight", *shape)
        out = self._emit("linear", f"{name}.out", n_out, x.outs, weight=weight, x=x)
        if weight.type.name == "nvfp4" and self.has(f"{name}.scale"):  # of the whole matrix
            if bias:  # a bias is added by the product itself, or not at all
                raise UnsupportedModelError(f"tensor {name}.scale: zincmetal scales no product that has a bias")
            return self._scaled(out, f"{name}.scale")
        return self.add(self.vector(f"{name}.bias", n_out), out) if bias else out

    def swiglu(self, gate: Value, up: Value) -> Value:
        """Compute silu(gate) · up: [T, width]."""
        return self._emit("swiglu", f"{gate.name}.swiglu", gate.width, gate.outs, gate=gate, up=up)

    def geglu(self, gate: Value, up: Value) -> Value:
        """Compute gelu(gate) · up: [T, width]. This gelu is the tanh form."""
        return self._emit("geglu", f"{gate.name}.geglu", gate.width, gate.outs, gate=gate, up=up)

    def swiglu_clamped(self, gate: Value, up: Value) -> Value:
        """Compute g · sigmoid(1.702 g) · (u + 1): [T, width]. g is gate up to 7, u is up within ±7 (gpt-oss)."""
        return self._emit("swiglu_clamped", f"{gate.name}.swiglu", gate.width, gate.outs, gate=gate, up=up)

    def relu2(self, x: Value) -> Value:
        """Compute max(x, 0)²: [T, width]."""
        return self._emit("relu2", f"{x.name}.relu2", x.width, x.outs, x=x)

    def geglu_slice(self, gate: Value, up: Value, first: int) -> Value:
        """Compute gelu(gate) · the columns of ``up`` from ``first`` on: [T, width of gate]. gelu is the tanh form."""
        return self._emit("geglu_slice", f"{gate.name}.geglu", gate.width, gate.outs, gate=gate, up=up, first=first)

    def scale(self, x: Value, name: str) -> Value:
        """Compute x · the one number of the weight ``name``: [T, width of x]."""
        return self._scaled(x, f"{name}.weight")

    def _scaled(self, x: Value, factor: str) -> Value:
        return self._emit("scale", f"{x.name}.scaled", x.width, x.outs, x=x, factor=self.vector(factor, 1))

    def add(self, a: Value | Weight, b: Value) -> Value:
        """Compute a + b: [T, width]. A weight a, [width], is added to every row."""
        summand = {"bias": a} if isinstance(a, Weight) else {"a": a}
        return self._emit("add", f"{b.name}.sum", b.width, b.outs, b=b, **summand)

    def begin(self) -> None:
        """Read the description of the step: the first operation of every plan."""
        self.ops.append(Op("begin"))

    def out_rows(self, x: Value) -> Value:
        """Take the rows whose logits are wanted: [O, width]."""
        return self._emit("take_rows", f"{x.name}.outs", x.width, True, x=x)

    def rope_kv(
        self, layer: int, q: Value, k: Value, v: Value, rope: str, qk_norm: bool = False, v_norm: bool = False
    ) -> Value:
        """Rotate q: [T, n_head · head_dim]. Write rotated k, and v, to the caches of ``layer``.

        ``rope`` is "norm" (it turns pairs) or "neox" (halves). A head of q may hold [q | gate]: the gate is left out.
        ``qk_norm``: heads of q and k have a norm before. ``v_norm``: heads of v have one, without a weight.
        """
        norms = self._head_norms(layer, "q_norm", "k_norm") if qk_norm else {}
        operands = {"k": k, "v": v, **norms, **self.kv(layer)}
        return self._rope("rope_kv", layer, q, rope, v_norm=float(v_norm), **operands)

    def rope(self, layer: int, q: Value, rope: str, q_norm: bool = False) -> Value:
        """Rotate q as ``rope_kv`` does, of a layer that has no k and v of its own: [T, n_head · head_dim]."""
        return self._rope("rope", layer, q, rope, **(self._head_norms(layer, "q_norm") if q_norm else {}))

    def _rope(self, kind: str, layer: int, q: Value, rope: str, **given: Any) -> Value:
        sizes = self.cfg.layers[layer]
        table, width = self.vector(self.cfg.rope_table(layer), sizes.n_rot // 2), sizes.n_head * sizes.head_dim
        return self._emit(kind, f"blk.{layer}.q_rope", width, q=q, freqs=table, rope=rope, layer=layer, **given)

    def _head_norms(self, layer: int, *names: str) -> dict[str, Weight]:
        head_dim = self.cfg.layers[layer].head_dim
        return {name: self.vector(f"blk.{layer}.attn_{name}.weight", head_dim) for name in names}

    def attention(self, layer: int, q: Value, gate: Value | None = None) -> Value:
        """Compute causal softmax attention of q over the cache of ``layer``, within its window: [T, n_head · head_dim].

        ``gate`` holds a gate for each head, or [q | gate]. The result of the head is multiplied by sigmoid(gate).
        If the file has sinks, each head's softmax has one more score, without a value.
        """
        n_head, sinks = self.cfg.layers[layer].n_head, f"blk.{layer}.attn_sinks.weight"
        sink = self.vector(sinks, n_head) if self.has(sinks) else None
        operands = {"q": q, "gate": gate, "sinks": sink, **self.kv(layer)}
        scale, window = self.cfg.attention_scale, self.cfg.layers[layer].window
        name = f"blk.{layer}.kqv"
        return self._emit("attention", name, q.width, **operands, scale=scale, window=window, layer=layer)

    def linear_heads(self, x: Value, name: str, n_head: int, n_out: int) -> Value:
        """Compute x Wᵀ for each head h: [T, n_head · n_out]. W is ``name``[h], [n_out, width of x / n_head]."""
        weight = self.weight(f"{name}.weight", n_head, n_out, x.width // n_head)
        return self._emit("linear_heads", f"{name}.out", n_head * n_out, weight=weight, x=x)

    def rope_latent(self, layer: int, q: Value, kv: Value) -> tuple[Value, Value]:
        """Divide the heads of q into the dimensions that stay and those that rotate, and rotate these.

        kv is [T, n_latent + n_rot]: writes the norm of the latent vector and the rotated key to the cache of ``layer``.
        """
        sizes, prefix = self.cfg.layers[layer], f"blk.{layer}"
        assert sizes.latent, f"the attention of layer {layer} is not latent"
        still = Value(f"{prefix}.q_still", sizes.n_head * sizes.latent.n_still)
        rot = Value(f"{prefix}.q_rot", sizes.n_head * sizes.n_rot)
        weights = {
            "norm": self.vector(f"{prefix}.attn_kv_a_norm.weight", sizes.latent.n_latent),
            "freqs": self.vector(self.cfg.rope_table(layer), sizes.n_rot // 2),
        }
        self.ops.append(Op("rope_latent", q=q, kv=kv, **weights, still=still, rot=rot, **self.kv(layer), layer=layer))
        return still, rot

    def attention_latent(self, layer: int, q: Value, q_rot: Value) -> Value:
        """Compute causal softmax attention over the latent cache of ``layer``: [T, n_head · n_latent].

        A head's query is [q | q_rot]. A row of the cache is the key of all heads, and its latent vector the value.
        """
        scale, name = self.cfg.attention_scale, f"blk.{layer}.kqv"
        operands = {"q": q, "q_rot": q_rot, **self.kv(layer)}
        return self._emit("attention_latent", name, q.width, **operands, scale=scale, layer=layer)

    def route(self, layer: int, logits: Value, shared: Value | None = None) -> Route:
        """Choose the experts of each row by the scores of ``logits`` [T, n_expert], as the configuration says.

        The file's ``exp_probs_b.bias`` is added to the scores for the choice alone. Its ``ffn_down_exps.scale`` are
        factors of the chosen experts' weights. ``shared`` [T, 1] is the logit of the shared expert, whose weight is
        its sigmoid; without it a shared expert has the weight 1.
        """
        experts, prefix = self._experts, f"blk.{layer}"
        chosen = Route(
            Value(f"{prefix}.expert_ids", experts.n_used),
            Value(f"{prefix}.expert_weights", experts.n_used + 1),
            Value(f"{prefix}.expert_slots", experts.n_used),
            Value(f"{prefix}.expert_tiles", 4 * experts.n_used),
            Value(f"{prefix}.expert_n_tiles", 1),
        )
        bias, scales = (
            self.vector(name, experts.n) if self.has(name) else None
            for name in (f"{prefix}.exp_probs_b.bias", f"{prefix}.ffn_down_exps.scale")
        )
        operands = {"router": logits, "shared": shared, "router_bias": bias, "router_scales": scales}
        whole = shared is None and experts.n_ff_shared > 0
        self.ops.append(Op("route", **operands, **chosen._asdict(), **asdict(experts.router), whole_shared=whole))
        return chosen

    def experts(self, route: Route, x: Value, name: str, n_in: int, n_out: int, part: Rows | None = None) -> Value:
        """Compute x Wᵀ + b for each expert e of a row: [T, n_used · n_out]. W is ``name``[e], [n_out, n_in].

        x is [T, n_in], one row for all experts, or [T, n_used · n_in], one row for each. b [n_out] counts if the file
        has it. ``part``: W is these rows of a larger matrix, which has no bias.
        """
        n, n_used = self._experts.n, self._experts.n_used
        bias = None
        if part:
            whole = self.weight(f"{name}.weight", n, part.n, n_in)
            weight = replace(whole, shape=(n, n_out, n_in), first=part.first, of=part.n)
        else:
            weight = self.weight(f"{name}.weight", n, n_out, n_in)
            bias = self._f32(f"{name}.bias", n, n_out) if self.has(f"{name}.bias") else None
        operands = {**route._asdict(), "weight": weight, "x": x, "bias": bias}
        out = f"{name}.{part.first}.out" if part else f"{name}.out"
        return self._emit("experts", out, n_used * n_out, **operands)

    def mix(self, residual: Value | None, route: Route, y: Value) -> Value:
        """Compute residual + Σ weight · y over a row's experts, or the sum alone: [T, n]. y is [T, n_used · n]."""
        operands = {"weights": route.weights, "y": y, "residual": residual}
        return self._emit("mix", f"{y.name}.mix", y.width // route.ids.width, **operands)

    def add_shared(self, residual: Value, route: Route, y: Value) -> Value:
        """Compute residual + weight of the shared expert · y: [T, n]."""
        operands = {"weights": route.weights, "y": y, "residual": residual}
        return self._emit("add_shared", f"{y.name}.sum", residual.width, **operands)

    def ssm(self, layer: int, qkv: Value, z: Value, alpha: Value, beta: Value, repeat: int = 1) -> Value:
        """Compute a recurrent layer's convolution, delta rule and gated norm: [T, d_inner]. Advances its states.

        ``repeat`` v heads that lie side by side have one k head; then the next k head follows, and after the last one
        the first. ``alpha`` and ``beta`` may be one value, with ``repeat`` betas and then ``repeat`` alphas in turn.
        """
        ssm, prefix = self._ssm, f"blk.{layer}"
        weights = {
            "conv_w": self._f32(f"{prefix}.ssm_conv1d.weight", ssm.channels, ssm.d_conv),
            "a": self.vector(f"{prefix}.ssm_a", ssm.n_v_head),
            "dt_bias": self.vector(f"{prefix}.ssm_dt.bias", ssm.n_v_head),
            "norm_w": self.vector(f"{prefix}.ssm_norm.weight", ssm.d_state),
        }
        states = {kind: State(kind, layer) for kind in ssm.slot_floats}
        values = {"qkv": qkv, "z": z, "alpha": alpha, "beta": beta}
        attrs = {"repeat": repeat, "eps": self.cfg.norm_eps}
        return self._emit("ssm", f"{prefix}.ssm", ssm.d_inner, **values, **weights, **states, **attrs)

    def ssm_ungroup(self, x: Value) -> tuple[Value, Value]:
        """Sort the inputs of :meth:`ssm` that x has for each k head: to qkv [T, channels] and z [T, d_inner]."""
        qkv, z = Value(f"{x.name}.qkv", self._ssm.channels), Value(f"{x.name}.z", self._ssm.d_inner)
        self.ops.append(Op("ssm_ungroup", x=x, qkv=qkv, z=z))
        return qkv, z

    def mamba2(self, layer: int, inputs: Value) -> Value:
        """Compute a Mamba2 layer's convolution, recurrence and gated norm of groups: [T, d_inner]. Advances its states.

        ``inputs`` is [T, d_in]: z, the channels of the convolution, and dt of each head (arXiv 2405.21060).
        """
        mamba, prefix = self.cfg.recurrence, f"blk.{layer}"
        assert isinstance(mamba, Mamba2), f"{self.cfg.arch} has no Mamba2 layers"
        n_head, d_group = mamba.n_head, mamba.d_inner // mamba.n_group
        groups = (mamba.n_group, d_group) if mamba.n_group > 1 else (d_group,)
        weights = {
            "conv_w": self._f32(f"{prefix}.ssm_conv1d.weight", mamba.channels, mamba.d_conv),
            "conv_b": self.vector(f"{prefix}.ssm_conv1d.bias", mamba.channels),
            "a": self._f32(f"{prefix}.ssm_a", n_head, 1),
            "d": self._f32(f"{prefix}.ssm_d", n_head, 1),
            "dt_bias": self.vector(f"{prefix}.ssm_dt.bias", n_head),
            "norm_w": self._f32(f"{prefix}.ssm_norm.weight", *groups),
        }
        states = {kind: State(kind, layer) for kind in mamba.slot_floats}
        eps = self.cfg.norm_eps
        return self._emit("mamba2", f"{prefix}.mamba2", mamba.d_inner, inputs=inputs, **weights, **states, eps=eps)

    def short_conv(self, layer: int, bcx: Value) -> Value:
        """Compute c · conv(b · x) of bcx [b | c | x], a causal convolution of each channel: [T, channels].

        Advances the layer's state.
        """
        conv, prefix = self.cfg.recurrence, f"blk.{layer}.shortconv"
        assert isinstance(conv, ShortConv), f"{self.cfg.arch} has no short convolutions"
        weight = self._f32(f"{prefix}.conv.weight", conv.channels, conv.taps)
        state = {kind: State(kind, layer) for kind in conv.slot_floats}
        return self._emit("short_conv", f"{prefix}.y", conv.channels, bcx=bcx, conv_w=weight, **state)

    def keep_rows(self, x: Value) -> None:
        """Keep x at the places of the rows' positions, for the block that drafts."""
        self.ops.append(Op("keep_rows", x=x))

    def pair_rows(self, x: Value) -> Value:
        """Compute [x | the kept row of the position before], which is zero before the first: [T, 2 · width]."""
        return self._emit("pair_rows", f"{x.name}.pairs", 2 * x.width, x=x)

    def logits(self, x: Value, matrix: str | None = None) -> None:
        """Project x to the logits, into LOGITS. A tied model uses the embedding table; ``matrix`` is another weight.

        Scales them, and caps them: cap · tanh(logit / cap).
        """
        usual = "output.weight" if self.has("output.weight") else "token_embd.weight"
        weight = self.rows(matrix or usual, self.cfg.n_vocab, x.width)
        self.ops.append(Op("linear", weight=weight, x=x, out=LOGITS))
        if (self.cfg.logit_scale, self.cfg.logit_cap) != (1.0, 0.0):
            self.ops.append(Op("cap_logits", scale=self.cfg.logit_scale, cap=self.cfg.logit_cap))

    def hidden(self, x: Value) -> None:
        """Put x, the rows after the final norm, into HIDDEN: projected, if the file has the layers for it."""
        pooling = self.cfg.pooling
        for name in ("cls.output",) if pooling and pooling.kind == "rank" else ("dense_2", "dense_3"):
            if weight := self._weight(f"{name}.weight"):
                n_out = weight.shape[0] if len(weight.shape) > 1 else 1
                x = self.linear(x, name, n_out, None)
        self.ops[-1] = self.ops[-1].replace(out=HIDDEN)

    def argmax(self) -> None:
        """Choose the largest logit of each output: its id goes to CHOSEN and RESULTS."""
        self.ops.append(Op("argmax"))

    def draw(self) -> None:
        """Draw a token for each output, as DRAWS says: its id goes to CHOSEN and RESULTS."""
        self.ops.append(Op("draw"))

    def accept(self) -> None:
        """Count the drafts after each output that are the tokens drawn in their places: to ACCEPTED and RESULTS."""
        self.ops.append(Op("accept"))

    def kv(self, layer: int) -> dict[str, State]:
        """Return the caches of keys and values that a layer reads, by kind."""
        sizes = self.cfg.layers[layer]
        return {kind: State(kind, sizes.kv_layer) for kind in caches_of(sizes)}

    def _emit(self, kind: str, name: str, width: int, outs: bool = False, /, **given: Any) -> Value:
        """Append an operation whose result is a new value."""
        out = Value(name, width, outs)
        self.ops.append(Op(kind, out=out, **given))
        return out
