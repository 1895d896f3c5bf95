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

_KEY = "tokenizer.ggml."
_UNUSED = 5  # in ``token_type``: what pads a vocabulary


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
        self._n_vocab = min(of.n_vocab, self.engine.n_vocab)
        self.engine.session_seats = self.engine.free_seats  # all sequences are sessions
        if self.engine.recurrent:
            self.engine.free()
            raise UsageError(
                f"draft: {quote(str(path))} has recurrent layers, whose states cannot be taken back after a rejected "
                "draft; choose a model with attention alone"
            )

    def drafter(self) -> ModelDrafter:
        """Return a drafter for one sequence."""
        return ModelDrafter(self.engine, self._n_vocab)

    def free(self) -> None:
        """Give the memory and the file back."""
        self.engine.free()


class ModelDrafter(Drafter):
    """Drafter that asks a draft model. Without a seat of the model it proposes nothing.

    ``n_vocab``: tokens that both models have. A draft ends before another one.
    """

    costly = True

    def __init__(self, engine: Engine, n_vocab: int) -> None:
        self._session, self._most, self._n_vocab = Session(engine), engine.n_ctx, n_vocab

    def propose(self, ids: Sequence[int], n: int) -> Draft:
        """Return the ``n`` most probable tokens after ``ids``, one after another, fewer at the end of the context.

        Raises DeviceError if its logits are not finite, and what a session raises.
        """
        session, n = self._session, min(n, self._most - len(ids))
        if n < 1:
            return NO_DRAFT
        session.rewind(min(common(session.ids, ids), len(ids) - 1))
        try:
            token = session.prefill(ids[session.length :])
        except PoolEmptyError:  # of seats
            return NO_DRAFT
        tokens = list[int]()
        while 0 <= token < self._n_vocab:
            tokens.append(token)
            if len(tokens) == n:
                break
            token = session.decode(token)
        if token < 0:
            raise session.engine.not_finite(session.sequence.pages)
        return Draft(tokens) if tokens else NO_DRAFT

    def close(self) -> None:
        """Give the session's memory back."""
        self._session.close()


def _check_vocabulary(draft: gguf.File, of: gguf.File, path: Path) -> None:
    """Raise UsageError unless both files have the same tokens.

    One may have more at the end if nothing uses them: files pad their vocabularies, each size of a model to another
    length.
    """
    mine, theirs = (list(file.metadata.get(f"{_KEY}tokens", ())) for file in (draft, of))
    n, longer = min(len(mine), len(theirs)), draft if len(mine) > len(theirs) else of
    more = max(len(mine), len(theirs)) - n
    types = list(longer.metadata.get(f"{_KEY}token_type", ()))[n:] if more else []
    if not n or mine[:n] != theirs[:n] or types != [_UNUSED] * more:
        raise UsageError(
            f"draft: {quote(str(path))} has another vocabulary than the model; a draft model needs the same tokens, "
            "as smaller models of the same family have"
        )
