"""Defines sampling in plain float64 NumPy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zincmetal.sampling import sampler as sampling
from zincmetal.sampling.logits import Adjusted, StepLogits
from zincmetal.sampling.params import SamplingParams

INF = float("inf")
Logits = NDArray[np.float32]
F64 = NDArray[np.float64]


def changed(logits: Logits, history: Sequence[int], p: SamplingParams) -> F64:
    """Applies processors, penalties and bias; returns logits, float64 [vocab]."""
    for process in p.logits_processors:
        logits = process(history, logits.copy())
    x = [float(v) for v in logits]
    recent = history[len(history) - min(p.repeat_last_n, len(history)) :]
    for t in set(recent):
        x[t] = x[t] / p.repeat_penalty if x[t] > 0 else x[t] * p.repeat_penalty
        x[t] -= p.presence_penalty + p.frequency_penalty * recent.count(t)
    for t, bias in p.logit_bias.items():
        x[t] += bias
    return np.array(x)


def softmax(x: F64) -> F64:
    e = np.exp(x - x.max())
    return np.asarray(e / e.sum())


def distribution(logits: Logits, history: Sequence[int], p: SamplingParams) -> F64:
    """Computes the probability of every token, float64 [vocab]."""
    x = changed(logits, history, p)
    order = [t for t in np.argsort(-x, kind="stable") if x[t] > -INF]
    if p.temperature == 0:
        return np.asarray(np.eye(len(x))[order[0]])
    if p.top_k:
        order = order[: p.top_k]
    if p.typical_p < 1:
        probs = softmax(x[order])
        entropy = -sum(q * np.log(q) for q in probs if q > 0)
        with np.errstate(divide="ignore"):
            by_distance = np.argsort(np.abs(-np.log(probs) - entropy), kind="stable")
        total, kept = 0.0, []
        for i in by_distance:
            kept.append(i)
            total += probs[i]
            if total >= p.typical_p:
                break
        order = [order[i] for i in sorted(kept)]
    probs = softmax(x[order])
    keep = [i for i in range(len(order)) if probs[:i].sum() < p.top_p and probs[i] >= p.min_p * probs[0]]
    order = [order[i] for i in keep]
    out = np.zeros(len(x))
    out[order] = softmax(x[order] / p.temperature)
    return out


def probabilities(logits: Logits, history: Sequence[int], params: SamplingParams) -> F64:
    """Computes the package's own probability of every token, after its filters and the temperature: float64 [vocab]."""
    step = StepLogits(sampling.processed(logits.copy(), history, params.logits_processors))
    rankings = Adjusted(step, *sampling.changes(step, history, params)).rankings()
    kept = next(k for k in (sampling.keep(r, params) for r in rankings) if k and k.whole)
    out = np.zeros(logits.size)
    with np.errstate(over="ignore"):
        out[kept.ids] = softmax((kept.logits - kept.logits[0]) / params.temperature)
    return out


def excess(counts: NDArray[Any], want: F64) -> float:
    """Computes by about how many standard deviations the chi-square of these counts is too large.

    The larger of two: over small groups of tokens, and over large groups, which show a small error of many tokens.
    """
    order = np.argsort(-want)
    counts, expected = counts[order], want[order] * counts.sum()
    return max(_excess(counts, expected, per_group) for per_group in (8, max(8, counts.sum() / 12)))


def _excess(counts: NDArray[Any], expected: F64, per_group: float) -> float:
    last = max(expected.sum() // per_group - 1, 0)
    _, groups = np.unique(np.minimum(expected.cumsum() // per_group, last), return_inverse=True)
    got, want = (np.bincount(groups, x).astype(np.float64) for x in (counts, expected))
    k = want.size - 1
    if k == 0:
        return 0.0
    x = float(((got - want) ** 2 / want).sum())
    return float(((x / k) ** (1 / 3) - 1 + 2 / (9 * k)) / np.sqrt(2 / (9 * k)))  # Wilson and Hilferty
