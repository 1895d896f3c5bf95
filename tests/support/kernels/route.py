"""The choice of experts by moe_topk and moe_route, and the expected one in float64 NumPy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from support.kernel_lab import Guarded, Lab, assert_close, assert_untouched
from support.kernels.experts_mm import Route

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I32 = NDArray[np.int32]

SCORES = {"logit": 0, "softmax": 1, "sigmoid": 2}
LEAST_WEIGHTS = 2.0**-14


@dataclass(frozen=True)
class Router:
    """A way to choose ``n_used`` experts of each row: see ``Router`` in config/experts.py.

    ``bias`` and ``scales`` are [n_expert]; ``shared`` [rows] are logits of the shared expert, or True for the weight 1.
    """

    n_used: int
    score: str = "logit"
    normalised: bool = True
    scale: float = 1.0
    bias: F32 | None = None
    scales: F32 | None = None
    n_group: int = 1
    n_group_used: int = 1
    shared: F32 | bool | None = None

    def params(self, n_expert: int) -> dict[str, Any]:
        shared = 0 if self.shared is None else 2 if self.shared is True else 1
        return {
            "n_expert": n_expert,
            "n_used": self.n_used,
            "shared": shared,
            "score": SCORES[self.score],
            "normalised": int(self.normalised),
            "has_bias": int(self.bias is not None),
            "has_scales": int(self.scales is not None),
            "n_group": self.n_group,
            "n_group_used": self.n_group_used,
            "scale": self.scale,
        }

    def inputs(self, lab: Lab, logits: F32, n_tokens: int) -> list[Guarded]:
        """Makes the bindings that the kernels read. Those that are left out are the logits."""
        router = lab.input(logits, align=4)
        given = [self.shared if isinstance(self.shared, np.ndarray) else None, self.bias, self.scales]
        return [lab.step(n_tokens), router, *(router if x is None else lab.input(x, align=4) for x in given)]

    def want(self, logits: F32) -> tuple[NDArray[np.int64], F64]:
        """Returns the ids [rows, n_used] and the weights [rows, n_used + 1], for finite logits.

        Equal scores: the lowest id comes first.
        """
        scores = _scores(self.score, logits.astype(np.float64))
        by = scores if self.bias is None else scores + self.bias.astype(np.float64)
        by = _kept_groups(by, self.n_group, self.n_group_used)
        ids = np.argsort(-by, axis=1, kind="stable")[:, : self.n_used]
        chosen = np.take_along_axis(scores, ids, axis=1)
        if self.score == "logit":
            chosen = _softmax(chosen)
        elif self.normalised:
            chosen = chosen / np.maximum(chosen.sum(axis=1, keepdims=True), LEAST_WEIGHTS)
        weights = np.zeros((len(ids), self.n_used + 1))
        weights[:, :-1] = self.scale * chosen
        if self.scales is not None:
            weights[:, :-1] *= self.scales.astype(np.float64)[ids]
        if isinstance(self.shared, np.ndarray):
            weights[:, -1] = 1 / (1 + np.exp(-self.shared[: len(ids)].astype(np.float64)))
        elif self.shared:
            weights[:, -1] = 1
        return ids, weights


def _softmax(x: F64) -> F64:
    e = np.exp(x - x.max(axis=1, keepdims=True, initial=-np.inf))
    return np.asarray(e / e.sum(axis=1, keepdims=True))


def _scores(kind: str, logits: F64) -> F64:
    if kind == "sigmoid":
        return np.asarray(1 / (1 + np.exp(-logits)))
    return _softmax(logits) if kind == "softmax" else logits


def _kept_groups(by: F64, n_group: int, n_used: int) -> F64:
    """Makes all values -inf but those of the groups with the largest sums of their two best."""
    if n_group == 1:
        return by
    groups = by.reshape(len(by), n_group, -1)
    sums = np.sort(groups, axis=2)[:, :, -2:].sum(axis=2)
    kept = np.argsort(-sums, axis=1, kind="stable")[:, :n_used]
    masked = np.full_like(groups, -np.inf)
    for row, of_row in enumerate(kept):
        masked[row, of_row] = groups[row, of_row]
    return masked.reshape(by.shape)


@dataclass(frozen=True)
class Routed:
    """Outputs of a choice; moe_topk writes only the first two."""

    ids: Guarded
    weights: Guarded
    slots: Guarded
    tiles: Guarded
    n_tiles: Guarded


def run_topk(lab: Lab, logits: F32, router: Router, n_tokens: int) -> tuple[I32, F32]:
    """Runs moe_topk; returns the ids and weights of the step's rows. Fails if another row was written."""
    rows, n_expert = logits.shape
    n_used = router.n_used
    ids, weights = lab.output(rows, n_used, dtype=np.int32, align=4), lab.output(rows, n_used + 1, align=4)
    bindings = [*router.inputs(lab, logits, n_tokens), ids, weights]
    lab.run("moe_topk", router.params(n_expert), "TopKParams", bindings, (rows,), 32)
    assert_untouched(ids.array[n_tokens:])
    assert_untouched(weights.array[n_tokens:])
    return ids.array[:n_tokens], weights.array[:n_tokens]


def run_route(lab: Lab, logits: F32, router: Router, n_tokens: int) -> Routed:
    """Runs moe_route on rows of logits, of which the first n_tokens are tokens."""
    (rows, n_expert), n_used = logits.shape, router.n_used
    i32: dict[str, Any] = {"dtype": np.int32, "align": 4}
    out = Routed(
        lab.output(rows, n_used, **i32),
        lab.output(rows, n_used + 1, align=4),
        lab.output(rows * n_used, **i32),
        lab.output(min(rows * n_used, n_expert), 4, dtype=np.int32),
        lab.output(1, **i32),
    )
    bindings = [*router.inputs(lab, logits, n_tokens), out.ids, out.weights, out.slots, out.tiles, out.n_tiles]
    threads, params = lab.core.shapes()["MOE_ROUTE_THREADS"], router.params(n_expert)
    lab.run("moe_route", params, "TopKParams", bindings, (1,), threads)
    return out


def check_choice(ids: I32, weights: F32, router: Router, logits: F32) -> None:
    """Fails unless the rows have the expected experts and weights."""
    want_ids, want = router.want(logits)
    assert np.array_equal(ids, want_ids)
    if len(want):
        assert_close(weights, want, 1e-6, np.maximum(np.abs(want), 1e-3 * abs(router.scale)))


def check_route(lab: Lab, logits: F32, router: Router, n_tokens: int) -> Routed:
    """Runs moe_route and checks all that it writes."""
    got = run_route(lab, logits, router, n_tokens)
    check_choice(got.ids.array[:n_tokens], got.weights.array[:n_tokens], router, logits[:n_tokens])
    assert_untouched(got.ids.array[n_tokens:])
    assert_untouched(got.weights.array[n_tokens:])

    route = Route(got.ids.array.copy(), n_tokens, logits.shape[1])
    slots, cut = route.sorted(lab.core.shapes()["MOE_FEW_ROWS"])
    assert got.n_tiles.array[0] == len(cut) == len(np.unique(route.experts))
    assert np.array_equal(got.slots.array[: len(slots)], slots)
    assert np.array_equal(got.tiles.array[: len(cut)], cut)
    assert_untouched(got.slots.array[len(slots) :])
    assert_untouched(got.tiles.array[len(cut) :])
    return got
