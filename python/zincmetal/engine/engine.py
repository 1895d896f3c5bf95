"""Runs the steps of one sequence on a device: ids in, logits out. Knows no text.

The life of a token in greedy decode:

1. ``decode(token, ahead=True)`` takes the program of one row that serves this position (``device/programs.py``).
2. ``core.decode_step`` writes token and position into the step buffer and submits the program, one command buffer.
3. The device computes embedding, layers and logits; keys, values and states stay in its buffers.
4. The last kernel writes the arg max, and the next position, to the places that the next step reads.
5. So the core submits the same program once more (``ahead``) before it waits: the device feeds itself.
6. The first step ends. Its token joins ``sequence.ids``, and the arg max is returned.
7. The caller makes text of the arg max, while the device works on the next step.
8. ``decode(best)`` finds that step in flight and waits for it instead of submitting one. Go on at 5.

A sampled token has no step 5: the host draws it from the logits that the step left (:meth:`Engine.sample`).

States of a step that runs ahead:

    idle       decode(t)           ->  idle        the step has run
    idle       decode(t, ahead)    ->  in flight   t's step has run, the step of its arg max is submitted
    in flight  decode(that token)  ->  idle        the step in flight was taken over (with ahead: in flight again)
    in flight  settle()            ->  idle        waits; the token in flight is in the sequence now
    idle       rewind(n)           ->  idle        the tokens from n on are forgotten
    in flight  anything else       ->  UsageError  settle first

A step that fails or is interrupted leaves recurrent states in between two tokens: they are settled and forgotten.
Every :class:`~zincmetal.engine.turn.Turn` settles the engine at its beginning and its end.
"""

from __future__ import annotations

import logging
import os
import time
import weakref
from collections.abc import Sequence as AnySequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .. import arguments
from ..device.buffers import Buffers, Progress
from ..device.host_routed import HostRoutedPlan
from ..device.programs import Program, Programs
from ..errors import ContextFullError, DeviceError, UsageError, ZincError, abbreviate, typed_errors
from ..plan.choices import OUTPUTS
from ..plan.chunks import LOGITS_ROWS, prompt_rows
from ..plan.plan import Plan
from ..sampling.logits import StepLogits
from ..sampling.sampler import Sampler
from .loaded import Loaded
from .sequence import Sequence
from .snapshot import Snapshot, States
from .turn import CLOSE, RESET, InUse, Turn, Turns

NOT_FINITE = (
    "the model's logits are not finite: the file is damaged, or the device failed; check the file, and load it again"
)
CLOSED = "the model is closed; load it again"
FORKED = (
    "the model was loaded before a fork, and its device is the parent's: load it in the child, or with Metal start "
    "processes by multiprocessing's spawn"
)
_log = logging.getLogger("zincmetal.engine")
_ENGINES: weakref.WeakSet[Engine] = weakref.WeakSet()


class Synced(NamedTuple):
    """Result of reading a prompt: the arg max after it (-1 if there is none), its computed tokens, its seconds."""

    best: int
    computed: int
    seconds: float


