"""Types of a compiled core: its functions, the facts of a device, and a dispatch bound to memory.

``_core.pyi`` describes the classes; a core is an extension module that :func:`backend.load` returns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeAlias, TypedDict

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .. import _core
    from ..plan.launch import Launch

Binding: TypeAlias = "tuple[_core.Buffer, int, int]"
"""The buffer, the byte offset, and the bytes that the kernel may touch."""


class BoundDispatch(NamedTuple):
    """Dispatch on device memory: one launch of a kernel, as a compiled core takes it."""

    kernel: str
    params: bytes
    bindings: Sequence[Binding]
    grid: tuple[int, int, int]  # threadgroups
    threads: int  # of a threadgroup
    barrier: bool  # before it

    @classmethod
    def of(cls, launch: Launch, bindings: Sequence[Binding], barrier: bool = False) -> BoundDispatch:
        """Bind a launch: ``bindings`` are its arguments' memory, in their order."""
        return cls(launch.kernel, launch.params, bindings, launch.grid, launch.threads, barrier)


class DeviceInfo(TypedDict):
    """Facts of a device. All sizes are in bytes."""

    name: str
    backend: str  # "metal", "cuda" or "cpu"
    unified_memory: bool  # the device works on the host's memory
    working_set_bytes: int  # that the device grants
    allocated_bytes: int  # of them that this process has allocated
    max_buffer_bytes: int
    max_threadgroup_bytes: int
    page_bytes: int  # wrapped memory begins at a multiple
    asynchronous: bool  # a step can run while the host works
    features: dict[str, str]  # facts that only one backend has, in words


class Core(Protocol):
    """Module that every backend compiles to: ``zincmetal._core_metal``, ``_core_cuda`` or ``_core_cpu``."""

    @property
    def __file__(self) -> str | None:
        """Path of the extension module; the kernels lie beside it."""

    @property
    def Buffer(self) -> type[_core.Buffer]:
        """Class of device memory."""

    @property
    def Device(self) -> type[_core.Device]:
        """Class of an opened device."""

    @property
    def Plan(self) -> type[_core.Plan]:
        """Class of a compiled plan."""

    @property
    def Steps(self) -> type[_core.Steps]:
        """Class that submits steps and collects their results."""

    def shapes(self) -> dict[str, int]:
        """Return the launch shapes and limits of kernels/shapes.h, by name."""

    def size_classes(self) -> dict[str, tuple[int, ...]]:
        """Return the sizes that kernels are compiled for, ascending, by the name of the list."""

    def tensor_types(self) -> tuple[str, ...]:
        """Return the tensor types that kernels take."""

    def expert_types(self) -> tuple[str, ...]:
        """Return the tensor types that kernels of experts take."""

    def params_dtype(self, name: str) -> np.dtype[np.void]:
        """Return the layout of a parameter struct of kernels/params.h."""

    def decode_step(
        self,
        steps: _core.Steps,
        plan: _core.Plan,
        rows: NDArray[np.void],
        outs: NDArray[np.uint32],
        page_writes: NDArray[np.void],
        draws: NDArray[np.void] | None = None,
        n_single: int = 0,
    ) -> int:
        """Submit a step; return its number."""

    def collect_step(self, steps: _core.Steps) -> NDArray[np.void]:
        """Wait for the oldest step in flight; return a Choice for each output."""

    def describe(
        self,
        steps: _core.Steps,
        rows: NDArray[np.void],
        outs: NDArray[np.uint32],
        page_writes: NDArray[np.void],
        draws: NDArray[np.void] | None = None,
        n_single: int = 0,
    ) -> None:
        """Describe the next step, and submit nothing."""

    def submit_described(self, steps: _core.Steps, plan: _core.Plan) -> int:
        """Submit the last section of the step that was described; return the step's number."""


if TYPE_CHECKING:
    _the_stub_is_a_core: Core = _core
