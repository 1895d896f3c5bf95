"""Draft models: a second, smaller model of the same vocabulary proposes tokens.

It is a model of its own, on the same device, with its own K/V pool. Each drafter has a session of it, and only the
thread that steps uses it. It proposes its most probable tokens, also where the text is sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .. import gguf
from ..errors import UsageError, quote
from .drafters import NO_DRAFT, Draft, Drafter
from .engine import Engine
from .loaded import Loaded
from .pages import PoolEmptyError
from .sequence import common
from .session import Session


class DraftModel:
    """Model that drafts for another one.

    Raises UsageError for another vocabulary, or for recurrent layers, and all errors of loading a model.
    """

    def __init__(self, path: Path, of: Engine) -> None:
        file = gguf.open(path)
        try:
            _check_vocabulary(file, of.file, path)
            info = of.device.info
            threads = int(info["features"].get("threads", 0))
            self.engine = Engine(
                Loaded(file, context=of.n_ctx, device=info["backend"], kv=of.loaded.kv, threads=threads)
            )
        except BaseException:
            file.close()
            raise
        self.engine.session_seats = self.engine.free_seats  # all sequences are sessions
        if self.engine.recurrent:
            self.engine.free()
            raise UsageError(
                f"draft: {quote(str(path))} has recurrent layers, whose states cannot be taken back after a rejected "
                "draft; choose a model with attention alone"
            )

    def drafter(self) -> ModelDrafter:
        """Return a drafter for one sequence."""
        return ModelDrafter(self.engine)

    def free(self) -> None:
        """Give the memory and the file back."""
        self.engine.free()


class ModelDrafter(Drafter):
    """Drafter that asks a draft model. Without a seat of the model it proposes nothing."""

    costly = True

    def __init__(self, engine: Engine) -> None:
        self._session, self._most = Session(engine), engine.n_ctx

    def propose(self, ids: Sequence[int], n: int) -> Draft:
        """Return the ``n`` most probable tokens after ``ids``, one after another, fewer at the end of the context."""
        session, n = self._session, min(n, self._most - len(ids))
        if n < 1:
            return NO_DRAFT
        session.rewind(min(common(session.ids, ids), len(ids) - 1))
        try:
            tokens = [session.prefill(ids[session.length :])]
        except PoolEmptyError:  # of seats
            return NO_DRAFT
        while len(tokens) < n:
            tokens.append(session.decode(tokens[-1]))
        return Draft(tokens)

    def close(self) -> None:
        """Give the session's memory back."""
        self._session.close()


def _check_vocabulary(draft: gguf.File, of: gguf.File, path: Path) -> None:
    """Raise UsageError unless both files have the same tokens."""
    key = "tokenizer.ggml.tokens"
    mine, theirs = draft.metadata.get(key), of.metadata.get(key)
    if mine is None or theirs is None or list(mine) != list(theirs):
        raise UsageError(
            f"draft: {quote(str(path))} has another vocabulary than the model; a draft model needs the same tokens, "
            "as smaller models of the same family have"
        )