class Engine:
    """Loaded model with one sequence and its memory. One thread at a time.

    ``prefill``, ``decode``, ``step``, ``sync``, ``sample``, ``rewind`` and ``settle`` are single steps. A caller that
    shares the engine wraps them in ``with Turn(engine)``. All other calls take a turn.
    """

    def __init__(self, loaded: Loaded) -> None:
        self.loaded = loaded
        self.core, self.device, self.file, self.planner = loaded.core, loaded.device, loaded.file, loaded.planner
        self.config = loaded.planner.config
        self.buffers = Buffers(self.device, loaded.weights, self.planner.addresses)
        self.programs = Programs(self.core, self.device, self.planner, self.buffers, loaded.fallbacks)
        self.sequence = Sequence(any(self.config.recurrent))
        self.steps = self.core.Steps(
            self.buffers.buffer("step"), self.buffers.buffer("tokens"), self.config.n_ctx, self.config.n_vocab
        )
        self.turns = Turns()
        self._states = States(self.buffers, self.planner.addresses, self.planner.target.page)
        self._words_read = 0
        self._unusable: tuple[type[ZincError], str] | None = None
        self._freed = self._forked = False
        loaded.engines.add(self)
        _ENGINES.add(self)
        self._why_host_routed = self.programs.get(1, "argmax", 0).why_host_routed
        self.runs_ahead = bool(self.device.info["asynchronous"]) and not self._why_host_routed
        if self._why_host_routed:
            _log.warning("%s: its experts are routed by the host, which is slow", self._why_host_routed)

    # ---- single steps ------------------------------------------------------------------------------------------

    @typed_errors
    def sync(self, ids: list[int], output: str = "argmax", progress: Progress | None = None) -> Synced:
        """Make ``ids``, the whole prompt, the sequence. Tokens that the sequence begins with are not computed again.

        ``progress(done, total)`` counts the tokens to compute. The time of making programs does not count. Raises
        UsageError for an empty prompt or a wrong id, ContextFullError for too many ids.
        """
        self.check_usable()
        self.check_prompt(ids)
        kept = self.sequence.reusable(ids)
        self.rewind(kept)
        for rows in {*prompt_rows(len(ids) - kept)}:
            self.program(rows, output, len(ids) - 1)
        self.program(1, output, len(ids))
        began = time.perf_counter()
        best = self.prefill(ids[kept:], output, progress)
        return Synced(best, len(ids) - kept, time.perf_counter() - began)

    @typed_errors
    def prefill(self, ids: list[int], output: str = "argmax", progress: Progress | None = None) -> int:
        """Append ids in steps of many tokens, the last token alone. Return its arg max, or -1 for another output."""
        best, done = -1, 0
        for rows in prompt_rows(len(ids)):
            if progress:
                progress(done, len(ids))
            end = min(done + rows, len(ids) - 1) if rows > 1 else done + 1
            best, done = self.step(ids[done:end], rows, output), end
        if progress:
            progress(done, len(ids))
        return best

    def decode(self, token: int, ahead: bool = False, output: str = "argmax") -> int:
        """Append a token. Return the arg max after it, or -1 for another output.

        ``ahead``: also submit the next step, which is fed by this step's arg max. Only the output "argmax" can.
        """
        if self._unusable is not None:
            self.check_usable()
        length = self.steps.length
        program = self.programs.get(1, output, length)
        compiled = program.compiled
        if isinstance(compiled, HostRoutedPlan):
            return self.step([token], 1, output)
        try:
            # A step ahead runs by this step's program.
            ahead = ahead and length + 2 <= program.max_position
            best: int = self.core.decode_step(self.steps, compiled, token, ahead)
        except BaseException:
            self._forget_states()
            raise
        self.sequence.ids.append(token)
        return best

    def step(self, ids: list[int], rows: int, output: str = "argmax") -> int:
        """Append ids by the program of ``rows`` rows. Return the arg max after the last, or -1 for another output.

        There may be fewer ids than rows. The step buffer has their number, and the kernels skip the other rows.
        """
        self.check_usable()  # close() of another thread waits for this call to end
        program = self.program(rows, output)
        if program.plan.rows < rows:
            return [self.step([token], 1, output) for token in ids][-1]
        compiled, array = program.compiled, np.asarray(ids, np.int32)
        try:
            if isinstance(compiled, HostRoutedPlan):
                best = compiled.step(self.steps, array)
            else:
                best = self.core.prefill_step(self.steps, compiled, array)
        except BaseException:
            self._forget_states(isinstance(compiled, HostRoutedPlan))
            raise
        self.sequence.ids += ids
        return best

    def rewind(self, length: int) -> None:
        """Shorten the sequence to its first ``length`` tokens. With recurrent layers ``length`` can only be 0."""
        # In this order an interrupt between the two leaves a sequence that can still be rewound.
        self.sequence.cut(length)
        self.steps.rewind(length)

    def settle(self) -> None:
        """End the step in flight. Its token joins the sequence, since a state cannot always be rewound."""
        if self._freed or self._forked:
            return
        known, settled = len(self.sequence), []
        with suppress(DeviceError):  # the device keeps a failure, and the next step tells it
            settled = self.steps.settle()
        if known + len(settled) == self.steps.length:
            self.sequence.ids += settled
        else:  # an interrupt came after a step and before ``ids`` had its token
            self.rewind(0 if self.sequence.recurrent else min(known, self.steps.length))

    def _forget_states(self, inside_a_step: bool = False) -> None:
        """Forget recurrent states after a step that did not end: some of them may have changed."""
        if inside_a_step or self.sequence.recurrent:
            self.settle()
            self.rewind(0)

    def last_logits(self) -> NDArray[np.float32]:
        """Return the logits after the last token, float32 [vocab]. Copy them: the next step may overwrite them."""
        return self.buffers.floats("logits")[: self.config.n_vocab]

    def sample(self, sampler: Sampler) -> int:
        """Draw the next token from the logits of the last step, whose output must have been "candidates"."""
        if self.programs.ranked_by_host:
            step = StepLogits.of(self.last_logits())
        else:
            candidates = self.buffers.records("candidates", self.core.params_dtype("Candidates"))
            step = StepLogits(candidates[0], self.buffers.indexable("logits"), self.config.n_vocab)
        try:
            return sampler.sample(step, self.sequence.ids)
        except DeviceError as error:
            raise self.not_finite(str(error)) from error
        finally:
            self._words_read += step.n_read

    def program(self, rows: int, output: str = "argmax", position: int | None = None) -> Program:
        """Return the program for a step of up to ``rows`` tokens at ``position`` (default: the sequence's end)."""
        return self.programs.get(rows, output, self.steps.length if position is None else position)

    # ---- calls of their own turn -------------------------------------------------------------------------------

    @typed_errors
    def logits(self, ids: AnySequence[int]) -> NDArray[np.float32]:
        """Return the logits after every position of ``ids``: float32 [len(ids), vocab], from an empty sequence."""
        ids = arguments.token_ids(ids)
        self.check_prompt(ids)
        with Turn(self):
            self.rewind(0)
            rows = self.program(min(LOGITS_ROWS, self.config.n_ctx), "all").plan.rows
            out = np.empty((len(ids), self.config.n_vocab), np.float32)
            for at in range(0, len(ids), rows):
                chunk = ids[at : at + rows]
                self.step(chunk, rows, "all")
                view = self.buffers.floats("logits")
                out[at : at + len(chunk)] = view.reshape(-1, self.config.n_vocab)[: len(chunk)]
                if not np.isfinite(out[at : at + len(chunk)]).all():
                    raise self.not_finite()
            return out

    @typed_errors
    def plan(self, rows: int, output: str = "argmax") -> Plan:
        """Return the plan for steps of up to ``rows`` tokens; 1 is decode. ``output`` is one of OUTPUTS."""
        output, rows = arguments.choice("output", output, OUTPUTS), arguments.integer("rows", rows, 1)
        with Turn(self):
            return self.program(rows, output).plan

    @typed_errors
    def reset(self) -> None:
        """Forget the sequence. Ends an unfinished stream: its next token raises UsageError."""
        with Turn(self, RESET):
            self.rewind(0)

    @typed_errors
    def save(self) -> Snapshot:
        """Copy the sequence and its state to host memory, for :meth:`restore`."""
        with Turn(self):
            return self._states.take(self.sequence.ids)

    @typed_errors
    def restore(self, saved: Snapshot) -> None:
        """Continue a saved sequence, of this model or of a model with the same file and type of K/V cache.

        Raises UsageError if states of the snapshot have other sizes, ContextFullError if it is too long. Then the
        sequence is unchanged.
        """
        with Turn(self):
            if not isinstance(saved, Snapshot):
                arguments.refuse("saved", "a snapshot of save()", saved)
            if len(saved.tokens) > self.config.n_ctx:
                raise ContextFullError(
                    f"the snapshot has {len(saved.tokens)} tokens and the context {self.config.n_ctx}; "
                    f"load the model with a larger context"
                )
            self._states.check(saved)
            self.rewind(0)
            self._states.put(saved)
            self.steps.resume(len(saved.tokens))
            self.sequence.ids += saved.tokens

    @typed_errors
    def fork(self) -> Engine:
        """Make another engine of this loaded model, with a copy of the sequence.

        Raises OutOfMemoryError if one more sequence does not fit.
        """
        saved = self.save()
        self.planner.check_memory(sequences=len(self.loaded.engines) + 1)
        twin = Engine(self.loaded)
        twin.restore(saved)
        return twin

    def profile(self) -> dict[str, Any]:
        """Return the cost of running so far: steps, tokens, command buffers, dispatches, barriers, device seconds.

        ``host_routed`` counts the steps whose experts the host routed, ``host_routed_why`` names the reason.
        ``replaced`` has the kernels that the device could not make, with the reason and the replacements.
        """
        routed = {"host_routed": asdict(self.programs.counters), "host_routed_why": self._why_host_routed}
        return {**self.steps.counters, **routed, "replaced": self.loaded.fallbacks.profile()}

    @property
    def words_read(self) -> int:
        """32-bit words of logits, ids and sums that sampling has read from the device since the engine was made.

        If many scattered values are read from memory that the host does not see, their whole range is copied. Only
        the requested values count.
        """
        return self._words_read

    # ---- life --------------------------------------------------------------------------------------------------

    @typed_errors
    def close(self) -> None:
        """Give the device memory and the file back; later calls raise UsageError. Closing twice is fine.

        A call or a stream of another thread ends with UsageError. This call waits for its end.
        """
        if self._freed or self._forked:
            self._unusable = self._unusable or (UsageError, CLOSED)
            return
        if self.turns.mine():
            raise UsageError("the model cannot be closed by a callback of its own call: raise an exception there")
        self._unusable = (UsageError, CLOSED)
        while True:
            with suppress(InUse), Turn(self, CLOSE):
                self._free()
                return
            time.sleep(0.002)

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._unusable == (UsageError, CLOSED)

    def _free(self) -> None:
        self.steps.close()
        self.programs.clear()
        self.buffers.close()
        self.loaded.release(self)
        self._freed = True

    def left_by_fork(self) -> None:
        """Mark this engine as the copy in a forked child: every later call raises DeviceError."""
        self._forked = True
        self._unusable = self._unusable or (DeviceError, FORKED)

    def check_usable(self) -> None:
        """Raise UsageError if the model is closed, DeviceError in the child of a fork."""
        if self._unusable is not None:
            kind, why = self._unusable
            raise kind(why)

    def check_file(self) -> None:
        """Raise FileChangedError if the mapped file is no longer what was loaded."""
        if not self._freed:
            self.file.check()

    def check_prompt(self, ids: AnySequence[int]) -> None:
        """Raise UsageError if there are no ids or wrong ids, ContextFullError if there are too many."""
        if not ids:
            raise UsageError("the prompt has no tokens; pass some text, or a BOS token")
        n_vocab = self.config.n_vocab
        wrong = next((t for t in ids if not 0 <= t < n_vocab), None)
        if wrong is not None:
            raise UsageError(f"token id {abbreviate(wrong)} is outside the vocabulary of {n_vocab}")
        if len(ids) > self.config.n_ctx:
            raise ContextFullError(
                f"the prompt has {len(ids)} tokens and the context {self.config.n_ctx}; "
                f"load the model with a larger context"
            )

    def not_finite(self, words: str = NOT_FINITE) -> DeviceError:
        """Make the error for logits that are not finite, with the remedy if the K/V caches show one."""
        kv = self.loaded.kv
        layers = self._states.overflowed(self.steps.length, kv)
        if not layers:
            return DeviceError(words)
        return DeviceError(
            f"{words}; keys or values of layer {layers[0]} are beyond the range of kv={kv!r}: "
            f"load the model with kv='f32', which holds them"
        )


def _forget_all() -> None:
    """Mark all engines as unusable in the child of a fork: their devices' threads and connections are the parent's."""
    for engine in list(_ENGINES):
        engine.left_by_fork()


os.register_at_fork(after_in_child=_forget_all)
