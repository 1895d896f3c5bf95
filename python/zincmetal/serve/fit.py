"""Context, number of sequences and bytes that a model of a server gets. Plain arithmetic on its estimate."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..errors import OutOfMemoryError
from ..plan.estimate import MemoryEstimate, in_units
from .channel import LoadOptions

AGENT = 65536  # tokens: agents begin with prompts of 10,000 to 40,000
LEAST = 4096  # tokens of a context that is worth having, if nobody asked for one
MOST_PARALLEL = 16
EACH = 4096  # tokens of memory for each of the sequences that run at once


@dataclass(frozen=True)
class Fit:
    """What a model is loaded with. ``nbytes`` is all that it may take, ``tokens`` what its K/V holds at most."""

    context: int
    parallel: int
    nbytes: int
    tokens: int
    trained: int

    def __str__(self) -> str:
        trained = "" if self.context >= self.trained else f" of {self.trained:,} that it was trained for"
        return (
            f"context {self.context:,}{trained}; memory for {self.tokens:,} tokens in all; "
            f"{'one request' if self.parallel == 1 else f'up to {self.parallel} requests'} at once"
        )


def needed(estimate: MemoryEstimate, context: int, sequences: int = 1) -> int:
    """Return the bytes of a model with the K/V of so many sequences of a context."""
    one = replace(estimate, n_ctx=context)
    return one.total + (sequences - 1) * (one.kv + one.slot)


def least(estimate: MemoryEstimate, options: LoadOptions) -> int:
    """Return the bytes below which a model is not loaded."""
    return needed(estimate, options.context or min(LEAST, estimate.n_ctx_train))


def wished(estimate: MemoryEstimate, options: LoadOptions) -> int:
    """Return the bytes for which models that are idle make room."""
    return needed(estimate, options.context or min(AGENT, estimate.n_ctx_train))


def fit(estimate: MemoryEstimate, options: LoadOptions, left: int, alone: bool) -> Fit:
    """Choose for a model that may take ``left`` bytes. ``alone``: the server has no other model.

    A context that nobody asked for is such that two whole sequences of it fit: an agent has another request beside its
    main one. If that is less than agents need, it is as long as fits. Raises OutOfMemoryError.
    """
    context = options.context or _context(estimate, left, alone)
    total = needed(estimate, context)
    if not context or total > left:
        shown = replace(estimate, n_ctx=context or min(LEAST, estimate.n_ctx_train), budget=left)
        shown.check()
        raise OutOfMemoryError(f"the model needs {in_units(shown.total)}, and {in_units(left)} are left for it")
    nbytes = left if alone else min(left, needed(estimate, context, 2))
    tokens = context + (nbytes - total) // estimate.kv_page * estimate.page
    parallel = options.parallel or max(1, min(MOST_PARALLEL, tokens // EACH))
    return Fit(context, parallel, nbytes, tokens, estimate.n_ctx_train)


def _context(estimate: MemoryEstimate, left: int, alone: bool) -> int:
    """Return the context for a model, 0 if not even the least fits."""
    within = replace(estimate, budget=left)
    longest = within.largest_context
    for_two = replace(within, kv_page=2 * estimate.kv_page, slot=2 * estimate.slot).largest_context
    most = min(estimate.n_ctx_train, max(for_two, min(longest, AGENT)))
    found = most if alone else min(most, AGENT)
    return found if found >= min(LEAST, estimate.n_ctx_train) else 0
