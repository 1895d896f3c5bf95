"""The interface of every compiled core: _core_metal, _core_cpu, _core_cuda. Load one with zincmetal.backend."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ._host import Map

Binding: TypeAlias = tuple[Buffer, int, int]
"""(buffer, byte offset, bytes that the kernel may touch)."""

Dispatch: TypeAlias = tuple[str, bytes, Sequence[Binding], tuple[int, int, int], int, bool]
"""(kernel, params, bindings, grid in threadgroups, threads per threadgroup, barrier before it)."""

class Buffer:
    """Device memory; a writable Python buffer of bytes when it is shared with the host."""

    @property
    def nbytes(self) -> int: ...
    @property
    def shared(self) -> bool:
        """Whether the host sees the memory itself, and not only copies."""
    def read(self, offset: int = 0, nbytes: int | None = None) -> NDArray[np.uint8]:
        """A copy of ``nbytes`` bytes (default: all the rest). Raises UsageError."""
    def write(self, data: NDArray[Any] | bytes, offset: int = 0) -> None:
        """Copy contiguous data in. Raises UsageError."""
    def __buffer__(self, flags: int, /) -> memoryview: ...

class Device:
    def __init__(self, *, threads: int = 0, native: bool = True, kernel_folder: str = "") -> None: ...
    @property
    def info(self) -> dict[str, Any]: ...
    def alloc(self, nbytes: int) -> Buffer: ...
    def wrap(self, owner: NDArray[np.uint8] | Map, offset: int, nbytes: int) -> Buffer:
        """Device memory over the owner's own, from a page boundary on: nothing is copied.

        Of a map that is damaged (see Map), by this or any later step that reads it: raises DeviceError.
        """
    def kernel_names(self) -> list[str]: ...
    def limits(self, kernel: str) -> tuple[int, int, int]:
        """(max threads per threadgroup, simdgroup width, static threadgroup bytes)."""
    def run(self, dispatches: Sequence[Dispatch]) -> float:
        """Record, run and wait, once; seconds on the device's clock."""
    def time_each(self, dispatches: Sequence[Dispatch]) -> list[float]:
        """Run each alone after the one before has ended, once; the seconds of each on the device's clock."""
    def prepare(self, kernels: Sequence[str]) -> None:
        """Make these kernels at once, where that is faster. What fails is told when one of them is used."""
    def start_capture(self, path: str) -> None:
        """Write what runs until :meth:`stop_capture` to a trace for the device's own tools. Raises UsageError where
        the device has none, and DeviceError where this process may not.
        """
    def stop_capture(self) -> None: ...

class Plan:
    """Dispatches made ready to be replayed as one command buffer."""

    def __init__(
        self, device: Device, dispatches: Sequence[Dispatch], max_tokens: int, has_argmax: bool = False
    ) -> None:
        """``has_argmax``: the last dispatch writes the arg max into the step buffer, so that a step can run ahead."""
    @property
    def max_tokens(self) -> int: ...
    @property
    def n_dispatches(self) -> int: ...
    @property
    def n_barriers(self) -> int: ...

class Steps:
    """Runs the steps of one sequence: its length, the step buffer, what is in flight, and counters."""

    def __init__(self, step: Buffer, tokens: Buffer, n_ctx: int, n_vocab: int) -> None: ...
    @property
    def length(self) -> int: ...
    @property
    def n_ctx(self) -> int: ...
    @property
    def counters(self) -> dict[str, float]: ...
    def settle(self) -> list[int]:
        """Wait for the step in flight, if there is one; the ids, now part of the sequence, of its tokens."""
    def rewind(self, length: int) -> None: ...
    def resume(self, length: int) -> None:
        """Make an empty sequence one of ``length`` tokens, whose state is in place. Raises UsageError."""
    def close(self) -> None: ...

def shapes() -> dict[str, int]:
    """The launch shapes and limits of kernels/shapes.h by name."""

def size_classes() -> dict[str, tuple[int, ...]]:
    """The sizes that kernels are compiled for, ascending: HEAD_CLASSES, SSM_CLASSES, EXPERT_CLASSES.

    A kernel of a class serves all sizes up to it.
    """

def tensor_types() -> tuple[str, ...]:
    """The tensor types that kernels take, by the names in quants.py."""

def expert_types() -> tuple[str, ...]:
    """The tensor types that kernels of experts take."""

def params_dtype(name: str) -> np.dtype[np.void]: ...
def decode_step(steps: Steps, plan: Plan, token: int, ahead: bool = False) -> int:
    """Append one token; the arg max of its logits. Raises UsageError, ContextFullError, DeviceError.

    With ``ahead`` the step of that arg max is submitted before this one is waited for, and is in flight when the
    call returns: the next call takes it over, if it is for that token, or ``steps.settle()`` ends it.
    """

def prefill_step(steps: Steps, plan: Plan, ids: NDArray[np.int32]) -> int:
    """Append int32 ids [n], n <= plan.max_tokens; the arg max after the last. Raises as decode_step."""
