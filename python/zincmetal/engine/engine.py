"""A model on a device and one sequence of its tokens: prefill, decode and logits over plans that are recorded once."""

from __future__ import annotations

import copy
import logging
import os
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from .. import arguments, gguf
from ..device import backend
from ..device.buffers import Buffers, Progress, map_weights
from ..device.fallback import KernelFallbacks
from ..device.host_routed import Compiled, Counters, HostRoutedPlan, compiled
from ..errors import ContextFullError, DeviceError, KernelError, UsageError, ZincError, abbreviate, typed_errors
from ..plan.addresses import KV_TYPES
from ..plan.plan import ARENA, Dispatch, Plan, ready
from ..plan.planner import LOGITS_ROWS, OUTPUTS, PREFILL_ROWS, Planner
from ..plan.target import Target
from ..sampling.logits import StepLogits
from ..sampling.sampler import Sampler
from . import snapshot
from .snapshot import Snapshot
from .turn import CLOSE, RESET, InUse, Turn, Turns

MAX_THREADS = 1024
NOT_FINITE = (
    "the model's logits are not finite: the file is damaged, or the device failed; check the file, and load it anew"
)
CLOSED = "the model is closed; load it again"
FORKED = (
    "the model was loaded before a fork, and its device is the parent's: load it in the child, or with Metal start "
    "processes by multiprocessing's spawn"
)
E = TypeVar("E", bound="Engine")
_ENGINES: weakref.WeakSet[Engine] = weakref.WeakSet()


