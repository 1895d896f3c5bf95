"""From operations to kernel launches. The only place where kernel names, parameters and grids are formed.

Names, bindings and parameters are those of ``kernels/*.metal`` and ``kernels/params.h``; the numbers of rows and
threads per threadgroup come from ``kernels/shapes.h`` through the compiled core, so that they stand in one place.

Where a device lacks a kernel, more general ones do its work, if there are any: the parts of a fused operation, or
what :meth:`Lowering._has` decides between.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType, ModuleType
from typing import Any

import numpy as np

from ..config import EXPERT_CLASSES, HEAD_CLASSES, SSM_CLASSES, ModelConfig
from ..errors import UnsupportedModelError
from ..graph.fuse import STACK, UNBATCHED
from ..graph.ops import STEP, TOKENS, Op, Operand, Value, Weight
from .tuning import USUAL, Split

SPLIT_SIMDGROUPS = 2048  # of one attention then, at most: enough for 132 cores
RANKING = ("candidates_partial", "candidates_final")

_PAIRS = ("_swiglu", "_geglu")  # epilogues of two matrices


@dataclass(frozen=True)
class Arg:
    """A binding to be: an operand, and whether the kernel reads it, writes it, or both.

    ``first`` is the float of the operand's first row at which the binding begins. The kernel does not touch an
    ``unused`` binding, which fills the place of an operand that was left out.
    """

    operand: Operand
    mode: str  # "r", "w", "rw"
    first: int = 0
    unused: bool = False


@dataclass(frozen=True)
class Routed:
    """Sizes of products with single experts: W[e] is [m, k]; slot i (row · n_used + j) takes row i // x_div of x."""

    n_used: int
    m: int
    k: int
    expert_bytes: int
    x_div: int


@dataclass(frozen=True)
class Launch:
    """One dispatch, before its operands have addresses.

    A ``routed`` one stands for a product of every row with each of its experts: the host, which reads their ids from
    the first argument, dispatches them one by one (``routed.py``). ``instead_of`` names the kernels that the device
    lacks, where this one is there in their place.
    """

    kernel: str
    params: bytes
    args: tuple[Arg, ...]
    grid: tuple[int, int, int]
    threads: int
    op: Op
    routed: Routed | None = None
    instead_of: tuple[str, ...] = ()


