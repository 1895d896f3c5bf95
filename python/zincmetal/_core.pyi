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
        """Copy contiguous data in. Raises UsageError for bytes outside, and if the buffer is read-only.

        No step in flight may use these bytes. Other bytes of the buffer may be in use.
        """
    def copy_from(self, source: Buffer, from_offset: int = 0, offset: int = 0, nbytes: int | None = None) -> None:
        """Copy ``nbytes`` bytes of ``source`` to ``offset``, by default all from ``from_offset`` on.

        The device copies after all work submitted before, and before all work submitted later. The call may return
        before. Raises UsageError for bytes outside, for numbers that are no multiples of 4, for ranges of one buffer
        that overlap, and for buffers of two devices.
        """
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
    def alloc(self, nbytes: int, shared: bool = False) -> Buffer:
        """Allocate a buffer. Raises OutOfMemoryError.

        ``shared``: the host sees the memory too. It always does where host and device have one memory.
        """
    def copy(self, copies: Sequence[tuple[Buffer, int, Buffer, int, int]]) -> None:
        """Copy (to, offset, source, from_offset, nbytes) each, as :meth:`Buffer.copy_from`, all at once.

        The copies have no order: none may read or write what another writes.
        """
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

    def __init__(self, device: Device, dispatches: Sequence[BoundDispatch], max_tokens: int, n_out: int = 0) -> None:
        """Compile a plan for up to ``max_tokens`` rows and ``n_out`` outputs. Raises DeviceError, UsageError."""
    @property
    def max_tokens(self) -> int: ...
    @property
    def n_out(self) -> int: ...
    @property
    def n_dispatches(self) -> int: ...
    @property
    def n_barriers(self) -> int: ...

class Steps:
    """Submits steps, of which two may be in flight, and collects their results in order. It knows no sequence."""

    def __init__(
        self,
        device: Device,
        step: Buffer,
        next_step: Buffer,
        next_rows: Buffer,
        next_outs: Buffer,
        next_pages: Buffer,
        next_draws: Buffer,
        results: Buffer,
        n_vocab: int,
        n_page_entries: int,
    ) -> None:
        """Take the buffers that steps are described in and answered by.

        All but ``step`` are shared, and have places for ``STEP_RING`` steps. Their sizes say how many rows, outputs
        and page writes a step may have. ``n_page_entries`` is the length of the buffer ``pages``. Raises UsageError.
        """
    @property
    def in_flight(self) -> int:
        """Steps that were submitted and not collected: 0, 1 or 2."""
    @property
    def counters(self) -> dict[str, float]:
        """Counts so far: steps, tokens, command_buffers, dispatches, barriers, max_in_flight, gpu_seconds.

        They count the steps that were collected. ``tokens`` counts their rows.
        """
    def drop(self) -> None:
        """Wait for everything in flight and forget it, with what was described. Failures are ignored.

        The rest of its work may be skipped. The next step can take no token from the steps that were dropped.
        """
    def close(self) -> None:
        """Refuse every later step with UsageError. What is in flight can still be collected or dropped."""

def shapes() -> dict[str, int]:
    """Return the launch shapes and limits of kernels/shapes.h by name."""

def size_classes() -> dict[str, tuple[int, ...]]:
    """Return the sizes that kernels are compiled for, ascending.

    The keys are HEAD_CLASSES, LATENT_CLASSES and SSM_CLASSES.
    A kernel of a class serves all sizes up to it.
    """

def tensor_types() -> tuple[str, ...]:
    """Return the tensor types that kernels take, by the names in quants.py."""

def expert_types() -> tuple[str, ...]:
    """Return the tensor types that kernels of experts take."""

def params_dtype(name: str) -> np.dtype[np.void]:
    """Return the layout of a parameter struct of kernels/params.h. Raises UsageError for an unknown name."""

def decode_step(
    steps: Steps,
    plan: Plan,
    rows: NDArray[np.void],
    outs: NDArray[np.uint32],
    page_writes: NDArray[np.void],
    draws: NDArray[np.void] | None = None,
    n_single: int = 0,
) -> int:
    """Submit a step and return its number. It does not wait: :func:`collect_step` has the results.

    ``rows`` is Row [n], ``outs`` u32 [m], ``page_writes`` PageWrite [w], ``draws`` Draw [m] (:func:`params_dtype`);
    None means zeros: greedy. The first ``n_single`` rows are runs of one row. A row may take a token from an output of
    the step that was submitted last. Raises UsageError, also if two steps are in flight, and DeviceError. Then the step
    is not in flight.
    """

def collect_step(steps: Steps) -> NDArray[np.void]:
    """Wait for the oldest step in flight; return a Choice for each of its outputs.

    If the step failed, this raises, and nothing is in flight any more. If Ctrl-C ends the wait, the step stays in
    flight: collect it again, or drop it. Raises UsageError if nothing is in flight, DeviceError.
    """

def describe(
    steps: Steps,
    rows: NDArray[np.void],
    outs: NDArray[np.uint32],
    page_writes: NDArray[np.void],
    draws: NDArray[np.void] | None = None,
    n_single: int = 0,
) -> None:
    """Describe the next step as :func:`decode_step`, and submit nothing.

    The caller then runs the step's sections itself. The kernel begin_step comes first. The last section is submitted by
    :func:`submit_described`. Raises UsageError.
    """

def submit_described(steps: Steps, plan: Plan) -> int:
    """Submit the last section of the step that was described; return the step's number. Raises as decode_step."""
