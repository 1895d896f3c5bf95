"""Decode of mixtures of experts: launches, and the expected outputs in float64 NumPy."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from support.kernel_lab import Guarded, Lab, assert_close, tiles
from support.kernels.experts import Biases, finished, kernel, matrices
from support.kernels.input_norm import InputNorm
from support.kernels.products import TOLERANCE, WEIGHT_ALIGN, Weights, of_vectors
from support.kernels.route import Router, run_topk
from zincmetal.gguf import quants
from zincmetal.gguf.quants import QuantType
from zincmetal.gguf.random_weights import random_weights
from zincmetal.plan.lower.experts import mix_group

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]


class Experts:
    """Random matrices of a type on a device, with gaps between rows and between experts, and the decoded values."""

    def __init__(self, lab: Lab, qtype: QuantType, m: int, k: int, n_expert: int) -> None:
        packed = random_weights(qtype, (n_expert * m, k), lab.rng)
        self.values: F64 = quants.dequantize(qtype, packed, (n_expert * m, k)).astype(np.float64).reshape(-1, m, k)
        self.row_bytes = packed.shape[1] + qtype.row_bytes(256)
        self.expert_bytes = m * self.row_bytes + 3 * qtype.row_bytes(256)
        tensor = np.full((n_expert, self.expert_bytes), 0xFF, np.uint8)
        rows = tensor[:, : m * self.row_bytes].reshape(n_expert, m, self.row_bytes)
        rows[:, :, : packed.shape[1]] = packed.reshape(n_expert, m, -1)
        tensor[:, : m * self.row_bytes] = rows.reshape(n_expert, -1)
        end = tensor.size - self.expert_bytes + (m - 1) * self.row_bytes + packed.shape[1]
        self.buffer = lab.input(tensor.reshape(-1)[:end], align=WEIGHT_ALIGN)

    def params(self, n_used: int) -> dict[str, int]:
        n_expert, m, k = self.values.shape
        return {
            "k": k,
            "m": m,
            "row_bytes": self.row_bytes,
            "expert_bytes": self.expert_bytes,
            "n_expert": n_expert,
            "n_used": n_used,
        }

    def chosen(self, ids: list[int]) -> F64:
        """Returns the matrices of these experts. An id out of range means the last expert."""
        return self.values[self.numbers(ids)]

    def numbers(self, ids: list[int]) -> list[int]:
        """Returns the experts that these ids mean."""
        n_expert = len(self.values)
        return [i if 0 <= i < n_expert else n_expert - 1 for i in ids]


def id_input(lab: Lab, ids: list[int]) -> Guarded:
    return lab.input(np.array(ids, np.int32), align=4)


def products(w: F64, x: F64) -> tuple[F64, F64]:
    """Computes w[j] x[j] (or w[j] x) for every expert j, and the root of the sum of the squares of each sum's terms."""
    x = np.broadcast_to(x, (w.shape[0], w.shape[2]))
    return np.einsum("jmk,jk->jm", w, x), np.sqrt(np.einsum("jmk,jk->jm", w**2, x**2))


class Choice(NamedTuple):
    """Experts that moe_mv chooses for one row: those that moe_topk would choose by ``logits`` [1, n_expert]."""

    router: Router
    logits: F32


class Chosen:
    """The experts of a row for moe_mv, given or to be chosen: ``ids``, and the bindings and parameters for it."""

    def __init__(self, lab: Lab, of: list[int] | Choice, dummy: Guarded) -> None:
        self.choice = of if isinstance(of, Choice) else None
        if not self.choice:
            assert isinstance(of, list)
            self.ids, self.first, self.last = of, id_input(lab, of), [dummy] * 5
            self.params: dict[str, Any] = dict.fromkeys(lab.core.params_dtype("TopKParams").names or (), 0)
            return
        if not lab.core.shapes()["FOLDED_CHOICE"]:
            pytest.skip("the choice of experts is a kernel of its own on this lane")
        router, logits = self.choice
        ids, self.weights = run_topk(lab, logits, router, 1)
        self.ids, self.params = ids[0].tolist(), router.params(logits.shape[1])
        self.first = lab.output(router.n_used, dtype=np.int32, align=4)
        self.written = lab.output(router.n_used + 1, align=4)
        self.last = [*router.inputs(lab, logits, 1)[1:], self.written]

    def check(self) -> None:
        """Fails unless the ids and weights of a choice are moe_topk's, to the bit."""
        if self.choice:
            assert self.first.array.tolist() == self.ids
            assert np.array_equal(self.written.array.view(np.uint32), self.weights[0].view(np.uint32))


