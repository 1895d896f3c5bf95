"""Numbers of rows that steps have, and the cut of a prompt into steps."""

from __future__ import annotations

PREFILL_ROWS = (32, 128, 512)  # a chunk takes the smallest plan that holds it
LOGITS_ROWS = 64  # rows of logits that a step computes if all are wanted


def plan_rows(n: int) -> list[int]:
    """Return the rows of the plans that prompts of up to ``n`` tokens need, the smallest first."""
    return [1, *(r for below, r in zip((1, *PREFILL_ROWS), PREFILL_ROWS, strict=False) if n > below)]


def chunk_rows(n: int) -> list[int]:
    """Return the rows of the plans that take ``n`` tokens: the largest plan, then the smallest that holds the rest."""
    whole, rest = divmod(n, PREFILL_ROWS[-1])
    last = [1 if rest == 1 else next(r for r in PREFILL_ROWS if rest <= r)] if rest else []
    return [PREFILL_ROWS[-1]] * whole + last


def prompt_rows(n: int) -> list[int]:
    """Return the rows of the plans that take a prompt of ``n`` tokens.

    The last token is a separate step. So no bit of its logits depends on the tokens that were computed before, and a
    seed gives the same text.
    """
    return [*chunk_rows(n - 1), 1] if n > 0 else []
