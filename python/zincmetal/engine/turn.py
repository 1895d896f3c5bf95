"""Turns: one call at a time uses an engine, or one stream from its first token to its last.

No lock is held. An interrupt may come between any two bytecodes, and no ``finally`` sees it. It would leave a lock held
for good. Turns form a chain instead, to which one atomic operation adds. The last turn counts, unless its call has
ended.
"""

from __future__ import annotations

import sys
import threading
import weakref
from types import FrameType
from typing import TYPE_CHECKING, Any

from ..errors import UsageError

if TYPE_CHECKING:
    from .engine import Engine

CLOSE, RESET = "close()", "reset()"  # calls that end a resting stream
IN_CALL = "the model is in use by another call; wait for it, or fork() the model for a second sequence"
IN_STREAM = (
    "the model is in use by an unfinished stream: end the stream with its close(), or with reset() of the model, which "
    "also works if only a traceback still has the stream"
)


class InUse(UsageError):
    """Another call or stream has the model."""


class Turns:
    """Turns of one engine."""

    def __init__(self) -> None:
        self._last = Turn.nobody()

    def take(self, turn: Turn, ends: str = "") -> None:
        """Give ``turn`` the engine; ``ends``, if any, ends a stream that rests between two tokens.

        Raises InUse if another call or stream has it.
        """
        last = self._last
        while True:
            while last.heirs:
                last = last.heirs[0]
            last.give_way(ends)
            last.heirs.append(turn)  # by two threads at once: the first one counts
            if last.heirs[0] is turn:
                self._last = turn
                return

    def mine(self) -> bool:
        """Return True if a call of this thread has the engine: then the asking call comes from a callback."""
        last = self._last
        while last.heirs:
            last = last.heirs[0]
        return last.on_this_stack()


class Turn:
    """Context manager for the use of an engine, by the call that enters it or by the ``stream`` that is set.

    ``driver`` is the one call that takes tokens from the stream. ``ended`` names the call that ended the stream.
    """

    def __init__(self, engine: Engine | None, ends: str = "", driver: FrameType | None = None) -> None:
        self._engine = engine  # until the turn is over: the engine has its last turn
        self._ends = ends
        self._frame = driver
        self._thread = threading.get_ident()
        self.stream: weakref.ref[Any] | None = None
        self.rest: list[None] = []  # has an item while a stream rests; whoever takes that goes on
        self.over = False
        self.ended = ""
        self.heirs: list[Turn] = []

    @classmethod
    def nobody(cls) -> Turn:
        """Return a turn that is over."""
        turn = cls(None)
        turn.over = True
        return turn

    def __enter__(self) -> Turn:
        engine = self._engine
        assert engine is not None, "a turn is taken once"
        self._thread = threading.get_ident()
        if self.stream is None:
            self._frame = sys._getframe(1)
        try:
            if self._ends != CLOSE:
                engine.check_usable()
                engine.check_file()
            engine.turns.take(self, self._ends)
            engine.settle()
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            self.rest.pop()  # of a stream that is closed between two tokens
        except IndexError:
            if self.ended:  # another call has the model now
                return
        try:
            if self._engine is not None:
                self._engine.settle()
        finally:
            self._leave()

    def _leave(self) -> None:
        self.over = True
        self._frame = self._engine = None

    def give_way(self, ends: str) -> None:
        """Return if this turn is over, was left behind by an interrupt, or can be ended now. Raises InUse otherwise."""
        if self.over:
            return
        if self.stream is None:
            if self._frame is not None and _runs(self._frame):
                raise InUse(IN_CALL)
            return
        stream = self.stream()
        if stream is None or stream.gi_frame is None:
            return
        alone = self._frame is not None and not _runs(self._frame)
        if (ends or alone) and self._end(ends or "another call"):
            return
        raise InUse(IN_CALL if stream.gi_running else IN_STREAM)

    def _end(self, by: str) -> bool:
        """End a stream that rests between two tokens. Return False if it does not rest."""
        self.ended = by
        try:
            self.rest.pop()
        except IndexError:  # it has just gone on, in another thread
            self.ended = ""
            return False
        self._leave()
        stream = self.stream() if self.stream else None
        if by == CLOSE and self._thread == threading.get_ident() and stream is not None:
            stream.close()  # whoever closes the model knows that the text is not whole: no error, as after close()
        return True

    def on_this_stack(self) -> bool:
        """Return True if this thread is inside this turn's call or stream."""
        stream = self.stream() if self.stream else None
        wanted = (self._frame, stream.gi_frame if stream is not None and stream.gi_running else None)
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            if not self.over and frame in wanted:
                return True
            frame = frame.f_back
        return False


def _runs(frame: FrameType) -> bool:
    """Return True if the call of a frame still runs. References to the frame do not matter."""
    try:
        frame.clear()
    except RuntimeError:  # of a running frame
        return True
    return False
