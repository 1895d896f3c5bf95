"""From operations to kernel launches. The only place where kernel names, parameters and grids are formed.

Names, bindings and parameters are those of ``kernels/*.metal`` and ``kernels/params.h``; the numbers of rows and
threads per threadgroup come from ``kernels/shapes.h`` through the compiled core, so that they stand in one place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from .config import HEAD_CLASSES, ModelConfig
from .graph import STEP, Op, Operand, Value, Weight


@dataclass(frozen=True)
class Arg:
    """A binding to be: an operand, and whether the kernel reads it, writes it, or both."""

    operand: Operand
    mode: str  # "r", "w", "rw"


@dataclass(frozen=True)
class Launch:
    """One dispatch, before its operands have addresses."""

    kernel: str
    params: bytes
    args: tuple[Arg, ...]
    grid: tuple[int, int, int]
    threads: int
    op: Op


class Lowering:
    """Lowers operations for plans of one core and model: knows parameter layouts, launch shapes, the KV type."""

    def __init__(self, core: ModuleType, cfg: ModelConfig, kv_type: str) -> None:
        self.cfg, self.kv_type = cfg, kv_type
        self._dtype = core.params_dtype
        self._shapes: Mapping[str, int] = core.shapes()

    def launches(self, op: Op, rows: int) -> list[Launch]:
        """The launches of ``op`` in a step of up to ``rows`` rows."""
        lower = getattr(self, f"_{op.kind}")
        result: list[Launch] = lower(op, 1 if _only_last(op) else rows)
        return result

    # ---- one method per kind of operation -----------------------------------------------------------------

    def _embed(self, op: Op, rows: int) -> list[Launch]:
        table = _weight(op.reads[2])
        n_vocab, n_embd = table.shape
        params = self._params(
            "EmbedParams", n_embd=n_embd, row_bytes=table.row_bytes, n_vocab=n_vocab, scale=op.attrs["scale"]
        )
        grid = (_tiles(n_embd, self._shapes["EMBED_COLUMNS"]), rows, 1)
        return [self._launch(op, f"embed_{table.type.name}", params, grid, self._shapes["EMBED_THREADS"])]

    def _rms_norm(self, op: Op, rows: int) -> list[Launch]:
        params = self._params("NormParams", n=_value(op.out).width, eps=op.attrs["eps"])
        return [self._launch(op, "rms_norm", params, (rows, 1, 1), self._shapes["NORM_THREADS"])]

    def _linear(self, op: Op, rows: int) -> list[Launch]:
        return self._mat_mul(op, "", rows)

    def _linear_add(self, op: Op, rows: int) -> list[Launch]:
        return self._mat_mul(op, "_add", rows)

    def _linear_swiglu(self, op: Op, rows: int) -> list[Launch]:
        return self._mat_mul(op, "_swiglu", rows)

    def _mat_mul(self, op: Op, epilogue: str, rows: int) -> list[Launch]:
        weight, shapes = _weight(op.reads[1]), self._shapes
        m, k = weight.shape
        matrices = 2 if epilogue == "_swiglu" else 1  # share the rows of a threadgroup
        params = self._params("MatMulParams", k=k, m=m, row_bytes=weight.row_bytes, residual_stride=m, scale_stride=1)
        if rows == 1:  # one row needs no step: drop it
            name = f"mul_mv{epilogue}_{weight.type.name}"
            per_group = shapes["MUL_MV_SIMDGROUPS"] * shapes["MUL_MV_ROWS"] // matrices
            threads = 32 * shapes["MUL_MV_SIMDGROUPS"]
            return [self._launch(op, name, params, (_tiles(m, per_group), 1, 1), threads, skip=1)]
        name = f"mul_mm{epilogue}_{weight.type.name}"
        grid = (_tiles(rows, shapes["MUL_MM_TOKENS"]), _tiles(m, shapes["MUL_MM_ROWS"] // matrices), 1)
        return [self._launch(op, name, params, grid, shapes["MUL_MM_THREADS"])]

    def _rope_kv(self, op: Op, rows: int) -> list[Launch]:
        cfg = self.cfg
        params = self._params(
            "RopeKvParams",
            n_head=cfg.n_head,
            n_head_kv=cfg.n_head_kv,
            head_dim=cfg.head_dim,
            n_rot=cfg.n_rot,
            eps=cfg.norm_eps,
            magnitude=cfg.rope.magnitude,
        )
        name = f"rope_kv_{op.attrs['rope']}_{self.kv_type}" + ("_qknorm" if op.attrs["qk_norm"] else "")
        return [self._launch(op, name, params, (cfg.n_head + 2 * cfg.n_head_kv, rows, 1), 32)]

    def _attention(self, op: Op, rows: int) -> list[Launch]:
        cfg, shapes = self.cfg, self._shapes
        params = self._params(
            "AttentionParams",
            n_head=cfg.n_head,
            n_head_kv=cfg.n_head_kv,
            head_dim=cfg.head_dim,
            scale=op.attrs["scale"],
        )
        # Instances come in classes of head size: one named _128 serves heads of 97 to 128.
        kind = f"{self.kv_type}_{next(c for c in HEAD_CLASSES if cfg.head_dim <= c)}"
        if rows == 1:
            grid = (cfg.n_head, 1, 1)
            return [self._launch(op, f"attention_decode_{kind}", params, grid, shapes["ATTENTION_DECODE_THREADS"])]
        grid = (cfg.n_head, _tiles(rows, shapes["ATTENTION_PREFILL_QUERIES"]), 1)
        return [self._launch(op, f"attention_prefill_{kind}", params, grid, shapes["ATTENTION_PREFILL_THREADS"])]

    def _swiglu(self, op: Op, rows: int) -> list[Launch]:
        return self._elementwise(op, "swiglu", rows)

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
        logits, n = op.reads[0], self.cfg.n_vocab
        n_part = min(_tiles(n, self._shapes["ARGMAX_COLUMNS"]), self._shapes["ARGMAX_THREADS"])
        params, threads = self._params("ArgmaxParams", n=n, n_part=n_part), self._shapes["ARGMAX_THREADS"]
        best, ids = Value("argmax.value", n_part, last=True), Value("argmax.id", n_part, last=True)
        first = (Arg(logits, "r"), Arg(best, "w"), Arg(ids, "w"))
        second = (Arg(STEP, "rw"), Arg(best, "r"), Arg(ids, "r"))
        return [
            Launch("argmax_partial", params, first, (n_part, 1, 1), threads, op),
            Launch("argmax_final", params, second, (1, 1, 1), threads, op),
        ]

    # ---- shared -------------------------------------------------------------------------------------------

    def _params(self, struct: str, **fields: Any) -> bytes:
        dtype = self._dtype(struct)
        if set(fields) != set(dtype.names):
            raise TypeError(f"{struct} has fields {dtype.names}, not {tuple(fields)}")
        return np.array(tuple(fields[name] for name in dtype.names), dtype).tobytes()

    def _launch(
        self, op: Op, kernel: str, params: bytes, grid: tuple[int, int, int], threads: int, skip: int = 0
    ) -> Launch:
        """A launch that binds what the operation reads (after ``skip``), then what it writes."""
        args = [Arg(r, "r") for r in op.reads[skip:]] + [Arg(w, "w") for w in op.writes]
        return Launch(kernel, params, tuple(args), grid, threads, op)


def _tiles(n: int, tile: int) -> int:
    return -(-n // tile)


def _only_last(op: Op) -> bool:
    """Whether the operation works on the last row alone."""
    return any(isinstance(v, Value) and v.last for v in (*op.reads, *op.writes))


def _weight(operand: Operand) -> Weight:
    assert isinstance(operand, Weight), operand
    return operand


def _value(operand: Operand) -> Value:
    assert isinstance(operand, Value), operand
    return operand