class Engine:
    """The weights of a model on a device, and one sequence: ids in, logits out. One thread at a time."""

    def __init__(
        self,
        file: gguf.File,
        context: int | None = None,
        device: str | None = None,
        kv: str | None = "f16",
        threads: int | None = 0,
        progress: Progress | None = None,
    ) -> None:
        kv = arguments.choice("kv", kv, KV_TYPES, "f16")
        threads = arguments.integer("threads", threads, 0, MAX_THREADS, 0, "0: the cores there are")
        context = None if context is None else arguments.integer("context", context, 1)
        device = None if device is None else arguments.text("device", device)
        arguments.callback("progress", progress)
        self._kv = kv
        self.file = file
        self.core, self.device = backend.open_device(device, threads)
        self.planner = Planner(file, Target.of(self.core, self.device.info), context, kv)
        self.planner.check_memory()
        self.config = self.planner.config
        self._fallbacks = KernelFallbacks(self.device)
        self._weights = map_weights(self.device, file, self.planner.addresses, progress)
        self._family: weakref.WeakSet[Engine] = weakref.WeakSet()  # they share the file and the weights
        self._begin()

    def _begin(self) -> None:
        """What a model does not share with its forks: a sequence, its memory, and plans that use it."""
        self._memory = Buffers(self.device, self._weights, self.planner.addresses)
        self._memory.alloc(ARENA, 1)
        self._plans: dict[tuple[int, str, int], tuple[Plan, Compiled]] = {}
        self._sequence: list[int] = []
        self._words_read = 0
        self._routed = Counters()
        self.turns = Turns()
        self._unusable: tuple[type[ZincError], str] | None = None
        self._freed = self._forked = False
        self.session = self.core.Steps(
            self._memory.buffer("step"), self._memory.buffer("tokens"), self.config.n_ctx, self.config.n_vocab
        )
        self._family.add(self)
        _ENGINES.add(self)
        decode = self._recorded(1, "argmax")[1]
        self._why_routed = decode.why if isinstance(decode, HostRoutedPlan) else None
        self._ahead = bool(self.device.info["asynchronous"]) and not self._why_routed
        if self._why_routed:
            message = "%s: its experts are routed by the host, which is slow"
            logging.getLogger("zincmetal").warning(message, self._why_routed)

    # ---- steps --------------------------------------------------------------------------------------------

    @typed_errors
    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """The logits after every position of ``ids``: float32 [len(ids), vocab], from an empty sequence."""
        ids = self._ids(ids)
        self._check_prompt(ids)
        with Turn(self):
            self._rewind(0)
            rows = self._recorded(min(LOGITS_ROWS, self.config.n_ctx), "all")[0].rows
            out = np.empty((len(ids), self.config.n_vocab), np.float32)
            for at in range(0, len(ids), rows):
                chunk = ids[at : at + rows]
                self._run(chunk, rows, "all")
                view = self._memory.floats("logits")
                out[at : at + len(chunk)] = view.reshape(-1, self.config.n_vocab)[: len(chunk)]
                if not np.isfinite(out[at : at + len(chunk)]).all():
                    raise self.not_finite()
            return out

    @typed_errors
    def reset(self) -> None:
        """Forget the sequence. Ends a stream that is not finished: taking another token of it raises UsageError."""
        with Turn(self, RESET):
            self._rewind(0)

    @typed_errors
    def save(self) -> Snapshot:
        """A copy of the sequence and its state in host memory, for :meth:`restore`."""
        with Turn(self):
            return snapshot.take(self._memory, self.planner.addresses, self._page, self._sequence)

    @typed_errors
    def restore(self, saved: Snapshot) -> None:
        """Go on from a saved sequence, in this model or another one of the same file and type of K/V cache.

        Raises UsageError where states of the snapshot have other sizes, ContextFullError where it is too long; the
        sequence is then as it was.
        """
        with Turn(self):
            if not isinstance(saved, Snapshot):
                arguments.refuse("saved", "what save() gave", saved)
            if len(saved.tokens) > self.config.n_ctx:
                raise ContextFullError(
                    f"the snapshot has {len(saved.tokens)} tokens and the context {self.config.n_ctx}; "
                    f"load the model with a larger context"
                )
            snapshot.check(self._memory, self.planner.addresses, self._page, saved)
            self._rewind(0)
            snapshot.put(self._memory, self.planner.addresses, self._page, saved)
            self.session.resume(len(saved.tokens))
            self._sequence = list(saved.tokens)

    @typed_errors
    def fork(self: E) -> E:
        """Another model with the same weights, at the same point of a sequence of its own; close it by itself.

        Raises OutOfMemoryError where one more sequence does not fit.
        """
        saved = self.save()
        self.planner.check_memory(sequences=len(self._family) + 1)
        twin = copy.copy(self)
        twin._begin()
        twin.restore(saved)
        return twin

    def profile(self) -> dict[str, Any]:
        """What running cost so far: steps, tokens, command buffers, dispatches, barriers, seconds of the device.

        ``host_routed`` says the same of steps whose experts the host had to route, and ``host_routed_why``;
        ``replaced`` the kernels that the device could not make: why, and by what they are replaced.
        """
        routed = {"host_routed": asdict(self._routed), "host_routed_why": self._why_routed}
        return {**self.session.counters, **routed, "replaced": self._fallbacks.profile()}

    @typed_errors
    def time_dispatches(self, ids: Sequence[int], position: int = 0, copies: int = 1) -> list[tuple[Dispatch, float]]:
        """Run a greedy step of ``ids`` at ``position``, each dispatch after the one before has ended: the dispatches
        of the plan, and the seconds of each by the device's clock.

        With more ``copies`` than one, each is run so often in one command buffer, one after the other, and the mean
        is given: without what beginning and ending a command buffer cost, and with what it reads in the caches.
        Positions before it hold whatever is in memory. Forgets the sequence.
        """
        ids = arguments.token_ids(ids)
        position, copies = arguments.integer("position", position), arguments.integer("copies", copies, 1, 1024)
        self._check_prompt(ids)
        if len(ids) > PREFILL_ROWS[-1] or not 0 <= position <= self.config.n_ctx - len(ids):
            limits = f"a step takes up to {PREFILL_ROWS[-1]} tokens of a context of {self.config.n_ctx}"
            raise UsageError(f"{len(ids)} tokens at {position}: {limits}")
        with Turn(self):
            self._rewind(0)
            plan, compiled = self._recorded(chunk_rows(len(ids))[0], "argmax", position)
            if plan.rows < len(ids):
                raise UsageError("this device cannot make kernels of steps of many tokens: time one token")
            if isinstance(compiled, HostRoutedPlan):
                raise UsageError(f"{compiled.why}: the host routes this model's experts between its dispatches")
            self._write_step(ids, position)
            dispatches = [ready(d, self._memory.buffer) for d in plan.dispatches]
            if copies == 1:
                return list(zip(plan.dispatches, self.device.time_each(dispatches), strict=True))
            seconds = []
            for dispatch in dispatches:
                self._write_step(ids, position)  # the last one of a step changes it
                seconds.append(self.device.run([(*dispatch[:-1], True)] * copies) / copies)
            return list(zip(plan.dispatches, seconds, strict=True))

    def _write_step(self, ids: list[int], position: int) -> None:
        """What a step reads, as the core's session writes it."""
        step = np.zeros(1, self.core.params_dtype("Step"))
        step["n_tokens"], step["pos"] = len(ids), position
        self._memory.buffer("step").write(step)
        self._memory.buffer("tokens").write(np.array(ids, np.int32))

    @property
    def _page(self) -> int:
        page: int = self.core.shapes()["KV_PAGE"]
        return page

    @property
    def words_read(self) -> int:
        """32-bit words of logits, ids and sums that sampling has read from the device since the model was loaded.

        Scattered ones, where they are many and the host does not see the memory, come with those between them, which
        do not count.
        """
        return self._words_read

    @typed_errors
    def plan(self, rows: int, output: str = "argmax") -> Plan:
        """The recorded plan for steps of up to ``rows`` tokens; 1 is decode. ``output`` is one of OUTPUTS."""
        output, rows = arguments.choice("output", output, OUTPUTS), arguments.integer("rows", rows, 1)
        with Turn(self):
            return self._recorded(rows, output)[0]

    def _keep_common(self, ids: list[int]) -> int:
        """Rewind the sequence to what it shares with ``ids``; the length of that."""
        # The last token runs in any case: its logits are wanted.
        kept = min(_common(self._sequence, ids), len(ids) - 1)
        if any(self.config.recurrent) and kept < len(self._sequence):
            kept = 0  # a recurrent state cannot be taken back to an earlier position
        self._rewind(kept)
        return kept

    def _prefill(self, ids: list[int], progress: Progress | None = None, output: str = "argmax") -> int:
        """Append ``ids`` in chunks; the arg max after the last of them, where the output is that."""
        best, done = -1, 0
        for rows in prompt_rows(len(ids)):
            if progress:
                progress(done, len(ids))
            end = min(done + rows, len(ids) - 1) if rows > 1 else done + 1
            best, done = self._run(ids[done:end], rows, output), end
        if progress:
            progress(done, len(ids))
        return best

    def _decode(self, token: int, ahead: bool = False, output: str = "argmax") -> int:
        """Append a token; the arg max after it, if the output is that. ``ahead``: the step of that will be wanted."""
        if self._unusable is not None:
            self.check_usable()
        compiled = self._recorded(1, output)[1]
        if isinstance(compiled, HostRoutedPlan):
            return self._run([token], 1, output)
        # A step ahead runs by this step's plan.
        max_position, length = self.planner.max_position, self.session.length
        ahead = ahead and max_position(length + 2) == max_position(length + 1)
        try:
            best: int = self.core.decode_step(self.session, compiled, token, ahead)
        except BaseException:
            self._forget_states()
            raise
        self._sequence.append(token)
        return best

    def _run(self, ids: list[int], rows: int, output: str = "argmax") -> int:
        self.check_usable()  # close() of another thread waits for this call to end
        (plan, compiled), array = self._recorded(rows, output), np.asarray(ids, np.int32)
        if plan.rows < rows:
            return [self._run([token], 1, output) for token in ids][-1]
        try:
            if isinstance(compiled, HostRoutedPlan):
                best = compiled.step(self.session, array)
            else:
                best = self.core.prefill_step(self.session, compiled, array)
        except BaseException:
            self._forget_states(isinstance(compiled, HostRoutedPlan))
            raise
        self._sequence += ids
        return best

    def _forget_states(self, part_of_a_step: bool = False) -> None:
        """After a step that did not end: recurrent states may have moved on, or some of them."""
        if part_of_a_step or any(self.config.recurrent):
            self.settle()
            self._rewind(0)

    def _rewind(self, length: int) -> None:
        # In this order an interrupt between the two leaves a sequence that can still be rewound.
        del self._sequence[length:]
        self.session.rewind(length)

    def settle(self) -> None:
        """End the step in flight, which makes its token part of the sequence: a state cannot always be rewound."""
        if self._freed or self._forked:
            return
        with suppress(DeviceError):  # the device keeps a failure, and the next step tells it
            self._sequence += self.session.settle()
        if len(self._sequence) != self.session.length:  # an interrupt came between a step and its record here
            self._rewind(0)

    def _last_logits(self) -> NDArray[np.float32]:
        return self._memory.floats("logits")[: self.config.n_vocab]

    def _sample(self, sampler: Sampler) -> int:
        """The token that follows the sequence, from what a step with the output "candidates" left."""
        if self.planner.ranked_by_host:
            step = StepLogits.of(self._last_logits())
        else:
            candidates = self._memory.records("candidates", self.core.params_dtype("Candidates"))
            step = StepLogits(candidates[0], self._memory.indexable("logits"), self.config.n_vocab)
        try:
            return sampler.sample(step, self._sequence)
        except DeviceError as error:
            raise self.not_finite(str(error)) from error
        finally:
            self._words_read += step.n_read

    def _recorded(self, rows: int, output: str, position: int | None = None) -> tuple[Plan, Compiled]:
        """The plan for a step of up to ``rows`` tokens at ``position`` (default: the next), here and on the device.

        It is one for a single token where the device cannot make what many of them take.
        """
        end = 1 + (self.session.length if position is None else position)
        max_position = self.planner.max_position(min(end, self.config.n_ctx)) if rows == 1 else self.config.n_ctx
        key = (rows, output, max_position)
        if key not in self._plans:
            if output == "all":
                self._grow("logits", 4 * rows * self.config.n_vocab)
            try:
                made = self._fallbacks.compile(
                    self.planner, lambda: self.planner.plan(rows, output, max_position), self._compile
                )
            except KernelError as error:
                if rows == 1:
                    raise
                made = self._recorded(1, output, position)
                self._fallbacks.use(dict.fromkeys(error.kernels, ("steps of one token",)))
            self._plans[key] = made
        return self._plans[key]

    def _compile(self, plan: Plan) -> Compiled:
        self._grow(ARENA, plan.arena_bytes)
        return compiled(self.core, self.device, plan, self._memory.buffer, self._routed)

    def _grow(self, name: str, nbytes: int) -> None:
        """Replace a buffer that is smaller; compiled plans, which use the old one, are made anew when next needed."""
        if self._memory.buffer(name).nbytes < nbytes:
            self._plans.clear()
            self._memory.alloc(name, nbytes)

    # ---- life ---------------------------------------------------------------------------------------------

    @typed_errors
    def close(self) -> None:
        """Give the device memory and the file back; later calls raise UsageError. Closing twice is fine.

        A call or a stream of another thread ends with UsageError, which is waited for.
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

    def _free(self) -> None:
        self.session.close()
        self._plans.clear()
        self._memory.close()
        self._family.discard(self)
        if not self._family:
            self._weights.clear()
            self.file.close()
        self._freed = True

    def __enter__(self: E) -> E:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _ids(self, prompt: Sequence[int]) -> list[int]:
        """The ids of a prompt."""
        try:
            return arguments.token_ids(prompt)
        except UsageError as error:
            raise UsageError(f"a prompt is text or a sequence of token ids: {error}") from error.__cause__

    def not_finite(self, words: str = NOT_FINITE) -> DeviceError:
        """What to raise where logits are not finite: with the remedy, where the K/V caches show one."""
        layers = snapshot.overflowed(self._memory, self.planner.addresses, self._page, self.session.length, self._kv)
        if not layers:
            return DeviceError(words)
        return DeviceError(
            f"{words}; keys or values of layer {layers[0]} are beyond the range of kv={self._kv!r}: "
            f"load the model with kv='f32', which holds them"
        )

    def _check_prompt(self, ids: Sequence[int]) -> None:
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

    def left_by_fork(self) -> None:
        """From now on this is the child's copy, of which nothing can be used."""
        self._forked = True
        self._unusable = self._unusable or (DeviceError, FORKED)

    def check_usable(self) -> None:
        """Raises UsageError where the model is closed, DeviceError in the child of a fork."""
        if self._unusable is not None:
            kind, why = self._unusable
            raise kind(why)

    def check_file(self) -> None:
        """Raises FileChangedError where the mapped file is no longer what was loaded."""
        if not self._freed:
            self.file.check()


def chunk_rows(n: int) -> list[int]:
    """The plans, by their rows, that take ``n`` tokens: the largest, then the smallest that holds the rest."""
    whole, rest = divmod(n, PREFILL_ROWS[-1])
    last = [1 if rest == 1 else next(r for r in PREFILL_ROWS if rest <= r)] if rest else []
    return [PREFILL_ROWS[-1]] * whole + last


def prompt_rows(n: int) -> list[int]:
    """The plans that take a prompt of ``n`` tokens. The last token is a step of its own, so that its logits are the
    same to the bit whether the tokens before it are computed now or were before: a seed gives the same text."""
    return [*chunk_rows(n - 1), 1] if n > 0 else []


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix."""
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return n


def _forget_all() -> None:
    """In the child of a fork no model can be used: its device's threads and connections have stayed behind."""
    for engine in list(_ENGINES):
        engine.left_by_fork()


os.register_at_fork(after_in_child=_forget_all)
