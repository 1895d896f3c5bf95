"""Stub for type checkers alone: no module is called ``_core``.

It describes every compiled core: ``_core_metal``, ``_core_cuda`` and ``_core_cpu``. Load one with
``zincmetal.device.backend.load``. ``make types`` holds the built modules to this stub.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._host import Map
from .device.core import BoundDispatch, DeviceInfo

class Buffer:
    """Device memory. It is a writable Python buffer of bytes if the device shares it with the host."""

    @property
    def nbytes(self) -> int: ...
    @property
    def shared(self) -> bool:
        """True if the host sees the memory itself. Otherwise it reads and writes copies."""
    def read(self, offset: int = 0, nbytes: int | None = None) -> NDArray[np.uint8]:
        """Copy ``nbytes`` bytes out, by default all from ``offset`` on. Raises UsageError for bytes outside."""
    def write(self, data: NDArray[Any] | bytes, offset: int = 0) -> None:
        """Copy contiguous data in. Raises UsageError for bytes outside, and if the buffer is read-only."""
    def __buffer__(self, flags: int, /) -> memoryview: ...

class Device:
    """Opened device. It belongs to the process that opened it."""

    def __init__(self, *, threads: int = 0, native: bool = True, kernel_folder: str = "") -> None:
        """Open the device.

        ``threads`` (0 = all cores) and ``native`` are for the CPU, ``kernel_folder`` for kernels that are compiled at
        run time. Raises DeviceError.
        """
    @property
    def info(self) -> DeviceInfo:
        """Facts of the device, as of now."""
    def alloc(self, nbytes: int) -> Buffer:
        """Allocate a buffer. Raises OutOfMemoryError."""
    def wrap(self, owner: NDArray[np.uint8] | Map, offset: int, nbytes: int) -> Buffer:
        """Make the owner's memory a buffer, without a copy. It must begin at a page boundary.

        If the owner is a damaged map (see Map), this call and every later step that reads it raise DeviceError.
        """
    def kernel_names(self) -> list[str]:
        """List every kernel that the device has."""
    def limits(self, kernel: str) -> tuple[int, int, int]:
        """Build a kernel; return its threads per threadgroup at most, its simdgroup width, its threadgroup bytes.

        Raises DeviceError if the device cannot build it.
        """
    def run(self, dispatches: Sequence[BoundDispatch]) -> float:
        """Run the dispatches once and wait; return seconds on the device's clock."""
    def time_each(self, dispatches: Sequence[BoundDispatch]) -> list[float]:
        """Run each dispatch alone and once, in order; return the seconds of each on the device's clock."""
    def prepare(self, kernels: Sequence[str]) -> None:
        """Build these kernels together if that is faster. A kernel that fails raises when it is used."""
    def start_capture(self, path: str) -> None:
        """Capture the following work in a trace for the device's own tools, until :meth:`stop_capture`.

        Raises UsageError if the device has no tools, DeviceError if this process may not use them.
        """
    def stop_capture(self) -> None:
        """End the trace. Raises UsageError if the device has no tools."""

class Plan:
    """Compiled plan: dispatches that are replayed as one command buffer."""

    def __init__(
        self, device: Device, dispatches: Sequence[BoundDispatch], max_tokens: int, has_argmax: bool = False
    ) -> None:
        """Compile a plan for up to ``max_tokens`` rows. Raises DeviceError, UsageError.

        ``has_argmax``: the last dispatch writes the arg max into the step buffer, so that a step can run ahead.
        """
    @property
    def max_tokens(self) -> int: ...
    @property
    def n_dispatches(self) -> int: ...
    @property
    def n_barriers(self) -> int: ...

class Steps:
    """Runs the steps of one sequence: its length, the step buffer, the steps in flight, and counters."""

    def __init__(self, step: Buffer, tokens: Buffer, n_ctx: int, n_vocab: int) -> None: ...
    @property
    def length(self) -> int: ...
    @property
    def n_ctx(self) -> int: ...
    @property
    def counters(self) -> dict[str, float]:
        """Counts so far: steps, tokens, command_buffers, dispatches, barriers, max_in_flight, gpu_seconds."""
    def settle(self) -> list[int]:
        """Wait for the step in flight, if there is one; return the ids that it appended to the sequence."""
    def rewind(self, length: int) -> None:
        """Shorten the sequence to ``length`` tokens. Raises UsageError if it has fewer."""
    def resume(self, length: int) -> None:
        """Give an empty sequence a length, for state that is already in place. Raises UsageError."""
    def close(self) -> None:
        """End the sequence: every later step raises UsageError."""

def shapes() -> dict[str, int]:
    """Return the launch shapes and limits of kernels/shapes.h by name."""

def size_classes() -> dict[str, tuple[int, ...]]:
    """Return the sizes that kernels are compiled for, ascending: HEAD_CLASSES, SSM_CLASSES, EXPERT_CLASSES.

    A kernel of a class serves all sizes up to it.
    """

def tensor_types() -> tuple[str, ...]:
    """Return the tensor types that kernels take, by the names in quants.py."""

def expert_types() -> tuple[str, ...]:
    """Return the tensor types that kernels of experts take."""

def params_dtype(name: str) -> np.dtype[np.void]:
    """Return the layout of a parameter struct of kernels/params.h. Raises UsageError for an unknown name."""

def decode_step(steps: Steps, plan: Plan, token: int, ahead: bool = False) -> int:
    """Append one token; return the arg max of its logits. Raises UsageError, ContextFullError, DeviceError.

    ``ahead``: submit the next step too, fed by this step's arg max, before this step ends. It is in flight when the
    call returns. The next call takes it over if it is for that token. ``steps.settle()`` ends it.
    """

def prefill_step(steps: Steps, plan: Plan, ids: NDArray[np.int32]) -> int:
    """Append int32 ids [n], n <= plan.max_tokens; return the arg max after the last. Raises as decode_step."""
