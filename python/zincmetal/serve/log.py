"""Line of the log for each generation: its numbers, and nothing of its text."""

from __future__ import annotations

import logging
import time

from .metrics import outcome_of
from .turn import Turn

_log = logging.getLogger("zincmetal.serve")


def log_turn(turn: Turn) -> None:
    """Log a turn that is over. An observer of ``Serving``."""
    if _log.isEnabledFor(logging.INFO):
        _log.info("%s %s: %s", turn.id, turn.backend.card.id, line_of(turn))


def line_of(turn: Turn) -> str:
    """Return what became of a turn: how it ended, its tokens, and its times."""
    prompt, cached = turn.matched or (len(turn.ready.asked.ids), 0)
    results = [ended.result for ended in turn.ended]
    words = [outcome_of(turn) + (f" ({type(turn.error).__name__})" if isinstance(turn.error, Exception) else "")]
    words.append(f"prompt {prompt} tokens, {cached} of them cached")
    words.append(f"answer {sum(len(result.tokens) for result in results)}")
    if turn.first_at is not None:
        words.append(f"first token after {turn.first_at - turn.began_at:.2f} s")
    made, seconds = sum(len(r.tokens) - 1 for r in results if r.tokens), sum(r.decode_seconds for r in results)
    if made > 0 and seconds > 0:
        words.append(f"then {made / seconds:.1f} tokens/s")
    return ", ".join([*words, f"{time.monotonic() - turn.began_at:.2f} s in all"])


__all__ = ["line_of", "log_turn"]