class Lowering:
    """Lowers operations for plans of one core and model: knows parameter layouts, launch shapes, the KV type."""

    def __init__(
        self,
        core: ModuleType,
        cfg: ModelConfig,
        kv_type: str,
        divide_above: int | None = None,
        tuned: Mapping[str, Split] = MappingProxyType({}),
        windows: Mapping[str, Sequence[Weight]] = MappingProxyType({}),
    ) -> None:
        """``divide_above`` and ``tuned`` are the device's, of tuning.DIVIDE_KEYS_ABOVE and SPLITS; ``windows`` has
        the rows of a tensor, by its name, where they are in several buffers."""
        self.cfg, self.kv_type, self._divide_above, self._tuned = cfg, kv_type, divide_above, tuned
        self._windows = windows
        self._reach: int | None = None
        self.missing: frozenset[str] = frozenset()  # kernels that the device does not have
        self._dtype = core.params_dtype
        self._shapes: Mapping[str, int] = core.shapes()
        self._mv_rows, self._mv_threads = self._shapes["MUL_MV_ROWS"], 32 * self._shapes["MUL_MV_SIMDGROUPS"]

    def within(self, reach: int) -> Lowering:
        """The same for steps that end before position ``reach``: attention then has no more keys to divide."""
        other = copy.copy(self)
        other._reach = reach
        return other

    def without(self, kernels: Collection[str]) -> Lowering:
        """The same for a device that lacks these kernels."""
        other = copy.copy(self)
        other.missing = frozenset(kernels)
        return other

    def launches(self, op: Op, rows: int) -> list[Launch]:
        """The launches of ``op`` in a step of up to ``rows`` rows."""
        rows = 1 if _only_last(op) else rows
        if not self.missing:
            return self._lower(op, rows)
        usual = [launch.kernel for launch in self.without(()).launches(op, rows)]
        lost = tuple(kernel for kernel in dict.fromkeys(usual) if not self._has(kernel))
        there = self._lower_with_parts(op, rows)
        return [launch if launch.kernel in usual else replace(launch, instead_of=lost) for launch in there]

    def _lower(self, op: Op, rows: int) -> list[Launch]:
        launches: list[Launch] = getattr(self, f"_{op.kind}")(op, rows)
        return launches

    def _lower_with_parts(self, op: Op, rows: int) -> list[Launch]:
        """The same, or the launches of the operation's parts where they are what the device has."""
        launches = self._lower(op, rows)
        if all(self._has(launch.kernel) for launch in launches) or not _separable(op, rows):
            return launches
        return [launch for part in op.parts for launch in self._lower_with_parts(part, rows)]

    @property
    def ranked_by_host(self) -> bool:
        """Whether the host finds the candidates among the logits, since the device has no kernel for it."""
        return not self.missing.isdisjoint(RANKING)

    def _has(self, kernel: str) -> bool:
        """Whether the device has the kernel, as far as is known."""
        return kernel not in self.missing

    def _instance(self, family: str, classes: Sequence[int], size: int) -> str:
        """The instance of a kernel for the least class that holds ``size``: each serves what the smaller ones do."""
        fitting = [f"{family}_{c}" for c in classes if size <= c]
        return next(filter(self._has, fitting), fitting[0])

    # ---- one method per kind of operation -----------------------------------------------------------------

    def _embed(self, op: Op, rows: int) -> list[Launch]:
        table = op.weight("table")
        n_vocab, n_embd = table.shape
        grid = (_tiles(n_embd, self._shapes["EMBED_COLUMNS"]), rows, 1)
        launches = []
        for first, window in self._in_windows(table):
            params = self._params(
                "EmbedParams",
                n_embd=n_embd,
                row_bytes=window.row_bytes,
                n_vocab=n_vocab,
                first=first,
                n_rows=window.shape[0],
                scale=op.attrs["scale"],
            )
            kernel, part = f"embed_{window.type.name}", op.replace(table=window)
            launches.append(self._launch(part, kernel, params, grid, self._shapes["EMBED_THREADS"]))
        return launches

    def _in_windows(self, weight: Weight) -> Iterator[tuple[int, Weight]]:
        """The rows of a matrix as they lie in buffers, each part with the number of its first row."""
        n, first = weight.shape[0], 0
        for window in self._windows.get(weight.name, (weight,)):
            rows = min(window.shape[0], n - first)
            if rows > 0:
                yield first, replace(window, shape=(rows, *window.shape[1:]))
            first += window.shape[0]

    def _rms_norm(self, op: Op, rows: int) -> list[Launch]:
        params = self._params("NormParams", n=_value(op.out).width, eps=op.attrs["eps"])
        return [self._launch(op, op.kind, params, (rows, 1, 1), self._shapes["NORM_THREADS"])]

    _rms_norm_add = _rms_norm_add_norm = _rms_norm

    def _linear(self, op: Op, rows: int) -> list[Launch]:
        weight = op.weight("weight")
        if weight.name not in self._windows:
            return self._mat_mul(op, "", rows)
        return [
            self._products_of(op, weight, window, first, row)
            for first, window in self._in_windows(weight)
            for row in range(rows)
        ]

    def _products_of(self, op: Op, weight: Weight, window: Weight, first: int, row: int) -> Launch:
        """The products of a window's rows, from ``first`` on, with one row of activations."""
        m, k = weight.shape
        (launch,) = self._mat_mul(op.replace(weight=window), "", 1)
        w, x, out = launch.args
        return replace(launch, args=(w, replace(x, first=row * k), replace(out, first=row * m + first)))

    def _linear_add(self, op: Op, rows: int) -> list[Launch]:
        return self._mat_mul(op, "_add", rows)

    def _linear_mix(self, op: Op, rows: int) -> list[Launch]:
        return self._mat_mul(op, "_mix", rows)

    def _linear_swiglu(self, op: Op, rows: int) -> list[Launch]:
        return self._mat_mul(op, "_swiglu", rows)

    def _linear_geglu(self, op: Op, rows: int) -> list[Launch]:
        return self._mat_mul(op, "_geglu", rows)

    def _mat_mul(self, op: Op, epilogue: str, rows: int) -> list[Launch]:
        weight, shapes = op.weights[0], self._shapes
        m, k = _matrix(weight)
        matrices = 2 if epilogue in _PAIRS else 1  # share the rows of a threadgroup
        scale = op.value("weights") if epilogue == "_mix" else None
        last = scale.width - 1 if scale else 0  # the last weight of a row is the shared expert's
        args = [*(Arg(r, "r", first=last if r is scale else 0) for r in op.reads), Arg(op.out, "w")]
        params = self._params(
            "MatMulParams",
            k=k,
            m=m,
            row_bytes=weight.row_bytes,
            residual_stride=m if op.get("residual") else 0,
            scale_stride=scale.width if scale else 0,
        )
        if rows == 1:  # one row needs no step: drop it
            name, per_simdgroup, threads = self._mul_mv(f"mul_mv{epilogue}_{weight.type.name}")
            grid = (_tiles(m, threads // 32 * per_simdgroup // matrices), 1, 1)
            return [Launch(name, params, tuple(args[1:]), grid, threads, op)]
        name = f"mul_mm{epilogue}_{weight.type.name}"
        grid = (_tiles(rows, shapes["MUL_MM_TOKENS"]), _tiles(m, shapes["MUL_MM_ROWS"] // matrices), 1)
        return [Launch(name, params, tuple(args), grid, shapes["MUL_MM_THREADS"], op)]

    def _linear_stack(self, op: Op, rows: int) -> list[Launch]:
        assert rows == 1, "stacks are of matrices that meet one row"
        matrices, x, pair = op.weights, op.value("x"), op.get("glu") is not None
        plain, last = (matrices[:-2], matrices[-2:]) if pair else (matrices, ())  # gate and up come last
        unused = [None] * (STACK - len(matrices))
        slots: list[Weight | None] = [*plain, *unused, *last]
        outs: list[Operand | None] = [*op.all("outs"), *unused, *op.all("glu"), *[None] * pair]
        main = next((w.type.name for w in matrices if w.type.name != "f32"), "f32")
        params = self._params(
            "StackParams",
            k=x.width,
            pair=int(pair),
            m=tuple(_matrix(w)[0] if w else 0 for w in slots),
            row_bytes=tuple(w.row_bytes if w else 0 for w in slots),
            is_f32=tuple(int(w is not None and w.type.name == "f32") for w in slots),
        )
        args = [Arg(x, "r"), *(_bound(w, matrices[0], "r") for w in slots), *(_bound(o, op.out, "w") for o in outs)]
        name, per_simdgroup, threads = self._mul_mv(f"mul_mv_stack_{main}")
        simdgroups = sum(_tiles(_matrix(w)[0], per_simdgroup) for w in plain)
        simdgroups += sum(_tiles(_matrix(w)[0], per_simdgroup // 2) for w in last[:1])
        return [Launch(name, params, tuple(args), (_tiles(simdgroups, threads // 32), 1, 1), threads, op)]

    # ---- mixtures of experts ------------------------------------------------------------------------------

    def _route(self, op: Op, rows: int) -> list[Launch]:
        router, ids, shared = op.value("router"), op.value("ids"), op.get("shared")
        n_expert, n_used = router.width, ids.width
        has_shared, scale = int(shared is not None), op.attrs["scale"]
        params = self._params("TopKParams", n_expert=n_expert, n_used=n_used, has_shared=has_shared, scale=scale)
        reads = (Arg(STEP, "r"), Arg(router, "r"), _bound(shared, router, "r"))
        args = (*reads, Arg(ids, "w"), Arg(op["weights"], "w"))
        launches = [Launch(self._instance("moe_topk", EXPERT_CLASSES, n_expert), params, args, (rows, 1, 1), 32, op)]
        if rows > 1:
            tiles = self._max_tiles(rows, n_used, n_expert)
            params = self._params("MoeSortParams", n_expert=n_expert, n_used=n_used, max_tiles=tiles)
            outs = (op["slots"], op["tiles"], op["n_tiles"])
            sort = (Arg(STEP, "r"), Arg(ids, "r"), *(Arg(out, "w") for out in outs))
            launches.append(Launch("moe_sort", params, sort, (1, 1, 1), self._shapes["MOE_SORT_THREADS"], op))
        return launches

    def _max_tiles(self, rows: int, n_used: int, n_expert: int) -> int:
        """Tiles of one expert each that the slots of a step can need."""
        slots = rows * n_used
        return min(slots, _tiles(slots, self._shapes["MOE_MM_TOKENS"]) + n_expert)

    def _experts(self, op: Op, rows: int) -> list[Launch]:
        return self._expert_products(op, "", rows)

    def _experts_swiglu(self, op: Op, rows: int) -> list[Launch]:
        return self._expert_products(op, "_swiglu", rows)

    def _expert_products(self, op: Op, epilogue: str, rows: int) -> list[Launch]:
        weight, x, n_used = op.weights[0], op.value("x"), op.value("ids").width
        n_expert, m, k = weight.shape
        x_div = n_used if x.width == k else 1  # slots that share a row of x
        matrices = len(op.weights)
        batched = f"moe_{'mv' if rows == 1 else 'mm'}{epilogue}_{weight.type.name}"
        # One row's second product is mixed at once, and has no kernel otherwise.
        lacking = rows == 1 and (x_div != n_used or not self._has(batched))
        if weight.type.name in UNBATCHED or (matrices == 1 and lacking):
            return [self._routed_products(op, weight, Routed(n_used, m, k, m * weight.row_bytes, x_div))]
        operands = (*(Arg(w, "r") for w in op.weights), Arg(x, "r"), Arg(op.out, "w"))
        if rows == 1:
            params = self._moe_params(weight, n_used)
            name, per_simdgroup, threads = self._mul_mv(batched)
            grid = (_tiles(m, threads // 32 * per_simdgroup // matrices), n_used, 1)
            return [Launch(name, params, (Arg(op["ids"], "r"), *operands), grid, threads, op)]
        params = self._params("MoeMmParams", **self._moe_sizes(weight), x_div=x_div)
        shapes = self._shapes
        grid = (self._max_tiles(rows, n_used, n_expert), _tiles(m, shapes["MUL_MM_ROWS"] // matrices), 1)
        args = (*(Arg(op[name], "r") for name in ("slots", "tiles", "n_tiles")), *operands)
        return [Launch(batched, params, args, grid, shapes["MUL_MM_THREADS"], op)]

    def _routed_products(self, op: Op, weight: Weight, sizes: Routed) -> Launch:
        no_epilogue = {"residual_stride": 0, "scale_stride": 0}
        params = self._params("MatMulParams", k=sizes.k, m=sizes.m, row_bytes=weight.row_bytes, **no_epilogue)
        args = (Arg(op["ids"], "r"), Arg(weight, "r"), Arg(op["x"], "r"), Arg(op.out, "w"))
        name, per_simdgroup, threads = self._mul_mv(f"mul_mv_{weight.type.name}")
        return Launch(name, params, args, (_tiles(sizes.m, threads // 32 * per_simdgroup), 1, 1), threads, op, sizes)

    def _experts_mix(self, op: Op, rows: int) -> list[Launch]:
        assert rows == 1, "many rows mix after their products"
        weight, shapes, n_used = op.weight("weight"), self._shapes, op.value("ids").width
        shared = (*op.all("shared_weight"), *op.all("shared_x"))
        reads = (op["ids"], op["weights"], weight, op["x"], op["residual"], *shared)
        args = [*(Arg(r, "r") for r in reads), Arg(op.out, "w")]
        rows = shapes["MOE_MIX_ROWS"]
        if not shared:
            name, per_group, threads = self._split(f"moe_mv_mix_{weight.type.name}", rows, shapes["MOE_MIX_THREADS"])
            grid = (_tiles(weight.shape[1], per_group), 1, 1)
            return [Launch(name, self._moe_params(weight, n_used), tuple(args), grid, threads, op)]
        w_shared = op.weight("shared_weight")
        sizes = {"k_shared": w_shared.shape[1], "row_bytes_shared": w_shared.row_bytes}
        params = self._params("MoeSharedParams", **self._moe_sizes(weight), n_used=n_used, **sizes)
        name = f"moe_mv_mix2_{weight.type.name}_{w_shared.type.name}"
        name, per_group, threads = self._split(name, rows, shapes["MOE_MIX2_THREADS"])
        return [Launch(name, params, tuple(args), (_tiles(weight.shape[1], per_group), 1, 1), threads, op)]

    def _moe_params(self, weight: Weight, n_used: int) -> bytes:
        return self._params("MoeParams", **self._moe_sizes(weight), n_used=n_used)

    def _moe_sizes(self, weight: Weight) -> dict[str, int]:
        n_expert, m, k = weight.shape
        nbytes = {"row_bytes": weight.row_bytes, "expert_bytes": m * weight.row_bytes}
        return {"k": k, "m": m, **nbytes, "n_expert": n_expert}

    def _mix(self, op: Op, rows: int) -> list[Launch]:
        n = op.value("out").width
        params = self._params("MoeMixParams", n=n, n_used=op.value("weights").width - 1)
        grid = (_tiles(n, self._shapes["ELEMENTWISE_COLUMNS"]), rows, 1)
        return [self._launch(op, "moe_mix", params, grid, self._shapes["ELEMENTWISE_THREADS"])]

    def _add_shared(self, op: Op, rows: int) -> list[Launch]:
        """One row's shared expert: an expert by itself, with the last of the weights."""
        assert rows == 1, "a weight to each row"
        n, weights = op.value("out").width, op.value("weights")
        weight = Arg(weights, "r", first=weights.width - 1)
        args = (Arg(STEP, "r"), weight, Arg(op["y"], "r"), Arg(op["residual"], "r"), Arg(op.out, "w"))
        grid = (_tiles(n, self._shapes["ELEMENTWISE_COLUMNS"]), 1, 1)
        params = self._params("MoeMixParams", n=n, n_used=1)
        return [Launch("moe_mix", params, args, grid, self._shapes["ELEMENTWISE_THREADS"], op)]

    # ---- recurrent layers ---------------------------------------------------------------------------------

    def _ssm(self, op: Op, rows: int) -> list[Launch]:
        ssm = self.cfg.ssm
        assert ssm
        params = self._params(
            "SsmParams",
            n_k_head=ssm.n_k_head,
            n_v_head=ssm.n_v_head,
            d_k=ssm.d_state,
            d_v=ssm.d_state,
            d_conv=ssm.d_conv,
            norm_eps=op.attrs["eps"],
            l2_eps=op.attrs["eps"],
        )
        step, qkv, z, alpha, beta, conv_w, a, dt_bias, norm_w = (Arg(r, "r") for r in op.reads)
        out, conv_state, state = Arg(op.out, "w"), Arg(op["ssm_conv"], "rw"), Arg(op["ssm_state"], "rw")
        shapes, n_head = self._shapes, ssm.n_v_head
        one_step = self._instance("ssm_step", SSM_CLASSES, ssm.d_state)
        if rows == 1 and self._has(one_step):
            args = (step, qkv, z, alpha, beta, conv_w, a, dt_bias, norm_w, conv_state, state, out)
            return [Launch(one_step, params, args, (n_head, 1, 1), shapes["SSM_STEP_THREADS"], op)]
        conv = Value(f"{op.out.name}.conv", ssm.channels)
        raw = Value(f"{op.out.name}.delta", ssm.d_inner)

        def launch(kernel: str, args: tuple[Arg, ...], x: int, y: int, threads: str) -> Launch:
            return Launch(kernel, params, args, (x, y, 1), shapes[threads], op)

        convolve = (step, qkv, conv_w, conv_state, Arg(conv, "w"))
        heads, token_tiles = 2 * ssm.n_k_head + n_head, _tiles(rows, shapes["SSM_CONV_TOKENS"])
        delta = (step, Arg(conv, "r"), alpha, beta, a, dt_bias, state, Arg(raw, "w"))
        delta_rule = self._instance("ssm_delta", SSM_CLASSES, ssm.d_state)
        size = int(delta_rule.rpartition("_")[2])
        column_tiles = _tiles(ssm.d_state * size, shapes["SSM_DELTA_FLOATS"])
        norm = (step, Arg(raw, "r"), z, norm_w, out)
        head_tiles = _tiles(n_head, shapes["SSM_NORM_THREADS"] // 32)
        return [
            launch("ssm_conv1d", convolve, heads, token_tiles, "SSM_CONV_THREADS"),
            launch(delta_rule, delta, column_tiles, n_head, "SSM_DELTA_THREADS"),
            launch("ssm_norm", norm, head_tiles, rows, "SSM_NORM_THREADS"),
        ]

    def _rope_kv(self, op: Op, rows: int) -> list[Launch]:
        cfg = self.cfg
        params = self._params(
            "RopeKvParams",
            n_head=cfg.n_head,
            n_head_kv=cfg.n_head_kv,
            head_dim=cfg.head_dim,
            q_stride=op.value("q").width // cfg.n_head,
            n_rot=cfg.n_rot,
            eps=cfg.norm_eps,
            magnitude=cfg.rope.magnitude,
        )
        name = f"rope_kv_{op.attrs['rope']}_{self.kv_type}" + ("_qknorm" if op.get("q_norm") else "")
        reads = (op[name] for name in ("step", "pages", "q", "k", "v", "freqs"))
        norms = (_bound(op.get(name), op["freqs"], "r") for name in ("q_norm", "k_norm"))
        args = (*(Arg(r, "r") for r in reads), *norms, *(Arg(w, "w") for w in op.writes))
        return [Launch(name, params, args, (cfg.n_head + 2 * cfg.n_head_kv, rows, 1), 32, op)]

    def _attention(self, op: Op, rows: int) -> list[Launch]:
        cfg, shapes = self.cfg, self._shapes
        gate_stride = op.value("gate").width // cfg.n_head if op.get("gate") else 0
        # Instances come in classes of head size: one named _128 serves heads of 97 to 128.
        families = (f"attention_{family}_{self.kv_type}" for family in ("split", "decode", "prefill"))
        split, decode, prefill = (self._instance(family, HEAD_CLASSES, cfg.head_dim) for family in families)
        divided = rows == 1 and self._has(split) and self._has("attention_merge")
        n_split = self._n_split(op.attrs["window"]) if divided else 1
        params = self._params(
            "AttentionParams",
            n_head=cfg.n_head,
            n_head_kv=cfg.n_head_kv,
            head_dim=cfg.head_dim,
            window=op.attrs["window"],
            gate_stride=gate_stride,
            n_split=n_split,
            scale=op.attrs["scale"],
        )
        if n_split > 1:
            return self._split_attention(op, split, params, n_split)
        # Both take any number of rows.
        wanted, other = (decode, prefill) if rows == 1 else (prefill, decode)
        kernel = wanted if self._has(wanted) or not self._has(other) else other
        grid, threads = (cfg.n_head, rows, 1), shapes["ATTENTION_DECODE_THREADS"]
        if kernel == prefill:
            queries = shapes["ATTENTION_PREFILL_QUERIES" + ("_256" if kernel.endswith("_256") else "")]
            grid, threads = (cfg.n_head, _tiles(rows, queries), 1), shapes["ATTENTION_PREFILL_THREADS"]
        args = (*_attended(op), _bound(op.get("gate"), op["q"], "r"), Arg(op.out, "w"))
        return [Launch(kernel, params, args, grid, threads, op)]

    def _split_attention(self, op: Op, kernel: str, params: bytes, n_split: int) -> list[Launch]:
        cfg = self.cfg
        parts = Value(f"{op.out.name}.parts", cfg.n_head * n_split * (cfg.head_dim + 4))
        split = (*_attended(op), Arg(parts, "w"))
        merge = (Arg(STEP, "r"), Arg(parts, "r"), _bound(op.get("gate"), op["q"], "r"), Arg(op.out, "w"))
        # A simdgroup to a query head of the group: the registers of more than eight may not fit a threadgroup.
        grid, threads = (cfg.n_head_kv, n_split, 1), 32 * min(cfg.n_head // cfg.n_head_kv, 8)
        all_threads = self._shapes["ATTENTION_DECODE_THREADS"]
        return [
            Launch(kernel, params, split, grid, threads, op),
            Launch("attention_merge", params, merge, (cfg.n_head, 1, 1), all_threads, op),
        ]

    def _n_split(self, window: int) -> int:
        """The parts that keys are divided into in decode: more than one where a row may see many of them."""
        reach = self._reach or self.cfg.n_ctx
        n_keys = min(window or reach, reach)
        if self._divide_above is None or n_keys <= self._divide_above:
            return 1
        parts = _tiles(n_keys, self._shapes["ATTENTION_SPLIT_KEYS"])
        return min(parts, _tiles(SPLIT_SIMDGROUPS, self.cfg.n_head))

    def _swiglu(self, op: Op, rows: int) -> list[Launch]:
        return self._elementwise(op, "swiglu", rows)

    def _geglu(self, op: Op, rows: int) -> list[Launch]:
        return self._elementwise(op, "geglu", rows)

    def _add(self, op: Op, rows: int) -> list[Launch]:
        return self._elementwise(op, "add", rows)

    def _take_last_row(self, op: Op, rows: int) -> list[Launch]:
        return self._elementwise(op, "take_last_row", rows)

    def _elementwise(self, op: Op, name: str, rows: int) -> list[Launch]:
        n = _value(op.out).width
        grid = (_tiles(n, self._shapes["ELEMENTWISE_COLUMNS"]), rows, 1)
        return [
            self._launch(op, name, self._params("ElementwiseParams", n=n), grid, self._shapes["ELEMENTWISE_THREADS"])
        ]

    def _argmax(self, op: Op, rows: int) -> list[Launch]:
        n = self.cfg.n_vocab
        n_part = min(_tiles(n, self._shapes["ARGMAX_COLUMNS"]), self._shapes["ARGMAX_THREADS"])
        params, threads = self._params("ArgmaxParams", n=n, n_part=n_part), self._shapes["ARGMAX_THREADS"]
        best, ids = Value("argmax.value", n_part, last=True), Value("argmax.id", n_part, last=True)
        first = (Arg(op["logits"], "r"), Arg(best, "w"), Arg(ids, "w"))
        second = (Arg(STEP, "rw"), Arg(TOKENS, "w"), Arg(best, "r"), Arg(ids, "r"))
        return [
            Launch("argmax_partial", params, first, (n_part, 1, 1), threads, op),
            Launch("argmax_final", params, second, (1, 1, 1), threads, op),
        ]

    def _candidates(self, op: Op, rows: int) -> list[Launch]:
        if self.ranked_by_host:
            return []
        n, shapes = self.cfg.n_vocab, self._shapes
        n_part = _tiles(n, shapes["CANDIDATES_COLUMNS"])
        params = self._params("CandidatesParams", n=n, n_part=n_part)
        parts = Value("candidates.parts", n_part * self._dtype("Candidates").itemsize // 4, last=True)
        first, second = (Arg(op["logits"], "r"), Arg(parts, "w")), (Arg(parts, "r"), Arg(op.out, "w"))
        return [
            Launch("candidates_partial", params, first, (n_part, 1, 1), shapes["CANDIDATES_THREADS"], op),
            Launch("candidates_final", params, second, (1, 1, 1), shapes["CANDIDATES_FINAL_THREADS"], op),
        ]

    # ---- shared -------------------------------------------------------------------------------------------

    def _mul_mv(self, kernel: str) -> tuple[str, int, int]:
        return self._split(kernel, self._mv_rows, self._mv_threads)

    def _split(self, kernel: str, rows: int, threads: int) -> tuple[str, int, int]:
        """The instance of a kernel for this device, with its rows and threads: these, where it has none of its own."""
        split = self._tuned.get(kernel, USUAL)
        name = kernel if split.rows in (None, rows) else f"{kernel}_r{split.rows}"
        if not self._has(name):
            return kernel, rows, threads
        return name, split.rows or rows, split.threads or threads

    def _params(self, struct: str, **fields: Any) -> bytes:
        dtype = self._dtype(struct)
        if set(fields) != set(dtype.names):
            raise TypeError(f"{struct} has fields {dtype.names}, not {tuple(fields)}")
        if large := [f"{name} {n}" for name, n in fields.items() if isinstance(n, int) and n >= 2**32]:
            problem = f"{', '.join(large)}: kernels take numbers below 2^32"
            raise UnsupportedModelError(f"the model has a tensor too large for {struct}: {problem}")
        return np.array(tuple(fields[name] for name in dtype.names), dtype).tobytes()

    def _launch(self, op: Op, kernel: str, params: bytes, grid: tuple[int, int, int], threads: int) -> Launch:
        """A launch that binds what the operation reads, then what it writes."""
        args = [Arg(r, "r") for r in op.reads] + [Arg(w, "w") for w in op.writes]
        return Launch(kernel, params, tuple(args), grid, threads, op)


def _tiles(n: int, tile: int) -> int:
    return -(-n // tile)


def _matrix(weight: Weight) -> tuple[int, int]:
    """Rows and columns; a vector is a matrix of one row."""
    m, k = weight.shape if len(weight.shape) == 2 else (1, *weight.shape)
    return m, k


def _only_last(op: Op) -> bool:
    """Whether the operation works on the last row alone."""
    return any(isinstance(v, Value) and v.last for v in (*op.reads, *op.writes))


def _separable(op: Op, rows: int) -> bool:
    """Whether there are kernels for the parts: what many rows share is added to each in their product alone."""
    shared = op.kind == "linear_mix" or (op.kind == "linear_add" and op.get("bias") is not None)
    return bool(op.parts) and (rows == 1 or not shared)


def _bound(operand: Operand | None, dummy: Operand, mode: str) -> Arg:
    """A binding of an operand that may be left out: then the kernel gets another one, and does not touch it."""
    return Arg(operand, mode) if operand else Arg(dummy, mode, unused=True)


def _attended(op: Op) -> tuple[Arg, ...]:
    return tuple(Arg(op[name], "r") for name in ("step", "pages", "q", "k_cache", "v_cache"))


def _value(operand: Operand) -> Value:
    assert isinstance(operand, Value), operand
    return operand