def run_moe_mv(
    lab: Lab,
    qtype: QuantType,
    m: int,
    k: int,
    n_expert: int,
    chosen: list[int] | Choice,
    *,
    form: str = "",
    bias: bool = False,
    normed: bool = False,
) -> Guarded:
    """Runs moe_mv and checks it; returns its output. The experts are given by their ids, or chosen by the kernel.

    ``normed``: the experts meet the norm of x.
    """
    experts = [Experts(lab, qtype, m, k, n_expert) for _ in range(matrices(form))]
    x_input = lab.input(x := lab.normal(k, scale=k**-0.5))
    row, norm = Chosen(lab, chosen, x_input), InputNorm(lab, x, normed)
    ids, out = row.ids, lab.output(len(row.ids), m)
    biases = Biases(lab, form, n_expert, m, bias, x_input)
    bindings = [row.first, *(e.buffer for e in experts), x_input, norm.buffer, *biases.buffers, out, *row.last]
    shapes = lab.core.shapes()
    name, least = kernel("moe_mv", form) + qtype.name, shapes["MOE_CHOOSE_THREADS"] // 32
    rows, simdgroups = of_vectors(shapes, name, shapes["MUL_MV_ROWS"])
    if row.choice and simdgroups < least:
        rows, simdgroups = least * shapes["MUL_MV_ROWS"], least
    params = {**experts[0].params(len(ids)), **biases.params(form), "alone": 0, **norm.params}
    grid, threads = (tiles(m, rows // len(experts)), len(ids)), 32 * simdgroups
    both = {"experts": params, "choice": row.params}
    lab.run(name, both, "MoeMvParams", bindings, grid, threads)
    row.check()
    unbiased, scales = zip(*(products(e.chosen(ids), norm.values) for e in experts), strict=True)
    added = [b[experts[0].numbers(ids)] for b in biases.values]
    biased = [w + b for w, b in zip(unbiased, added, strict=True)]
    want, scale = finished(form, biased, [s + np.abs(b) for s, b in zip(scales, added, strict=True)])
    assert_close(out.array, want, TOLERANCE, scale)
    return out


def run_mix(
    lab: Lab,
    qtype: QuantType,
    m: int,
    k: int,
    n_expert: int,
    ids: list[int],
    *,
    shared: tuple[QuantType, int] | None = None,
    alias: bool = False,
    bias: bool = False,
    alone: bool = False,
) -> Guarded:
    """Runs moe_mv_mix and checks it; returns its output.

    ``shared``: type and columns of the shared expert's matrix. ``alias``: the output is the residual's buffer.
    ``bias``: the experts have biases. ``alone``: there is no residual, and its place is not read.
    """
    experts, n = Experts(lab, qtype, m, k, n_expert), len(ids)
    x, weights, residual = lab.normal(n, k, scale=k**-0.5), lab.normal(n + 1), lab.normal(m)
    residual = residual * 0 if alone else residual
    out = lab.in_out(residual) if alias else lab.output(m)
    w64 = weights.astype(np.float64)
    parts, scales = products(experts.chosen(ids), x.astype(np.float64))
    x_input = lab.input(x)
    biases = Biases(lab, "", n_expert, m, bias, x_input)
    added = biases.values[0][experts.numbers(ids)]
    parts, scales = w64[:n, None] * (parts + added), np.abs(w64[:n, None]) * (scales + np.abs(added))
    name, struct = f"moe_mv_mix_{qtype.name}", "MoeParams"
    params = {**experts.params(n), **biases.params(""), "alone": int(alone), "normed": 0, "eps": 0}
    bindings = [id_input(lab, ids), lab.input(weights, align=4), experts.buffer, x_input]
    bindings.append(out if alias else lab.input(np.full(1, np.nan, np.float32) if alone else residual))
    if shared:
        w, x_shared = Weights(lab, shared[0], m, shared[1]), lab.normal(shared[1], scale=shared[1] ** -0.5)
        part, scale = products(w.values[None], x_shared.astype(np.float64))
        parts, scales = np.vstack([parts, w64[n] * part]), np.vstack([scales, np.abs(w64[n]) * scale])
        bindings += [w.buffer, lab.input(x_shared)]
        del params["kind"], params["alone"], params["normed"], params["eps"]
        params |= {"k_shared": shared[1], "row_bytes_shared": w.row_bytes}
        name, struct = f"moe_mv_mix2_{qtype.name}_{shared[0].name}", "MoeSharedParams"
    shapes = lab.core.shapes()
    rows, threads = mix_group(shapes, name)
    lab.run(name, params, struct, [*bindings, *biases.buffers, out], (tiles(m, rows),), threads)
    scale = np.sqrt((scales**2).sum(axis=0) + residual.astype(np.float64) ** 2)
    assert_close(out.array, parts.sum(axis=0) + residual, TOLERANCE, scale)
    return out


def shared_types(qtype: QuantType) -> list[QuantType]:
    """Lists the types of a shared expert that moe_mv_mix2 takes beside routed experts of this type."""
    return [qtype] if qtype.block_size == 1 or qtype is quants.Q8_0 else [qtype, quants.Q8_0]
