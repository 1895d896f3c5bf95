"""The candidates kernels against a full sort and float64 sums."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from support.kernel_lab import MSL, Lab, every_lane
from support.kernels.output import DTYPE, F32, run

N_CANDIDATES = DTYPE["id"].shape[0]


def check(got: Any, logits: F32) -> None:
    """Fails unless ``got`` has exactly the largest logits, the lowest ids among equals, and the sums."""
    finite = np.flatnonzero(np.isfinite(logits))
    x = logits[finite].astype(np.float64)
    best = finite[np.lexsort((finite, -x))][:N_CANDIDATES]
    assert got["n"] == len(best)
    assert got["n_not_finite"] == len(logits) - len(finite)
    ids = got["id"][: len(best)]
    assert np.array_equal(np.sort(ids), np.sort(best))
    assert np.array_equal(got["logit"][: len(best)], logits[ids])
    if not len(best):
        assert got["sum_exp"] == got["sum_x_exp"] == 0
        return
    below = x - x.max()
    assert got["largest"] == x.max()
    # the kernels sum in float32, up to a thousand terms one after the other
    assert got["sum_exp"] == pytest.approx(np.exp(below).sum(), rel=2e-5)
    assert got["sum_x_exp"] == pytest.approx((below * np.exp(below)).sum(), rel=5e-5)


SIZES = [1, 2, 31, 255, 256, 257, 512, 4095, 4096, 4097, 20_011, 151_936]


@every_lane
@pytest.mark.parametrize("n", SIZES)
def test_random_logits(lane: str, n: int) -> None:
    if lane == MSL and n > 10**5:
        n = 33_001  # fibres are slow
    lab = Lab(lane)
    logits = lab.normal(n, scale=3.0)
    check(run(lab, logits), logits)


@every_lane
@pytest.mark.parametrize("n_part", [1, 3, 40])
def test_any_number_of_parts(lane: str, n_part: int) -> None:
    lab = Lab(lane)
    for n in (5, 700, 9001):
        logits = lab.normal(n, scale=8.0)
        check(run(lab, logits, n_part), logits)


@every_lane
@pytest.mark.parametrize("order", ["rising", "falling", "random"])
def test_final_with_one_simdgroup(lane: str, order: str) -> None:
    """A thread has several parts, whose largest logits come in any order."""
    lab = Lab(lane)
    logits = np.sort(lab.normal(900))
    logits = {"rising": logits, "falling": logits[::-1].copy(), "random": lab.normal(900)}[order]
    check(run(lab, logits, 90, final_threads=32), logits)


@every_lane
@pytest.mark.parametrize("order", ["rising", "falling"])
def test_sorted_logits(lane: str, order: str) -> None:
    lab = Lab(lane)
    logits = np.sort(lab.normal(10_000))
    logits = logits if order == "rising" else logits[::-1].copy()
    check(run(lab, logits), logits)


@every_lane
@pytest.mark.parametrize("value", [0.0, -3.5, 1e30])
def test_all_equal(lane: str, value: float) -> None:
    lab = Lab(lane)
    logits = np.full(9000, value, np.float32)
    got = run(lab, logits)
    check(got, logits)
    assert got["id"].max() == N_CANDIDATES - 1


@every_lane
@pytest.mark.parametrize("n_above", [0, 1, 100, 255])
def test_ties_at_the_threshold(lane: str, n_above: int) -> None:
    """Hundreds of logits share a value that fewer than 256 exceed: the lowest of their ids fill the places."""
    lab = Lab(lane)
    logits = lab.normal(12_000) - 10
    chosen = lab.rng.permutation(12_000)
    logits[chosen[:n_above]] = 5 + lab.rng.random(n_above)
    logits[chosen[n_above : n_above + 900]] = 4
    check(run(lab, logits), logits)


@every_lane
def test_few_different_values(lane: str) -> None:
    lab = Lab(lane)
    logits = lab.rng.integers(-4, 5, 15_000).astype(np.float32)
    check(run(lab, logits), logits)


@every_lane
def test_zeros_of_both_signs_are_equal(lane: str) -> None:
    lab = Lab(lane)
    logits = np.where(lab.rng.random(6000) < 0.5, np.float32(-0.0), np.float32(0.0))
    logits[lab.rng.integers(6000, size=40)] = 1e-40
    logits[lab.rng.integers(6000, size=40)] = -1e-40
    got = run(lab, logits)
    best = np.lexsort((np.arange(6000), -logits.astype(np.float64)))[:N_CANDIDATES]
    assert set(got["id"].tolist()) == set(best.tolist())


@every_lane
@pytest.mark.parametrize("odd", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("share", [0.001, 0.5, 0.99, 1.0])
def test_logits_that_are_not_finite(lane: str, odd: float, share: float) -> None:
    """Logits that are not finite are counted and never chosen, even if fewer than 256 are finite."""
    lab = Lab(lane)
    logits = lab.normal(9000)
    logits[lab.rng.random(9000) < share] = odd
    check(run(lab, logits), logits)


@every_lane
def test_logits_far_apart(lane: str) -> None:
    """Some logits weigh nothing against the largest, of their part or of all."""
    lab = Lab(lane)
    for scale in (1e-6, 100.0, 1e20, 1e37):
        logits = np.clip(lab.normal(9000, scale=scale), -3e38, 3e38)
        logits[lab.rng.integers(9000)] += np.float32(scale)
        check(run(lab, logits), logits)


@every_lane
def test_the_same_logits_give_the_same_bits(lane: str) -> None:
    lab = Lab(lane)
    logits = lab.normal(20_000)
    a, b = (run(lab, logits) for _ in range(2))
    assert [a[f].tobytes() for f in ("largest", "sum_exp", "sum_x_exp")] == [
        b[f].tobytes() for f in ("largest", "sum_exp", "sum_x_exp")
    ]
